"""The sections of a recipe that say how pairs of pictures for upscaling are made, and how a model that enlarges them
learns to do it in few steps. Settings only: the work is in data/ and objectives/edm.py.

A degradation is named (`data.upscaling.degradation: mild`), or described by those keys in which it differs from
`strong` (`degradation: {final_sinc: 0.5, second: {jpeg: [30, 95]}}`).
"""

from __future__ import annotations

import copy
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from .schema import Count, NotNegative, Number, Positive, Probability, Section, as_tuple

SHARES_ADD_UP = 1e-6


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] <= value[1]:
        raise PydanticCustomError("range", "expected two numbers, 0 <= first <= second")
    return value


def _odd(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1] or value[0] % 2 == 0 or value[1] % 2 == 0:
        raise PydanticCustomError("odd", "expected two odd numbers, 1 <= first <= second")
    return value


def _quality(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1] <= 100:
        raise PydanticCustomError("quality", "expected two whole numbers, 1 <= first <= second <= 100")
    return value


Range = Annotated[tuple[Number, Number], BeforeValidator(as_tuple), AfterValidator(_range)]
Odd = Annotated[tuple[int, int], BeforeValidator(as_tuple), AfterValidator(_odd)]
Quality = Annotated[tuple[int, int], BeforeValidator(as_tuple), AfterValidator(_quality)]


class _Shares(Section):
    """Probabilities of things of which exactly one happens."""

    def conflicts(self):
        shares = {name: getattr(self, name) for name in self.shared()}
        if abs(sum(shares.values()) - 1) > SHARES_ADD_UP:
            yield "", f"expected {', '.join(shares)} to add up to 1, got {', '.join(map(str, shares.values()))}"

    @classmethod
    def shared(cls) -> list[str]:
        return [name for name, field in cls.model_fields.items() if field.annotation is float]


class Shapes(_Shares):
    """How often a blur that is no sinc has which shape: one width in all directions, or two and an angle."""

    gaussian: Probability = 0.45
    gaussian_oblong: Probability = 0.25
    generalized: Probability = 0.12
    generalized_oblong: Probability = 0.03
    plateau: Probability = 0.12
    plateau_oblong: Probability = 0.03


class Blur(Section):
    probability: Probability = 1.0
    sizes: Odd = (7, 21)  # of the kernel: every odd number from the first to the second, equally often
    sinc: Probability = 0.1  # an ideal low-pass instead of a shape: ringing
    shapes: Shapes = Field(default_factory=Shapes)
    sigma: Range = (0.2, 3.0)
    generalized_beta: Range = (0.5, 4.0)  # half of the draws below 1 (or at the nearer end), half above
    plateau_beta: Range = (1.0, 2.0)


class Resize(_Shares):
    enlarge: Probability = 0.2
    reduce: Probability = 0.7
    unchanged: Probability = 0.1
    scale: Range = (0.3, 1.5)  # enlarged by 1 to the second, reduced by the first to 1

    def conflicts(self):
        yield from super().conflicts()
        if not 0 < self.scale[0] <= 1 <= self.scale[1]:
            yield "scale", f"expected 0 < first <= 1 <= second, got {list(self.scale)}"


class Noise(Section):
    gaussian: Probability = 0.5  # else Poisson
    sigma: Range = (1.0, 15.0)  # of the Gaussian noise, in 255ths
    poisson_scale: Range = (0.05, 2.0)
    grey: Probability = 0.4  # the same in all channels


class Stage(Section):
    """Blur, resize, noise, JPEG."""

    blur: Blur = Field(default_factory=Blur)
    resize: Resize = Field(default_factory=Resize)
    noise: Noise = Field(default_factory=Noise)
    jpeg: Quality = (60, 95)


def _second() -> Stage:
    return Stage(
        blur=Blur(probability=0.5, sigma=(0.2, 1.5)),
        resize=Resize(enlarge=0.3, reduce=0.4, unchanged=0.3, scale=(0.6, 1.2)),
        noise=Noise(sigma=(1.0, 12.0), poisson_scale=(0.05, 1.0)),
        jpeg=(60, 100),
    )


