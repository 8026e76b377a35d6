"""What all kinds of pipelines have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """nn.Module.to: diffusers' own warns about modules that are kept in float32 even where there are none."""
    nn.Module.to(model, device=device, dtype=dtype)


class Kind:
    """What all kinds have: a pipeline whose parts are frozen and in evaluation mode, and one of them that denoises."""

    #: Name of the component that denoises.
    component: str
    #: The kinds of objective that fit: `objective.kind` of a recipe.
    objectives: tuple[str, ...]
    #: Sides of a picture are multiples of so many pixels.
    multiple: int
    #: Tokens of the longest text encoder, where that can be chosen; None: fixed by the model, or there is none.
    text_length: int | None = None
    #: Whether it can.
    chooses_text_length: bool = False
    #: Components that training has no use for, and that are not loaded.
    unused: tuple[str, ...] = ()
    #: Whether part of the condition is made of the picture (`picture_condition`), so that its latents are not enough.
    needs_pixels: bool = False

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.components[name] for name in pipeline.components):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The denoising network of the pipeline."""
        return getattr(self.pipeline, self.component)

    @contextlib.contextmanager
    def _with(self, model: nn.Module, scheduler=None) -> Iterator[None]:
        """The pipeline with `model` in the place of its own, and with a scheduler, if one is given."""
        new = {self.component: model} if scheduler is None else {self.component: model, "scheduler": scheduler}
        own = {name: getattr(self.pipeline, name) for name in new}
        self.pipeline.register_modules(**new)
        try:
            yield
        finally:
            self.pipeline.register_modules(**own)

    def save(self, folder: Path, model: nn.Module, scheduler=None) -> None:
        """Write the pipeline, with `model` and the scheduler in the place of its own, as its class loads it."""
        with self._with(model, scheduler):
            self.pipeline.save_pretrained(folder)
