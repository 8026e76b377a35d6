"""Helpers around diffusers pipelines; they need diffusers, which is imported when one of them is called."""

from linattn.pipelines.high_resolution import HighResolution, Stage, high_resolution, size_rule

__all__ = ["HighResolution", "Stage", "high_resolution", "size_rule"]
