"""Inf-DiT: a diffusion transformer in pixel space that enlarges images of any size (Yang et al. 2024, 2405.04312).

The network sees patches of 4 x 4 pixels of [noisy picture | enlarged input] as tokens on a grid that is cut into square
blocks. Self-attention is `linattn.block_causal_attention`: a block sees itself and its neighbours to the top left, left
and top. In the first layer every block also attends to the low-resolution tokens of the 3 x 3 blocks around it. So what
a block depends on is above it or to its left, layer by layer, and the network can walk over an image in strips and give
the numbers of the whole: `InfDiTTransformer2DModel.strips`, planned by `linattn.adapters.infdit.streaming`.

Everything that the authors' code computes without use is left out (absolute positions, a second norm of the keys); what
it computes is reproduced, oddities included: keys are normalised with the norm of the queries, the condition passes two
SiLUs, the trunk ends with two LayerNorms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from linattn import block_causal_attention

from . import official
from .streaming import Plan, resolve

EPS = 1e-6
TIME_CHANNELS = 192
#: Blocks whose tokens go through a linear layer at a time where no gradients are kept: bounds what lies beside a strip.
PIECE = 8


class Positions(NamedTuple):
    """Where the tokens of a strip lie: rows first .. first + rows of a grid `width` wide, shifted by offset (row, col).

    Positions count on without end. The original takes them modulo 1024; differences, which are all that a rotation
    tells, are the same up to an image of 4096 pixels, and beyond it there is no seam here.
    """

    first: int
    rows: int
    width: int
    offset: tuple[int, int] = (0, 0)

    def tables(self, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (rows * width, 1, head_dim / 2), float32: the first half of the angles is the row's."""
        half = head_dim // 2
        # The reciprocal of a power, not a power of the reciprocal: they differ in the last bit.
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half))
        down = torch.arange(self.first, self.first + self.rows, device=device) + self.offset[0]
        right = torch.arange(self.width, device=device) + self.offset[1]
        down = (down[:, None] * frequencies)[:, None].expand(-1, self.width, -1)
        right = (right[:, None] * frequencies)[None].expand(self.rows, -1, -1)
        angles = torch.cat([down, right], -1).flatten(0, 1)[:, None]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (B, N, H, D) by the angles of each token: of neighbouring pairs (x_2i, x_2i+1)."""
    cos, sin = tables  # float32, and so are the products
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)], -1).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Halo:
    """What a layer hands from strip to strip: keys and values (B, block * width, H, D) of the last row of blocks.

    Its memory is there from the beginning: pieces that are allocated anew for every strip, between tensors that come
    and go, would leave holes in the heap.

    Args:
        keys, values: memory for them; None where there is but one strip.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        self._pair = None if keys is None else (keys, values)
        self.filled = False

    def take(self) -> tuple[Tensor, Tensor]:
        return self._pair

    def put(self, keys: Tensor, values: Tensor) -> None:
        if self._pair is not None:
            for own, new in zip(self._pair, (keys, values), strict=True):
                own.copy_(new)
            self.filled = True


