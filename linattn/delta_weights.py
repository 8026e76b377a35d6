r"""Delta weights: what a fine-tune changed, as tensors that are added to other models of the same architecture.

    delta = W_tuned - W_base,        merged = W_other + scale delta

PeRFlow publishes its few-step students like this. Sums and differences are formed in float32 (float64 for float64
models) and rounded once, to the model's type.

    delta = delta_weights.load("hansyan/perflow-sd15-delta-weights")
    merge = delta_weights.merge(pipe.unet, delta)
    ...
    merge.unmerge()                              # the bits that were there before

A delta is a plain dict from the model's keys to tensors. Needs torch; `load` and `save` need safetensors, names on the
hub huggingface_hub as well: pip install "linattn[diffusers]". docs/perflow.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

FILE_NAME = "delta_weights.safetensors"
MODEL_FILE = "diffusion_pytorch_model"

_MISSING = ("raise", "skip")
_EXTRA_CHANNELS = ("raise", "pad", "skip")


def extract(
    base: nn.Module | Mapping[str, Tensor], tuned: nn.Module | Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """tuned - base, key by key, on the CPU.

    Args:
        base, tuned: models or their state dicts.
        dtype: of the result; None: float32, float64 where one of the two is float64.

    Raises:
        ValueError: keys or shapes differ, or a weight that is not floating point.
    """
    before, after = _weights(base), _weights(tuned)
    if before.keys() != after.keys():
        raise ValueError(
            f"base and tuned must have the same keys, {_some(before.keys() ^ after.keys())} are in one only"
        )
    delta = {}
    for key, weight in after.items():
        if weight.shape != before[key].shape:
            raise ValueError(f"{key} must have one shape, got {_shape(before[key])} in base, {_shape(weight)} in tuned")
        wide = _wide(before[key], weight)
        difference = weight.detach().cpu().to(wide) - before[key].detach().cpu().to(wide)
        delta[key] = difference.to(dtype or wide)
    return delta


@dataclass
class _Weight:
    """One weight with a delta. Refers to the parameter itself, which stays the same when a model is moved."""

    key: str
    weight: Tensor
    change: Tensor
    scale: float
    kept: Tensor | None = None

    def merge(self, exact: bool) -> None:
        if exact:
            self.kept = self.weight.detach().to("cpu", copy=True)
        self.weight.copy_(self._plus(self.weight, self.scale))

    def unmerge(self) -> None:
        self.weight.copy_(self._plus(self.weight, -self.scale) if self.kept is None else self.kept)

    def is_as_merged(self) -> bool:
        return torch.equal(self.weight, self._plus(self.kept, self.scale).to(self.weight))

    def _plus(self, weight: Tensor, scale: float) -> Tensor:
        wide = _wide(weight, self.change)
        change = scale * self.change.to(weight.device, wide)
        if weight.shape != change.shape:  # the first input channels
            padding = change.new_zeros(weight.shape[0], weight.shape[1] - change.shape[1], *weight.shape[2:])
            change = torch.cat([change, padding], dim=1)
        return (weight.to(wide) + change).to(weight.dtype)


@dataclass
class Merge:
    """A delta in a model: which weights have it, and the way back. As a context manager it is unmerged at the end.

    merged: keys that the delta was added to, `padded` among them.
    padded: keys of which only the first input channels have a delta.
    skipped: keys of the delta that the model lacks, or has with more input channels.
    untouched: keys of the model that the delta lacks.
    """

    merged: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    _weights: list[_Weight] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weights back. Calling it again does nothing.

        Raises:
            ValueError: with exact=True, a weight is not what this merge made it (it was trained, or another delta was
                merged, which must be unmerged first). Nothing is changed.
        """
        for weight in self._weights:
            if weight.kept is not None and not weight.is_as_merged():
                raise ValueError(f"{weight.key} was changed after this delta was merged: undo that first")
        for weight in self._weights:
            weight.unmerge()
        self._weights = []

    def __enter__(self) -> Merge:
        return self

    def __exit__(self, *_) -> None:
        self.unmerge()


