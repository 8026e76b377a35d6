"""Adapters put the ops into diffusers models; each module serves one model family and holds no attention math.

They need diffusers, which linattn itself does not: `pip install "linattn[diffusers]"`. It is imported on first use.
"""

import importlib

_HOME = {
    "CLEAR": "clear",
    "InfDiTTransformer2DModel": "infdit",
    "InfDiTUpscalePipeline": "infdit",
    "LinFusion": "linfusion",
    "LinearAttention": "linfusion",
    "LinearAttnProcessor": "linfusion",
    "convert_infdit_checkpoint": "infdit",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f'{__name__}.{name} needs diffusers: pip install "linattn[diffusers]"') from error
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
