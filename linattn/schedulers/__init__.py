"""Schedulers for diffusers pipelines. Needs the extra: pip install "linattn[diffusers]".

`PeRFlowScheduler` (docs/perflow.md) samples from few-step students; `piecewise` is the mathematics of piecewise
rectified flow that it shares with the training, and needs torch only.
"""

_EXPORTS = {"PeRFlowScheduler": "perflow", "PeRFlowSchedulerOutput": "perflow"}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
