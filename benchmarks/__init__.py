"""Benchmarks, run from a checkout: `python -m benchmarks` lists them, `python -m benchmarks.<family>` runs one.

Every module of this folder that has a `FAMILY` is one benchmark family; there is no list to add to. A family describes
its cases, its contenders and its figure (harness/family.py); how to measure, record and draw is the harness's business.
"""

from __future__ import annotations

import importlib
import pkgutil

#: Modules of this folder that are commands of their own, not families.
COMMANDS = {"__main__", "gpu", "infdit_memory", "tables"}


def families() -> dict:
    """Every benchmark family: name -> Family."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg and info.name not in COMMANDS]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in sorted(names)]
    return {family.name: family for family in found}
