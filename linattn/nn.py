r"""Attention layers on top of the linear attention op: the Focused and the Mamba-like ("MLLA") layer.

Both compute

    out_i = phi(q_i) (1/N sum_j phi(k_j)^T v_j) / (phi(q_i) . 1/N sum_j phi(k_j) + 1e-6)

and differ in the feature map phi, in positions, and in a convolution of v that is added. Their maps act on all channels
at once (before the heads are split) or are followed by a rotation, so they are evaluated here, in float32, and the op
is called with feature_map="identity". Everything quadratic or of size (head_dim, head_dim) happens inside the op, which
takes any head dim; the token grid is an argument, so any height and width will do.

Parameters carry the names of flash-bidirectional-linear-attention's layers: their state dicts load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linattn

__all__ = ["FocusedLinearAttention", "MambaLikeLinearAttention"]

# Both papers' code adds this to the denominator (in its mean form, as the op does).
_EPS = 1e-6


class FocusedLinearAttention(nn.Module):
    r"""Focused linear attention of FLatten Transformer.

    The feature map sharpens directions and keeps lengths; with t a token's channels (all heads together),

        u = (relu(t) + 1e-6) / softplus(scale),     phi(t) = |u| u^p / |u^p|

    so that similar tokens attract and dissimilar ones repel like a softmax does. k carries a learned position, and a
    depthwise convolution of v over the token grid restores the rank that linear attention lacks:

        y = proj(linear_attention(phi(q), phi(k + positional_encoding), v) + dwc(v))

    Args:
        dim: channels C, a multiple of num_heads.
        height, width: the token grid, the one that the positional encoding is learned for.
        num_heads: heads H, head_dim = C / H.
        qkv_bias: bias in the q and kv projections.
        sr_ratio: keys and values are taken from the grid reduced by this factor (a strided convolution and LayerNorm).
        focusing_factor: the power p.
        kernel_size: of the depthwise convolution, odd.

    Shapes:
        x (B, N, C), tokens in raster order, N = height * width; returns (B, N, C).

    Raises:
        ValueError: N is not height * width, or dim is no multiple of num_heads.

    Source: FLatten Transformer: Vision Transformer using Focused Linear Attention, ICCV 2023, section 4.
    """

    def __init__(
        self,
        dim: int,
        height: int,
        width: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        focusing_factor: float = 3,
        kernel_size: int = 5,
    ):
        super().__init__()
        self.head_dim = _head_dim(dim, num_heads)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if min(height, width) < sr_ratio:
            raise ValueError(f"height and width must be at least sr_ratio, got {height=}, {width=}, {sr_ratio=}")
        self.height, self.width = height, width
        self.sr_ratio = sr_ratio
        self.focusing_factor = focusing_factor
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.dwc = nn.Conv2d(self.head_dim, self.head_dim, kernel_size, groups=self.head_dim, padding=kernel_size // 2)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, (height // sr_ratio) * (width // sr_ratio), dim))

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """height and width default to the grid of construction; another grid resizes the positional encoding."""
        height, width = _grid(self, x, height, width)
        q = self.q(x)
        context = x
        if self.sr_ratio > 1:
            context = self.norm(self.sr(_to_grid(x, height, width)).flatten(2).transpose(1, 2))
        k, v = self.kv(context).chunk(2, dim=-1)
        # In a head where the sharpened q is nearly 0, its gradient reaches 1 / eps times that of out: too much for
        # float16, which therefore goes through the op in float32.
        dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
        phi_q, phi_k = self._focus(q), self._focus(k + self._positions(height, width))
        phi_q, phi_k, v_heads = (
            t.to(dtype).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (phi_q, phi_k, v)
        )
        out = linattn.linear_attention(phi_q, phi_k, v_heads, feature_map="identity", eps=_EPS)
        out = out.transpose(1, 2).flatten(2).to(v.dtype)
        if self.sr_ratio > 1:
            # Along the raster sequence, not over the grid: that is what weights with sr_ratio > 1 were trained with.
            v = F.interpolate(v.transpose(1, 2), size=x.shape[1], mode="linear").transpose(1, 2)
        # One depthwise kernel of head_dim channels, shared by the heads: they go to the batch.
        local = v.unflatten(-1, (-1, self.head_dim)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        local = self.dwc(local).flatten(2).unflatten(0, (x.shape[0], -1)).permute(0, 3, 1, 2).flatten(2)
        return self.proj(out + local)

    def attention_spec(self) -> dict:
        """What `linattn.report` says of this layer."""
        return _spec(self, self.q.in_features)

    def _focus(self, t: Tensor) -> Tensor:
        """phi(t), in float32 (or float64)."""
        u = (_wide(t).relu() + 1e-6) / F.softplus(_wide(self.scale))
        # A factor inside the power cancels, so it may be any constant: the largest entry, so that no power overflows.
        sharp = (u / u.detach().amax(dim=-1, keepdim=True)) ** self.focusing_factor
        return sharp * (u.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.height, self.width):
            return self.positional_encoding
        r = self.sr_ratio
        positions = _to_grid(self.positional_encoding, self.height // r, self.width // r)
        positions = F.interpolate(positions, size=(height // r, width // r), mode="bilinear", align_corners=False)
        return positions.flatten(2).transpose(1, 2)


class MambaLikeLinearAttention(nn.Module):
    r"""The attention of MLLA: linear attention with rotary positions in the numerator only.

    With phi(t) = elu(t) + 1 and R_i the rotation of token i (y, x) by the angles (y theta, x theta),
    theta_c = base^(-c / (C/4)), in pairs of adjacent channels,

        out_i = R_i phi(q_i) (1/N sum_j (R_j phi(k_j))^T v_j) / (phi(q_i) . 1/N sum_j phi(k_j) + 1e-6) + lepe(v)_i

    where v = x and lepe is a depthwise 3x3 convolution over the token grid. There is no output projection.
    The denominator is made of the unrotated vectors, which are positive, so it cannot vanish. The rotation is computed
    in float32 and its angles never rounded to a narrower type, so the layer works in float16 and bfloat16.

    Args:
        dim: channels C, a multiple of num_heads and of 4.
        height, width: the token grid assumed where the call gives none; it need not be square.
        num_heads: heads H, head_dim = C / H.
        qkv_bias: bias in the qk projection.
        base: of the rotation's frequencies.

    Shapes:
        x (B, N, C), tokens in raster order, N = height * width; returns (B, N, C).

    Raises:
        ValueError: N is not height * width, or dim is no multiple of num_heads or of 4.

    Source: Demystify Mamba in Vision: A Linear Attention Perspective, NeurIPS 2024.
    """

    def __init__(
        self,
        dim: int,
        height: int,
        width: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        base: float = 10000.0,
    ):
        super().__init__()
        self.head_dim = _head_dim(dim, num_heads)
        self.height, self.width = height, width
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.rope = _Rotary(dim, height, width, base)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """height and width default to the grid of construction; any other grid works as well."""
        height, width = _grid(self, x, height, width)
        q, k = (_elu1(t) for t in self.qk(x).chunk(2, dim=-1))
        rotations = self.rope(height, width)
        q_rotated, k_rotated = _rotate(q, rotations), _rotate(k, rotations)
        q, k, q_rotated, k_rotated, v = (
            t.to(x.dtype).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, q_rotated, k_rotated, x)
        )
        out = linattn.linear_attention(q_rotated, k_rotated, v, feature_map="identity", eps=_EPS, q_denom=q, k_denom=k)
        local = self.lepe(_to_grid(x, height, width)).flatten(2).transpose(1, 2)
        return out.transpose(1, 2).flatten(2) + local

    def attention_spec(self) -> dict:
        """What `linattn.report` says of this layer."""
        return _spec(self, self.qk.in_features)


class _Rotary(nn.Module):
    """The table of rotations (height, width, C/2, 2) = (cos, sin), as a buffer named as in published state dicts.

    It is a function of the grid: it stays in float32 when the model is cast to a narrower type, and a loaded table is
    not read, since it may have been rounded or belong to another grid.
    """

    def __init__(self, dim: int, height: int, width: int, base: float):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4 (two axes, channels rotated in pairs), got {dim}")
        self.dim, self.height, self.width, self.base = dim, height, width, base
        self.register_buffer("rotations", self._table(height, width, None, torch.float32))

    def forward(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.height, self.width):
            return self.rotations
        return self._table(height, width, self.rotations.device, self.rotations.dtype)

    def _table(self, height: int, width: int, device, dtype: torch.dtype) -> Tensor:
        bands = self.dim // 4
        theta = self.base ** (-torch.arange(bands, device=device, dtype=dtype) / bands)
        y = torch.arange(height, device=device, dtype=dtype)[:, None] * theta
        x = torch.arange(width, device=device, dtype=dtype)[:, None] * theta
        angles = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def _apply(self, fn, recurse=True):
        before = self.rotations
        super()._apply(fn, recurse)
        after = self.rotations
        # Made anew rather than converted: a narrow type would round the angles, a meta tensor has none to convert.
        if (after.device, after.dtype) != (before.device, before.dtype):
            dtype = torch.float64 if after.dtype == torch.float64 else torch.float32
            self.rotations = self._table(self.height, self.width, after.device, dtype)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        stored = state_dict.get(f"{prefix}rotations")
        if stored is not None and self.rotations.is_meta:
            self.rotations = self._table(self.height, self.width, stored.device, torch.float32)
        elif stored is None and strict:
            missing_keys.append(f"{prefix}rotations")


def _rotate(t: Tensor, rotations: Tensor) -> Tensor:
    """Rotate pairs of adjacent channels of t (B, N, C) by a table (height, width, C/2, 2); in the table's precision."""
    a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations.flatten(0, 1).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _elu1(t: Tensor) -> Tensor:
    # exp directly, not elu + 1: that cancels where t is very negative. The clamp keeps exp's unused branch finite.
    t = _wide(t)
    return torch.where(t > 0, t + 1, t.clamp(max=0).exp())


def _wide(t: Tensor) -> Tensor:
    """In float32, or in float64 if it is that already."""
    return t if t.dtype == torch.float64 else t.float()


def _spec(layer: nn.Module, dim: int) -> dict:
    """Both layers map their tokens themselves, before the op."""
    options = {"feature_map": "identity", "eps": _EPS}
    heads = dim // layer.head_dim
    return {"op": "linear_attention", "adapter": "linattn.nn", "options": options, "heads": heads, "mask": False}


def _head_dim(dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads, got {dim=}, {num_heads=}")
    return dim // num_heads


def _grid(layer: nn.Module, x: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    if (height is None) != (width is None):
        raise ValueError(f"give both height and width or neither, got {height=}, {width=}")
    if height is None:
        height, width = layer.height, layer.width
    if x.ndim != 3 or x.shape[1] != height * width:
        raise ValueError(f"x must be (batch, height * width, channels) with {height=}, {width=}, got {tuple(x.shape)}")
    return height, width


def _to_grid(t: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C) -> (B, C, height, width)."""
    return t.transpose(1, 2).unflatten(-1, (height, width))
