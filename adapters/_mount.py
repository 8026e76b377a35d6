"""Exchange submodules of a model, and put the very same objects back.

Nothing here knows what the modules compute. All state lives in the `Mount` object, which its owner keeps: the model
itself carries no mark, so that after `undo` its modules, their order, and its state dict are what they were.

What others have put on the model stays with the model, in both directions:

    peft wrappers (LoRA)         move over to the module that comes in; a delta that has been merged (fused) into the
                                 weight of the old one is merged into the weight of the new one
    device, dtype, train/eval    are those of the module that goes out
    children of both modules     a child that is the same object in the module that comes in and in the one that goes
                                 out is left alone, with all that is on it; what has been put around it goes back
    accelerate's offload hooks   are put on the module that comes in, and leave the one that goes out
    diffusers' group offloading  is applied again to the whole model, as diffusers does when layers change
    diffusers' layerwise casting is put on the module that comes in; it cannot be taken off again
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import nn


def find_transformer(pipeline_or_transformer) -> nn.Module:
    """The transformer of a diffusers pipeline, or the transformer itself; a torch.compile wrapper is looked through."""
    model = getattr(pipeline_or_transformer, "transformer", pipeline_or_transformer)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "expected a diffusers pipeline that has a transformer, or a transformer (torch.nn.Module), got "
            f"{type(pipeline_or_transformer)}"
        )
    return model


def find_unet(pipeline_or_unet) -> nn.Module:
    """The UNet of a diffusers pipeline, or the UNet itself; a torch.compile wrapper is looked through."""
    model = getattr(pipeline_or_unet, "unet", pipeline_or_unet)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a diffusers pipeline that has a UNet, or a UNet (torch.nn.Module), got {type(pipeline_or_unet)}"
        )
    return model


class Mount:
    """The record of one exchange.

    Args:
        model: the model whose submodules are exchanged.
        replacements: qualified name -> module that takes the place of the one found there.
        slots: child layers that may carry peft wrappers; these stay with the model when its modules change. Those that
            a module does not have, or shares with the one it replaces, are passed over.
        extra: children of a module that comes in to which nothing corresponds in one that goes out, where these two
            share the rest.
    """

    def __init__(
        self, model: nn.Module, replacements: dict[str, nn.Module], slots: tuple[str, ...], extra: tuple[str, ...] = ()
    ):
        self.model = model
        self.replacements = dict(replacements)
        self.originals = {name: model.get_submodule(name) for name in replacements}
        self._extra = extra
        self._shared = {n: _shared_children(module, self.originals[n]) for n, module in self.replacements.items()}
        self._slots = {n: _own_slots(module, self.originals[n], slots) for n, module in self.replacements.items()}
        self._fused: list[tuple[nn.Module, _Merged]] = []
        dtype = weight_dtype(model)
        for name, module in self.replacements.items():
            original = self.originals[name]
            _hold_like(self._incoming(name), self._outgoing(name), dtype, model.training)
            for slot in self._slots[name]:
                # The originals keep what is fused into them, so that they come back to the last bit.
                for wrapper in wrappers(original.get_submodule(slot)):
                    if is_merged(wrapper):
                        self._fused.append((base_layer(wrapper), _Merged(wrapper)))
                for wrapper in _move_wrappers(original, module, slot):
                    _merge_again(wrapper)
            _set(model, name, module)
        self._held = {name: _holding(self._incoming(name), dtype, model.training) for name in self.replacements}
        _apply_group_offloading_again(model)

    def _incoming(self, name: str) -> nn.Module:
        """Of a module that comes in, what is not shared with the one that goes out."""
        module = self.replacements[name]
        if not self._shared[name]:
            return module
        layers = [base_layer(module.get_submodule(slot)) for slot in self._slots[name]]
        return nn.ModuleList([*layers, *(module.get_submodule(child) for child in self._extra)])

    def _outgoing(self, name: str) -> nn.Module:
        """Of a module that goes out, what is not shared with the one that comes in; all of it if that is nothing."""
        original = self.originals[name]
        if not self._shared[name] or not self._slots[name]:
            return original
        return nn.ModuleList(base_layer(original.get_submodule(slot)) for slot in self._slots[name])

    def foreign(self) -> list[str]:
        """Names at which the model no longer holds what was mounted there."""
        return [name for name, module in self.replacements.items() if self.model.get_submodule(name) is not module]

    def undo(self) -> None:
        """Put the originals back. They follow the model if it was moved, cast or offloaded in the meantime."""
        installed = {id(wrapper) for module in self.replacements.values() for wrapper in module.modules()}
        for base, merged in self._fused:
            if merged.has_changed():
                merged.take_out_of(base)
                if id(merged.wrapper) not in installed:
                    merged.wrapper.base_layer = base
                    _merge_again(merged.wrapper)
        unchanged = {id(merged.wrapper) for _, merged in self._fused if not merged.has_changed()}
        dtype, training = weight_dtype(self.model), self.model.training
        for name, original in self.originals.items():
            module = self.replacements[name]
            incoming = self._incoming(name)
            if self._slots[name] and self._held[name] != _holding(incoming, dtype, training):
                _hold_like(self._outgoing(name), incoming, dtype, training)
            if self._held[name][2] != training:
                original.train(training)
            for slot in self._slots[name]:
                for wrapper in wrappers(module.get_submodule(slot)):
                    if is_merged(wrapper):
                        _Merged(wrapper).take_out_of(base_layer(wrapper))
                for wrapper in _move_wrappers(module, original, slot):
                    if id(wrapper) not in unchanged:
                        _merge_again(wrapper)
            for child in self._shared[name]:
                original._modules[child] = module._modules[child]
            _release(incoming)
            _set(self.model, name, original)
        _apply_group_offloading_again(self.model)


def _shared_children(module: nn.Module, original: nn.Module) -> list[str]:
    return [name for name, child in original.named_children() if module._modules.get(name) is child]


def _own_slots(module: nn.Module, original: nn.Module, slots: tuple[str, ...]) -> list[str]:
    """Those slots that both modules have, with layers of their own."""
    layers = ((slot, layer_at(module, slot), layer_at(original, slot)) for slot in slots)
    return [slot for slot, own, other in layers if other is not None and base_layer(own) is not base_layer(other)]


def layer_at(module: nn.Module, slot: str) -> nn.Module | None:
    """The child layer of this qualified name; None where there is none."""
    try:
        return module.get_submodule(slot)
    except AttributeError:
        return None


def _set(root: nn.Module, name: str, module: nn.Module) -> None:
    # Assigning to an existing child keeps its position, so the order of named_modules() and state_dict() stays.
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


# ------------------------------------------------------------------------------------------------------- peft wrappers


def wrappers(layer: nn.Module) -> list[nn.Module]:
    """The peft wrappers (LoRA and its kin) around a layer, outermost first."""
    found = []
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        found.append(layer)
        layer = layer.base_layer
    return found


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer under any number of peft wrappers."""
    around = wrappers(layer)
    return around[-1].base_layer if around else layer


