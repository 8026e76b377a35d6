"""What the Triton kernels of all op families share: feature maps, blocks of rows, head-dim tiles, launch rules.

Rules every kernel here follows
- Loads are converted to float32 at once, unless they go straight into `tl.dot`.
- Row addresses are `index.to(int64) * stride`: a token index times a row stride passes 2**31 in real images.
- Strides come in units of UNIT elements (a power of two, constexpr), so that the compiler knows how far every row is
  aligned. (Triton's own test is "stride divisible by 16", which fails for a head dim of 40 and leaves scalar loads.)
- No size is specialised on: one binary serves every length, and a size of 1 is not turned into a constant.
"""

from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl

# Every run-time integer and float of our kernels: sizes, strides (in UNITs) and factors. None is specialised on.
_TENSORS = ("q", "k", "v", "qd", "kd", "o", "g", "gq", "gk", "gv", "gqd", "gkd")
RUNTIME_ARGUMENTS = [
    "rows",
    "heads",
    "tokens",
    "keys",
    "chunk",
    "inner_size",
    "splits",
    "size0",
    "size1",
    "scale",
    "inv_count",
    "eps",
]
RUNTIME_ARGUMENTS += [f"{tensor}_s{axis}" for tensor in _TENSORS for axis in "bhn"]

IDENTITY: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)
ELU1: tl.constexpr = tl.constexpr(2)

# log2(e) as the sum of two float32 numbers, and ln(2).
_LOG2E: tl.constexpr = tl.constexpr(1.44269502162933349609375)
_LOG2E_LOW: tl.constexpr = tl.constexpr(1.925963033500011e-08)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """exp in float32. EXACT: the rounding error of x * log2(e), up to |x| ulp in the result, is carried along.

    (exp2 compiles to one flushing MUFU; tl.exp would add four instructions to keep subnormal results.)
    """
    if EXACT:
        x = tl.where(x < -104.0, -104.0, x)  # exp(-104) is 0 in float32; -inf would make the correction NaN
        high = x * _LOG2E
        low = tl.fma(x, _LOG2E, -high) + x * _LOG2E_LOW
        power = tl.exp2(high)
        return power + power * (low * _LN2)
    else:
        return tl.exp2(x * _LOG2E)


@triton.jit
def phi(x, FEATURE: tl.constexpr, EXACT: tl.constexpr):
    """Feature map of float32 values; the comparisons are written so that NaN passes through."""
    if FEATURE == ELU1:
        return tl.where(x > 0, x + 1.0, _exp(x, EXACT))
    elif FEATURE == RELU:
        return tl.where(x <= 0, 0.0, x)
    else:
        return x


@triton.jit
def phi_slope(p, FEATURE: tl.constexpr):
    """phi'(x) from p = phi(x) alone: elu1 is at most 1 exactly where its slope is its value."""
    if FEATURE == ELU1:
        return tl.where(p > 1.0, 1.0, p)
    elif FEATURE == RELU:
        return tl.where(p > 0, 1.0, 0.0)
    else:
        return tl.full(p.shape, 1.0, tl.float32)


@triton.jit
def load_rows(
    base, token, live, stride, UNIT: tl.constexpr, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr = True, INSIDE: tl.constexpr = False, FILL: tl.constexpr = 0.0,
):  # fmt: skip
    """Columns first .. first + BLOCK of the given tokens; FILL where the token is not live or the column >= WIDTH.

    MASKED = False promises that all tokens are live, INSIDE = True that all columns are below WIDTH.
    """
    column = first + tl.arange(0, BLOCK)
    at = base + token.to(tl.int64)[:, None] * stride * UNIT + column[None, :]
    if INSIDE:
        if MASKED:
            return tl.load(at, mask=live[:, None], other=FILL)
        else:
            return tl.load(at)
    elif MASKED:
        return tl.load(at, mask=live[:, None] & (column < WIDTH)[None, :], other=FILL)
    else:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=FILL)