class BlockCausalSelfAttention(nn.Module):
    """Self-attention over blocks, with rotary positions and an embedding per slot (docs/block_causal_attention.md).

    Shapes: x (B, rows * width, C), whole rows of blocks. Source: Inf-DiT, section 3.2; the norm of queries and keys is
    shared, as in the authors' code.
    """

    is_cross_attention = False

    def __init__(self, dim: int, heads: int, block: int):
        super().__init__()
        self.heads, self.block = heads, block
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_qk = nn.LayerNorm(dim // heads, eps=EPS)
        self.slot_embed = nn.Parameter(torch.zeros(4, heads, dim // heads))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def attention_spec(self) -> dict:
        """What `linattn.report` says of this layer."""
        return {
            "op": "block_causal_attention",
            "adapter": "Inf-DiT",
            "options": {"block": self.block, "edge": "clamp"},
            "shown": ("block",),
            "heads": self.heads,
            "head_dim": self.slot_embed.shape[-1],
        }

    def project(self, x: Tensor, positions: Positions) -> Iterator[Tensor]:
        """Queries, keys and values of some rows of tokens, (B, N, H, D) each, one after the other."""
        tables = positions.tables(x.shape[-1] // self.heads, x.device)
        for layer in (self.to_q, self.to_k):
            yield rotate(self.norm_qk(layer(x).unflatten(-1, (self.heads, -1))), tables)
        yield self.to_v(x).unflatten(-1, (self.heads, -1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        """Attention of q (B, N, H, D) over k and v (B, M, H, D), not projected: q's rows are the last ones of k's."""
        rows, above = k.shape[1] // width, (k.shape[1] - q.shape[1]) // width
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = block_causal_attention(q, k, v, rows, width, self.block, slot_embed=self.slot_embed, q_row=above)
        return out.transpose(1, 2).flatten(2)


class LRContext:
    """What cross-attention needs of the low-resolution picture, which depends on neither the noisy one nor its noise.

    Args:
        image: (B, 3, h, w), h and w multiples of what a block covers.
        keep: hold keys and values of all tokens, projected once. Otherwise the picture alone is held, and they are
            projected anew, in every call, for each row of blocks (0.3 % more arithmetic at the official size, and
            no memory that grows with the picture).
    """

    def __init__(self, model: InfDiTTransformer2DModel, image: Tensor, keep: bool = True):
        self.image = image
        self._embed = model.lr_embed
        self._attention = model.transformer_blocks[0].cross_attn
        self._kept = self._project(0, self.blocks[0]) if keep else None

    @property
    def side(self) -> int:
        """Tokens along the side of a block."""
        return self._attention.lr_side

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return tuple(n // (self.side * self._embed.kernel_size[0]) for n in self.image.shape[2:])

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, (count + 2) side, (columns + 2) side, H, D) around rows of blocks from `first` on."""
        if self._kept is None:
            return self._project(first, count)
        below = slice(first * self.side, (first + count + 2) * self.side)
        return tuple(x[:, below] for x in self._kept)

    def _project(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        side, pixels, (rows, _) = self.side, self._embed.kernel_size[0], self.blocks
        above, below = max(first - 1, 0), min(first + count + 1, rows)
        tokens = self._embed(self.image[:, :, above * side * pixels : below * side * pixels])
        # The ring around the picture is made of tokens that are zero; they are attended like any others.
        ring = (side, side, side * (above - first + 1), side * (first + count + 1 - below))
        return self._attention.keys(F.pad(tokens, ring).permute(0, 2, 3, 1))


class LRCrossAttention(nn.Module):
    """Every block attends to the low-resolution tokens of the 3 x 3 blocks around it, none masked.

    Queries and keys carry learnt positions within the block and the window. Source: Inf-DiT, section 3.3.
    """

    def __init__(self, dim: int, heads: int, block: int, lr_side: int):
        super().__init__()
        self.heads, self.block, self.lr_side = heads, block, lr_side
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(dim // heads, eps=EPS) for _ in range(2))
        self.query_position = nn.Parameter(torch.zeros(block**2, heads, dim // heads))
        self.key_position = nn.Parameter(torch.zeros((3 * lr_side) ** 2, heads, dim // heads))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without position, and values, of tokens (B, h, w, C): (B, h, w, H, D) each."""
        k, v = (layer(tokens).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        return self.norm_k(k), v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (B, rows, columns, C) of whole blocks; keys and values as `LRContext.rows` has them around these."""
        b, rows, columns, _ = x.shape
        down, right = rows // self.block, columns // self.block
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.heads, -1)))
        q = q.view(b, down, self.block, right, self.block, *q.shape[3:]).transpose(2, 3).flatten(3, 4)
        q = (q + self.query_position).flatten(0, 2).transpose(1, 2)
        k = (self._windows(keys) + self.key_position).flatten(0, 2).transpose(1, 2)
        v = self._windows(values).flatten(0, 2).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = out.view(b, down, right, self.block, self.block, -1).transpose(2, 3).reshape(x.shape)
        return self.to_out[0](out)

    def _windows(self, x: Tensor) -> Tensor:
        """(B, h, w, H, D) -> (B, down, right, tokens of a window, H, D), windows of 3 x 3 blocks at every block."""
        size, step = 3 * self.lr_side, self.lr_side
        return x.unfold(1, size, step).unfold(2, size, step).permute(0, 1, 2, 5, 6, 3, 4).flatten(3, 4)


class InfDiTBlock(nn.Module):
    """One layer: block-causal self-attention, in the first layer cross-attention to the low resolution, and an MLP.

    With `modulation` = Linear(SiLU(emb)) = (shift_1, scale_1, shift_2, scale_2), LN a LayerNorm without parameters:

        x += attn(LN(x) (1 + scale_1) + shift_1)
        x += cross_attn(LN(x))                               first layer only; then LN' with parameters takes LN's place
        x += ff(LN(x) (1 + scale_2) + shift_2)
    """

    def __init__(self, dim: int, heads: int, block: int, lr_side: int | None):
        super().__init__()
        self.block = block
        self.modulation = nn.Linear(dim, 4 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.attn = BlockCausalSelfAttention(dim, heads, block)
        self.cross_attn = None
        if lr_side is not None:
            self.norm_cross = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
            self.cross_attn = LRCrossAttention(dim, heads, block, lr_side)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=lr_side is not None)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        positions: Positions,
        context: LRContext,
        halo: Halo | None = None,
    ) -> Tensor:
        """The next x: of the whole image, or with a halo of one strip of it, in place and without gradients.

        Args:
            x: (B, rows * width, C) of whole rows of blocks.
            emb: (B, C).
            halo: of this layer, left by the strip above (empty for the first); it is left for the strip below.
        """
        if halo is not None:
            return self._strip(x, emb, positions, context, halo)
        shift1, scale1, shift2, scale2 = self.modulation(emb).chunk(4, 1)
        q, k, v = self.attn.project(modulate(self.norm1(x), shift1, scale1), positions)
        x = x + self.attn.to_out[0](self.attn(q, k, v, positions.width))
        if self.cross_attn is not None:
            grid = self.norm_cross(x).unflatten(1, (positions.rows, positions.width))
            x = x + self.cross_attn(grid, *context.rows(0, positions.rows // self.block)).flatten(1, 2)
        return x + self.ff(modulate(self.norm2(x), shift2, scale2))

    def _strip(self, x: Tensor, emb: Tensor, positions: Positions, context: LRContext, halo: Halo) -> Tensor:
        """Linear layers run on a few rows of tokens at a time; beside x lie queries, keys, values and their result."""
        rows, width, attn = positions.rows, positions.width, self.attn
        shift1, scale1, shift2, scale2 = self.modulation(emb).chunk(4, 1)
        row = self.block * width
        above = row if halo.filled else 0
        k, v = (x.new_empty(len(x), above + x.shape[1], attn.heads, x.shape[2] // attn.heads) for _ in range(2))
        if above:
            k[:, :above], v[:, :above] = halo.take()
        q = torch.empty_like(k[:, above:])
        step = max(1, PIECE * self.block**2 // width)
        for first in range(0, rows, step):
            here = positions._replace(first=positions.first + first, rows=min(step, rows - first))
            piece = slice(first * width, (first + here.rows) * width)
            parts = attn.project(modulate(self.norm1(x[:, piece]), shift1, scale1), here)
            for target in (q, k[:, above:], v[:, above:]):
                target[:, piece] = next(parts)
            del parts, target  # they hold a piece and all values
        out = attn(q, k, v, width)
        del q
        halo.put(k[:, -row:], v[:, -row:])
        del k, v
        pieces = [slice(first * width, min(first + step, rows) * width) for first in range(0, rows, step)]
        for piece in pieces:
            x[:, piece] += attn.to_out[0](out[:, piece])
        del out
        if self.cross_attn is not None:
            self._cross_strip(x.unflatten(1, (rows, width)), context, positions.first // self.block)
        for piece in pieces:
            x[:, piece] += self.ff(modulate(self.norm2(x[:, piece]), shift2, scale2))
        return x

    def _cross_strip(self, grid: Tensor, context: LRContext, first: int) -> None:
        block, side = self.block, context.side
        for row in range(grid.shape[1] // block):
            keys, values = context.rows(first + row, 1)
            for left in range(0, grid.shape[2], PIECE * block):
                part = grid[:, row * block : (row + 1) * block, left : left + PIECE * block]
                start = left // block * side
                window = slice(start, start + (part.shape[2] // block + 2) * side)
                part += self.cross_attn(self.norm_cross(part), keys[:, :, window], values[:, :, window])


class InfDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""The denoising network F of Inf-DiT, natively in PyTorch, exact in every schedule.

    The preconditioned network of Karras et al. 2022 is D(x; s) = c_skip x + c_out F(c_in [x | lr_up], c_noise)
    (`linattn.schedulers.edm.preconditioning`); c_in scales all six channels.

    Args:
        hidden_size, num_layers, num_attention_heads: of the transformer; the MLP is four times as wide.
        patch_size: pixels along the side of a token.
        block_size: tokens along the side of a block; the sides of a picture are multiples of `block_pixels`.
        in_channels, out_channels: [noisy | enlarged low resolution] and the picture.
        vector_dim: of the image vector (CLIP), 0 for none.
        lr_patch_size: low-resolution pixels along the side of a low-resolution token.
        sr_scale: output pixels to a low-resolution pixel.

    The defaults are those of the published weights (`load_official_state_dict`, `convert_infdit_checkpoint`).

    Raises:
        ValueError: sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["InfDiTBlock"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1280,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        patch_size: int = 4,
        block_size: int = 32,
        in_channels: int = 6,
        out_channels: int = 3,
        vector_dim: int = 768,
        lr_patch_size: int = 2,
        sr_scale: int = 4,
    ):
        super().__init__()
        sizes = dict(self.config)
        for name, value in sizes.items():
            lowest = 0 if name == "vector_dim" else 1
            if not name.startswith("_") and (not isinstance(value, int) or value < lowest):
                raise ValueError(f"{name} must be a whole number, at least {lowest}, got {value!r}")
        if hidden_size % (4 * num_attention_heads) != 0:
            raise ValueError(
                f"hidden_size must be a multiple of 4 * num_attention_heads = {4 * num_attention_heads} (each half of "
                f"a head is rotated in pairs), got {hidden_size}"
            )
        lr_side, rest = divmod(block_size * patch_size, sr_scale * lr_patch_size)
        if rest or lr_side == 0:
            raise ValueError(
                f"block_size * patch_size must be a multiple of sr_scale * lr_patch_size = {sr_scale * lr_patch_size}, "
                f"got {block_size} * {patch_size}"
            )
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.lr_embed = nn.Conv2d(3, hidden_size, lr_patch_size, lr_patch_size)
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, hidden_size)
        self.vector_embed = TimestepEmbedding(vector_dim, hidden_size) if vector_dim else None
        self.transformer_blocks = nn.ModuleList(
            InfDiTBlock(hidden_size, num_attention_heads, block_size, None if layer else lr_side)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=EPS, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the authors start training: modulations and slot embeddings zero, so that a layer begins unmodulated."""
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "slot_embed")) or "modulation" in name:
                parameter.zero_()
            elif name.startswith(("patch_embed", "lr_embed", "time_embed", "proj_out")):
                nn.init.xavier_uniform_(parameter.flatten(1))
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)
        depth = (2 * len(self.transformer_blocks)) ** -0.5
        for layer in self.transformer_blocks:
            layer.attn.to_out[0].weight.mul_(depth)
            layer.ff.net[2].weight.mul_(depth)
        if self.vector_embed is not None:
            self.vector_embed.linear_2.weight.zero_()

    # ---- sizes -------------------------------------------------------------------------------------------------------

    @property
    def block_pixels(self) -> int:
        """Pixels along the side of a block: what the sides of a picture are multiples of."""
        return self.config.block_size * self.config.patch_size

    def _check_sizes(self, height: int, width: int) -> None:
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % self.block_pixels:
                raise ValueError(
                    f"{name} must be a positive multiple of block_size * patch_size = {self.block_pixels} pixels, got "
                    f"{value}"
                )

    def _check_lr(self, image: Tensor) -> None:
        side = self.block_pixels // self.config.sr_scale
        if image.ndim != 4 or image.shape[1] != 3 or not image.numel() or any(n % side for n in image.shape[2:]):
            raise ValueError(
                f"lr_image must be (B, 3, h, w) with h and w multiples of block_size * patch_size / sr_scale = {side}, "
                f"got {tuple(image.shape)}"
            )

    # ---- condition ---------------------------------------------------------------------------------------------------

    def prepare_lr(self, lr_image: Tensor, *, keep: bool = True) -> LRContext:
        """Everything of the low-resolution picture (B, 3, H / sr_scale, W / sr_scale) that all calls share.

        Args:
            keep: hold its keys and values, not only the picture (see `LRContext`).

        Raises:
            ValueError: sizes that are not whole blocks.
        """
        self._check_lr(lr_image)
        return LRContext(self, lr_image.to(self.lr_embed.weight.dtype), keep)

    def _condition(self, timestep: Tensor | float, image_embeds: Tensor | None, batch: int) -> Tensor:
        """SiLU(SiLU(time + vector)) (B, C): what every modulation is a linear function of."""
        dtype, device = self.patch_embed.weight.dtype, self.patch_embed.weight.device
        timestep = torch.as_tensor(timestep, device=device, dtype=torch.float32)
        if timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(f"timestep must be a number or ({batch},), got {tuple(timestep.shape)}")
        emb = self.time_embed(self.time_proj(timestep.expand(batch)).to(dtype))
        wanted = None if self.vector_embed is None else (batch, self.config.vector_dim)
        given = None if image_embeds is None else tuple(image_embeds.shape)
        if wanted != given:
            raise ValueError(
                f"image_embeds must be {wanted} (vector_dim = {self.config.vector_dim} of this model), got {given}"
            )
        if image_embeds is not None:
            emb = emb + self.vector_embed(image_embeds.to(dtype))
        return F.silu(F.silu(emb))

    def _context(self, lr_image: Tensor | None, lr_context: LRContext | None, batch: int, size: tuple) -> LRContext:
        if (lr_image is None) == (lr_context is None):
            raise ValueError("expected lr_image or lr_context, one of the two")
        context = self.prepare_lr(lr_image) if lr_context is None else lr_context
        wanted = (batch, 3, *(n // self.config.sr_scale for n in size))
        if tuple(context.image.shape) != wanted:
            raise ValueError(
                f"the low-resolution picture must be {wanted} for {batch} pictures of {size[0]} x {size[1]} pixels, "
                f"got {tuple(context.image.shape)}"
            )
        return context

    # ---- the network -------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        lr_image: Tensor | None = None,
        image_embeds: Tensor | None = None,
        *,
        lr_context: LRContext | None = None,
        position_offset: tuple[int, int] = (0, 0),
        schedule: str | Plan = "full",
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """F (B, out_channels, H, W) of a preconditioned input.

        Args:
            hidden_states: (B, in_channels, H, W), c_in [noisy | enlarged low resolution].
            timestep: c_noise = ln(sigma) / 4, (B,) or one number; float32 whatever the model computes in.
            lr_image: (B, 3, H / sr_scale, W / sr_scale) in [-1, 1]; or
            lr_context: `prepare_lr` of it, once for all calls on the same picture.
            image_embeds: (B, vector_dim), the CLIP vector of the low-resolution picture; None if vector_dim is 0.
            position_offset: added to the row and column of every token (training draws it at random).
            schedule: "full", "layer_major", "streaming" or a plan of `linattn.adapters.infdit.streaming`. Only "full"
                keeps what gradients need.

        Raises:
            ValueError: sizes that do not fit; the message names the argument.
            RuntimeError: gradients asked of another schedule than "full".
        """
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"hidden_states must be (B, {self.config.in_channels}, H, W), got {tuple(hidden_states.shape)}"
            )
        batch, _, height, width = hidden_states.shape
        self._check_sizes(height, width)
        context = self._context(lr_image, lr_context, batch, (height, width))
        plan = resolve(schedule)
        if plan.schedule == "full" and torch.is_grad_enabled():
            out = self._whole(hidden_states, timestep, image_embeds, context, position_offset)
        else:
            if torch.is_grad_enabled() and hidden_states.requires_grad:
                raise RuntimeError(f'schedule {plan.schedule!r} keeps nothing for gradients: use "full" or no_grad')
            out = hidden_states.new_empty(batch, self.config.out_channels, height, width)
            strips = self.strips(
                lambda top, bottom: hidden_states[:, :, top:bottom],
                height,
                width,
                timestep,
                image_embeds,
                lr_context=context,
                position_offset=position_offset,
                schedule=plan,
            )
            for top, bottom, rows in strips:
                out[:, :, top:bottom] = rows
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.patch_embed(pixels.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)

    def _read_out(self, x: Tensor, emb: Tensor, rows: int) -> Tensor:
        """Tokens (B, rows * width, C) to pixels (B, out_channels, ...)."""
        shift, scale = self.modulation_out(emb).chunk(2, 1)
        x = self.norm_out(self.norm_out(x))  # the trunk ends with one, and the head begins with another
        x = self.proj_out(modulate(x, shift, scale))
        p, b = self.config.patch_size, len(x)
        x = x.view(b, rows, -1, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, self.config.out_channels, rows * p, -1)

    def _whole(self, hidden_states, timestep, image_embeds, context, offset) -> Tensor:
        rows, width = (n // self.config.patch_size for n in hidden_states.shape[2:])
        emb = self._condition(timestep, image_embeds, len(hidden_states))
        positions = Positions(0, rows, width, tuple(offset))
        x = self._embed(hidden_states)
        for layer in self.transformer_blocks:
            if self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, emb, positions, context)
            else:
                x = layer(x, emb, positions, context)
        return self._read_out(x, emb, rows)

    def strips(
        self,
        read: Callable[[int, int], Tensor],
        height: int,
        width: int,
        timestep: Tensor | float,
        image_embeds: Tensor | None = None,
        *,
        lr_context: LRContext,
        position_offset: tuple[int, int] = (0, 0),
        schedule: str | Plan = "full",
    ) -> Iterator[tuple[int, int, Tensor]]:
        """`forward` without gradients, in strips: yields (top, bottom, rows of F), in pixels, from top to bottom.

        Args:
            read: (top, bottom) -> rows [top, bottom) of hidden_states, (B, in_channels, bottom - top, width). Every
                row is read once, and before the strip that it belongs to is yielded; so a caller may overwrite the
                rows that were yielded.
            height, width: of the picture, in pixels.
            schedule: how layers and strips are nested; the numbers are the same, within the rounding of matrix products
                of other shapes. "full": one strip. "layer_major": layer by layer, strips in place; the hidden state of
                the picture is held. "streaming": strip by strip through all layers; one row of blocks of keys and
                values per layer is held, and nothing that grows with the height.

        Raises:
            ValueError: sizes that do not fit.
        """
        self._check_sizes(height, width)
        context = self._context(None, lr_context, len(lr_context.image), (height, width))
        plan, size, block = resolve(schedule), self.config.patch_size, self.config.block_size
        rows, columns = height // size, width // size
        step = rows if plan.rows is None else min(rows, plan.rows * block)
        with torch.no_grad():
            emb = self._condition(timestep, image_embeds, len(lr_context.image))
        strips = [
            Positions(first, min(step, rows - first), columns, tuple(position_offset)) for first in range(0, rows, step)
        ]
        # A generator must not leave a grad mode behind between its steps: the walk below switches it around each.
        walk = self._layer_major if plan.schedule == "layer_major" else self._streaming
        return walk(read, strips, emb, context)

    @torch.no_grad()
    def _layer_major(self, read, strips, emb, context):
        columns, size = strips[0].width, self.config.patch_size
        total = strips[-1].first + strips[-1].rows
        x = self.patch_embed.weight.new_empty(len(emb), total * columns, self.config.hidden_size)
        places = [slice(s.first * columns, (s.first + s.rows) * columns) for s in strips]
        for strip, place in zip(strips, places, strict=True):
            x[:, place] = self._embed(read(strip.first * size, (strip.first + strip.rows) * size))
        halo = self._halo(strips, len(emb))
        for layer in self.transformer_blocks:
            halo.filled = False
            for strip, place in zip(strips, places, strict=True):
                layer(x[:, place], emb, strip, context, halo)
        yield from self._emit(x, emb, Positions(0, total, columns))

    @torch.no_grad()
    def _streaming(self, read, strips, emb, context):
        size = self.config.patch_size
        halos = [self._halo(strips, len(emb)) for _ in self.transformer_blocks]
        for strip in strips:
            top, bottom = strip.first * size, (strip.first + strip.rows) * size
            x = self._embed(read(top, bottom)).contiguous()
            for layer, halo in zip(self.transformer_blocks, halos, strict=True):
                layer(x, emb, strip, context, halo)
            yield from self._emit(x, emb, strip)

    def _halo(self, strips: list[Positions], batch: int) -> Halo:
        """An empty one, for strips as wide as these."""
        heads = self.config.num_attention_heads
        size = (batch, self.config.block_size * strips[0].width, heads, self.config.hidden_size // heads)
        return Halo(*(self.patch_embed.weight.new_empty(size) for _ in range(2))) if len(strips) > 1 else Halo()

    def _emit(self, x: Tensor, emb: Tensor, strip: Positions) -> Iterator[tuple[int, int, Tensor]]:
        """The pixels of a strip of tokens, one row of blocks at a time."""
        size, block = self.config.patch_size, self.config.block_size
        for first in range(0, strip.rows, block):
            top = (strip.first + first) * size
            part = x[:, first * strip.width : (first + block) * strip.width]
            yield top, top + block * size, self._read_out(part, emb, block)

    # ---- the authors' weights ----------------------------------------------------------------------------------------

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over weights under the names of the authors' code (726 keys for the published model).

        Strict, but for keys that the network does not use (`official.IGNORED`) and the image encoder's.

        Raises:
            ValueError: missing, unknown or misshapen keys; the message names them.
        """
        self.load_state_dict(official.to_own_names(self, state_dict), strict=True, assign=False)