def is_merged(wrapper: nn.Module) -> bool:
    """Whether this peft wrapper has added its delta to the weight it wraps (what diffusers calls fused)."""
    return bool(getattr(wrapper, "merged", False))


def why_fused_stays(layer: nn.Module, target: nn.Module) -> str | None:
    """Why what is fused into the weight of `layer` cannot move to `target`; None if it can, or nothing is fused."""
    if not any(is_merged(wrapper) for wrapper in wrappers(layer)):
        return None
    for base in (base_layer(layer), base_layer(target)):
        weight = getattr(base, "weight", None)
        if type(base) is not nn.Linear or type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"the layer under it is a {type(base).__name__}, whose weight is not a plain matrix"
        if weight.is_meta:
            return "its weights are offloaded"
    for wrapper in filter(is_merged, wrappers(layer)):
        variants = set(getattr(wrapper, "lora_variant", {})) & set(wrapper.merged_adapters)
        if variants:
            return f"what {_listed(variants)} adds depends on the weight it is added to (DoRA and its kin)"
    return None


def subtract_fused(layer: nn.Module, weights: nn.Linear) -> None:
    """Take out of `weights`, a copy of the weight and bias of this layer's base, what wrappers have fused into it."""
    for wrapper in filter(is_merged, wrappers(layer)):
        _Merged(wrapper).take_out_of(weights)


def refuse_fused(
    sources: dict[str, nn.Module], targets: dict[str, nn.Module], slots: tuple[str, ...], action: str
) -> None:
    """Raise where a LoRA is fused into a layer of `sources` and cannot move to the same layer of `targets`."""
    stuck = []
    for name, module in sources.items():
        for slot in slots:
            layer, target = layer_at(module, slot), layer_at(targets[name], slot)
            reason = why_fused_stays(layer, target) if layer is not None and target is not None else None
            if reason:
                stuck.append(f"{name}.{slot}: {reason}")
    if stuck:
        raise ValueError(
            f"cannot {action} while a LoRA is fused into {some(stuck, '; ')}. unfuse_lora() first, {action}, "
            "then fuse again"
        )


def some(items, separator: str = ", ") -> str:
    """The first few of a list, and how many there are, for messages."""
    items = [str(item) for item in items]
    shown = separator.join(items[:3])
    return shown if len(items) <= 3 else f"{shown}{separator}... ({len(items)} in all)"


def _move_wrappers(source: nn.Module, target: nn.Module, slot: str) -> list[nn.Module]:
    """Move the wrappers around a layer of `source` to the same layer of `target`, and return them.

    The wrapper objects survive, with their adapters and scales; only what they wrap is exchanged. So a LoRA acts on
    whichever module is in the model, and it does not matter whether it was loaded before or after mounting.
    """
    around = wrappers(source.get_submodule(slot))
    if around:
        base = around[-1].base_layer
        around[-1].base_layer = target.get_submodule(slot)
        _set(source, slot, base)
        _set(target, slot, around[0])
    return around


