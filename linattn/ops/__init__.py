"""The ops. Each module of this package is one family; importing the package registers all of them.

Families are discovered, not listed: adding one is adding a file. `registration` is the machinery they share.
"""

import importlib
import pkgutil

_MACHINERY = {"registration", "checks"}

families = tuple(
    importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name not in _MACHINERY
)
