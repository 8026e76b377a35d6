"""The authors' checkpoint of Inf-DiT to a folder that `InfDiTUpscalePipeline.from_pretrained` loads."""

from __future__ import annotations

import math
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linattn.schedulers import EDMScheduler

from . import _pickled
from .model import InfDiTTransformer2DModel
from .official import IGNORED, IMAGE_ENCODER

DEEPSPEED_NAME = "mp_rank_*_model_states.pt"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_TOWER = f"{IMAGE_ENCODER}model.visual."
#: What open_clip's tower calls its parts, and transformers' CLIPVisionModelWithProjection.
_TOWER_SINGLE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_TOWER_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_HEAD = 64  # channels to a head of CLIP's towers; their shapes do not say


@dataclass
class Conversion:
    """What `convert_infdit_checkpoint` did.

    folder: that was written.
    source: the file that was read.
    dtype: of the weights.
    config: of the network.
    parameters: of the network.
    image_encoder: where the image encoder came from: "checkpoint", a path, or None where there is none.
    unused: keys of the file that nothing needs.
    """

    folder: Path
    source: Path
    dtype: torch.dtype
    config: dict[str, int]
    parameters: int
    image_encoder: str | None
    unused: list[str]

    def __str__(self) -> str:
        encoder = {
            None: "none: calls of the pipeline need image_embeds, or convert with image_encoder=",
            "checkpoint": "from the checkpoint",
        }
        lines = [
            f"{self.source} -> {self.folder}",
            f"network: {self.parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}, "
            + ", ".join(f"{name}={value}" for name, value in self.config.items()),
        ]
        if self.config["vector_dim"]:
            lines.append(f"image encoder: {encoder.get(self.image_encoder, f'from {self.image_encoder}')}")
        if self.unused:
            lines.append(f"{len(self.unused)} keys of the file are not used by the network")
        return "\n".join(lines)


def convert_infdit_checkpoint(
    src,
    dst,
    *,
    image_encoder=None,
    dtype: torch.dtype | str | None = None,
    image_encoder_heads: int | None = None,
    scheduler: EDMScheduler | None = None,
    max_shard_size: str = "10GB",
) -> Conversion:
    """Make a pipeline's folder, in safetensors, of a checkpoint of Inf-DiT under the authors' names.

        convert_infdit_checkpoint("ckpt/mp_rank_00_model_states.pt", "infdit")
        pipe = InfDiTUpscalePipeline.from_pretrained("infdit")

    The sizes of the network are read off the weights. Nothing that a pickle names is imported or run, whatever is in it
    beside tensors. The folder is written whole or not at all.

    Args:
        src: a file of torch.save (DeepSpeed's mp_rank_00_model_states.pt, a dict whose entry "module" is the state
            dict; or a state dict) or of safetensors, or a folder that holds one of them.
        dst: the folder; it must not exist, or be empty.
        image_encoder: a folder of a CLIP model of transformers (open_clip's ViT-L-14, datacomp_xl_s13b_b90k, which the
            hub has as laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K), instead of the tower of the checkpoint. Without
            either the pipeline is saved without an image encoder.
        dtype: of the saved weights: a torch dtype or its name; None: as they are.
        image_encoder_heads: of the checkpoint's tower; None: its width / 64.
        scheduler: saved with the pipeline; None: `EDMScheduler()`, the settings of the authors.
        max_shard_size: a larger file of weights is cut into several.

    Raises:
        ValueError: a file that is no such checkpoint; keys that are missing, unknown or of the wrong shape are named.
        OSError: src does not exist, or dst does.
    """
    dtype = _dtype(dtype)
    source, dst = _find(Path(src)), Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder")
    if image_encoder is not None and not Path(image_encoder).is_dir():
        raise FileNotFoundError(f"image_encoder must be a folder, got {image_encoder}")

    state = read(source)
    config = config_of(state, source)
    network = _network(state, config, dtype)
    origin = None
    encoder = None
    if image_encoder is not None:
        encoder, origin = _encoder_from(Path(image_encoder), config["vector_dim"], dtype), str(image_encoder)
    elif config["vector_dim"] and any(key.startswith(_TOWER) for key in state):
        encoder = image_encoder_of(state, heads=image_encoder_heads, dtype=dtype)
        _check_dim(encoder, config["vector_dim"], source)
        origin = "checkpoint"
    used_tower = _TOWER if origin == "checkpoint" else None
    unused = [key for key in state if _is_ignored(key, used_tower)]

    from .pipeline import InfDiTUpscalePipeline

    pipe = InfDiTUpscalePipeline(network, scheduler or EDMScheduler(), encoder)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    _write(pipe, dst, max_shard_size)
    return Conversion(dst, source, network.dtype, config, parameters, origin, unused)


