"""The section of a recipe that says which samples of a data set are used (`data.filters`). Settings only: the work is
in data/sources.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from .schema import Number, Section, Text, Texts


def _values(value: object) -> object:
    if isinstance(value, (list, tuple)) and all(isinstance(part, (str, int, float, bool)) for part in value):
        return tuple(value)
    raise PydanticCustomError("values", "expected a list of texts, numbers, true or false")


Values = Annotated[tuple[str | int | float | bool, ...], BeforeValidator(_values)]


class Filters(Section):
    """Which samples are used, by what stands beside their pictures: the keys of a line of metadata.jsonl or of a JSON
    file (`images`), of the JSON member (`webdataset`), or columns (`datasets`).

    Several filters hold together. A key whose value is null or NaN is lacking.
    """

    require: Texts = ()  # keys without which a sample is not used
    at_least: dict[Text, Number] = Field(default_factory=dict)  # key -> lowest number that is used
    at_most: dict[Text, Number] = Field(default_factory=dict)
    one_of: dict[Text, Values] = Field(default_factory=dict)  # key -> values that are used
    # Samples that lack a key of at_least, at_most or one_of: used, not used, or an error.
    missing: Literal["keep", "drop", "error"] = "error"

    def conflicts(self):
        for key, lowest in self.at_least.items():
            if key in self.at_most and lowest > self.at_most[key]:
                yield (
                    f"at_least.{key}",
                    f"expected at most data.filters.at_most.{key} ({self.at_most[key]}), got {lowest}",
                )
        for key, values in self.one_of.items():
            if not values:
                yield f"one_of.{key}", "expected at least one value, got []"

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that a filter looks at, once; none: all samples are used."""
        return tuple(dict.fromkeys([*self.require, *self.at_least, *self.at_most, *self.one_of]))
