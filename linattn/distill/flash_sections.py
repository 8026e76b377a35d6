"""The sections of a recipe that are about Flash Diffusion (`objective.kind: flash`). Settings only: the work is in
objectives/flash.py, and docs/flash.md has the formulas.

A setting of a phase is one value for all phases, or a list with one for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from .schema import Count, NotNegative, Positive, Probability, Section, Texts, as_tuple, import_path, number


def _tuples(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(part) for part in value)
    return number(value)


def _per_phase(is_one: Callable[[object], bool], what: str) -> PlainValidator:
    def validate(value: object) -> object:
        value = _tuples(value)
        if is_one(value) or (isinstance(value, tuple) and value and all(is_one(part) for part in value)):
            return value
        raise PydanticCustomError("per_phase", f"expected {what}, or a list of these, one for each phase")

    return PlainValidator(validate)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_range(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)) and 1 <= value[0] <= value[1]


def _is_weights(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(_is_number(part) and part >= 0 for part in value)
        and sum(value) > 0
    )


Counts = Annotated[Any, _per_phase(_is_count, "a whole number from 1 on")]
Factors = Annotated[Any, _per_phase(lambda value: _is_number(value) and value >= 0, "a number from 0 on")]
Ranges = Annotated[Any, _per_phase(_is_range, "[lowest, highest], 1 <= lowest <= highest")]
Weights = Annotated[Any, _per_phase(_is_weights, "a list of numbers from 0 on, not all 0")]
Variances = Annotated[Any, _per_phase(lambda value: _is_number(value) and value > 0, "a number above 0")]
Distributions = Annotated[
    Any, _per_phase(lambda value: value in ("uniform", "gaussian", "mixture"), "uniform, gaussian or mixture")
]


class Phases(Section):
    """What holds for how many optimizer steps; the last phase goes on."""

    steps: Counts = 5000
    grid_steps: Counts = 32  # K of the teacher's sampler
    guidance: Ranges = (3.0, 13.0)  # of the teacher, drawn once a batch; [1, 1]: it is not guided
    distribution: Distributions = "mixture"  # of the place on the grid where training starts
    weights: Weights = (0.25, 0.25, 0.25, 0.25)  # of the mixture's modes, the noisiest first
    variance: Variances = 0.5  # of a mode, times 2
    distillation: Factors = 1.0
    dmd: Factors = 0.0
    adversarial: Factors = 0.0

    def conflicts(self):
        from .objectives.flash import Phases as Checked

        try:
            Checked.of(**self.model_dump())
        except ValueError as error:
            yield "", f"{error}"


class Adversary(Section):
    """The discriminator: heads on what the frozen teacher makes of noised samples."""

    loss: Literal["hinge", "lsgan", "non-saturating", "vanilla", "wgan"] = "lsgan"
    features: Texts | None = None  # modules of the teacher; []: its prediction; None: as the model's kind has it
    real: Literal["data", "teacher"] = "data"  # teacher: where its path ends
    noise_levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)] = (10, 250, 500, 750)
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 64  # channels of a head's first layer
    levels: Annotated[int, Field(ge=0)] = 2  # of a head, that reduce a picture's sides by 2
    learning_rate: Positive = 1e-5

    def conflicts(self):
        if not self.noise_levels:
            yield "noise_levels", "expected at least one noise level, got []"


class FakeScore(Section):
    """A copy of the teacher that learns to denoise what the student draws (DMD2); LoRA where the student is one."""

    learning_rate: Positive = 1e-5


def _policy(value: object) -> object:
    if value in ("zero", "keep", "empty") or _is_prompt(value):
        return value
    raise PydanticCustomError("policy", "expected zero, keep, empty or {prompt: text}")


def _is_prompt(value: object) -> bool:
    return isinstance(value, dict) and list(value) == ["prompt"] and isinstance(value["prompt"], str)


class FlashObjective(Section):
    """The student learns to say in one step where the guided teacher's path ends (Flash Diffusion)."""

    kind: Literal["flash"] = "flash"
    phases: Phases = Field(default_factory=Phases)
    # What the student predicts; None: as the teacher. epsilon, v_prediction, sample: of diffusion.
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    order: Annotated[int, Field(ge=1, le=2)] = 2  # of the teacher's solver: 1 DDIM or Euler, 2 DPM-Solver++
    teacher: Literal["model", "student"] = "model"  # student: the student as it starts, with its adapter
    guidance: NotNegative = 3.5  # that both are told, if the model was distilled to be told one (FLUX.1-dev)
    shift: Positive | None = None  # of flow matching's noise levels; None: as the scheduler says
    per_sample: bool = False  # a start and a guidance for each sample, not for each batch
    distance: Literal["l2", "l1", "huber", "perceptual"] = "l2"
    huber_c: Positive = 1e-3
    # distance: perceptual: module:function of two batches of pictures in -1..1, of which 8 * crop pixels are compared.
    perceptual: Annotated[str, AfterValidator(import_path)] | None = None
    crop: Count | None = 64  # rows and columns of latents that are decoded; None: all
    drop: dict[str, Probability] = Field(default_factory=dict)  # entry of the condition -> chance to hide it
    # Entry of the condition -> what takes its place where there is none: zero, keep, empty (of the empty caption), or
    # {prompt: text}. Entries that are not named: as the pipeline guides.
    unconditional: dict[str, Annotated[Any, PlainValidator(_policy)]] = Field(default_factory=dict)
    discriminator: Adversary | None = None  # needed where a phase has an adversarial term
    fake_score: FakeScore | None = None  # None: the student is its own (Flash)

    def conflicts(self):
        factors = self.phases.adversarial
        used = any(factors) if isinstance(factors, tuple) else bool(factors)
        if used and self.discriminator is None:
            yield "discriminator", "expected a section ({}: all as by default) beside phases.adversarial, got null"
        if (self.distance == "perceptual") != (self.perceptual is not None):
            needed = "module:function" if self.distance == "perceptual" else "null"
            got = "null" if self.perceptual is None else repr(self.perceptual)
            yield "perceptual", f"expected {needed} beside objective.distance: {self.distance}, got {got}"
