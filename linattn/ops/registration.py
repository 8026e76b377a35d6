"""From one description of an op: schema, run-time backend choice, fake, autograd, autocast, vmap, FLOP formula.

Three kinds of op live in the namespace `linattn`:

* a **kernel op** `_<name>_<backend>`: what a backend offers. It writes into outputs that the caller allocated and
  returns nothing. The reference and Triton ones are implemented here from Python, those of the compiled libraries by
  the libraries. Schemas are defined in this one place for all of them, so that nothing can drift apart.
* a **dispatched op** (`Op`): checks its arguments, allocates its outputs, chooses a backend *at run time* and calls
  that backend's kernel op. Because the choice is inside the op, compiled graphs make it afresh at each run, and the
  fake implementation (the same checks and the same allocation, no kernel) cannot depend on it.
* a **composite op** (`Composite`): written in terms of dispatched ops; torch decomposes it wherever it meets it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder

import torch

from .. import backend

NAMESPACE = "linattn"
_library = torch.library.Library(NAMESPACE, "DEF")
_public: list[str] = []
_flop_formulas: dict[str, Callable] = {}

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def public_ops() -> tuple[str, ...]:
    """Names of the documented ops, in the order of their definition."""
    return tuple(_public)


def flop_formulas() -> dict[str, Callable]:
    """Op name -> FLOPs of a call, for the ops that have a formula."""
    return dict(_flop_formulas)


def overload(name: str) -> torch._ops.OpOverload:
    """The op object `torch.ops.linattn.<name>.default`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# ------------------------------------------------------------------------------------------------- kernel ops


def define_kernels(
    name: str, arguments: str, reference: Callable, triton: Callable | None
) -> Callable[[str], Callable]:
    """Define `_<name>_<backend>(arguments) -> ()` for every backend and return `kernel(backend) -> callable`.

    `reference` and `triton` implement it from Python (None: there is no such kernel); compiled libraries register
    theirs when they are loaded, before or after this call.
    """
    name = "_" + name.lstrip("_")
    python = {"reference": reference, "triton": triton}
    for which in backend.BACKENDS:
        op = f"{name}_{which}"
        _library.define(f"{op}({arguments}) -> ()")
        if python.get(which) is not None:
            _library.impl(op, python[which], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", lambda *args, **kwargs: None, lib=_library)
    return functools.cache(lambda which: overload(f"{name}_{which}"))


def lazy(module: str, function: str) -> Callable | None:
    """A callable that imports `linattn.<module>` when it is first called: `import linattn` stays free of triton.

    None where there is no such module: a family may be without kernels for a backend.
    """
    module = f"{NAMESPACE}.{module}"
    # importlib.util.find_spec(module) would import the package that it lies in.
    package = importlib.util.find_spec(module.rpartition(".")[0])
    if package is None or PathFinder.find_spec(module, package.submodule_search_locations) is None:
        return None

    @functools.cache
    def resolve() -> Callable:
        return getattr(importlib.import_module(module), function)

    return lambda *args: resolve()(*args)


# ------------------------------------------------------------------------------------------------- dispatched ops


def _raise_double_backward(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"{NAMESPACE}: {name} cannot be differentiated (double backward is not supported)")

    return backward


class _Arguments:
    """Names the arguments of a call and fills in the defaults, which the dispatcher drops.

    What inspect.Signature.bind does, without its checks, which the dispatcher has made: every call of every op passes
    through here.
    """

    def __init__(self, schema: torch._C.FunctionSchema):
        self._template = {argument.name: argument.default_value for argument in schema.arguments}
        self._names = tuple(self._template)

    def __call__(self, args, kwargs) -> dict:
        bound = self._template.copy()
        bound.update(zip(self._names, args, strict=False))
        bound.update(kwargs)
        return bound


@dataclass(frozen=True)
class Op:
    """A dispatched op.

    schema      name, arguments and results, as torch spells them.
    check       check(**arguments): raises ValueError or TypeError that names the argument, the expectation and the
                value. Runs in the real and in the fake implementation.
    allocate    allocate(**arguments) -> the outputs (a tensor or a tuple): shapes, dtypes and strides.
    launch      launch(kernel, outputs, **arguments): calls the kernel op and fills every element of the outputs.
    selector    the argument whose device and dtype select the backend.
    save        save(ctx, arguments, outputs) and
    backward    backward(ctx, *grads): as in torch.library.register_autograd. Without them differentiation raises.
    cast        arguments that autocast converts to its active type (as SDPA does: float64 stays).
    flops       flops(*shapes and values, out_shape), which linattn.flops hands to torch.utils.flop_counter.
    unbatched   arguments and results that do not begin with a batch dimension.
    """

    schema: str
    check: Callable
    allocate: Callable
    launch: Callable
    kernel: Callable[[str], Callable]
    selector: str
    save: Callable | None = None
    backward: Callable | None = None
    cast: tuple[str, ...] = ()
    flops: Callable | None = None
    unbatched: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.schema[: self.schema.index("(")]


def register(op: Op) -> torch._ops.OpOverload:
    """Define `op` and everything that torch asks of an operator."""
    name, qualified = op.name, f"{NAMESPACE}::{op.name}"
    _library.define(op.schema)
    overloaded = overload(name)
    bound = _Arguments(overloaded._schema)
    if not name.startswith("_"):
        _public.append(name)

    def run(*args, **kwargs):
        arguments = bound(args, kwargs)
        op.check(**arguments)
        chosen = arguments[op.selector]
        which = backend.choose(name, chosen.device, chosen.dtype)
        outputs = op.allocate(**arguments)
        op.launch(op.kernel(which), outputs, **arguments)
        return outputs

    def fake(*args, **kwargs):
        arguments = bound(args, kwargs)
        op.check(**arguments)
        return op.allocate(**arguments)

    def setup_context(ctx, inputs, output):
        if op.save is not None:
            op.save(ctx, bound(inputs, {}), output)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(
        qualified, op.backward or _raise_double_backward(name), setup_context=setup_context, lib=_library
    )
    torch.library.register_vmap(qualified, _batch_rule(overloaded, op.unbatched), lib=_library)
    _register_autocast(name, overloaded, bound, op.cast)
    if op.flops is not None:
        _flop_formulas[name] = op.flops
    return overloaded


@dataclass(frozen=True)
class Composite:
    """An op written in terms of dispatched ops; autograd and the fake come from those."""

    schema: str
    body: Callable
    cast: tuple[str, ...] = ()


def register_composite(op: Composite) -> torch._ops.OpOverload:
    """Define a composite op."""
    name = op.schema[: op.schema.index("(")]
    _library.define(op.schema)
    overloaded = overload(name)
    _public.append(name)
    bound = _Arguments(overloaded._schema)
    _library.impl(name, op.body, "CompositeImplicitAutograd")
    # vmap does not decompose composites that are written in Python: without a rule it would loop, with a warning.
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _batch_rule(overloaded), lib=_library)
    _register_autocast(name, overloaded, bound, op.cast)
    return overloaded


