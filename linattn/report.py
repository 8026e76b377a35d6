"""`linattn.report(model)`: what every attention layer runs, on which backend, and why not on something faster.

Nothing is run and nothing is changed; diffusers, peft and accelerate are recognised by what their objects look like and
never imported. A layer that calls an op of this package says so itself. It, or its processor, has a method

    attention_spec()            on a module
    attention_spec(module)      on an attention processor, with the module it serves

that returns a dict:

    "op"          name of the op as in torch.ops.linattn, e.g. "linear_attention"
    "adapter"     who mounted it, e.g. "LinFusion"
    "options"     keyword arguments of the op that never change, e.g. {"feature_map": "elu1"} (optional)
    "shown"       those options that the text names, beside the op (optional)
    "mask"        False where an attention_mask is refused (optional)
    "processor"   the processor class that the layer needs; with any other the weights are not what they are run as
                  (optional)
    "heads", "head_dim"      where the module's attributes of these names do not say it (optional)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from . import backend as backends

__all__ = ["AttentionLayer", "Report", "report"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    Attributes:
        name: qualified name in the model ("unet." in front where a pipeline was given).
        runs: "linear_attention" or another op of this package; "softmax" for diffusers' processors; "linear, in
            PyTorch" for those of them that are linear attention; "unknown" for a processor from elsewhere.
        by: the adapter that mounted the layer, else the class of its processor.
        processor: class of the processor.
        kind: "self" or "cross" attention, None where the layer does not say.
        heads, head_dim: None where the layer does not say.
        dtype: what it computes in; storage: what its weights are kept in, where that is another type.
        device: where it runs (an offloaded layer: where it will).
        options: what the op is called with; shown: the names of those in the text.
        backend: the linattn backend that would run; None for other attention, and where a forced one cannot.
        why_not: backend -> reason, for those that are preferred to `backend`.
        attention_backend: what diffusers' `set_attention_backend` does here: "honoured: NAME" or "no effect".
        plugins: what else sits on the layer: LoRA, IP-Adapter, quantised linears, hooks.
        warnings: what one would want to know before trusting it.
    """

    name: str
    runs: str
    by: str
    processor: str
    kind: str | None
    heads: int | None
    head_dim: int | None
    dtype: str | None
    storage: str | None
    device: str | None
    options: dict = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    backend: str | None = None
    why_not: dict = field(default_factory=dict)
    attention_backend: str = "no effect"
    plugins: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """Heads x head dim."""
        return f"{self.heads or '?'}x{self.head_dim or '?'}"


@dataclass(frozen=True)
class Report:
    """The attention layers of a model in the order of its modules; `str()` groups those that are alike."""

    model: str
    layers: list[AttentionLayer]

    def to_dict(self) -> dict:
        """The same as plain data, fit for JSON."""
        return {"model": self.model, "layers": [_plain(asdict(layer)) for layer in self.layers]}

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.model}: no attention layer that diffusers or linattn would know"
        lines = [f"{self.model}: {_count(len(self.layers), 'attention layer')}"]
        lines += [line for layers in _groups(self.layers).values() for line in _describe(layers)]
        warned: dict[str, int] = Counter(text for layer in self.layers for text in layer.warnings)
        if warned:
            lines.append("  warnings:")
            lines += [f"    {_count(number, 'layer')}: {text}" for text, number in warned.items()]
        return "\n".join(lines)


