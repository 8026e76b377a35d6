"""The schedules of Inf-DiT: each gives the numbers of the whole, in the memory that its plan says."""

import pytest
import torch
from helpers.memory import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("diffusers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')

from test_infdit_model import inputs, small

from linattn.adapters import InfDiTTransformer2DModel
from linattn.adapters.infdit import streaming
from linattn.adapters.infdit.streaming import Plan, peak_bytes, plan

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
PLANS = [
    Plan("layer_major", 1),
    Plan("layer_major", 2, keep_lr=False),
    Plan("layer_major", 3),
    Plan("streaming", 1, keep_lr=False),
    Plan("streaming", 2),
    Plan("streaming", 9),
    Plan("full", None, keep_lr=False),
]


def strip_by_strip(model, way, x, time, lr, vector, **options):
    """F by `strips`, every strip of the input overwritten as soon as its result is there, and the order of events."""
    x, out, events = x.clone(), torch.full_like(x[:, :3], float("nan")), []

    def read(top, bottom):
        events.append(("read", top, bottom))
        return x[:, :, top:bottom].clone()

    context = model.prepare_lr(lr, keep=way.keep_lr)
    strips = model.strips(read, *x.shape[2:], time, vector, lr_context=context, schedule=way, **options)
    for top, bottom, rows in strips:
        events.append(("write", top, bottom))
        out[:, :, top:bottom] = rows
        x[:, :, top:bottom] = float("nan")
    return out, events


@pytest.mark.parametrize("way", PLANS, ids=str)
@pytest.mark.parametrize("height, width, batch", [(5, 3, 1), (3, 4, 2), (1, 2, 1)])
def test_every_schedule_gives_the_numbers_of_the_whole(way, height, width, batch):
    """In float64, where a wrong neighbour or position would stand out; five rows of blocks leave a ragged strip."""
    model = small(vector_dim=5, num_layers=3).double()
    side = model.block_pixels
    arguments = inputs(model, height * side, width * side, batch, dtype=torch.float64)
    whole = model(*arguments, position_offset=(2, 9)).sample
    assert whole.requires_grad, "the path that training takes"
    found, _ = strip_by_strip(model, way, *arguments, position_offset=(2, 9))
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-11)
    with torch.no_grad():
        x, time, lr, vector = arguments
        by_forward = model(x, time, lr, vector, position_offset=(2, 9), schedule=way).sample
    torch.testing.assert_close(by_forward, whole.detach(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_schedules_differ_by_rounding_alone(dtype, tolerance):
    model = small(num_layers=2).to(dtype)
    arguments = inputs(model, 5 * 16, 3 * 16, dtype=dtype)
    with torch.no_grad():
        whole = model(*arguments).sample.float()
        for way in PLANS:
            found = strip_by_strip(model, way, *arguments)[0].float()
            assert (found - whole).norm() < tolerance * whole.norm(), way


def test_blocks_are_cut_into_pieces_of_any_size(monkeypatch):
    """Linear layers and cross-attention run on a few blocks at a time: also when that is less than a row, or ragged."""
    from linattn.adapters.infdit import model as module

    model = small(num_layers=2).double()
    arguments = inputs(model, 3 * 16, 5 * 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(*arguments).sample
        for pieces in (1, 2, 3, 100):
            monkeypatch.setattr(module, "PIECE", pieces)
            found, _ = strip_by_strip(model, Plan("streaming", 2), *arguments)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_each_row_is_read_once_and_streaming_writes_before_it_reads_on():
    model = small()
    arguments = inputs(model, 5 * 16, 32)
    _, events = strip_by_strip(model, Plan("streaming", 2), *arguments)
    assert events == [
        ("read", 0, 32),
        ("write", 0, 16),
        ("write", 16, 32),
        ("read", 32, 64),
        ("write", 32, 48),
        ("write", 48, 64),
        ("read", 64, 80),
        ("write", 64, 80),
    ]
    _, events = strip_by_strip(model, Plan("layer_major", 3), *arguments)
    reads, writes = events[:2], events[2:]
    assert reads == [("read", 0, 48), ("read", 48, 80)]
    assert writes == [("write", top, top + 16) for top in range(0, 80, 16)]


def test_strips_leave_the_grad_mode_alone():
    model = small()
    x, time, lr, _ = inputs(model, 48, 32)
    strips = model.strips(
        lambda a, b: x[:, :, a:b], 48, 32, time, lr_context=model.prepare_lr(lr), schedule="streaming"
    )
    for _, _, rows in strips:
        assert torch.is_grad_enabled() and not rows.requires_grad


def test_gradients_asked_of_a_schedule_that_keeps_nothing_are_refused():
    model = small()
    x, time, lr, _ = inputs(model, 32, 32)
    with pytest.raises(RuntimeError, match="'streaming' keeps nothing for gradients"):
        model(x.requires_grad_(), time, lr, schedule="streaming")


def test_names_of_the_original_mean_the_exact_schedule():
    assert streaming.resolve("ar") == streaming.resolve("ar2") == streaming.resolve("streaming") == Plan("streaming", 1)
    for wrong in ("rows", Plan("rows"), Plan("full", 0)):
        with pytest.raises(ValueError, match=r"expected|must be one of"):
            streaming.resolve(wrong)


# -------------------------------------------------------------------------------------------------------------- memory


def imagined(dtype=torch.bfloat16, **sizes):
    """A model without memory: what it would allocate can be counted, at any size."""
    torch.set_default_dtype(dtype)
    try:
        return InfDiTTransformer2DModel(**sizes)
    finally:
        torch.set_default_dtype(torch.float32)


def peak(model, batch, height, width, way):
    """Bytes that one call has alive at most, beside weights and the caller's pictures."""
    size, dtype = model.config.sr_scale, model.dtype
    lr = torch.empty(batch, 3, height // size, width // size, dtype=dtype)
    vector = torch.empty(batch, model.config.vector_dim, dtype=dtype) if model.config.vector_dim else None

    def read(top, bottom):
        return torch.empty(batch, model.config.in_channels, bottom - top, width, dtype=dtype)

    with PeakMemory() as counted, torch.no_grad():
        counted.ignore(*model.parameters(), lr)
        context = model.prepare_lr(lr, keep=way.keep_lr)
        for _ in model.strips(read, height, width, 0.5, vector, lr_context=context, schedule=way):
            pass
    return counted.peak


TINY = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "block_size": 8, "vector_dim": 0}


@pytest.mark.parametrize(
    "dtype, batch, height, width, sizes",
    [
        (torch.bfloat16, 1, 1024, 1024, {"num_layers": 2}),
        (torch.bfloat16, 1, 1024, 256, {"num_layers": 3}),
        (torch.float32, 2, 512, 1024, {"num_layers": 2}),
        (torch.float32, 1, 128, 128, {"num_layers": 1}),
        (torch.bfloat16, 1, 256, 192, TINY),
        (torch.float32, 1, 256, 32, TINY | {"hidden_size": 32, "num_attention_heads": 2, "block_size": 4}),
        (torch.float32, 1, 96, 192, TINY),
    ],
)
def test_plan_says_what_a_call_allocates(dtype, batch, height, width, sizes):
    with FakeTensorMode():
        model = imagined(dtype, **sizes)
        for way in (
            Plan("full", None),
            Plan("layer_major", 1, keep_lr=False),
            Plan("layer_major", 3),
            Plan("streaming", 1, keep_lr=False),
            Plan("streaming", 2),
        ):
            counted, said = peak(model, batch, height, width, way), peak_bytes(model, batch, height, width, way)
            assert counted <= said <= 1.4 * counted + 2 * MIB, (
                f"{way}: {counted / MIB:.1f} counted, {said / MIB:.1f} MiB said"
            )


def test_count_of_imagined_tensors_is_that_of_real_ones():
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "block_size": 4, "vector_dim": 0}
    for way in (Plan("full"), Plan("streaming", 1, keep_lr=False)):
        real = peak(InfDiTTransformer2DModel(**sizes), 1, 96, 64, way)
        with FakeTensorMode():
            assert peak(imagined(torch.float32, **sizes), 1, 96, 64, way) == real


def test_streaming_holds_nothing_that_grows_with_the_height_and_layer_major_the_hidden_state():
    sizes = {"num_layers": 4}
    with FakeTensorMode():
        model = imagined(**sizes)
        streams = [peak(model, 1, height, 512, Plan("streaming", 1, keep_lr=False)) for height in (512, 1024)]
        assert streams[0] == streams[1]
        majors = [peak(model, 1, height, 512, Plan("layer_major", 1, keep_lr=False)) for height in (512, 1024)]
        hidden = (1024 - 512) * 512 // 16 * 1280 * 2
        assert abs(majors[1] - majors[0] - hidden) < 0.01 * hidden
        # The rolling cache: keys and values of one row of blocks for every layer, 5 MiB a block.
        deep, flat = imagined(num_layers=8), peak(model, 1, 1024, 512, Plan("streaming", 1, keep_lr=False))
        more = peak(deep, 1, 1024, 512, Plan("streaming", 1, keep_lr=False)) - flat
        assert more == 4 * (512 // 128) * 5 * MIB


def test_plan_takes_the_longest_strips_that_fit():
    with FakeTensorMode():
        model = imagined(num_layers=28)
        size = (1, 2048, 2048)
        unlimited = plan(model, *size, None)
        assert (unlimited.schedule, unlimited.rows, unlimited.keep_lr) == ("full", None, True)
        seen, limit = [], unlimited.peak_bytes
        while True:
            try:
                found = plan(model, *size, limit - 1)
            except ValueError as error:
                assert f"expected at least {found.peak_bytes / MIB:,.0f} MiB for 1 x 2048 x 2048 pixels" in str(error)
                break
            assert found.peak_bytes < limit
            assert found.peak_bytes == peak_bytes(model, *size, found)
            seen.append((found.schedule, found.rows))
            limit = found.peak_bytes
        assert seen[0] == ("full", None), "first of all it holds no keys of the low resolution"
        assert ("layer_major", 1) in seen and ("layer_major", 8) in seen
        assert limit < 0.35 * unlimited.peak_bytes
        # At 56 rows of blocks the hidden state is as large as the cache of 28 layers.
        assert plan(model, 1, 16384, 1024, "1.6GiB").schedule == "streaming"
        assert plan(model, *size, None, schedule="ar2").schedule == "streaming"


def test_limits_are_read_as_people_write_them():
    cpu = torch.device("cpu")
    assert streaming.memory_limit("1.5 GiB", cpu) == 1.5 * 2**30
    assert streaming.memory_limit("512MB", cpu) == streaming.memory_limit("512m", cpu) == 512 * MIB
    assert streaming.memory_limit(1e9, cpu) == streaming.memory_limit("1000000000", cpu) == 10**9
    assert streaming.memory_limit(None, cpu) is None
    assert 0 < streaming.memory_limit("auto", cpu) <= streaming.free_bytes("cpu")
    for wrong in ("much", "4 GiBs", "1.2.3G", 0, -5, True, float("inf"), [1]):
        with pytest.raises(ValueError, match="max_memory must be bytes"):
            streaming.memory_limit(wrong, cpu)


def test_the_benchmark_measures_a_point_and_writes_its_table(monkeypatch, tmp_path):
    import benchmarks.infdit_memory as benchmark
    from benchmarks.harness import record
    from benchmarks.readme import infdit_memory as table
    from benchmarks.tables import Results

    point = benchmark.Point(256, 512, 1, "layer_major", width_of_model=64)
    hidden = 64 * 128 * 64 * 2
    assert hidden < benchmark.planned(point) < benchmark.original(point)
    assert benchmark.measured(point, torch.device("cpu")) >= 0, "a process keeps what it once had: no less than nothing"
    monkeypatch.setattr(benchmark, "POINTS", [point])
    monkeypatch.setattr(benchmark.runner, "RESULTS", tmp_path)
    assert benchmark.main(["--only", "256 x 512", "--save", "--device", "cpu"]) == 0
    (written,) = tmp_path.rglob("*.csv")
    (row,) = record.read(written)
    assert hidden / MIB < float(row["p50"]) < 400
    text = table.render(Results({written.parent.name: [row]}))
    assert f"| 256 x 512 | 1 x 64 | `layer_major` | {float(row['p50']):.0f} MiB |" in text
