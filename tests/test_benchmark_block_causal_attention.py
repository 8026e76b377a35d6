"""The benchmark of block-causal attention: its contenders are one function, and its work is what the op reports."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks belong to the checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import block_causal_attention as benchmark  # noqa: E402
from benchmarks.harness.family import Case  # noqa: E402
from benchmarks.harness.measure import Skip  # noqa: E402

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("mode", ["forward", "forward+backward"])
LAYOUTS = pytest.mark.parametrize("layout", ["BNHD", "BHND"])


def case(mode="forward", layout="BNHD"):
    return Case("12x16 b4", 2, 3, 192, 192, 16, 16, "float32", layout=layout, mode=mode)


def called(provider, case):
    contender = benchmark.prepare(provider, case, CPU, None, 1.0)
    with contender.scope():
        return contender.call()


@BOTH
@LAYOUTS
def test_keys_put_side_by_side_give_the_numbers_of_the_op(mode, layout):
    """Corner, first row, first column and interior, with embeddings; gradients of all four tensors."""
    theirs, ours = (called(provider, case(mode, layout)) for provider in ("sdpa", "linattn-cpu"))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert mode == "forward" or [g.shape for g in ours] == [(2, 3, 192, 16)] * 3 + [(4, 3, 16)]


def test_sorting_by_blocks_and_back_changes_nothing():
    pattern = benchmark.Pattern(4, 6, 2)
    x = torch.arange(2 * 3 * 24 * 5.0).reshape(2, 3, 24, 5)
    blocks = benchmark.by_blocks(x, pattern)
    assert blocks.shape == (2, 2, 3, 3, 4, 5)
    assert blocks[0, 1, 2, 0, :, 0].tolist() == x[0, 0, [16, 17, 22, 23], 0].tolist()
    assert torch.equal(benchmark.in_raster_order(blocks, pattern), x)


@BOTH
def test_the_flops_are_those_that_the_op_reports_to_torch(mode):
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    with FlopCounterMode(display=False) as counter:
        called("linattn-cpu", case(mode))
    assert counter.get_total_flops() == benchmark.work(case(mode))[1]


def test_bytes_are_those_counted_by_hand():
    rows = 2 * 3 * 192 * 16
    assert benchmark.work(case())[0] == 4 * 4 * rows  # q, k, v, out
    assert benchmark.work(case("forward+backward"))[0] == 4 * 12 * rows  # and q, k, v, out, dout, dq, dk, dv


def test_flex_is_left_out_where_its_tiles_do_not_fit_the_blocks():
    with pytest.raises(Skip, match="a block is not a multiple of 64 tokens"):
        benchmark.prepare("flex", case(), CPU, None, 1.0)