# ------------------------------------------------------------------------------------------------------------- reading


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = DTYPES.get(_SHORT.get(dtype, dtype), dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    return dtype


def _find(src: Path) -> Path:
    """The file of weights that src is or holds."""
    if src.is_file():
        return src
    if not src.is_dir():
        raise FileNotFoundError(f"{src} does not exist")
    # Training writes folder/<iteration>/mp_rank_00_model_states.pt.
    found = sorted(src.rglob(DEEPSPEED_NAME)) or sorted(p for s in ("*.pt", "*.safetensors") for p in src.glob(s))
    if len(found) != 1:
        some = ", ".join(str(path.relative_to(src)) for path in found[:4])
        several = f"several files of weights ({some}{' ...' if len(found) > 4 else ''}): pass the one to convert"
        nothing = f"neither {DEEPSPEED_NAME} nor another .pt or .safetensors"
        raise ValueError(f"{src} holds {several if found else nothing}")
    return found[0]


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save or safetensors; tensors are read from the file when they are used.

    Raises:
        ValueError: not such a file, or values that are no tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if zipfile.is_zipfile(path):
        state = _pickled.load(path, "module")
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise ValueError(
                f"{path} is neither a file of torch.save as written since torch 1.6 nor an older one of tensors alone: "
                f"{reason}"
            ) from error
        if isinstance(state, Mapping) and isinstance(state.get("module"), Mapping):
            state = state["module"]
    others = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    if others:
        some = ", ".join(f"{key!r} ({_kind(value)})" for key, value in list(others.items())[:4])
        raise ValueError(f"{path} must hold a state dict, on its own or as its entry 'module'; no tensors are: {some}")
    return dict(state)


def _kind(value: Any) -> str:
    return type(value).__name__


def config_of(state: Mapping[str, Tensor], source: Path | str = "the checkpoint") -> dict[str, int]:
    """The arguments of `InfDiTTransformer2DModel`, from the shapes of the authors' weights.

    Raises:
        ValueError: keys that this needs are missing, or their shapes do not fit together.
    """
    adaln, final = "mixins.adaln_layer", "mixins.final_layer"
    wanted = {
        "patch": "mixins.patch_embed.proj.weight",
        "lr": f"{adaln}.proj_lr.weight",
        "slots": f"{adaln}.re_pos_embed",
        "query": f"{adaln}.lr_query_position_embedding",
        "key": f"{adaln}.lr_key_position_embedding",
        "out": f"{final}.linear.weight",
    }
    missing = [key for key in wanted.values() if key not in state]
    if missing:
        first = ", ".join(list(state)[:3]) or "nothing"
        raise ValueError(f"{source} is no checkpoint of Inf-DiT: it lacks {', '.join(missing)}; it holds {first} ...")
    shapes = {name: tuple(state[key].shape) for name, key in wanted.items()}
    vector = state.get("cond_embed.map_vector.0.weight")
    try:
        hidden, channels, patch, _ = shapes["patch"]
        lr_patch = shapes["lr"][2]
        layers, _, heads, _ = shapes["slots"]
        block, window = (math.isqrt(shapes[name][1]) for name in ("query", "key"))
        # A window is 3 x 3 blocks of the low resolution, and a block shows the same as a block of the output.
        sr_scale, rest = divmod(3 * block * patch, window * lr_patch)
        out, odd = divmod(shapes["out"][0], patch**2)
        whole = (block**2, window**2) == (shapes["query"][1], shapes["key"][1])
        if rest or odd or not whole:
            raise ValueError
    except (ValueError, IndexError, ZeroDivisionError):
        found = ", ".join(f"{wanted[name]} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{source} is no checkpoint of Inf-DiT: shapes do not fit together: {found}") from None
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "block_size": block,
        "in_channels": channels,
        "out_channels": out,
        "vector_dim": 0 if vector is None else vector.shape[1],
        "lr_patch_size": lr_patch,
        "sr_scale": sr_scale,
    }