def report(model_or_pipeline) -> Report:
    """What runs in every attention layer of a model.

        print(linattn.report(pipe))

    Args:
        model_or_pipeline: a diffusers pipeline (all its models are looked through) or any torch.nn.Module; a
            torch.compile wrapper is looked into.

    Returns:
        a :class:`Report`: `.layers`, a list of :class:`AttentionLayer`; `str()`, a short table; `.to_dict()`.
        The number of tokens from which linear attention is the quicker one is not in it: that has to be measured
        (python -m benchmarks.linfusion_module, in a checkout).

    Raises:
        TypeError: neither a module nor a pipeline.
        ValueError: an unknown backend is forced by the environment variable LINATTN_BACKEND.
    """
    layers = []
    for prefix, model in _models(model_or_pipeline).items():
        for name, module, parents in _walk(model, prefix):
            spec = _spec(module)
            if spec is not None or _is_attention(module):
                layers.append(_layer(name, module, parents, spec))
    return Report(type(_unwrapped(model_or_pipeline)).__name__, layers)


# ---- finding the layers -----------------------------------------------------------------------------------------


def _unwrapped(model):
    return getattr(model, "_orig_mod", model)


def _models(model_or_pipeline) -> dict[str, nn.Module]:
    """Name in front of the layers' names -> module."""
    if isinstance(model_or_pipeline, nn.Module):
        return {"": _unwrapped(model_or_pipeline)}
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"expected a diffusers pipeline or a torch.nn.Module, got {type(model_or_pipeline)}")
    return {f"{name}.": _unwrapped(m) for name, m in components.items() if isinstance(m, nn.Module)}


