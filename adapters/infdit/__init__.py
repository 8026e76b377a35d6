"""Inf-DiT: the network, its schedules for bounded memory, the pipeline and the converter of the authors' weights."""

import importlib

_HOME = {
    "InfDiTTransformer2DModel": "model",
    "InfDiTUpscalePipeline": "pipeline",
    "convert_infdit_checkpoint": "convert",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
