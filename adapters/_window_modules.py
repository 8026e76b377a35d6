"""The attention modules that CLEAR mounts: diffusers' own, with a window in place of all keys.

A mounted module has the children of the one it replaces, most of them the very same objects (text projections, norms),
so that whatever addresses layers by name finds them. Layers are called, their weights never read. The attention is
`linattn.window_attention`; what differs between FLUX and SD3 is the order of the tokens and the plugins they know.
"""

from __future__ import annotations

import math
import warnings

import torch
from diffusers.models.attention_processor import Attention, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor
from torch import nn

import linattn

from ._grid import Grid
from ._mount import base_layer

Tensor = torch.Tensor

# The layers that CLEAR has weights of its own for.
SLOTS = ("to_q", "to_k", "to_v", "to_out.0")
# Copies of several projections in one, which fuse_qkv_projections adds; here the projections are called one by one.
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")
_IP_ADAPTERS = (FluxIPAdapterAttnProcessor, SD3IPAdapterJointAttnProcessor2_0)
# What the blocks of diffusers hand to an attention processor beyond the arguments of its module.
_KNOWN_KEYWORDS = {"ip_hidden_states", "ip_adapter_masks", "temb"}
# On top of the tokens, where keys are pooled: the constant of CLEAR's pooled processor.
_POOLED_FACTOR = 10