def _walk(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """(name, module, the module and what it lies in, from the inside), without the names that compilation adds."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = name.split(".") if name else []
        parents = [modules[path] for i in range(len(parts), -1, -1) if (path := ".".join(parts[:i])) in modules]
        if not hasattr(module, "_orig_mod"):  # what was compiled comes next, under its own name
            yield prefix + name.replace("._orig_mod", ""), module, parents


def _is_attention(module: nn.Module) -> bool:
    """diffusers' attention modules: those that leave the computation to a processor."""
    processor = getattr(module, "processor", None)
    if processor is None or not callable(processor):
        return False
    return hasattr(module, "set_processor") or "Attn" in type(processor).__name__


def _spec(module: nn.Module) -> dict | None:
    """What the layer, or else its processor, says of itself."""
    processor = getattr(module, "processor", None)
    for owner, arguments in ((module, ()), (processor, (module,))):
        method = getattr(owner, "attention_spec", None)
        if callable(method):
            spec = method(*arguments)
            missing = {"op", "adapter"} - set(spec)
            if missing:
                raise ValueError(f"{type(owner).__name__}.attention_spec() lacks {sorted(missing)}, got {spec}")
            return spec
    return None


# ---- one layer --------------------------------------------------------------------------------------------------


def _layer(name: str, module: nn.Module, parents: list[nn.Module], spec: dict | None) -> AttentionLayer:
    processor = getattr(module, "processor", None)
    dtype, storage, device = _placement(module, parents)
    facts = {
        "name": name,
        "processor": type(processor).__name__ if processor is not None else "",
        "kind": _kind(module),
        "heads": _heads(module, spec or {}),
        "head_dim": _head_dim(module, spec or {}),
        "dtype": _word(dtype),
        "storage": _word(storage),
        "device": str(device) if device is not None else None,
        "plugins": tuple(_plugins(module, parents)),
    }
    honoured, active = _attention_backend(processor)
    warnings = []
    expected = (spec or {}).get("processor")
    if spec is None or (expected is not None and not isinstance(processor, expected)):
        facts |= {"runs": _stock(processor), "by": type(processor).__name__}
        facts["attention_backend"] = f"honoured: {active or 'native'}" if honoured else "no effect"
        if spec is not None:
            warnings.append(
                f"{spec['adapter']} mounted it for {spec['op']}, but its processor is {type(processor).__name__}, "
                f"not {expected.__name__}: the weights are not meant for that"
            )
    else:
        facts |= {"runs": spec["op"], "by": spec["adapter"], "options": dict(spec.get("options", {}))}
        facts["shown"] = tuple(spec.get("shown", ()))
        facts |= _backend(spec["op"], device, dtype, warnings)
        if not spec.get("mask", True):
            warnings.append("no attention mask: a call with one raises")
    if active is not None and not honoured and active != "native":
        warnings.append(f"diffusers' attention backend is set to {active}, which has no effect here")
    return AttentionLayer(**facts, warnings=tuple(warnings))


def _stock(processor) -> str:
    """What a processor computes that says nothing of itself: known for diffusers' own, by their names."""
    kind = type(processor)
    if not kind.__module__.startswith("diffusers."):
        return "unknown"
    return "linear, in PyTorch" if "Linear" in kind.__name__ or "Multiscale" in kind.__name__ else "softmax"


def _backend(op: str, device, dtype, warnings: list[str]) -> dict:
    """The backend that would run, and why those that are preferred to it would not."""
    if device is None or dtype is None:
        return {}
    try:
        chosen = backends.choose(op, device, dtype)
    except ValueError as error:
        warnings.append(f"cannot run: {error}")
        return {"why_not": {name: _reason(op, name, device, dtype) for name in (backends.forced(),)}}
    better = backends.BACKENDS[: backends.BACKENDS.index(chosen)]
    reasons = {name: reason for name in better if (reason := _reason(op, name, device, dtype))}
    # What could run and is not chosen: another one is forced, or it is Triton's interpreter.
    forced = backends.forced()
    other = "Triton's interpreter has to be asked for" if forced is None else f"{forced} is forced"
    reasons |= {name: other for name in better if name not in reasons}
    if chosen == "reference":
        warnings.append("no kernel runs here, the definition in PyTorch does: see why_not")
    return {"backend": chosen, "why_not": reasons}


def _reason(op: str, name: str, device, dtype) -> str | None:
    return backends.why_not(op, name, device, dtype)


def _kind(module: nn.Module) -> str | None:
    cross = getattr(module, "is_cross_attention", None)
    return None if cross is None else "cross" if cross else "self"


def _heads(module: nn.Module, spec: dict) -> int | None:
    heads = spec.get("heads") or getattr(module, "heads", None) or getattr(module, "num_heads", None)
    return heads if isinstance(heads, int) else None


def _head_dim(module: nn.Module, spec: dict) -> int | None:
    given = spec.get("head_dim") or getattr(module, "head_dim", None)
    inner, heads = getattr(module, "inner_dim", None), _heads(module, spec)
    if given is None and inner and heads:
        given = inner // heads
    return given if isinstance(given, int) else None


def _placement(module: nn.Module, parents: list[nn.Module]):
    """(dtype of the computation, dtype of the weights if it is another one, device of the computation)."""
    tensors = [*module.parameters(), *module.buffers()]
    floating = [t for t in tensors if t.is_floating_point()]
    stored = floating[0].dtype if floating else None
    device = tensors[0].device if tensors else None
    dtype = next(
        (d for hook in _diffusers_hooks(module).values() if (d := getattr(hook, "compute_dtype", None))), stored
    )
    execution = next((d for owner in (*parents, *module.modules()) for d in _execution_devices(owner)), None)
    return dtype, None if dtype == stored else stored, torch.device(execution) if execution is not None else device


def _execution_devices(module: nn.Module) -> Iterator:
    """Where the hooks on this module will run it: accelerate's offloading, diffusers' group offloading."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            yield f"cuda:{device}" if isinstance(device, int) else device
    for one in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
        device = getattr(getattr(one, "group", None), "onload_device", None)
        if device is not None:
            yield device


def _diffusers_hooks(module: nn.Module) -> dict[str, object]:
    """diffusers' hooks on the layer and on what is in it, by name."""
    found: dict[str, object] = {}
    for child in module.modules():
        found |= getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
    return found


def _attention_backend(processor) -> tuple[bool, str | None]:
    """(whether diffusers' attention dispatcher serves this processor, the backend that is set for it)."""
    honoured = hasattr(processor, "_attention_backend")
    name = getattr(processor, "_attention_backend", None)
    if name is None:
        registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
        name = getattr(registry, "_active_backend", None)
    return honoured, None if name is None else getattr(name, "value", str(name))


def _plugins(module: nn.Module, parents: list[nn.Module]) -> Iterator[str]:
    """What others have put on the layer, each once, with the number of places."""
    found: Counter[str] = Counter()
    for child in module.modules():
        kind = type(child)
        if isinstance(getattr(child, "base_layer", None), nn.Module):
            adapters = list(getattr(child, "lora_A", None) or getattr(child, "active_adapters", []))
            merged = ", fused" if getattr(child, "merged", False) else ""
            found[
                f"{'LoRA' if hasattr(child, 'lora_A') else kind.__name__} ({', '.join(map(str, adapters))}{merged})"
            ] += 1
        elif (quantised := _quantised(child)) is not None:
            found[quantised] += 1
        if hasattr(child, "parametrizations"):
            found["parametrized weights"] += 1
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            found["hooks"] += 1
    # A mounted module that keeps its processor holds the adapter's beside it.
    if any(hasattr(getattr(module, holder, None), "to_k_ip") for holder in ("processor", "ip_adapter")):
        found["IP-Adapter"] += 1
    for name in _diffusers_hooks(module):
        found[f"diffusers hook {name}"] += 1
    if any(hasattr(owner, "_hf_hook") for owner in parents):
        found["accelerate hook"] += 1
    for name, number in found.items():
        yield name if number == 1 else f"{name} x{number}"


def _quantised(layer: nn.Module) -> str | None:
    """The name of a quantised linear layer: one that is not torch's own, or whose weight is a packed tensor."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        return None
    packed = type(weight) if type(weight) not in (nn.Parameter, torch.Tensor) else type(weight.data)
    if packed is not torch.Tensor:
        return f"quantised: {packed.__name__}"
    return None if weight.is_floating_point() else f"quantised: {type(layer).__name__}"


# ---- text -------------------------------------------------------------------------------------------------------


def _groups(layers: list[AttentionLayer]) -> dict[tuple, list[AttentionLayer]]:
    """Layers that differ in their name and shape only."""
    groups: dict[tuple, list[AttentionLayer]] = {}
    for layer in layers:
        placed = (layer.dtype, layer.storage, layer.device, layer.backend, layer.attention_backend)
        key = (layer.runs, layer.by, layer.kind, *placed, repr(layer.options), layer.plugins)
        groups.setdefault(key, []).append(layer)
    return groups


def _describe(layers: list[AttentionLayer]) -> list[str]:
    first = layers[0]
    shapes = Counter(layer.shape for layer in layers)
    text = ", ".join(f"{number} x {shape}" for shape, number in shapes.items())
    kind = f"{first.kind} " if first.kind else ""
    lines = [f"  {_count(len(layers), kind + 'layer')}: {text} (heads x head dim), e.g. {first.name}"]
    what = f"{first.runs} ({first.by})" if first.runs != "unknown" else f"unknown: {first.by}"
    what = ", ".join([what, *(f"{name} {first.options[name]}" for name in first.shown)])
    stored = f", stored as {first.storage}" if first.storage else ""
    where = f"{first.dtype or 'no dtype'}{stored} on {first.device or 'no device'}"
    backend = f"backend {first.backend}" if first.backend else None
    lines.append("    " + ", ".join(part for part in (what, where, backend) if part))
    if first.plugins:
        lines.append("    with " + ", ".join(first.plugins))
    lines.append(f"    set_attention_backend: {first.attention_backend}")
    # On a CPU nobody expects kernels for GPUs; the reasons are all in why_not.
    kind_of_device = (first.device or "").split(":")[0]
    for name, reason in first.why_not.items():
        if name == kind_of_device or (name == "triton" and kind_of_device == "cuda"):
            lines.append(f"    not {name}: {reason}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _word(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _plain(value):
    """Tuples as lists, and whatever JSON does not know as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