def _register_autocast(name: str, op, bound: _Arguments, cast: Sequence[str]) -> None:
    """Cast to the type that autocast has now; torch.library.register_autocast knows a fixed type only."""
    if not cast:
        return

    def kernel_for(device_type: str, key: str) -> Callable:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, **kwargs):
            arguments = bound(args, kwargs)
            dtype = torch.get_autocast_dtype(device_type)
            for argument in cast:
                x = arguments[argument]
                if x is not None and x.is_floating_point() and x.dtype != torch.float64:
                    arguments[argument] = x.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*arguments.values())

        return kernel

    for device_type, key in _AUTOCAST_KEYS.items():
        _library.impl(name, kernel_for(device_type, key), key)


def _batch_rule(op, unbatched: Sequence[str] = ()) -> Callable:
    """vmap as a reshape: tensors begin with a batch dimension, and the mapped one is folded into it.

    A tensor without a batch dimension has no place for it. Where one is mapped, or is a result, vmap is a loop.
    """
    schema = op._schema
    without = [argument.name in unbatched for argument in schema.arguments]
    always_loops = any(result.name in unbatched for result in schema.returns)

    def loop(info, in_dims, *args):
        def call(i):
            pairs = zip(args, in_dims, strict=True)
            return op(*(x if dim is None else x.select(dim, i) for x, dim in pairs))

        outputs = [call(i) for i in range(info.batch_size)]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    def rule(info, in_dims, *args):
        if always_loops or any(w and dim is not None for w, dim in zip(without, in_dims, strict=False)):
            return loop(info, in_dims, *args)
        size = info.batch_size
        batch = None

        def fold(x, dim):
            nonlocal batch
            if not isinstance(x, torch.Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            batch = x.shape[1]
            return x.flatten(0, 1)

        triples = zip(args, in_dims, without, strict=False)
        outputs = op(*(x if w else fold(x, dim) for x, dim, w in triples))

        def unfold(x):
            # A result that the arguments made superfluous is empty and has no batch dimension (see `superfluous`).
            return x.unsqueeze(0).expand(size, 0) if x.dim() == 1 else x.unflatten(0, (size, batch))

        if isinstance(outputs, torch.Tensor):
            return unfold(outputs), 0
        return tuple(unfold(x) for x in outputs), (0,) * len(outputs)

    return rule


# ------------------------------------------------------------------------------------------------- memory layout


def readable(x: torch.Tensor) -> torch.Tensor:
    """x as kernels read it: a head dim of stride 1 is taken in place, anything else is copied once."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_like_heads(x: torch.Tensor, head_dim: int, tokens: int | None = None) -> torch.Tensor:
    """Empty (B, H, N, head_dim), dense in the stride order of x (B, H, N, *), the head dim innermost.

    N is that of x unless `tokens` is given.

    With diffusers' (B, N, H, D) tensors seen as (B, H, N, D), flattening the result back to (B, N, H * D) is a view.
    """
    # Broadcast (stride 0) and length-1 dimensions have no place of their own: they go outermost.
    loose = [dim for dim in range(3) if x.shape[dim] == 1 or x.stride(dim) == 0]
    tight = [dim for dim in range(3) if dim not in loose]
    order = loose + sorted(tight, key=functools.cmp_to_key(lambda a, b: -1 if x.stride(a) > x.stride(b) else 1))
    shape = (*x.shape[:2], x.shape[2] if tokens is None else tokens, head_dim)
    strides, step = [0, 0, 0, 1], head_dim
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def superfluous(x: torch.Tensor) -> torch.Tensor:
    """What an op returns in the place of a result that its arguments make superfluous: schemas know no optional one."""
    return x.new_empty((0,))


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, and float64 for float64 inputs: the type of sums over tokens."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
