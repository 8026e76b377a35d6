"""LinFusion: every self-attention of a Stable Diffusion UNet becomes linear attention.

    q = Wq (x + Gq(x)),  k = Wk (x + Gk(x)),  v = Wv x,      G(t) = W2 leaky_relu(layer_norm(W1 t + b1)) + b2
    y = Wo linear_attention(q, k, v, feature_map="elu1", eps=1e-4) + bo

x (B, N, C), heads split C into contiguous chunks of head_dim. There is no softmax, no 1/sqrt(head_dim), no mask.
Time and memory grow with N, not with N^2. The function and its gradient stand in docs/linear_attention.md; the adapter
holds no attention math, it only mounts modules that call the op.

    linfusion = LinFusion.construct_for(pipeline, pretrained_model_name_or_path="path/or/hub-name")
    ...
    linfusion.unmount()

Source: LinFusion: 1 GPU, 1 Minute, 16K Image (arXiv 2409.02097). Checkpoints of its authors load as they are.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

import linattn
from linattn.ops.linear_attention import FEATURE_MAPS

from ._mount import (
    Mount,
    base_layer,
    find_unet,
    is_offloaded,
    refuse_fused,
    some,
    subtract_fused,
    weight_dtype,
    weights_present,
    wrappers,
)

# The layers that keep diffusers' names, so that whatever addresses them by name (LoRA above all) finds them.
SLOTS = ("to_q", "to_k", "to_v", "to_out.0")

# Which published weights fit which architecture: {(width, heads): number of attn1 modules}.
ARCHITECTURES = {
    "sd1.5": {(320, 8): 5, (640, 8): 5, (1280, 8): 6},
    "sd2.1": {(320, 5): 5, (640, 10): 5, (1280, 20): 6},
    "sdxl": {(640, 10): 10, (1280, 20): 60},
}
PUBLISHED = {
    "sd1.5": "Yuanshi/LinFusion-1-5",
    "sd2.1": "Yuanshi/LinFusion-2-1",
    "sdxl": "Yuanshi/LinFusion-XL",
}
# Repositories whose weights are known to go with a published LinFusion.
KNOWN_REPOSITORIES = {
    "runwayml/stable-diffusion-v1-5": "sd1.5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1.5",
    "CompVis/stable-diffusion-v1-4": "sd1.5",
    "SG161222/Realistic_Vision_V4.0_noVAE": "sd1.5",
    "SG161222/Realistic_Vision_V5.1_noVAE": "sd1.5",
    "Lykon/dreamshaper-8": "sd1.5",
    "timbrooks/instruct-pix2pix": "sd1.5",
    "stabilityai/stable-diffusion-2-1": "sd2.1",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
    "diffusers/sdxl-instructpix2pix-768": "sdxl",
}


# Ways of diffusers to compute the same softmax attention.
STOCK_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
)

# What says where a checkpoint is, among the arguments of from_pretrained.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LinearAttnProcessor:
    """Runs a `LinearAttention` module. Rebuildable without arguments; weights and settings live in the module."""

    def __call__(
        self,
        attn: LinearAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError(
                f"linear attention has no attention_mask, got one of shape {tuple(attention_mask.shape)}: every query "
                "sees every key. Call without a mask, or unmount() LinFusion"
            )
        if hidden_states.ndim != 3:
            raise ValueError(f"hidden_states must be (batch, tokens, channels), got {tuple(hidden_states.shape)}")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(hidden_states + attn.to_q_(hidden_states))
        k = attn.to_k(context + attn.to_k_(context))
        v = attn.to_v(context)
        # By head_dim and not by heads: tensor parallelism shards the heads. The op reads these views in place.
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in (q, k, v))
        out = linattn.linear_attention(q, k, v, feature_map=attn.feature_map, eps=attn.eps)
        out = out.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


class LinearAttention(Attention):
    r"""The module that takes the place of a UNet's `attn1`.

    Keeps the children `to_q`, `to_k`, `to_v`, `to_out` of diffusers' Attention and adds the branches `to_q_`, `to_k_`.
    Layers are called, their weights never read, so LoRA wrappers and quantised linears work inside it.

    Args:
        query_dim: channels C.
        heads: number of heads; C must be a multiple.
        projection_mid_dim: width of the branches; None: C; -1: the branch is the identity, so q = Wq (2 x).
        feature_map, eps: as in `linattn.linear_attention`. The published weights were trained with the defaults.

    Shapes:
        hidden_states (B, N, C), encoder_hidden_states (B, M, C) or None for self-attention; returns (B, N, C).
    """

    def __init__(
        self,
        query_dim: int,
        heads: int,
        projection_mid_dim: int | None = None,
        feature_map: str = "elu1",
        eps: float = 1e-4,
    ):
        if query_dim % heads:
            raise ValueError(f"query_dim must be a multiple of heads, got {query_dim=}, {heads=}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}")
        super().__init__(query_dim, heads=heads, dim_head=query_dim // heads, processor=LinearAttnProcessor())
        self.head_dim = query_dim // heads
        self.feature_map = feature_map
        self.eps = eps
        self.to_q_ = _branch(query_dim, projection_mid_dim)
        self.to_k_ = _branch(query_dim, projection_mid_dim)

    def attention_spec(self) -> dict:
        """What `linattn.report` says of this layer."""
        return {
            "op": "linear_attention",
            "adapter": "LinFusion",
            "options": {"feature_map": self.feature_map, "eps": self.eps},
            "mask": False,
            "processor": LinearAttnProcessor,
        }

    def set_processor(self, processor) -> None:
        # A softmax processor would run on weights trained for linear attention and give garbage without a word.
        if isinstance(processor, LinearAttnProcessor):
            super().set_processor(processor)
        else:
            warnings.warn(
                f"{type(processor).__name__} refused: these attn1 modules are LinFusion's and stay linear. "
                "unmount() LinFusion to use another attention processor on them",
                stacklevel=2,
            )

    def __setattr__(self, name, value) -> None:
        # Some pipelines (perturbed attention guidance) assign the attribute instead of calling set_processor.
        if name == "processor" and not isinstance(value, LinearAttnProcessor):
            self.set_processor(value)
        else:
            super().__setattr__(name, value)

    def fuse_projections(self, fuse: bool = True) -> None:
        if fuse:
            warnings.warn(
                "fuse_qkv_projections has no effect on LinFusion's attn1 modules: "
                "their q, k and v are projections of different inputs",
                stacklevel=2,
            )

    @torch.no_grad()
    def copy_base_weights(self, attention: Attention) -> None:
        """Take over the projections of a softmax attention, and let the branches start from zero.

        So q, k, v and the output projection are exactly those of `attention`; only the attention itself differs.
        """
        for slot in SLOTS:
            _copy_linear(base_layer(attention.get_submodule(slot)), base_layer(self.get_submodule(slot)))
        for branch in (self.to_q_, self.to_k_):
            if isinstance(branch, nn.Sequential):
                nn.init.zeros_(branch[-1].weight)
                nn.init.zeros_(branch[-1].bias)


class LinFusion(ModelMixin, ConfigMixin):
    """The linear self-attentions of a UNet: built, mounted, unmounted, loaded and saved as one model.

    Reads and writes the published layout: `config.json` with `modules_list`, and one safetensors file in which module
    number i of that list owns the keys `{i}.to_q.weight`, `{i}.to_q_.0.weight`, ...

    Args:
        modules_list: one entry per module, `{"module_name": qualified name in the UNet, "dim_n": channels,
            "heads": heads, "projection_mid_dim": branch width, None = channels, -1 = identity}`.
        feature_map, eps: the attention these weights belong to, see `linattn.linear_attention`.
    """

    @register_to_config
    def __init__(self, modules_list: list[dict], feature_map: str = "elu1", eps: float = 1e-4):
        super().__init__()
        for index, entry in enumerate(modules_list):
            _check_entry(index, entry)
            module = LinearAttention(entry["dim_n"], entry["heads"], entry["projection_mid_dim"], feature_map, eps)
            self.add_module(str(index), module)
        self._mount: Mount | None = None

    @property
    def modules_dict(self) -> dict[str, LinearAttention]:
        """Name in the UNet -> module."""
        return {entry["module_name"]: self.get_submodule(str(i)) for i, entry in enumerate(self.config.modules_list)}

    @property
    def mounted(self) -> bool:
        return self._mount is not None

    @staticmethod
    def get_default_config(pipeline_or_unet, mid_dim_scale: int | None = None) -> dict:
        """The config for a UNet, read off the UNet itself: `LinFusion(**LinFusion.get_default_config(unet))`.

        Args:
            mid_dim_scale: branch width = channels // mid_dim_scale; None: as wide as the channels. (The published
                weights use None for SD 1.5 and 2.1 and 16 for SDXL.)
        """
        modules = _self_attentions(find_unet(pipeline_or_unet))
        widths = sorted({attention.query_dim for attention in modules.values()})
        if mid_dim_scale is not None and not 1 <= mid_dim_scale <= widths[0]:
            raise ValueError(
                f"mid_dim_scale must be from 1 to {widths[0]}, the channels of the narrowest self-attention, "
                f"got {mid_dim_scale}"
            )
        return {
            "modules_list": [
                {
                    "dim_n": attention.query_dim,
                    "heads": attention.heads,
                    "module_name": name,
                    "projection_mid_dim": None if mid_dim_scale is None else attention.query_dim // mid_dim_scale,
                }
                for name, attention in modules.items()
            ]
        }

    @staticmethod
    def architecture(pipeline_or_unet) -> str | None:
        """Which of `ARCHITECTURES` this UNet is, by the widths and heads of its self-attentions; None if none."""
        found = Counter((a.query_dim, a.heads) for a in _self_attentions(find_unet(pipeline_or_unet)).values())
        return next((name for name, modules in ARCHITECTURES.items() if modules == found), None)

    @classmethod
    def construct_for(
        cls,
        pipeline=None,
        *,
        unet: nn.Module | None = None,
        pretrained_model_name_or_path=None,
        load_pretrained: bool = True,
        pipe_name_path: str | None = None,
        mid_dim_scale: int | None = None,
        **load_options,
    ) -> LinFusion:
        """Build (or load) the LinFusion that fits a UNet, and mount it.

        Args:
            pipeline: a diffusers pipeline with a UNet, or the UNet itself.
            unet: the UNet, if `pipeline` is not given.
            pretrained_model_name_or_path: hub name or folder of LinFusion weights.
            load_pretrained: with no path given, True looks up the published weights for this UNet: by the name it was
                loaded from (or `pipe_name_path`), else by its architecture. False loads nothing: base weights are
                copied from the UNet and the new branches start as zero.
            pipe_name_path: the repository whose weights these are, where the pipeline does not know it.
            mid_dim_scale: where nothing is loaded, the width of the branches, as in `get_default_config`; weights that
                are loaded have theirs.
            load_options: passed to `from_pretrained` (subfolder, revision, variant, local_files_only, ...).

        Raises:
            ValueError: no weights are known for this UNet, or the weights do not fit it (naming the module).
            RuntimeError: a LinFusion is mounted on this UNet already.
        """
        if (pipeline is None) == (unet is None):
            raise ValueError("pass either a pipeline (or UNet) or unet=")
        target = find_unet(pipeline if unet is None else unet)
        _refuse_mounted(target)
        path = pretrained_model_name_or_path
        if path is None and load_pretrained:
            path = cls._published_for(pipeline, target, pipe_name_path)
        if path is not None:
            if mid_dim_scale is not None:
                raise TypeError(f"{mid_dim_scale=} belongs to load_pretrained=False: {path} has its own branch widths")
            linfusion = cls.from_pretrained(path, **{"torch_dtype": weight_dtype(target), **load_options})
        else:
            if load_options:
                raise TypeError(f"nothing is loaded, so {sorted(load_options)} have no meaning")
            linfusion = cls(**cls.get_default_config(target, mid_dim_scale))
            linfusion.copy_base_weights(target)
        return linfusion.mount_to(target)

    @classmethod
    def _published_for(cls, pipeline, unet, pipe_name_path) -> str:
        names = [pipe_name_path]
        if pipe_name_path is None:
            names = [getattr(getattr(m, "config", None), "_name_or_path", None) for m in (pipeline, unet)]
        family = next((KNOWN_REPOSITORIES[name] for name in names if name in KNOWN_REPOSITORIES), None)
        family = family or cls.architecture(unet)
        if family is None:
            name = next((name for name in names if name), "this UNet")
            raise ValueError(
                f"no published LinFusion weights are known for {name!r}, and its architecture is none of "
                f"{', '.join(ARCHITECTURES)}. Either pass pretrained_model_name_or_path= with LinFusion weights, "
                f"or pipe_name_path= with the repository it derives from ({', '.join(KNOWN_REPOSITORIES)}), "
                "or load_pretrained=False to start from the UNet's own weights (then distill)"
            )
        return PUBLISHED[family]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> LinFusion:
        """Load weights: diffusers' `from_pretrained`, safetensors only, straight in `torch_dtype`.

        Raises:
            ValueError: keys are missing, unknown or of the wrong shape; the message names their module in the UNet.
            OSError: there is no safetensors file (pickles are not read).
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("LinFusion loads safetensors only, got use_safetensors=False")
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:
            keys = re.findall(r"(?<![\w.])\d+\.to_(?:q|k|v|out|q_|k_)\.[\w.]*\w", str(error))
            if not keys:
                raise
            where = {key: kwargs[key] for key in _WHERE if key in kwargs}
            modules = cls.load_config(pretrained_model_name_or_path, **where)["modules_list"]
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not have the shapes of their config.json: "
                f"{_named(dict.fromkeys(keys), modules)}. {error}"
            ) from error
        # diffusers leaves missing weights at random values, with a warning at most.
        wrong = {what: info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
        if wrong:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not match their config.json: "
                + "; ".join(f"{what}: {_named(keys, model.config.modules_list)}" for what, keys in wrong.items())
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write `config.json` and the safetensors file: diffusers' `save_pretrained`.

        Raises:
            ValueError: a LoRA is attached to the modules; its keys have no place in the published layout.
        """
        wrapped = [f"{i}.{slot}" for i, m in self.named_children() for slot in SLOTS if _is_wrapped(m, slot)]
        if wrapped:
            raise ValueError(
                f"LoRA (or another peft) layers are attached at {some(wrapped)}: unmount() first (they stay with the "
                "UNet), then save"
            )
        if is_offloaded(self):
            raise ValueError(
                "the weights are offloaded by accelerate and not in the modules: unmount() first, then save"
            )
        super().save_pretrained(save_directory, **kwargs)

    def copy_base_weights(self, pipeline_or_unet) -> LinFusion:
        """Start from the UNet's own projections, with branches that add nothing yet."""
        unet = find_unet(pipeline_or_unet)
        self._check_fit(unet)
        for name, module in self.modules_dict.items():
            attention = unet.get_submodule(name)
            with contextlib.ExitStack() as stack:
                for slot in SLOTS:
                    stack.enter_context(weights_present(base_layer(attention.get_submodule(slot))))
                module.copy_base_weights(attention)
            with torch.no_grad():
                for slot in SLOTS:
                    subtract_fused(attention.get_submodule(slot), module.get_submodule(slot))
        return self

    def mount_to(self, pipeline_or_unet) -> LinFusion:
        """Put the modules in place of the UNet's, after moving them to its device and dtype.

        Plugins keep working: LoRA layers on the replaced modules move over to the new ones (and back on unmount), fused
        or not, and the new modules are offloaded and stored as the old ones were. An attention processor that somebody
        has set on a replaced module does nothing while it is away; a warning names it.

        Raises:
            ValueError: a module is missing in the UNet, has another shape, or does something linear attention cannot;
                the message names it, and nothing has been changed.
            RuntimeError: mounted already.
        """
        if self.mounted:
            raise RuntimeError("this LinFusion is mounted already: unmount() it first")
        unet = find_unet(pipeline_or_unet)
        _refuse_mounted(unet)
        self._check_fit(unet)
        self.train(unet.training)
        self._mount = Mount(unet, self.modules_dict, SLOTS)
        _warn_of_processors(self._mount.originals)
        return self

    def unmount(self) -> LinFusion:
        """Put the original modules back: the same objects, so that nothing of the mounting remains.

        Raises:
            RuntimeError: not mounted, or something else was put in the place of the mounted modules since.
            ValueError: something is fused into the weights that cannot be taken out of them again.
        """
        if self._mount is None:
            raise RuntimeError("this LinFusion is not mounted on a UNet")
        foreign = self._mount.foreign()
        if foreign:
            raise RuntimeError(f"the UNet no longer holds LinFusion's modules at {some(foreign)}; nothing was changed")
        refuse_fused(self.modules_dict, self._mount.originals, SLOTS, "unmount")
        self._mount.undo()
        # fuse_qkv_projections keeps the processors it found, to put them back: ours must not go on the originals.
        kept = getattr(self._mount.model, "original_attn_processors", None) or {}
        for name, original in self._mount.originals.items():
            if isinstance(kept.get(f"{name}.processor"), LinearAttnProcessor):
                kept[f"{name}.processor"] = original.processor
        self._mount = None
        return self

    def _check_fit(self, unet: nn.Module) -> None:
        """Raise before anything is touched, with the names of the modules that do not fit and the reason."""
        problems = []
        found = {}
        for entry in self.config.modules_list:
            name = entry["module_name"]
            try:
                found[name] = unet.get_submodule(name)
            except AttributeError:
                problems.append(f"{name}: the UNet has no such module")
                continue
            reason = _why_not(found[name], entry)
            if reason:
                problems.append(f"{name}: {reason}")
        if problems:
            raise ValueError(f"LinFusion does not fit this UNet ({len(problems)} modules): {some(problems, '; ')}")
        refuse_fused(found, found, SLOTS, "mount")


def _named(keys, modules_list: list[dict]) -> str:
    """Keys of a checkpoint, each with the module in the UNet that it belongs to."""
    named = []
    for key in keys:
        index = str(key).partition(".")[0]
        known = index.isdigit() and int(index) < len(modules_list)
        named.append(f"{key} ({modules_list[int(index)]['module_name']})" if known else str(key))
    return some(named)


def _branch(dim: int, mid_dim: int | None) -> nn.Module:
    if mid_dim == -1:
        return nn.Identity()
    mid_dim = dim if mid_dim is None else mid_dim
    return nn.Sequential(
        nn.Linear(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(inplace=True), nn.Linear(mid_dim, dim)
    )


def _copy_linear(source: nn.Module, target: nn.Linear) -> None:
    weight = getattr(source, "weight", None)
    if type(source) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point():
        target.weight.copy_(weight)
        if target.bias is not None:
            target.bias.copy_(source.bias)
        return
    # A quantised layer: only its forward knows its weights. W I + b reads them column by column.
    place = next(source.parameters()).device
    eye = torch.eye(target.in_features, device=place, dtype=target.weight.dtype)
    bias = source(torch.zeros_like(eye[:1]))
    target.weight.copy_((source(eye) - bias).T)
    if target.bias is not None:
        target.bias.copy_(bias[0])


def _self_attentions(unet: nn.Module) -> dict[str, Attention]:
    found = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.rpartition(".")[2] == "attn1"
    }
    if not found:
        raise ValueError(f"{type(unet).__name__} has no self-attention (an Attention module named attn1) to replace")
    return found


def _check_entry(index: int, entry: dict) -> None:
    expected = {"dim_n", "heads", "module_name", "projection_mid_dim"}
    if set(entry) != expected:
        raise ValueError(f"modules_list[{index}] must have the keys {sorted(expected)}, got {sorted(entry)}")
    mid_dim = entry["projection_mid_dim"]
    if mid_dim is not None and mid_dim != -1 and mid_dim < 1:
        raise ValueError(f"modules_list[{index}]: projection_mid_dim must be None, -1 or positive, got {mid_dim}")


def _why_not(module: nn.Module, entry: dict) -> str | None:
    """Why this module cannot be replaced by the linear attention of `entry`; None if it can."""
    if not isinstance(module, Attention):
        return f"expected a diffusers Attention, found {type(module).__name__}"
    if isinstance(module, LinearAttention):
        return "is linear attention already"
    if (module.query_dim, module.heads) != (entry["dim_n"], entry["heads"]):
        return (
            f"the UNet has {module.query_dim} channels and {module.heads} heads, "
            f"these weights are for {entry['dim_n']} and {entry['heads']}"
        )
    if module.inner_dim != module.query_dim or module.inner_kv_dim != module.query_dim:
        return f"inner_dim={module.inner_dim}, inner_kv_dim={module.inner_kv_dim}, both must be {module.query_dim}"
    # What the replaced module does and linear attention has no counterpart for. (upcast_attention is no obstacle: the
    # op evaluates the feature map and accumulates in float32.)
    active = {
        "cross_attention_dim": module.is_cross_attention or module.cross_attention_dim != module.query_dim,
        "added_kv_proj_dim": module.added_kv_proj_dim is not None,
        "bias": module.use_bias,
        "group_norm": module.group_norm is not None,
        "spatial_norm": module.spatial_norm is not None,
        "norm_q": module.norm_q is not None,
        "norm_k": module.norm_k is not None,
        "norm_cross": module.norm_cross is not None,
        "residual_connection": module.residual_connection,
        "rescale_output_factor": module.rescale_output_factor != 1.0,
        "is_causal": getattr(module, "is_causal", False),
        "pre_only": module.pre_only,
        "dropout": module.dropout > 0,
    }
    active = [name for name, is_active in active.items() if is_active]
    return f"uses {', '.join(active)}, which linear attention does not reproduce" if active else None


def _refuse_mounted(unet: nn.Module) -> None:
    name = next((name for name, module in unet.named_modules() if isinstance(module, LinearAttention)), None)
    if name is not None:
        raise RuntimeError(f"a LinFusion is mounted on this UNet already ({name} is linear): unmount() it first")


def _warn_of_processors(originals: dict[str, nn.Module]) -> None:
    foreign = {name: type(m.processor).__name__ for name, m in originals.items() if not _is_stock(m.processor)}
    if foreign:
        warnings.warn(
            f"LinFusion sets aside the attention processors {', '.join(sorted(set(foreign.values())))} of "
            f"{some(foreign)}: they do nothing until unmount()",
            stacklevel=3,
        )


def _is_stock(processor) -> bool:
    """Whether this processor computes plain softmax attention, so that nothing is lost with it."""
    kind = type(processor)
    return kind.__module__ == Attention.__module__ and kind.__name__ in STOCK_PROCESSORS


def _is_wrapped(module: nn.Module, slot: str) -> bool:
    return bool(wrappers(module.get_submodule(slot)))
