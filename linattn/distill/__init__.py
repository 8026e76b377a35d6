"""Distillation: recipes, data, objectives, and one trainer for all of them.

    from linattn.distill import Trainer, recipe
    from linattn.adapters import LinFusion

    Trainer(recipe.load("linfusion_sd15", ["data.path=pictures", "output.folder=run"]), LinFusion).run()

On the command line: `linattn distill linfusion_sd15 --set data.path=pictures`. docs/distillation.md explains recipes,
data and checkpoints. Needs the extra: pip install "linattn[train]".
"""

_EXPORTS = {"Trainer": "trainer", "Interrupted": "trainer", "Recipe": "recipe", "RecipeError": "recipe"}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