@torch.no_grad()
def merge(
    model: nn.Module,
    delta: Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    missing: str = "raise",
    extra_channels: str = "raise",
    exact: bool = True,
) -> Merge:
    """Add scale delta to the model's weights, in place. Nothing is changed where an error is raised.

    Args:
        model: e.g. a UNet. Of a layer that LoRA wraps, the layer's own weights are meant.
        missing: what keys are that one has and the other lacks: "raise", or "skip": the common keys are merged. UNets
            with linear attention, for example, have weights that no delta has.
        extra_channels: what a weight is that has more input channels (dimension 1) than its delta, as conv_in of
            inpainting and multiview UNets: "raise"; "pad": the first channels get the delta; "skip".
        exact: keep a copy of the weights on the CPU, so that `unmerge` restores them to the bit. False: `unmerge`
            subtracts, which leaves a rounding of the model's type.

    Raises:
        ValueError: an unknown policy; keys or shapes that differ beyond what the policies allow; weights that are not
            floating point (quantised), or are not here (offloaded to "meta").
    """
    _expect_one_of("missing", missing, _MISSING)
    _expect_one_of("extra_channels", extra_channels, _EXTRA_CHANNELS)
    weights = _weights(model)
    made = Merge(untouched=[key for key in weights if key not in delta])
    made.skipped = [key for key in delta if key not in weights]
    if (made.untouched or made.skipped) and missing == "raise":
        raise ValueError(
            f"model and delta must have the same keys: the model lacks {_some(made.skipped)}, the delta "
            f'{_some(made.untouched)} (missing="skip" merges the others)'
        )
    for key, weight in weights.items():
        if key not in delta:
            continue
        change = delta[key]
        if not change.is_floating_point():
            raise ValueError(f"{key} of the delta must be floating point, got {change.dtype}")
        if weight.shape != change.shape:
            if not _has_extra_channels(weight, change):
                raise ValueError(
                    f"{key} must have the model's shape {_shape(weight)}, got {_shape(change)} in the delta"
                )
            if extra_channels == "raise":
                raise ValueError(
                    f"{key} has {weight.shape[1]} input channels in the model and {change.shape[1]} in the delta "
                    '(extra_channels="pad" changes the first ones, "skip" none)'
                )
            if extra_channels == "skip":
                made.skipped.append(key)
                continue
            made.padded.append(key)
        made.merged.append(key)
        made._weights.append(_Weight(key, weight, change, scale))

    for weight in made._weights:
        weight.merge(exact)
    return made


# --------------------------------------------------------------------------------------------------------------- files


