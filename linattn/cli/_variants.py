"""The ways in which one pipeline draws canvases: with its own attention, with controls, and with students.

Each is a function of the pipeline that gives a context, as `linattn.evaluate.evaluate_canvases` wants them:

    teacher   the model as it is
    zeroed    UNets: every self-attention gives zeros, what is possible without any
    alone     transformers: a window of one token, so that image tokens see themselves and the text but no other
    before    the student's attention with the model's own weights, not distilled
    after     the student
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from linattn._quiet import quiet_diffusers

if TYPE_CHECKING:
    from linattn.evaluate import Variant

TITLES = {
    "teacher": "teacher: stock attention",
    "zeroed": "zeroed: no attention",
    "alone": "alone: no attention between image tokens",
    "before": "before distillation",
    "after": "after distillation",
}
OF_UNETS = ("teacher", "zeroed", "before", "after")
OF_TRANSFORMERS = ("teacher", "alone", "before", "after")


def variants(student=None, names: Iterable[str] | None = None, *, is_unet: bool | None = None) -> dict[str, Variant]:
    """Variants by name, in the order above.

    Args:
        student: folder of LinFusion or CLEAR weights. Without it there is no "after", and of a transformer no "before":
            nothing says how large its window is.
        names: those that are wanted, in the order of the tables; None: all that there are.
        is_unet: whether the model has a UNet; the student says it where there is one.

    Raises:
        KeyError: a name that does not exist for this student.
    """
    from linattn.evaluate import zeroed_attention

    kind = None if student is None else json.loads((Path(student) / "config.json").read_text())
    if kind is not None:
        is_unet = kind.get("_class_name") != "CLEAR"
    known: dict[str, Variant] = {"teacher": lambda pipe: contextlib.nullcontext()}
    if is_unet is None or is_unet:
        known |= {"zeroed": zeroed_attention, "before": linfusion_mounted}
        if student is not None:
            known["after"] = functools.partial(linfusion_mounted, weights=student)
    else:
        known["alone"] = functools.partial(clear_mounted, window_size=1)
        if student is not None:
            pattern = {key: kind[key] for key in ("window_size", "down_factor")}
            known["before"] = functools.partial(clear_mounted, **pattern)
            known["after"] = functools.partial(clear_mounted, weights=student)
    return {name: known[name] for name in (known if names is None else names)}


@contextlib.contextmanager
def linfusion_mounted(pipe, weights=None) -> Iterator:
    """LinFusion on a pipeline while the context lasts: its weights from a folder, or with None those of the model."""
    from linattn.adapters import LinFusion

    with quiet_diffusers():
        if weights is None:
            linfusion = LinFusion.construct_for(pipe, load_pretrained=False)
        else:
            linfusion = LinFusion.construct_for(pipe, pretrained_model_name_or_path=str(weights))
    try:
        yield linfusion
    finally:
        linfusion.unmount()


@contextlib.contextmanager
def clear_mounted(pipe, weights=None, **pattern) -> Iterator:
    """CLEAR on a pipeline while the context lasts.

    Args:
        weights: a folder; None: those of the model.
        pattern: window_size, down_factor; where there is a folder, it says them.
    """
    from linattn.adapters import CLEAR

    with quiet_diffusers():
        if weights is None:
            clear = CLEAR.construct_for(pipe, load_pretrained=False, **pattern)
        else:
            clear = CLEAR.construct_for(pipe, pretrained_model_name_or_path=str(weights), **pattern)
    try:
        yield clear
    finally:
        clear.unmount()
