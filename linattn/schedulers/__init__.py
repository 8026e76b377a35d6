"""Schedulers for diffusers pipelines. Needs the extra: pip install "linattn[diffusers]".

`PeRFlowScheduler` (docs/perflow.md) samples from few-step students; `piecewise` is the mathematics of piecewise
rectified flow that it shares with the training. `few_step_arguments` is how a pipeline draws with a student of Flash
Diffusion (docs/flash.md). `EDMScheduler` samples from EDM models such as Inf-DiT
(docs/infdit.md); `edm` is its mathematics. `piecewise` and `edm` need torch only.
"""

_EXPORTS = {
    "EDMScheduler": "edm_scheduler",
    "EDMSchedulerOutput": "edm_scheduler",
    "PeRFlowScheduler": "perflow",
    "PeRFlowSchedulerOutput": "perflow",
    "few_step_arguments": "few_steps",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