def save(delta: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write `delta_weights.safetensors` into a folder."""
    from safetensors.torch import save_file

    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in delta.items()}, path, metadata={"format": "pt"})
    return path


def load(
    name_or_path: str | Path,
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> dict[str, Tensor]:
    """Read delta weights, or compute them from a fine-tuned model.

    Args:
        name_or_path: a safetensors file, or a folder or repository on the hub that holds, itself or under unet/,
            delta_weights.safetensors, or diffusion_pytorch_model.safetensors (one file or shards).
        base: the file is a whole model that was made from this one: the delta is the difference. None: it is a delta.
        variant: of the file's name, e.g. "v0-1" or "fp16".
        revision: of a repository on the hub.

    Raises:
        FileNotFoundError: no such file in the folder or repository.
        ValueError: not safetensors; a whole model without base; delta weights with one.
    """
    paths = _files(str(name_or_path), variant, revision)
    from safetensors.torch import load_file

    loaded = {key: tensor for path in paths for key, tensor in load_file(path).items()}
    norms = [tensor.float().abs().mean() for key, tensor in loaded.items() if key.endswith("weight") and _is_norm(key)]
    # A norm's weights are about 1 in a model and about 0 in a difference of two.
    whole = bool(norms) and torch.stack(norms).median() > 0.5
    if whole and base is None:
        raise ValueError(f"{paths[0]} looks like a whole model: pass base=, the model that it was made from")
    if not whole and norms and base is not None:
        raise ValueError(f"{paths[0]} looks like delta weights already: leave base out")
    return loaded if base is None else extract(base, loaded)


def _is_norm(key: str) -> bool:
    return "norm" in key.rpartition(".")[0].rpartition(".")[2]


def _files(name: str, variant: str | None, revision: str | None) -> list[str]:
    """Local paths of the file, or of its shards."""
    path, ending = Path(name), f".{variant}" if variant else ""
    if path.is_file() or path.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth"):
        if path.suffix != ".safetensors":
            raise ValueError(f"expected a safetensors file, got {name}")
        if not path.is_file():
            raise FileNotFoundError(f"no file {name}")
        return [name]
    fetch = _in_folder(path) if path.is_dir() else _on_hub(name, revision)
    wanted = [f"delta_weights{ending}.safetensors", f"{MODEL_FILE}{ending}.safetensors"]
    index = f"{MODEL_FILE}.safetensors.index{ending}.json"
    for folder in ("", "unet/"):
        for file in wanted:
            if found := fetch(folder + file):
                return [found]
        if found := fetch(folder + index):
            shards = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
            return [_expect(fetch(folder + shard), folder + shard, name) for shard in shards]
    raise FileNotFoundError(f"{name} has none of {', '.join(wanted)} (nor under unet/)")


def _expect(found: str | None, file: str, name: str) -> str:
    if found is None:
        raise FileNotFoundError(f"{name} has no {file}, which its index names")
    return found


def _in_folder(folder: Path) -> Callable[[str], str | None]:
    return lambda file: str(folder / file) if (folder / file).is_file() else None


def _on_hub(name: str, revision: str | None) -> Callable[[str], str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(file: str) -> str | None:
        try:
            return hf_hub_download(name, file, revision=revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    return fetch


# ---------------------------------------------------------------------------------------------------------------- LoRA


@dataclass
class LoRA:
    """Delta weights as a LoRA.

    state_dict: for `pipe.load_lora_weights(...)`, or to be saved with safetensors.
    left_out: keys of the delta that no LoRA can hold (norms, biases), those that are zero not counted.
    error: layer -> |delta - up down| / |delta|, what the rank does not hold.
    """

    state_dict: dict[str, Tensor]
    left_out: list[str]
    error: dict[str, float]


@torch.no_grad()
def to_lora(
    delta: Mapping[str, Tensor], rank: int, *, prefix: str = "unet", dtype: torch.dtype = torch.float32
) -> LoRA:
    """The best LoRA of a rank: for each linear layer and convolution the truncated singular value decomposition.

        delta ~ up down,    up (O, r),  down (r, I)        of a convolution: up (O, r, 1, 1), down (r, I, h, w)

    Every layer gets the same rank, filled up with zeros where it has less, and there are no alphas: a loader that
    scales by alpha / rank scales by 1.

    Args:
        rank: r >= 1.
        prefix: part of the pipeline that the delta belongs to.
        dtype: of the result.

    Raises:
        ValueError: rank < 1.

    Source: Eckart and Young 1936 (the truncation is the nearest matrix of that rank in the Frobenius norm).
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    made = LoRA({}, [], {})
    for key, tensor in delta.items():
        layer, _, kind = key.rpartition(".")
        if kind != "weight" or tensor.ndim not in (2, 4):
            if tensor.count_nonzero():
                made.left_out.append(key)
            continue
        up, values, down = torch.linalg.svd(tensor.to(_wide(tensor)).flatten(1), full_matrices=False)
        total, lost = values.square().sum(), values[rank:].square().sum()
        made.error[layer] = (lost / total).sqrt().item() if total else 0.0
        root = values[:rank].sqrt()
        a, b = root[:, None] * down[:rank], up[:, :rank] * root
        a = nn.functional.pad(a, (0, 0, 0, rank - len(root)))
        b = nn.functional.pad(b, (0, rank - len(root)))
        if tensor.ndim == 4:
            a, b = a.unflatten(1, tensor.shape[1:]), b[:, :, None, None]
        made.state_dict[f"{prefix}.{layer}.lora_A.weight"] = a.to(dtype).contiguous()
        made.state_dict[f"{prefix}.{layer}.lora_B.weight"] = b.to(dtype).contiguous()
    return made


# -------------------------------------------------------------------------------------------------------------- shared


def _weights(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights by its own keys: without those of LoRA, and without the names of its wrappers."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    weights = {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
    for key, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key} must be floating point, got {tensor.dtype}: merge before the model is quantised")
        if tensor.is_meta:
            raise ValueError(f"{key} has no data (device meta): merge before the model is offloaded")
    return weights


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _has_extra_channels(weight: Tensor, change: Tensor) -> bool:
    if weight.ndim != change.ndim or weight.ndim < 2 or weight.shape[1] <= change.shape[1]:
        return False
    return weight.shape[:1] + weight.shape[2:] == change.shape[:1] + change.shape[2:]


def _some(keys) -> str:
    keys = sorted(keys)
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}" if keys else "none"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _expect_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