@triton.jit
def store_rows(
    base, value, token, live, stride, UNIT: tl.constexpr, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr = True, INSIDE: tl.constexpr = False,
):  # fmt: skip
    column = first + tl.arange(0, BLOCK)
    at = base + token.to(tl.int64)[:, None] * stride * UNIT + column[None, :]
    value = value.to(base.dtype.element_ty)
    if INSIDE:
        if MASKED:
            tl.store(at, value, mask=live[:, None])
        else:
            tl.store(at, value)
    elif MASKED:
        tl.store(at, value, mask=live[:, None] & (column < WIDTH)[None, :])
    else:
        tl.store(at, value, mask=(column < WIDTH)[None, :])


@triton.jit
def load_matrix(base, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block of a contiguous (ROWS, COLUMNS) matrix, zero outside."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(base + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_matrix(base, value, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(base + row[:, None] * COLUMNS + column[None, :], value, mask=mask)


@triton.jit
def load_vector(base, column, COLUMNS: tl.constexpr):
    return tl.load(base + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def fit_float16(peak):
    """Power of two s that brings peak * s into [2**14, 2**15); 1 where peak is 0, subnormal, inf or NaN.

    A float32 matrix times s keeps 28 binary orders of magnitude above float16's subnormals and cannot overflow it.
    """
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    fits = (exponent > 0) & (exponent < 255)
    # 2**(14 - (exponent - 127)), kept inside the normal range
    power = tl.where(fits, tl.minimum(tl.maximum(268 - exponent, 1), 254), 127)
    return (power << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def reduce_kernel(PART0, PART1, OUT0, OUT1, size0, size1, splits, BLOCK: tl.constexpr):
    """OUT[i] = sum over splits of PART[split, i], in their order; the first programs do array 0, the rest array 1."""
    block = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    second = block >= blocks0
    size = tl.where(second, size1, size0)
    at = tl.where(second, block - blocks0, block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if second:
        for split in range(splits):
            total += tl.load(PART1 + split * tl.cast(size, tl.int64) + at, mask=at < size, other=0.0)
        tl.store(OUT1 + at, total, mask=at < size)
    else:
        for split in range(splits):
            total += tl.load(PART0 + split * tl.cast(size, tl.int64) + at, mask=at < size, other=0.0)
        tl.store(OUT0 + at, total, mask=at < size)


@triton.jit
def vector_operand(vector, fit, DTYPE: tl.constexpr):
    """A float32 vector times fit as a [D, 16] right operand whose columns add up to it: three terms of DTYPE, zeros.

    A product with it is phi(x) . vector in the tensor core, at float32's precision, with the very operand (and in the
    very register layout) that the numerator uses.
    """
    value = vector * fit
    high = value.to(DTYPE)
    rest = tl.where(tl.abs(value) < float("inf"), value - high.to(tl.float32), 0.0)  # inf - inf would be NaN
    middle = rest.to(DTYPE)
    low = (rest - middle.to(tl.float32)).to(DTYPE)
    column = tl.arange(0, 16)[None, :]
    terms = tl.where(column == 1, middle.to(tl.float32)[:, None], low.to(tl.float32)[:, None])
    terms = tl.where(column == 0, high.to(tl.float32)[:, None], terms)
    return tl.where(column < 3, terms, 0.0).to(DTYPE)


def head_tile(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) whose sum covers a head dim: 40 -> (64, 0), 80 -> (64, 16).

    Triton's blocks are powers of two, and padding 80 to 128 would cost 2.6 times the products and 1.6 times the feature
    maps. Up to 64 the padding is cheaper than a second block would be (blocks below 64 rows do not reach wgmma).
    """
    whole = triton.next_power_of_2(max(width, 16))
    if whole <= 64:
        return whole, 0
    half = whole // 2
    rest = max(16, triton.next_power_of_2(width - half)) if width > half else 0
    return (half, rest) if rest < half else (whole, 0)


def stride_unit(*tensors: torch.Tensor) -> int:
    """Largest power of two, at most 16 bytes, that divides every outer stride of all tensors."""
    bits = 16 // tensors[0].element_size()
    for tensor in tensors:
        for stride in tensor.stride()[:-1]:
            bits |= stride
    return bits & -bits


def split_tokens(tokens: int, heads: int, width: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, tokens per split) for a kernel that sums over tokens into a state of `width` columns.

    Never a function of the batch: the split decides the order of the sums, and a sample must give the same bits in any
    batch. A partial state costs 4 * D * width bytes against 8 * D per token and head, so `chunk` tokens per split are a
    workspace of width / (2 * chunk) of q, k, v and out.
    """
    programs = heads * tiles
    chunk = max(256, 12 * width) if tokens >= 32768 else 256  # above 32k: workspace below 4.2 %
    fill = min(-(-2 * multiprocessors // programs), tokens // chunk)  # two programs per multiprocessor at batch 1
    smooth = min(-(-8 * multiprocessors // programs), tokens // (16 * width))  # short tail of the last wave
    exact = -(-tokens // 16384)  # long float32 sums in the tensor core lose bits
    splits = max(1, fill, smooth, exact)
    chunk = -(-tokens // splits)
    chunk = -(-chunk // 128) * 128  # whole blocks
    return -(-tokens // chunk), chunk


def run_tokens(tokens: int, programs: int, block: int, multiprocessors: int) -> tuple[int, int]:
    """(runs, tokens per run) for a kernel whose rows are independent, so the batch may count.

    Long runs spread the cost of loading the state; short ones fill the device.
    """
    fill = -(-2 * multiprocessors // programs)
    smooth = min(-(-8 * multiprocessors // programs), tokens // (8 * block))
    runs = max(1, fill, smooth, -(-tokens // 65536))
    chunk = -(-tokens // runs)
    chunk = -(-chunk // block) * block
    return -(-tokens // chunk), chunk


def reduce_partials(partials: torch.Tensor, splits: int, first: torch.Tensor, second: torch.Tensor | None) -> None:
    """first and second from their partials: [splits, *first.shape], then [splits, *second.shape]."""
    first_size = first.numel()
    second_size = 0 if second is None else second.numel()
    grid = (triton.cdiv(first_size, 1024) + triton.cdiv(second_size, 1024),)
    second_partials = partials if second is None else partials[splits * first_size :]
    reduce_kernel[grid](
        partials, second_partials, first, first if second is None else second, first_size, second_size, splits,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


@lru_cache(None)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a small number for the interpreter, which runs programs one by one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


@lru_cache(None)
def tensor_core(device: torch.device) -> str:
    """How tl.dot multiplies on a device: "wgmma", "mma" or "".

    wgmma (Hopper) reads its right operand from shared memory; mma.sync takes it from registers, where a D x E operand
    that stays for a whole loop does not always fit. "" stands for the rest: for datacentre Blackwell, Triton 3.6 fails
    to compile some of the kernels that keep a state in registers, so it gets the plain tiled ones.
    """
    if device.type != "cuda":
        return "wgmma"  # the interpreter, which has no such limits
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "mma", 9: "wgmma", 12: "mma"}.get(major, "")


def on_device(tensor: torch.Tensor):
    """Context in which a launch goes to the tensor's device. None where it would change nothing (the usual case)."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return None


def launched_on_tensor_device(launcher):
    """Triton launches on the current device; go to the device of the launcher's first tensor where that is another."""

    @wraps(launcher)
    def launch(*arguments):
        device = on_device(arguments[0])
        if device is None:
            return launcher(*arguments)
        with device:
            return launcher(*arguments)

    return launch


def strides(tensor: torch.Tensor, unit: int) -> tuple[int, int, int]:
    """Strides of (B, H, N) of a (B, H, N, D) tensor in units of `unit` elements."""
    b, h, n, _ = tensor.stride()
    return b // unit, h // unit, n // unit


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with scale > 0, well inside float32, for a running maximum; the usual case costs nothing."""
    if scale >= 1e-30:
        return q, scale
    return (-q, -scale) if scale <= -1e-30 else (q * 0.0, 1.0)