class Degradation(Section):
    """How a low resolution picture is made from one of four times its sides; see `linattn.distill.data.degradation`."""

    method: Literal["two_stages", "bicubic"] = "two_stages"  # bicubic: reduced cleanly, nothing below matters
    first: Stage = Field(default_factory=Stage)
    second: Stage = Field(default_factory=_second)
    final_sinc: Probability = 0.8


#: What differs from the defaults above, which are `strong`. `strong` and `mild` are the two of Inf-DiT's authors.
DEGRADATIONS: dict[str, dict] = {
    "strong": {},
    "mild": {
        "first": {"blur": {"sigma": [0.2, 1.5], "generalized_beta": [0.5, 2.0], "plateau_beta": [1.0, 1.5]}},
        "second": {
            "blur": {
                "sizes": [7, 11],
                "sigma": [0.2, 1.0],
                "generalized_beta": [0.5, 2.0],
                "plateau_beta": [1.0, 1.5],
            }
        },
    },
    "bicubic": {"method": "bicubic"},
}


def _described(value: object) -> object:
    """A name, or the keys that differ from `strong`, as all keys."""
    if isinstance(value, str):
        if value not in DEGRADATIONS:
            raise PydanticCustomError("degradation", f"expected {', '.join(DEGRADATIONS)}, or keys that differ")
        value = DEGRADATIONS[value]
    return _merged(Degradation().model_dump(), value) if isinstance(value, dict) else value


def _merged(base: dict, changes: dict) -> dict:
    merged = copy.copy(base)
    for key, value in changes.items():
        inner = base.get(key)
        if isinstance(inner, dict) and value is None:
            continue  # a section whose keys are all commented out
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class Upscaling(Section):
    """Pairs for upscaling (`objective.kind: edm`, `edm_steps`): what is cut out of a picture, what is made of that."""

    degradation: Annotated[Degradation, BeforeValidator(_described)] = Field(default_factory=Degradation)
    full_resolution: Probability = 0.7  # cut out of the picture as it is; else its shorter side is reduced to the crop
    flip: Probability = 0.3  # of those at full resolution, mirrored left to right


class EDMStepsObjective(Section):
    """The student learns to say in one step where its teacher's path ends, from the levels of few steps (Inf-DiT)."""

    kind: Literal["edm_steps"] = "edm_steps"
    grid_steps: Count = 20  # K, of the teacher's sampler
    order: Annotated[int, Field(ge=1, le=2)] = 2  # of its steps: 1 Euler, 2 DPM-Solver++; one call each
    # How often training starts near each of the levels that the student will be sampled at, the noisiest first: as many
    # numbers as it is to need steps.
    weights: Annotated[tuple[NotNegative, ...], BeforeValidator(as_tuple)] = (0.25, 0.25, 0.25, 0.25)
    variance: Positive = 0.5  # how near: twice the variance of the distance, in steps of the teacher
    start: Literal["lr", "noise"] = "lr"  # of the noisiest level: noise around the enlarged picture, or noise alone
    per_sample: bool = False  # a level for each sample, not for each batch: the teacher walks as far as the noisiest
    distance: Literal["l2", "l1", "huber"] = "l2"
    huber_c: Positive = 1e-3
    max_offset: Annotated[int, Field(ge=0)] = 896  # rows and columns of tokens that positions start at: 0 to this

    def conflicts(self):
        if not 1 <= len(self.weights) <= self.grid_steps:
            count = len(self.weights)
            yield "weights", f"expected from 1 to objective.grid_steps ({self.grid_steps}) numbers, got {count}"
        elif not sum(self.weights):
            yield "weights", f"expected at least one above 0, got {list(self.weights)}"


def named(name: str) -> Degradation:
    """One of `DEGRADATIONS`."""
    return Degradation.model_validate(_described(name))