def _merge_again(wrapper: nn.Module) -> None:
    """Merge into the layer now under this wrapper what it had merged into another one."""
    if is_merged(wrapper):
        adapters = list(wrapper.merged_adapters)
        wrapper.merged_adapters = []
        wrapper.merge(adapter_names=adapters)


@dataclass
class _Merged:
    """What a wrapper had merged at one moment: a copy of the wrapper without the layer it wraps, small as LoRA is.

    The wrapper itself may be unfused, changed or unloaded later; the copy can still take its delta out of a weight.
    """

    wrapper: nn.Module
    frozen: nn.Module

    def __init__(self, wrapper: nn.Module):
        self.wrapper = wrapper
        self.frozen = copy.deepcopy(wrapper, {id(wrapper.base_layer): nn.Identity()})

    def has_changed(self) -> bool:
        now, then = self.wrapper, self.frozen
        if now.merged_adapters != then.merged_adapters or getattr(now, "scaling", {}) != getattr(then, "scaling", {}):
            return True
        now = {key: value for key, value in now.state_dict().items() if not key.startswith("base_layer.")}
        then = then.state_dict()
        return now.keys() != then.keys() or not all(torch.equal(now[key].to(then[key]), then[key]) for key in then)

    def take_out_of(self, base: nn.Linear) -> None:
        adapters = list(self.frozen.merged_adapters)
        self.frozen.base_layer = base
        try:
            self.frozen.to(device=base.weight.device)
            self.frozen.unmerge()
        finally:
            self.frozen.base_layer = nn.Identity()
            self.frozen.merged_adapters = adapters


def _listed(names) -> str:
    return ", ".join(map(repr, sorted(names)))


# ------------------------------------------------------------------------ device, dtype, and who moves the weights when


def _hold_like(incoming: nn.Module, outgoing: nn.Module, dtype: torch.dtype, training: bool) -> None:
    """Hold the weights of `incoming` as those of `outgoing` are held, in a model of this dtype and mode."""
    incoming.train(training)
    _release(incoming)
    # With layerwise casting on, weights rest in the storage dtype and are cast for each call.
    incoming.to(device=_device(outgoing), dtype=None if _casting(incoming) else dtype)
    casting = _casting(outgoing)
    if casting is not None and _casting(incoming) is None:
        from diffusers.hooks import apply_layerwise_casting

        apply_layerwise_casting(
            incoming, casting.storage_dtype, casting.compute_dtype, non_blocking=casting.non_blocking
        )
    offload = _offload(outgoing)
    if offload is not None:
        from accelerate.hooks import attach_align_device_hook

        attach_align_device_hook(
            incoming,
            execution_device=offload.execution_device,
            offload=True,
            weights_map=incoming.state_dict(),
            offload_buffers=offload.offload_buffers,
        )


def _release(module: nn.Module) -> None:
    """Take off what moves the weights of this module about, so that it holds them itself."""
    if _offload(module) is not None:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(module)
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        if registry is not None:
            for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
                registry.remove_hook(name, recurse=False)


def _holding(module: nn.Module, dtype: torch.dtype, training: bool) -> tuple:
    return _device(module), dtype, training, _offload(module) is None, _casting(module) is None


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights; where layerwise casting is on, of those that are not stored in another."""
    if _casting(model) is not None:
        for child in model.modules():
            own = next(child.parameters(recurse=False), None)
            if own is not None and own.is_floating_point() and _casting_of(child) is None:
                return own.dtype
    return model.dtype


def _device(module: nn.Module) -> torch.device | None:
    if _offload(module) is not None:
        return torch.device("cpu")  # where accelerate keeps offloaded weights
    return next((parameter.device for parameter in module.parameters()), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds this module's weights elsewhere between calls; the parameters are then empty."""
    return _offload(module) is not None


@contextlib.contextmanager
def weights_present(layer: nn.Module):
    """Inside, the parameters of a layer that accelerate offloads hold their values."""
    if _offload(layer) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer, torch.device("cpu")):
        yield


def _offload(module: nn.Module):
    """The hook by which accelerate offloads this module's weights (`enable_sequential_cpu_offload`), if any."""
    hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def _casting(module: nn.Module):
    """The hook by which diffusers stores this module's weights in another dtype, if any."""
    return next((hook for hook in map(_casting_of, module.modules()) if hook is not None), None)


def _casting_of(layer: nn.Module):
    registry = getattr(layer, "_diffusers_hook", None)
    return registry.get_hook("layerwise_casting") if registry is not None else None


def _apply_group_offloading_again(model: nn.Module) -> None:
    """Its groups are made of the layers they found: those that came in must be in them, those that went out not."""
    try:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading as apply_again
    except ImportError:  # an older or newer diffusers, whose groups we cannot renew
        return
    apply_again(model)
