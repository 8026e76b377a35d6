"""The names that the authors' code gives to the weights of Inf-DiT, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

#: Keys that the network has no use for: a norm of the keys that is never applied, tables that are computed, absolute
#: positions that are never added.
IGNORED = (
    r"mixins\.adaln_layer\.k_layer_norm\.\d+\.(weight|bias)",
    r"mixins\.adaln_layer\.rope\.freqs_(cos|sin)",
    r"transformer\.position_embeddings\.weight",
)
#: Keys of the image encoder: another model, which `convert_infdit_checkpoint` takes care of.
IMAGE_ENCODER = "image_encoder."

_LINEAR = ("weight", "bias")
_SINGLE = {
    "patch_embed": "mixins.patch_embed.proj",
    "lr_embed": "mixins.adaln_layer.proj_lr",
    "time_embed.linear_1": "time_embed.mlp.0",
    "time_embed.linear_2": "time_embed.mlp.2",
    "vector_embed.linear_1": "cond_embed.map_vector.0",
    "vector_embed.linear_2": "cond_embed.map_vector.2",
    "modulation_out": "mixins.final_layer.adaLN_modulation.1",
    "proj_out": "mixins.final_layer.linear",
    "transformer_blocks.0.norm2": "mixins.adaln_layer.post_cross_attention_layernorm",
    "transformer_blocks.0.cross_attn.norm_q": "mixins.adaln_layer.cross_q_ln",
    "transformer_blocks.0.cross_attn.norm_k": "mixins.adaln_layer.cross_k_ln",
    "transformer_blocks.0.cross_attn.to_q": "mixins.adaln_layer.cross_attention.query",
    "transformer_blocks.0.cross_attn.to_out.0": "mixins.adaln_layer.cross_attention.dense",
}
_PER_LAYER = {
    "modulation": "mixins.adaln_layer.adaLN_modulations.{}.1",
    "attn.norm_qk": "mixins.adaln_layer.q_layer_norm.{}",
    "attn.to_out.0": "transformer.layers.{}.attention.dense",
    "ff.net.0.proj": "transformer.layers.{}.mlp.dense_h_to_4h",
    "ff.net.2": "transformer.layers.{}.mlp.dense_4h_to_h",
}
_QKV = "transformer.layers.{}.attention.query_key_value"
_CROSS_KV = "mixins.adaln_layer.cross_attention.key_value"
_SLOTS = "mixins.adaln_layer.re_pos_embed"
_POSITIONS = {
    "query_position": "mixins.adaln_layer.lr_query_position_embedding",
    "key_position": "mixins.adaln_layer.lr_key_position_embedding",
}


def to_own_names(model, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the authors' names as one for `model`.

    Raises:
        ValueError: keys that are missing, unknown, or of another shape than `model` has; the message names them.
    """
    layers, wanted = len(model.transformer_blocks), {name: x.shape for name, x in model.state_dict().items()}
    used: set[str] = set()
    missing: list[str] = []
    own: dict[str, Tensor] = {}

    def take(key: str, make) -> None:
        if key not in state_dict:
            missing.append(key)
            return
        used.add(key)
        own.update(make(state_dict[key]))

    def whole(name: str):
        return lambda x: {name: x}

    def parts(names: tuple[str, ...], end: str):
        return lambda x: {f"{name}.{end}": part for name, part in zip(names, x.chunk(len(names)), strict=True)}

    for end in _LINEAR:
        for name, theirs in _SINGLE.items():
            if model.vector_embed is not None or not name.startswith("vector_embed"):
                take(f"{theirs}.{end}", whole(f"{name}.{end}"))
        take(f"{_CROSS_KV}.{end}", parts(tuple(f"transformer_blocks.0.cross_attn.to_{x}" for x in "kv"), end))
        for layer in range(layers):
            block = f"transformer_blocks.{layer}"
            for name, theirs in _PER_LAYER.items():
                take(f"{theirs.format(layer)}.{end}", whole(f"{block}.{name}.{end}"))
            take(f"{_QKV.format(layer)}.{end}", parts(tuple(f"{block}.attn.to_{x}" for x in "qkv"), end))
    take(_SLOTS, lambda x: {f"transformer_blocks.{i}.attn.slot_embed": part for i, part in enumerate(x)})
    for name, theirs in _POSITIONS.items():
        take(theirs, lambda x, name=name: {f"transformer_blocks.0.cross_attn.{name}": x[0]})

    problems = []
    unknown = [
        key
        for key in state_dict
        if key not in used and not key.startswith(IMAGE_ENCODER) and not any(re.fullmatch(p, key) for p in IGNORED)
    ]
    misshapen = [
        f"{name}: {tuple(x.shape)} instead of {tuple(wanted[name])}"
        for name, x in own.items()
        if name in wanted and x.shape != wanted[name]
    ]
    unknown += [name for name in own if name not in wanted]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen)):
        if names:
            problems.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''})")
    if problems:
        raise ValueError(
            "expected the weights of Inf-DiT under the names of the authors' code for a network of this "
            f"configuration; keys {'; '.join(problems)}"
        )
    return own


def to_official_names(model) -> dict[str, Tensor]:
    """The weights of `model` under the authors' names: what `to_own_names` takes."""
    own, layers = model.state_dict(), range(len(model.transformer_blocks))
    theirs: dict[str, Tensor] = {}
    for end in _LINEAR:
        for name, key in _SINGLE.items():
            if f"{name}.{end}" in own:
                theirs[f"{key}.{end}"] = own[f"{name}.{end}"]
        cross = "transformer_blocks.0.cross_attn"
        theirs[f"{_CROSS_KV}.{end}"] = torch.cat([own[f"{cross}.to_{x}.{end}"] for x in "kv"])
        for layer in layers:
            block = f"transformer_blocks.{layer}"
            for name, key in _PER_LAYER.items():
                theirs[f"{key.format(layer)}.{end}"] = own[f"{block}.{name}.{end}"]
            theirs[f"{_QKV.format(layer)}.{end}"] = torch.cat([own[f"{block}.attn.to_{x}.{end}"] for x in "qkv"])
    theirs[_SLOTS] = torch.stack([own[f"transformer_blocks.{layer}.attn.slot_embed"] for layer in layers])
    for name, key in _POSITIONS.items():
        theirs[key] = own[f"transformer_blocks.0.cross_attn.{name}"][None]
    return theirs
