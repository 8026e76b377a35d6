"""Checkpoints of CLEAR: where they lie, what they hold, and whether that is what is needed.

The published files are named after the pattern they were trained for (clear_local_16_down_4.safetensors) and hold the
q, k, v and output projections of every attention, and with pooling its weight:

    transformer_blocks.{i}.attn.{to_q,to_k,to_v,to_out.0}.{weight,bias}
    single_transformer_blocks.{j}.attn.{to_q,to_k,to_v}.{weight,bias}
    {both}.attn.processor.spatial_weight                                (1, 1, 1, f, 1, f, 1)

Names, shapes and sizes are checked from the head of a file, before any weight is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ._mount import some

PUBLISHED_REPOSITORY = "Huage001/CLEAR"
PUBLISHED = (
    "clear_local_32.safetensors",
    "clear_local_16.safetensors",
    "clear_local_8.safetensors",
    "clear_local_16_down_4.safetensors",
    "clear_local_8_down_4.safetensors",
)
SAVED_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"

_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")
_KEY = re.compile(
    r"(.+\.attn2?)\.(?:to_([qkv])\.(?:weight|bias)|(to_out\.0)\.(?:weight|bias)|processor\.spatial_weight)"
)
_SPATIAL = ".processor.spatial_weight"


def find(path, weight_name: str | None, **hub) -> tuple[Path, dict | None]:
    """(the weights, the config saved beside them or None).

    Args:
        path: a file, a folder, or a name on the hub.
        weight_name: the file in a folder or repository; None: what `save_pretrained` wrote.
        hub: subfolder, and arguments of `hf_hub_download`.
    """
    subfolder = hub.pop("subfolder", None)
    if weight_name is not None:
        weight_name = _with_suffix(weight_name)
    local = Path(path)
    if local.is_file():
        if weight_name is not None:
            raise ValueError(f"{path} is a file, so weight_name={weight_name!r} has no meaning")
        file = local.with_name(_with_suffix(local.name))
    elif local.is_dir():
        folder = local / subfolder if subfolder else local
        file = folder / (weight_name or SAVED_NAME)
        if not file.is_file():
            there = sorted(found.name for found in folder.glob("*.safetensors"))
            choice = f"there are {', '.join(there)}: pass one as weight_name=" if there else "nor any other safetensors"
            raise OSError(f"{folder} has no {file.name}; {choice}")
    else:
        file = _from_hub(str(path), weight_name or SAVED_NAME, subfolder, hub)
        if file.name == SAVED_NAME:
            _from_hub(str(path), CONFIG_NAME, subfolder, hub)
    return file, _config_beside(file)


def _with_suffix(name: str) -> str:
    suffix = Path(name).suffix
    if suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ValueError(f"CLEAR loads safetensors only, got {name}")
    return name if suffix == ".safetensors" else f"{name}.safetensors"


def _from_hub(repository: str, name: str, subfolder: str | None, options: dict) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **options))
    except HFValidationError as error:
        raise OSError(f"{repository} is no file, no folder, and no name on the hub") from error
    except RemoteEntryNotFoundError as error:
        hint = f": pass weight_name=, e.g. {PUBLISHED[1]}" if name == SAVED_NAME else ""
        raise OSError(f"{repository} has no {name}{hint}") from error


def _config_beside(file: Path) -> dict | None:
    """The config that belongs to a file: only what `save_pretrained` wrote has one."""
    config = file.with_name(CONFIG_NAME)
    if file.name != SAVED_NAME or not config.is_file():
        return None
    config = json.loads(config.read_text(encoding="utf-8"))
    if config.get("_class_name") != "CLEAR":
        raise ValueError(f"{file.parent} holds a {config.get('_class_name')}, not a CLEAR")
    missing = {"window_size", "down_factor", "modules_list"} - set(config)
    if missing:
        raise ValueError(f"{file.with_name(CONFIG_NAME)} lacks {sorted(missing)}")
    return config


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of everything in a file."""
    try:
        with safe_open(str(file), "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def read(file: Path, keys: list[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    with safe_open(str(file), "pt") as opened:
        return {key: opened.get_tensor(key).to(dtype) if dtype else opened.get_tensor(key) for key in keys}


def settle(file: Path, shapes: dict, config: dict | None, window_size, down_factor) -> tuple[int, int]:
    """The one radius and the one factor of pooling on which all agree who know it.

    Raises:
        ValueError: two that know it differ, or nobody knows.
    """
    named = _NAME.fullmatch(file.stem)
    sizes = {
        "window_size=": window_size,
        "config.json": config and config["window_size"],
        f"the name {file.name}": int(named[1]) if named else None,
    }
    factors = {
        "down_factor=": down_factor,
        "config.json": config and config["down_factor"],
        f"the name {file.name}": int(named[2] or 1) if named else None,
        "the weights": _pooling_in(file, shapes),
    }
    return _agreed("window_size", file, sizes), _agreed("down_factor", file, factors)


def _agreed(what: str, file: Path, said: dict) -> int:
    said = {who: value for who, value in said.items() if value is not None}
    if not said:
        raise ValueError(
            f"{file.name} does not say its {what}: pass {what}=. (The published names do, such as {PUBLISHED[3]}, "
            "and so does the config.json that save_pretrained writes.)"
        )
    if len(set(said.values())) > 1:
        pooling = what == "down_factor"
        raise ValueError(
            f"{what} of {file}: "
            + ", ".join(f"{value} says {who}" for who, value in said.items())
            + ". Weights are distilled for one pattern and mean nothing in another: "
            + (
                f"pass down_factor={said['the weights']}, or leave it out"
                if pooling
                else "leave window_size out, or pass the right one (and rename the file, if its name is wrong)"
            )
        )
    return next(iter(said.values()))


def _pooling_in(file: Path, shapes: dict) -> int:
    """f of the spatial weights in a file; 1 where there are none."""
    found = {shape for key, shape in shapes.items() if key.endswith(_SPATIAL)}
    if not found:
        return 1
    shape = found.pop()
    f = shape[3] if len(shape) == 7 else 0
    if found or shape != (1, 1, 1, f, 1, f, 1) or f < 2:
        raise ValueError(
            f"{file}: every spatial_weight must have one shape (1, 1, 1, f, 1, f, 1), got {sorted({shape, *found})}"
        )
    return f


def entries_in(shapes: dict) -> tuple[list[dict], str | None]:
    """(modules_list, class of the transformer if that can be told) of published weights, from their keys."""
    names: dict[str, dict] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match:
            entry = names.setdefault(match[1], {"module_name": match[1], "dim": None, "to_out": False})
            entry["to_out"] |= match[3] is not None
            if len(shape) == 2:
                entry["dim"] = shape[0]
    entries = sorted(names.values(), key=lambda entry: _in_order(entry["module_name"]))
    dims = {entry["dim"] for entry in entries} - {None}
    for entry in entries:
        entry["dim"] = entry["dim"] or next(iter(dims), 0)
    if not entries:
        raise ValueError(f"there are no weights of CLEAR in it: no key of the kinds it has, but {some(shapes)}")
    single = any(name.startswith("single_transformer_blocks.") for name in names)
    return entries, "FluxTransformer2DModel" if single else None


def _in_order(name: str) -> tuple:
    return name.startswith("single_"), [int(part) if part.isdigit() else part for part in name.split(".")]


def check(file: Path, shapes: dict, expected: dict, others: set[str]) -> list[str]:
    """The keys to read.

    Args:
        expected: key -> shape.
        others: names of attentions whose weights may be there and are not wanted.

    Raises:
        ValueError: keys are missing, unknown or misshapen.
    """
    unknown = [
        key
        for key in shapes
        if key not in expected and not ((match := _KEY.fullmatch(key)) is not None and match[1] in others)
    ]
    wrong = [f"{k} {shapes[k]}, needed {expected[k]}" for k in expected if k in shapes and shapes[k] != expected[k]]
    problems = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": unknown,
        "of another shape": wrong,
    }
    problems = {what: keys for what, keys in problems.items() if keys}
    if problems:
        told = "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items())
        hint = " (to mount on some attentions only, pass layers=)" if "missing" in problems else ""
        raise ValueError(
            f"{file} does not hold the weights that are needed{hint}: {told}. Is it for another transformer?"
        )
    return list(expected)
