"""The CPU kernels of block-causal attention below the public op: every instruction set, tile edges, threads, workspace.

What the op means is tested for all backends alike in test_block_causal_attention.py.
"""

import subprocess
import sys

import pytest
import torch
from helpers.native import ISAS
from test_cpu_kernels import DTYPES, library, threads, use  # noqa: F401  (fixtures)

import linattn  # noqa: F401  (defines the private ops)
from linattn import backend

REASON = backend.why_not("block_causal_attention", "cpu", torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Case:
    """A call: grid and block in tokens, the strip of queries; heads adjacent in memory, as models have them."""

    def __init__(self, height, width, block, strip=None, clamp=True, embed=True, dim=40, batch=1, heads=2):
        self.height, self.width, self.block, self.clamp, self.embed = height, width, block, clamp, embed
        self.q_row, self.q_rows = strip or (0, height)
        self.dim, self.batch, self.heads = dim, batch, heads

    def __str__(self):
        words = f"{self.height}x{self.width} by {self.block} from {self.q_row} dim {self.dim}"
        return words + ("" if self.clamp else " drop") + ("" if self.embed else " no embed")

    def tensors(self, dtype, seed=0):
        """q, k, v, slot_embed, grad_out, grad_lse."""
        generator = torch.Generator().manual_seed(seed)

        def make(rows):
            x = torch.randn(self.batch, rows * self.width, self.heads, self.dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        q, k, v, grad_out = make(self.q_rows), make(self.height), make(self.height), make(self.q_rows)
        embed = torch.randn(4, self.heads, self.dim, generator=generator) if self.embed else None
        return q, k, v, embed, grad_out, torch.randn(q.shape[:3], generator=generator)

    @property
    def geometry(self):
        return self.height, self.width, self.block, self.clamp, self.q_row, self.dim**-0.5

    def mask(self):
        """(queries, slots, keys), from coordinates."""
        token = torch.arange(self.height * self.width)
        row, column = token // self.width // self.block, token % self.width // self.block
        mine = slice(self.q_row * self.width, (self.q_row + self.q_rows) * self.width)
        slots = []
        for up, left in ((0, 0), (1, 1), (0, 1), (1, 0)):
            i, j = row[mine] - up, column[mine] - left
            if self.clamp:
                i, j = i.clamp(min=0), j.clamp(min=0)
            slots.append((i[:, None] == row) & (j[:, None] == column))
        return torch.stack(slots, 1)


def run(case, q, k, v, embed, grad_out, grad_lse):
    """Everything that the two kernels write, as a dict; every output starts as NaN."""

    def like(x):
        return None if x is None else torch.full_like(x, float("nan"))

    out, lse = like(q), torch.full(q.shape[:3], float("nan"))
    torch.ops.linattn._block_causal_attention_cpu(q, k, v, embed, *case.geometry, out, lse)
    grads = {"q": like(q), "k": like(k), "v": like(v), "slot_embed": like(embed)}
    torch.ops.linattn._block_causal_attention_backward_cpu(
        grad_out, grad_lse, q, k, v, embed, out, lse, *case.geometry, *grads.values()
    )
    return {"out": out, "lse": lse} | {f"grad_{name}": x for name, x in grads.items() if x is not None}


def plain(case, tensors, dtype):
    """The formulas in `dtype`, gradients written out, every step rounded."""
    q, k, v, embed, grad_out, grad_lse = (None if x is None else x.to(dtype) for x in tensors)
    scale, mask = case.dim**-0.5, case.mask()
    slots = torch.zeros(4, 1, 1, dtype=dtype) if embed is None else embed
    keys = torch.cat([k + e.unsqueeze(-2) for e in slots], 2)
    scores = (q @ keys.mT * scale).masked_fill(~mask.flatten(1), float("-inf"))
    p, lse = scores.softmax(-1), scores.logsumexp(-1)
    values = torch.cat([v] * 4, 2)
    out = p @ values
    ds = p * (grad_out @ values.mT - (grad_out * out).sum(-1, keepdim=True) + grad_lse[..., None])
    over_slots = [x.unflatten(-1, (4, -1)) for x in (p, ds)]
    results = {"out": out, "lse": lse, "grad_q": ds @ keys * scale}
    results["grad_k"] = over_slots[1].sum(-2).mT @ q * scale
    results["grad_v"] = over_slots[0].sum(-2).mT @ grad_out
    if embed is not None:
        results["grad_slot_embed"] = torch.einsum("bhns,bhnd->shd", over_slots[1].sum(-1), q) * scale
    return results


# Tiles are 64 tokens of a block, 32 where a block has no more; chunks 64 rows; four tiles share one.
EDGES = [
    Case(16, 16, 8, dim=64),
    Case(24, 16, 8, clamp=False, dim=128, heads=1),
    Case(10, 15, 5, dim=51),
    Case(18, 9, 9, embed=False),
    Case(36, 18, 18, strip=(18, 18), dim=80, heads=1),
    Case(12, 18, 6, strip=(6, 6), clamp=False, embed=False, dim=33),
    Case(3, 7, 1, dim=8),
    Case(7, 7, 7, batch=2),
    Case(32, 64, 32, dim=80, heads=1),
]


@every_isa
@every_dtype
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_error_is_at_most_twice_that_of_the_plain_formula(library, isa, dtype, case):  # noqa: F811
    use(library, isa)
    tensors = case.tensors(DTYPES[dtype])
    exact, rounded = plain(case, tensors, torch.float64), plain(case, tensors, DTYPES[dtype])
    got = run(case, *tensors)
    assert got.keys() == exact.keys()
    for name, reference in exact.items():
        error, allowed = (got[name].double() - reference).norm(), 2 * (rounded[name].double() - reference).norm()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


LARGE, SMALL = Case(36, 18, 18, dim=16, batch=3), Case(9, 12, 3, batch=3)


def assert_same(results, others):
    for name, value in results.items():
        assert not value.isnan().any(), name
        assert torch.equal(value, others[name]), name


@every_isa
@every_dtype
@pytest.mark.parametrize("case", [SMALL, LARGE], ids=str)
def test_same_bits_for_any_number_of_threads(library, threads, isa, dtype, case):  # noqa: F811
    use(library, isa)
    tensors = case.tensors(DTYPES[dtype])
    threads(1)
    one = run(case, *tensors)
    threads(3)
    assert_same(one, run(case, *tensors))


@every_isa
@every_dtype
@pytest.mark.parametrize("case", [SMALL, LARGE], ids=str)
def test_same_bits_for_a_sample_alone_and_in_a_batch(library, isa, dtype, case):  # noqa: F811
    use(library, isa)
    q, k, v, embed, grad_out, grad_lse = case.tensors(DTYPES[dtype])
    batch = run(case, q, k, v, embed, grad_out, grad_lse)
    one = slice(1, 2)
    alone = run(case, q[one], k[one], v[one], embed, grad_out[one], grad_lse[one])
    del alone["grad_slot_embed"]  # a sum over the batch
    assert_same(alone, {name: x[one] for name, x in batch.items()})


@every_isa
@every_dtype
def test_embeddings_of_empty_slots_are_not_read(library, isa, dtype):  # noqa: F811
    use(library, isa)
    case = Case(5, 20, 5, clamp=False)  # one row of blocks: top-left and top are empty everywhere
    tensors = case.tensors(DTYPES[dtype])
    clean = run(case, *tensors)
    tensors[3][[1, 3]] = float("nan")
    assert_same(clean, run(case, *tensors))
    assert (clean["grad_slot_embed"][[1, 3]] == 0).all()


@every_isa
def test_scores_of_any_size_are_exponentiated_safely(library, isa):  # noqa: F811
    use(library, isa)
    case = Case(6, 9, 3, dim=8, heads=1)
    tensors = case.tensors(torch.float32)
    huge = 1e18
    tensors[0].mul_(huge), tensors[1].mul_(huge)  # scores near 1e36: one key takes all
    out, exact = run(case, *tensors)["out"], plain(case, tensors, torch.float64)["out"]
    assert torch.equal(out.double(), exact.float().double())


@every_isa
def test_grad_lse_may_have_any_strides(library, isa):  # noqa: F811
    use(library, isa)
    case = Case(6, 9, 3)
    *tensors, grad_lse = case.tensors(torch.float32)
    ones = torch.ones(()).expand(grad_lse.shape)
    assert_same(run(case, *tensors, ones.contiguous()), run(case, *tensors, ones))


@every_isa
def test_no_queries_leave_gradients_of_zero(library, isa):  # noqa: F811
    use(library, isa)
    for case in (Case(6, 6, 3, strip=(3, 0)), Case(6, 6, 3, batch=0), Case(0, 6, 3), Case(0, 0, 2**62)):
        for name, x in run(case, *case.tensors(torch.float32)).items():
            assert (x == 0).all(), name
        assert run(case, *case.tensors(torch.float32))["grad_slot_embed"].numel() == 4 * 2 * 40


# -------------------------------------------------------------------------------------------- workspace, bad input


PEAK = """
import resource, sys, torch, linattn
torch.set_num_threads(1)
backward = sys.argv[1] == "backward"
q, k, v, out, grad, gq, gk, gv = (torch.zeros(1, 4096, 8, 80).transpose(1, 2) for _ in range(8))
lse, embed, ge = torch.zeros(1, 8, 4096), torch.zeros(4, 8, 80), torch.zeros(4, 8, 80)
geometry = 64, 64, 32, True, 0, 80**-0.5
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if backward:
    torch.ops.linattn._block_causal_attention_backward_cpu(
        grad, None, q, k, v, embed, out, lse, *geometry, gq, gk, gv, ge)
else:
    torch.ops.linattn._block_causal_attention_cpu(q, k, v, embed, *geometry, out, lse)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * q.nbytes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_workspace_is_below_5_percent_of_the_tensors(direction):
    done = subprocess.run([sys.executable, "-c", PEAK, direction], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


def test_bindings_refuse_what_memory_safety_depends_on():
    case = Case(6, 9, 3)
    q, k, v, embed, grad, _ = case.tensors(torch.float32)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])

    def call(q=q, k=k, v=v, embed=embed, geometry=case.geometry, out=out, lse=lse):
        torch.ops.linattn._block_causal_attention_cpu(q, k, v, embed, *geometry, out, lse)

    call()
    with pytest.raises(RuntimeError, match="k must be"):
        call(k=k[:, :, :-1])
    with pytest.raises(RuntimeError, match="v must be"):
        call(v=v[..., :32])
    with pytest.raises(RuntimeError, match="slot_embed must be"):
        call(embed=embed[:3])
    with pytest.raises(RuntimeError, match="slot_embed must be"):
        call(embed=embed[..., :32])
    with pytest.raises(RuntimeError, match="slot_embed must be float32"):
        call(embed=embed.double())
    with pytest.raises(RuntimeError, match="slot_embed must be float32 and contiguous"):
        call(embed=embed.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="out must be"):
        call(out=out[:, :1])
    with pytest.raises(RuntimeError, match="lse must be"):
        call(lse=lse[:, :, 1:])
    with pytest.raises(RuntimeError, match="lse must be contiguous"):
        call(lse=lse.mT.contiguous().mT)
    for geometry in ((7, 9, 3), (6, 8, 3), (6, 9, 4)):
        with pytest.raises(RuntimeError, match="multiples of block"):
            call(geometry=(*geometry, *case.geometry[3:]))
    with pytest.raises(RuntimeError, match="block must be at least 1"):
        call(geometry=(6, 9, 0, *case.geometry[3:]))
    with pytest.raises(RuntimeError, match="q must hold rows of blocks"):
        call(geometry=(*case.geometry[:4], 3, case.geometry[5]))
    with pytest.raises(RuntimeError, match="q must hold rows of blocks"):
        call(q=q[:, :, :9], out=out[:, :, :9], lse=lse[:, :, :9])
    with pytest.raises(RuntimeError, match="another dtype"):
        call(k=k.half())
    with pytest.raises(RuntimeError, match="stride 1"):
        call(q=q.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="grad_slot_embed goes with slot_embed"):
        torch.ops.linattn._block_causal_attention_backward_cpu(
            grad, None, q, k, v, embed, out, lse, *case.geometry, q.clone(), k.clone(), v.clone(), None
        )
