"""The parts of `linattn demo`. Every module in this folder is one part; there is no list to add to.

A part has

    NAME = "stable_diffusion"                       # what --part asks for
    SUMMARY = "one line that says what it shows"
    REQUIRES = ("diffusers", "PIL")                 # what must be importable
    def run(out, *, quick, report) -> list[Path]    # write pictures and figures into the folder `out`, return them

``report(text)`` shows a line to the user; ``quick`` asks for the same on less (seconds instead of a minute). A part
imports what is slow or optional inside ``run``. Modules whose names start with an underscore are not parts.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType


def parts() -> dict[str, ModuleType]:
    """Every part of this folder: name -> module, sorted by name.

    Raises:
        TypeError: a module here is not a part; the message names what it lacks.
    """
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        lacking = [name for name in ("NAME", "SUMMARY", "REQUIRES", "run") if not hasattr(module, name)]
        if lacking:
            raise TypeError(
                f"{module.__name__}: a part of the demo needs {', '.join(lacking)} (linattn/demos/__init__)"
            )
        found[module.NAME] = module
    return dict(sorted(found.items()))


def missing(part: ModuleType) -> list[str]:
    """The modules that this part requires and that are not installed."""
    return [name for name in part.REQUIRES if importlib.util.find_spec(name) is None]