class WindowAttnProcessor(nn.Module):
    """What stands in the place of a mounted module's attention processor; it holds the weight of the pooled keys.

    The module itself computes the attention. Built without arguments, as plugins rebuild processors, it is a blank
    that `set_processor` of a mounted module does not take.

    Args:
        down_factor: f; 1: no pooling, no weight.

    Attributes:
        spatial_weight: (1, 1, 1, f, 1, f, 1), 1 / f^2 at first; only if f > 1.
    """

    def __init__(self, down_factor: int = 1):
        super().__init__()
        if down_factor > 1:
            f = down_factor
            self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Pooled tokens of x (B, H, height * width, D). A call, so that hooks which move weights see it."""
        f = self.spatial_weight.shape[3]
        return linattn.pool_tokens(x, self.spatial_weight.reshape(f, f), height, width)


class _WindowAttention:
    """What mounted modules of both families have in common.

    Attributes:
        radius, down_factor: the window, and the pooling (1: none).
        grid: the `Grid` of the model.
        ip_adapter: an IP-Adapter's processor, whose part is added to the attention; or None.
    """

    text_first: bool

    @classmethod
    def around(cls, original: nn.Module, layers: nn.Module, radius: int, down_factor: int, grid: Grid) -> nn.Module:
        """The module that takes the place of `original`.

        Args:
            layers: has the layers of `SLOTS` that are not to be those of `original`, and `processor`.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        # Settings come along; what torch keeps for itself, and what hooks have put on the original, does not.
        own = {
            *vars(module),
            "processor",
            "forward",
            "_old_forward",
            "_hf_hook",
            "_diffusers_hook",
            "_compiled_call_impl",
        }
        vars(module).update({key: value for key, value in vars(original).items() if key not in own})
        vars(module)["training"] = original.training
        for name, child in original.named_children():
            if name not in ("processor", *_FUSED):
                module._modules[name] = child
        for name, child in layers.named_children():
            if name == "to_out":
                child = nn.ModuleList([*child, *original.to_out[len(child) :]]).train(original.training)
            module._modules[name] = child
        module.fused_projections = False
        module.head_dim = original.inner_dim // original.heads
        module.radius = radius
        module.down_factor = down_factor
        module.grid = grid
        module.ip_adapter = None
        return module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ):
        if attention_mask is not None:
            raise ValueError(
                f"CLEAR has no attention_mask, got one of shape {tuple(attention_mask.shape)}: the window says who "
                "sees whom. Call without a mask, or unmount() CLEAR"
            )
        unknown = kwargs.keys() - _KNOWN_KEYWORDS
        if unknown:
            warnings.warn(f"joint_attention_kwargs {sorted(unknown)} have no meaning for CLEAR", stacklevel=2)
        height, width = self.grid.size
        text = self._text_length(hidden_states, encoder_hidden_states, height, width)

        # (B, N, H, D). By head_dim and not by heads: tensor parallelism shards the heads.
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.to_q, self.to_k, self.to_v))
        image = self._normed(q, k, "norm_q", "norm_k")
        ip_adapter = self._ip_adapter_part(q, k, v, image[0], height, width, kwargs)
        q, k = image
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = (
                self._heads(layer(encoder_hidden_states))
                for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            )
            text_q, text_k = self._normed(text_q, text_k, "norm_added_q", "norm_added_k")
            q, k, v = (self._joined(*pair) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        q, k = self._rotated_and_scaled(q, k, image_rotary_emb)

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # the op reads these views in place
        pooled_k = pooled_v = None
        if self.down_factor > 1:
            start = text if self.text_first else 0
            pooled_k, pooled_v = (
                self.processor(t[:, :, start : start + height * width], height, width) for t in (k, v)
            )
        out = linattn.window_attention(
            q,
            k,
            v,
            height,
            width,
            self.radius,
            text_length=text,
            text_first=self.text_first,
            pooled_k=pooled_k,
            pooled_v=pooled_v,
        )
        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return self._finished(out, None, ip_adapter)
        if self.text_first:
            return self._finished(out[:, text:], out[:, :text], ip_adapter)
        return self._finished(out[:, : height * width], out[:, height * width :], ip_adapter)

    def _text_length(self, hidden_states, encoder_hidden_states, height: int, width: int) -> int:
        tokens = hidden_states.shape[1]
        if encoder_hidden_states is None:
            # Single-stream blocks hand over text and image in one; image alone is the case of no text.
            text = tokens - height * width
        else:
            text = encoder_hidden_states.shape[1]
            tokens = tokens + text
        if tokens - text != height * width or text < 0:
            raise ValueError(
                f"hidden_states must hold {height} x {width} image tokens, the grid of this call, got "
                f"{tuple(hidden_states.shape)}"
                + ("" if encoder_hidden_states is None else f" beside text {tuple(encoder_hidden_states.shape)}")
            )
        return text

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _normed(self, q: Tensor, k: Tensor, norm_q: str, norm_k: str) -> tuple[Tensor, Tensor]:
        norm_q, norm_k = getattr(self, norm_q, None), getattr(self, norm_k, None)
        return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k))

    def _joined(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)

    def _rotated_and_scaled(self, q: Tensor, k: Tensor, rotation) -> tuple[Tensor, Tensor]:
        """q and k (B, N, H, D) at their positions, q times what proportional attention multiplies the scores by.

        That factor goes into the rotation of q, which is float32, so that it costs no rounding of its own; and it is a
        tensor, since the op's `scale`, a number, would make a new graph for each size.
        """
        turn_q = turn_k = rotation
        if self.grid.training_length is not None:
            tokens = q.shape[1] * (_POOLED_FACTOR if self.down_factor > 1 else 1)
            factor = torch.full((), tokens, dtype=torch.float32, device=q.device).log()
            factor = (factor / math.log(self.grid.training_length)).sqrt()
            if rotation is None:
                q = (q * factor).to(q.dtype)
            else:
                turn_q = tuple(t.to(q.device) * factor for t in rotation)
        if rotation is not None:
            q = apply_rotary_emb(q, turn_q, sequence_dim=1)
            k = apply_rotary_emb(k, turn_k, sequence_dim=1)
        return q, k

    def _projected(self, image: Tensor) -> Tensor:
        if not self.pre_only:
            for layer in self.to_out:
                image = layer(image)
        return image

    def attention_spec(self) -> dict:
        """What `linattn.report` says of this layer."""
        pooled = {"down_factor": self.down_factor} if self.down_factor > 1 else {}
        return {
            "op": "window_attention",
            "adapter": "CLEAR",
            "options": {"radius": self.radius, "text_first": self.text_first, **pooled},
            "shown": ("radius", *pooled),
            "mask": False,
            "processor": WindowAttnProcessor,
            "heads": self.heads,
            "head_dim": self.head_dim,
        }

    # ---- what plugins do to processors

    def get_processor(self, return_deprecated_lora: bool = False):
        """An IP-Adapter's processor if there is one, so that whoever loaded it finds it to set its scale."""
        return self.processor if self.ip_adapter is None else self.ip_adapter

    def set_processor(self, processor) -> None:
        """Take over an IP-Adapter; any other processor goes without one. The attention stays what it is."""
        if isinstance(processor, _IP_ADAPTERS):
            self.ip_adapter = processor
            return
        had_one, self.ip_adapter = self.ip_adapter is not None, None
        # Unloading an IP-Adapter sets the stock processor, or a blank one of our class.
        if not isinstance(processor, WindowAttnProcessor) and not (had_one and is_stock(processor)):
            warnings.warn(
                f"{type(processor).__name__} refused: CLEAR is mounted on this attention, whose weights are for its "
                "window. unmount() CLEAR to use another attention processor",
                stacklevel=2,
            )

    def __setattr__(self, name, value) -> None:
        # Some pipelines (perturbed attention guidance) assign the attribute instead of calling set_processor.
        if name == "processor":
            self.set_processor(value)
        else:
            super().__setattr__(name, value)

    def fuse_projections(self, fuse: bool = True) -> None:
        if fuse:
            warnings.warn(
                "fuse_qkv_projections has no effect where CLEAR is mounted: its projections stay layers of their own",
                stacklevel=2,
            )

    def unfuse_projections(self) -> None:
        pass


