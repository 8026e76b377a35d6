"""Exchange submodules of a model, and put the very same objects back.

Nothing here knows what the modules compute. All state lives in the `Mount` object, which its owner keeps: the model
itself carries no mark, so that after `undo` its modules, their order, and its state dict are what they were.
"""

from __future__ import annotations

import torch
from torch import nn


def find_unet(pipeline_or_unet) -> nn.Module:
    """The UNet of a diffusers pipeline, or the UNet itself; a torch.compile wrapper is looked through."""
    model = getattr(pipeline_or_unet, "unet", pipeline_or_unet)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a diffusers pipeline that has a UNet, or a UNet (torch.nn.Module), got {type(pipeline_or_unet)}"
        )
    return model


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer under any number of peft wrappers."""
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer
    return layer


def is_fused(layer: nn.Module) -> bool:
    """Whether a peft wrapper of this layer has added its delta to the weight it wraps."""
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        if getattr(layer, "merged", False):
            return True
        layer = layer.base_layer
    return False


def hand_over_wrappers(source: nn.Module, target: nn.Module, slots: tuple[str, ...]) -> None:
    """Move the peft wrappers (LoRA and its kin) around the layers of `source` to the same layers of `target`.

    The wrapper objects survive, with their adapters and scales; only what they wrap is exchanged. So a LoRA acts on
    whichever module is in the model, and it does not matter whether it was loaded before or after mounting.
    """
    for slot in slots:
        outermost = source.get_submodule(slot)
        innermost, layer = None, outermost
        while isinstance(getattr(layer, "base_layer", None), nn.Module):
            innermost, layer = layer, layer.base_layer
        if innermost is not None:
            innermost.base_layer = target.get_submodule(slot)
            _set(source, slot, layer)
            _set(target, slot, outermost)


class Mount:
    """The record of one exchange.

    Args:
        model: the model whose submodules are exchanged.
        replacements: qualified name -> module that takes the place of the one found there.
        slots: child layers that may carry peft wrappers; these stay with the model when its modules change.
    """

    def __init__(self, model: nn.Module, replacements: dict[str, nn.Module], slots: tuple[str, ...]):
        self.model = model
        self.slots = slots
        self.replacements = dict(replacements)
        self.originals = {name: model.get_submodule(name) for name in replacements}
        self._placed_at = _placement(model)
        for name, module in self.replacements.items():
            hand_over_wrappers(self.originals[name], module, slots)
            _set(model, name, module)

    def foreign(self) -> list[str]:
        """Names at which the model no longer holds what was mounted there."""
        return [name for name, module in self.replacements.items() if self.model.get_submodule(name) is not module]

    def undo(self) -> None:
        """Put the originals back. They follow the model if it was moved or cast in the meantime."""
        placement = _placement(self.model)
        for name, original in self.originals.items():
            if placement != self._placed_at:
                original.to(device=placement[0], dtype=placement[1])
                original.train(placement[2])
            hand_over_wrappers(self.replacements[name], original, self.slots)
            _set(self.model, name, original)


def _set(root: nn.Module, name: str, module: nn.Module) -> None:
    # Assigning to an existing child keeps its position, so the order of named_modules() and state_dict() stays.
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype, bool]:
    return model.device, model.dtype, model.training