def _network(state: Mapping[str, Tensor], config: dict, dtype: torch.dtype | None) -> InfDiTTransformer2DModel:
    dtype = dtype or state["mixins.patch_embed.proj.weight"].dtype
    with torch.device("meta"):
        network = InfDiTTransformer2DModel(**config)
    network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")
    network.load_official_state_dict(state)
    return network.eval().requires_grad_(False)


def _is_ignored(key: str, tower: str | None) -> bool:
    if key.startswith(IMAGE_ENCODER):
        return tower is None or not key.startswith(tower)
    return any(re.fullmatch(pattern, key) for pattern in IGNORED)


# -------------------------------------------------------------------------------------------------------- image encoder


def image_encoder_of(state: Mapping[str, Tensor], *, heads: int | None = None, dtype: torch.dtype | None = None):
    """transformers' CLIPVisionModelWithProjection of open_clip's tower under "image_encoder.model.visual.".

    Args:
        heads: of its attention; None: width / 64.
        dtype: None: as the weights are.

    Raises:
        ValueError: missing or unknown keys, or shapes that do not fit; the message names them.
    """
    from transformers import CLIPVisionModelWithProjection

    config, weights = tower_of(state, heads)
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(weights)
    return model.to(dtype or weights["visual_projection.weight"].dtype).eval()


def tower_of(state: Mapping[str, Tensor], heads: int | None = None):
    """(config, state dict) of `image_encoder_of`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = {key.removeprefix(_TOWER): value for key, value in state.items() if key.startswith(_TOWER)}
    for key in ("conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight"):
        if key not in tower:
            raise ValueError(f"the image encoder of the checkpoint lacks {_TOWER}{key}")
    width, _, patch, _ = tower["conv1.weight"].shape
    if heads is None:
        heads = width // _HEAD
    if heads < 1 or width % heads:
        raise ValueError(f"image_encoder_heads must divide the width of the image encoder, {width}, got {heads}")
    layers = {match[1] for key in tower if (match := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tower["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=1 + max(int(layer) for layer in layers),
        num_attention_heads=heads,
        image_size=patch * math.isqrt(tower["positional_embedding"].shape[0] - 1),
        patch_size=patch,
        projection_dim=tower["proj"].shape[1],
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    own = {"visual_projection.weight": tower["proj"].t()}
    used = {"proj"}

    def take(key: str, *names: str) -> None:
        if key in tower:
            used.add(key)
            own.update(zip(names, tower[key].chunk(len(names)), strict=True))

    for key, name in _TOWER_SINGLE.items():
        take(key, name)
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
        for end in ("weight", "bias"):
            for key, name in _TOWER_LAYER.items():
                take(f"{theirs}.{key}.{end}", f"{ours}.{name}.{end}")
            take(f"{theirs}.attn.in_proj_{end}", *(f"{ours}.self_attn.{x}_proj.{end}" for x in "qkv"))

    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in CLIPVisionModelWithProjection(config).state_dict().items()}
    found = {name: tuple(x.shape) for name, x in own.items()}
    problems = {
        "missing": sorted(set(wanted) - set(found)),
        "unknown": sorted(_TOWER + key for key in set(tower) - used),
        "of another shape": sorted(
            f"{name}: {shape} instead of {wanted[name]}" for name, shape in found.items() if shape != wanted[name]
        ),
    }
    problems = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if problems:
        raise ValueError(f"the image encoder of the checkpoint does not fit; keys {'; '.join(problems)}")
    return config, own


def _encoder_from(folder: Path, vector_dim: int, dtype: torch.dtype | None):
    from transformers import CLIPVisionModelWithProjection

    if not vector_dim:
        raise ValueError("image_encoder is of no use: this network has vector_dim = 0")
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    _check_dim(encoder, vector_dim, folder)
    return encoder if dtype is None else encoder.to(dtype)


def _check_dim(encoder, vector_dim: int, source: Path) -> None:
    if encoder.config.projection_dim != vector_dim:
        raise ValueError(
            f"the image encoder of {source} gives vectors of {encoder.config.projection_dim}, the network wants "
            f"{vector_dim}"
        )


# ------------------------------------------------------------------------------------------------------------- writing


def _write(pipe, dst: Path, max_shard_size: str) -> None:
    """Into a folder beside dst, which then takes its place."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are for one user alone
        pipe.save_pretrained(partial, safe_serialization=True, max_shard_size=max_shard_size)
        os.replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
