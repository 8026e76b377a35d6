"""What the sections of a recipe are made of: types of values that explain themselves, and the base of every section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def number(value: object) -> object:
    """Text that is a number in YAML 1.2, but not in 1.1: `1e-4`."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def as_tuple(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise PydanticCustomError("list", "expected a list")


def as_paths(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, str) and part for part in value):
        return tuple(value)
    raise PydanticCustomError("path", "expected a path, or a list of paths")


def _multiple_of_8(value: int) -> int:
    if value % 8:
        raise PydanticCustomError("multiple", "expected a multiple of 8 (the image encoder reduces by 8)")
    return value


def import_path(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
        raise PydanticCustomError("import_path", "expected 'module:Class', as in 'linattn.adapters:LinFusion'")
    return value


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
Number = Annotated[float, BeforeValidator(number)]
NotNegative = Annotated[float, BeforeValidator(number), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0)]
Probability = Annotated[float, BeforeValidator(number), Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Field(ge=8), AfterValidator(_multiple_of_8)]


class Section(BaseModel):
    """Base of every section: no unknown keys, no silent conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return {} if value is None else value  # a section whose keys are all commented out

    @model_validator(mode="after")
    def _consistent(self):
        if conflicts := list(self.conflicts()):
            raise PydanticCustomError("conflicts", "keys disagree", {"conflicts": conflicts})
        return self

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key inside this section, what is wrong) for values that are right each, and wrong together."""
        return iter(())