class FluxWindowAttention(_WindowAttention, FluxAttention):
    """The attention of a FLUX block: tokens in the order [text | image], rotary positions.

    Shapes:
        double-stream blocks: hidden_states (B, height * width, C), encoder_hidden_states (B, T, C); returns both, and
        with an IP-Adapter its part (B, height * width, C) beside them.
        single-stream blocks: hidden_states (B, T + height * width, C); returns the same.
    """

    text_first = True

    def _ip_adapter_part(self, q, k, v, normed_q, height, width, kwargs) -> Tensor | None:
        images = kwargs.get("ip_hidden_states")
        if self.ip_adapter is None or images is None:
            return None
        # Each image prompt is attended densely by all image queries, without positions.
        adapter, part = self.ip_adapter, 0
        for x, scale, to_k, to_v in zip(images, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, strict=False):
            x = x.flatten(1, -2)  # (B, images, tokens, C), or without the dimension of images
            keys, values = (self._heads(layer(x)).transpose(1, 2) for layer in (to_k, to_v))
            out = nn.functional.scaled_dot_product_attention(normed_q.transpose(1, 2), keys, values)
            part = part + scale * out.transpose(1, 2).flatten(2)
        return part

    def _finished(self, image: Tensor, text: Tensor | None, ip_adapter: Tensor | None):
        if text is None:
            return self._projected(image)
        both = self._projected(image), self.to_add_out(text)
        return both if ip_adapter is None else (*both, ip_adapter)


class JointWindowAttention(_WindowAttention, Attention):
    """The attention of an SD3 block: tokens in the order [image | text], or image alone (`attn2` of SD3.5).

    Shapes:
        hidden_states (B, height * width, C), encoder_hidden_states (B, T, C) or None; returns hidden_states, and the
        text beside it if there is any.
    """

    text_first = False

    def _ip_adapter_part(self, q, k, v, normed_q, height, width, kwargs) -> Tensor | None:
        images, adapter = kwargs.get("ip_hidden_states"), self.ip_adapter
        if adapter is None or images is None or adapter.scale == 0:
            return None
        # The adapter's own attention of the image to itself and the image prompt, which stands where text would; it
        # has the window of the attention that it is added to.
        images = adapter.norm_ip(images, temb=kwargs.get("temb"))
        ip_k, ip_v = self._heads(adapter.to_k_ip(images)), self._heads(adapter.to_v_ip(images))
        keys = torch.cat([adapter.norm_k(k), adapter.norm_ip_k(ip_k)], dim=1)
        values = torch.cat([v, ip_v], dim=1)
        out = linattn.window_attention(
            adapter.norm_q(q).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            height,
            width,
            self.radius,
            text_length=images.shape[1],
            text_first=False,
            q_text_length=0,
        )
        return adapter.scale * out.transpose(1, 2).flatten(2)

    def _finished(self, image: Tensor, text: Tensor | None, ip_adapter: Tensor | None):
        image = self._projected(image if ip_adapter is None else image + ip_adapter)
        if text is None:
            return image
        return image, (text if self.to_add_out is None else self.to_add_out(text))


def is_stock(processor) -> bool:
    """Whether this processor computes plain softmax attention, so that nothing is lost with it."""
    kind = type(processor)
    return kind.__module__.startswith("diffusers.") and kind.__name__ in (
        "FluxAttnProcessor",
        "JointAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "XFormersJointAttnProcessor",
    )


def is_ip_adapter(processor) -> bool:
    return isinstance(processor, _IP_ADAPTERS)


def window_module(original: nn.Module) -> type | None:
    """The class that takes the place of this attention module; None if there is none."""
    if isinstance(original, FluxAttention):
        return FluxWindowAttention
    return JointWindowAttention if isinstance(original, Attention) else None


def copied_layer(layer: nn.Module) -> nn.Linear | None:
    """A linear layer with the weights under `layer`; None where they cannot be copied (quantised)."""
    base = base_layer(layer)
    # The class first: the weight of a quantised layer is not even looked at.
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
        return None
    copy = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    for name, parameter in base.named_parameters(recurse=False):
        copied = parameter.detach().clone()
        setattr(copy, name, nn.Parameter(copied, requires_grad=parameter.requires_grad))
    return copy
