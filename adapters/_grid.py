"""Where the image tokens of a transformer lie: the grid that a call works on, and its position ids in full precision.

A diffusion transformer sees a row of tokens; that they are height x width tokens of an image is known to its caller
only. `Grid` finds it out once a call, before the first block runs, for all modules that share it.

The size is kept as the shape of a tensor without elements. In eager mode its entries are Python integers; under
torch.compile, which takes integers on modules for constants, they are symbolic, so that a new size compiles nothing.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# Where FluxTransformer2DModel.forward has these arguments, for calls that do not name them.
_IMG_IDS, _HIDDEN_STATES = 4, 0
_KONTEXT = (
    "A second image in the sequence (FLUX.1 Kontext) is not supported: a window has no meaning across two images. "
    "unmount() CLEAR for such calls"
)


class Grid:
    """Height and width in image tokens of the call that is running, shared by the mounted modules of one model.

    Attributes:
        fixed: (height, width) set ahead, or None: found in each call.
        training_length: number of tokens at which proportional attention changes nothing; None: it is off.
    """

    def __init__(self):
        self.fixed: tuple[int, int] | None = None
        self.training_length: int | None = None
        self._shape: Tensor | None = None
        self._seen: tuple | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width); integers, or symbols of them while a graph is traced."""
        if self._shape is None:
            raise RuntimeError(
                "the height and width of the image are not known: call the transformer itself, whose forward finds "
                "them, or say them by set_grid(height, width)"
            )
        return self._shape.shape[0], self._shape.shape[1]

    def fix(self, size: tuple[int, int] | None, device=None) -> None:
        """Set the size ahead of the calls; None: each call finds its own."""
        self.fixed = size
        if size is not None:
            self._set(*size, device)

    def read_position_ids(self, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook for FLUX: the grid from img_ids, which go on in float32."""
        ids = _argument("img_ids", _IMG_IDS, args, kwargs)
        if ids is None:
            raise ValueError("img_ids is needed: the position (0, row, column) of each image token, shape (tokens, 3)")
        ids = ids[0] if ids.ndim == 3 else ids  # diffusers still takes, and warns of, a batch dimension
        if self.fixed is None:
            height, width, ids = self._read(ids)
            self._set(height, width, ids.device)
        else:
            height, width = self.fixed
            if ids.shape[0] != height * width:
                raise ValueError(
                    f"set_grid({height}, {width}) was called, which is {height * width} image tokens, but img_ids has "
                    f"{ids.shape[0]}. Call set_grid() without arguments to have each call find its own grid"
                )
            if _is_coarse(ids):
                ids = _raster(ids[0], height, width)
        return _with_argument("img_ids", _IMG_IDS, ids, args, kwargs)

    def read_latents(self, module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook for SD3: the grid from the size of the latents."""
        latents = _argument("hidden_states", _HIDDEN_STATES, args, kwargs)
        patch = module.config.patch_size
        size = latents.shape[-2] // patch, latents.shape[-1] // patch
        if self.fixed is None:
            self._set(*size, latents.device)
        elif self.fixed != size:
            raise ValueError(
                f"set_grid{self.fixed} was called, but these latents are {size[0]} x {size[1]} image tokens. Call "
                "set_grid() without arguments to have each call find its own grid"
            )

    def _set(self, height: int, width: int, device) -> None:
        shape = self._shape
        if shape is None or shape.shape[0] != height or shape.shape[1] != width or shape.device != device:
            self._shape = torch.empty((height, width, 0), device=device)

    @torch.compiler.disable(reason="position ids are read before the graph: call set_grid(height, width) ahead")
    def _read(self, ids: Tensor) -> tuple[int, int, Tensor]:
        """(height, width, exact ids). Pipelines pass one tensor in all steps: it is read, which waits for its device,
        in the first."""
        version = None if ids.is_inference() else ids._version
        if self._seen is None or self._seen[0] is not ids or self._seen[1] != version:
            self._seen = ids, version, *read_grid(ids)
        return self._seen[2:]


def read_grid(ids: Tensor) -> tuple[int, int, Tensor]:
    """The grid that position ids describe, and the ids in full precision.

    Args:
        ids: (tokens, 3), rows (constant, row, column) in raster order. 16-bit ids may have been rounded, as pipelines
            do by casting them to the dtype of the model: bfloat16 counts to 256, then by twos, from 512 by fours.

    Returns:
        height, width, and ids (tokens, 3): float32 and counted again where they were 16-bit numbers that count by
        one, else those given.

    Raises:
        ValueError: the ids are not those of one image in raster order.
    """
    if ids.ndim != 2 or ids.shape[1] != 3 or ids.shape[0] == 0:
        raise ValueError(f"img_ids must have the shape (tokens, 3), got {tuple(ids.shape)}")
    table = ids.detach().to("cpu")
    first = table[0]
    if not bool((table[:, 0] == first[0]).all()):
        raise ValueError(
            f"img_ids must be one image: its first column is constant, got {table[:, 0].unique().tolist()}. {_KONTEXT}"
        )
    tokens = len(table)
    # How often the first column occurs counts the rows, how often the first row occurs the columns. Either count is
    # too high where rounding makes neighbours of the first equal, which zero never is.
    rows, columns = int((table[:, 2] == first[2]).sum()), int((table[:, 1] == first[1]).sum())
    for height, width in dict.fromkeys([(rows, tokens // rows), (tokens // columns, columns)]):
        if height * width != tokens:
            continue
        if _is_coarse(ids) and torch.equal(_raster(first, height, width).to(ids.dtype), table):
            return height, width, _raster(ids[0], height, width)
        if _is_raster(table[:, 1:], height, width):
            return height, width, ids
    raise ValueError(
        f"img_ids must be one image in raster order (constant, row, column), rows and columns counting up; the "
        f"{tokens} ids from {first.tolist()} to {table[-1].tolist()} are not. {_KONTEXT}"
    )


def _is_raster(table: Tensor, height: int, width: int) -> bool:
    """Whether (tokens, 2) rows and columns run through a grid in raster order; their steps may be any."""
    y, x = table.reshape(height, width, 2).double().unbind(-1)
    same = bool((y == y[:, :1]).all()) and bool((x == x[:1]).all())
    return same and bool((y[:, 0].diff() > 0).all()) and bool((x[0].diff() > 0).all())


def _is_coarse(ids: Tensor) -> bool:
    """Whether numbers of this dtype cannot count to the sizes of images."""
    return ids.is_floating_point() and ids.dtype.itemsize < 4


def _raster(first: Tensor, height: int, width: int) -> Tensor:
    """Ids (height * width, 3) in float32 that count from `first` in raster order."""
    first = first.float()
    y, x = torch.meshgrid(
        first[1] + torch.arange(height, device=first.device),
        first[2] + torch.arange(width, device=first.device),
        indexing="ij",
    )
    return torch.stack([first[0].expand(height, width), y, x], dim=-1).reshape(height * width, 3)


def _argument(name: str, position: int, args: tuple, kwargs: dict):
    return args[position] if len(args) > position else kwargs.get(name)


def _with_argument(name: str, position: int, value, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
