"""The benchmarks: their statistics and floors by hand-made numbers, their tables from a small record, and every
command once, end to end. No test depends on how long anything takes."""

import csv
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks belong to the checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

import benchmarks  # noqa: E402
from benchmarks import gpu, linear_attention, linfusion_module, tables  # noqa: E402
from benchmarks.harness import correctness, measure, record, roofline, tuning  # noqa: E402
from benchmarks.harness.family import Case  # noqa: E402

CPU = torch.device("cpu")
LAYER = Case("layer", 2, 8, 1024, 1024, 40, 40, "bfloat16")


def run_module(*arguments):
    """`python -m ...` in the checkout, as a user runs it: Triton not interpreted."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "LINATTN_BACKEND")}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


class Clock:
    """A clock that only moves when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        """A sampler of something that takes `seconds()`; the clock moves by it."""

        def sample():
            took = seconds()
            self.now += took
            return took

        return sample


# ---- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "expected"), [(0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1, 5.0)])
def test_quantiles_interpolate_between_order_statistics(q, expected):
    assert measure.quantile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(expected)


def test_ratios_are_taken_round_by_round():
    """Both contenders are ten times slower in the second half: their ratio is not."""
    times = {"a": [1.0, 1.0, 10.0, 10.0, 10.0], "b": [2.0, 2.0, 20.0, 20.0, 20.0]}
    measured = measure.Measurement(times, canary=[1.0] * 5, kept=[True] * 5)
    assert measured.speedup("a", "b") == 2.0
    assert measured.speedup("b", "a") == 0.5


def test_rounds_with_a_slow_canary_do_not_count():
    clock, canary_times = Clock(), iter([1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    work_times = iter([1.0, 3.0, 3.0, 99.0, 3.0, 3.0])  # the first is the warm-up, the fourth falls into the slow round
    measured = measure.interleave(
        {"a": clock.work(lambda: next(work_times))},
        measure.Canary(clock.work(lambda: next(canary_times))),
        seconds=5.0,
        clock=clock,
    )
    assert measured.kept == [True, True, False, True, True]
    assert measured.statistics("a") == measure.Statistics(3.0, 3.0, 3.0, 3.0)
    assert measured.rounds("a") == (4, 1)


def test_a_machine_that_is_always_slow_still_gives_numbers():
    """The least number of rounds is kept, those with the quickest canaries, for a contender that sat most out too."""
    canary = [9.0, 8.0, 7.0, 6.0, 5.0]
    kept = measure.kept_rounds(canary, best=1.0, taking_part={"a": [True] * 5, "b": [True, False, False, False, True]})
    assert kept == [True, False, True, True, True]


def test_a_slow_contender_sits_rounds_out_and_everyone_is_sampled():
    clock = Clock()
    samplers = {"quick": clock.work(lambda: 0.1), "slow": clock.work(lambda: 10.0)}
    measured = measure.interleave(
        samplers, measure.Canary(clock.work(lambda: 0.01)), seconds=2.0, least=3, most=60, clock=clock
    )
    taken = {name: sum(t is not None for t in times) for name, times in measured.times.items()}
    assert taken == {"quick": 10, "slow": 3}
    here = [i for i, t in enumerate(measured.times["slow"]) if t is not None]
    assert max(b - a for a, b in itertools.pairwise(here)) <= 4, "its rounds are spread over the run"
    assert measured.speedup("quick", "slow") == pytest.approx(100)


def test_the_order_of_contenders_rotates():
    order = []
    samplers = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}
    measure.interleave(samplers, measure.Canary(lambda: 1.0), seconds=1e-9, least=3, clock=Clock())
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the warm-up, then three rounds


def test_patience_is_spent_on_waiting_for_a_quick_canary():
    """Two slow canaries, then a quick one; with no patience left the round is taken as it comes."""
    clock, times = Clock(), iter([1.0, 9.0, 9.0, 1.0, 9.0, 9.0])
    canary = measure.Canary(clock.work(lambda: next(times)))
    canary.patience = 12.0
    assert canary() == 1.0
    assert canary.wait_until_quiet(clock, pause=0) == 1.0
    assert canary.patience == 12.0 - 9.0 - 1.0
    assert canary.wait_until_quiet(clock, pause=0) == 9.0
    assert canary.patience < 0


def test_short_calls_are_repeated_within_a_sample():
    clock, calls = Clock(), []

    def call():
        calls.append(1)
        clock.now += measure.SAMPLE_SECONDS / 10

    sample = measure.cpu_sampler(measure.Contender(call), clock)
    before = len(calls)
    assert sample() == pytest.approx(measure.SAMPLE_SECONDS / 10)
    assert len(calls) - before == 10


# ---- floors -----------------------------------------------------------------------------------------------------


def test_bytes_and_flops_of_linear_attention_are_those_counted_by_hand():
    rows = 2 * 8 * 1024
    moved, flops = linear_attention.work(LAYER)
    assert moved == 4 * rows * 40 * 2  # q, k, v, out
    assert flops == 2 * (2 * rows * 40 * 40)  # phi(k)^T v and phi(q) kv
    backward = Case(**{**vars(LAYER), "mode": "backward"})
    moved, flops = linear_attention.work(backward)
    assert moved == 7 * rows * 40 * 2  # reads grad, q, k, v; writes three gradients
    assert flops == 4 * (2 * rows * 40 * 40)
    both = Case(**{**vars(LAYER), "mode": "forward+backward"})
    assert linear_attention.work(both) == (11 * rows * 40 * 2, 6 * (2 * rows * 40 * 40))
    cross = Case("cross", 1, 1, 10, 6, 4, 3, "float32")
    assert linear_attention.work(cross) == (4 * (10 * 4 + 6 * 4 + 6 * 3 + 10 * 3), 2.0 * (6 * 4 * 3 + 10 * 4 * 3))


def test_the_flops_are_those_that_the_op_reports_to_torch():
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    contender = linear_attention.prepare("linattn-cpu", LAYER, CPU, None, 1.0)
    with FlopCounterMode(display=False) as counter, contender.scope():
        contender.call()
    assert counter.get_total_flops() == linear_attention.work(LAYER)[1]


def test_the_floor_is_the_larger_of_two_times():
    machine = roofline.Machine({1000: 200.0, 10_000: 100.0, 100_000: 50.0}, {"float32": 1000.0})
    assert machine.floor(900, 10, "float32") == (900 / 200, "bytes")
    assert machine.floor(5000, 10, "float32") == (5000 / 100, "bytes")
    assert machine.floor(10**6, 10, "float32") == (10**6 / 50, "bytes"), "beyond all copies the largest one holds"
    assert machine.floor(900, 9000, "float32") == (9.0, "flops")


def test_ceilings_of_this_machine_are_positive_and_peaks_are_no_lower_than_matmul():
    machine = roofline.measure(CPU, seconds=0.2)
    assert all(rate > 0 for rate in machine.bandwidth.values())
    assert all(machine.peak[name] >= rate > 0 for name, rate in machine.matmul.items())
    assert set(machine.peak) == {"float32", "bfloat16", "float16"}


# ---- the family -------------------------------------------------------------------------------------------------


def test_families_are_found_without_a_list():
    assert {"linear_attention", "linfusion_module"} <= set(benchmarks.families())


@pytest.mark.parametrize("level", ["smoke", "quick", "default", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", benchmarks.families())
def test_no_case_is_listed_twice(family, device, level):
    cases = benchmarks.families()[family].cases(torch.device(device), level)
    assert len(cases) == len(set(cases)) > 0


@pytest.mark.parametrize("provider", ["sdpa", "linattn-cpu", "eager"])
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_contenders_do_the_case_they_were_given(provider, layout):
    case = Case("tiny", 2, 3, 70, 70, 16, 16, "float32", layout=layout, mode="forward+backward")
    contender = linear_attention.prepare(provider, case, CPU, None, 1.0)
    with contender.scope():
        gradients = contender.call()
    assert [tuple(g.shape) for g in gradients] == [(2, 3, 70, 16)] * 3
    if provider == "linattn-cpu":
        strides = {"BNHD": (70 * 3 * 16, 16, 3 * 16, 1), "BHND": (3 * 70 * 16, 70 * 16, 16, 1)}[layout]
        assert all(g.stride() == strides for g in gradients)


def test_eager_and_ours_are_one_function():
    q, k, v = linear_attention._inputs(Case("tiny", 1, 2, 33, 33, 8, 8, "float32"), CPU, gradients=False)
    import linattn

    torch.testing.assert_close(linear_attention.eager(q, k, v), linattn.linear_attention(q, k, v))


def test_a_quadratic_contender_is_left_out_with_its_reason():
    machine = roofline.Machine({1: 1.0}, {"float32": 1e9}, {"float32": 1e9})
    case = Case("large", 1, 1, 100_000, 100_000, 40, 40, "float32")
    with pytest.raises(measure.Skip, match=r"quadratic: one call would take 1600 s or more"):
        linear_attention.prepare("sdpa", case, CPU, machine, 2.0)


# ---- the module family ------------------------------------------------------------------------------------------

# Branches as wide as the channels (SD 1.5) and sixteen times narrower (SDXL).
MODULES = [Case("SD1.5 0", 2, 2, 24, 24, 8, 8, "float32"), Case("SDXL 0", 2, 2, 24, 24, 16, 16, "float32")]
BOTH = pytest.mark.parametrize("case", MODULES, ids=["wide", "narrow"])


@pytest.mark.parametrize(("name", "config"), [
    ("sd1.5", {"attention_head_dim": 8, "cross_attention_dim": 768}),
    ("sd2.1", {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "sample_size": 96}),
    ("sdxl", {
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "sample_size": 128,
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }),
])  # fmt: skip
def test_the_layers_are_those_of_the_unet(name, config):
    """Heads, tokens and head dim of every self-attention, read off a run of the UNet without data."""
    diffusers = pytest.importorskip("diffusers")
    seen = []

    def note(module, inputs, kwargs):
        tokens = (inputs[0] if inputs else kwargs["hidden_states"]).shape[1]
        seen.append((module.heads, tokens, module.inner_dim // module.heads))

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**{"sample_size": 64, **config})
        for key, module in unet.named_modules():
            if key.endswith(".attn1"):
                module.register_forward_pre_hook(note, with_kwargs=True)
        side = unet.config.sample_size
        text = torch.empty(1, 7, config["cross_attention_dim"])
        unet(torch.empty(1, 4, side, side), torch.empty(1), text)
    listed = linfusion_module.UNETS[{"sd1.5": "SD1.5", "sd2.1": "SD2.1", "sdxl": "SDXL"}[name]]
    assert listed.image == 8 * side
    assert {layer[:3]: layer[3] for layer in listed.layers} == Counter(seen)


def module_outputs(case, *providers):
    for provider in providers:
        contender = linfusion_module.prepare(provider, case, CPU, None, 1.0)
        with contender.scope():
            yield contender.call()


@BOTH
def test_original_and_ours_are_one_module(case):
    pytest.importorskip("diffusers")
    torch.testing.assert_close(*module_outputs(case, "linattn-cpu", "eager"))


def test_the_compiled_contender_is_the_same_module():
    pytest.importorskip("diffusers")
    torch.testing.assert_close(*module_outputs(MODULES[1], "linattn-cpu-compiled", "eager"))


@BOTH
def test_the_modules_flops_are_those_that_torch_counts(case):
    pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    x = torch.randn(case.B, case.N, case.H * case.D, requires_grad=True)
    module = linfusion_module._module("linattn-cpu", case, CPU)
    with FlopCounterMode(display=False) as counter:
        out = module(x)
        assert counter.get_total_flops() == linfusion_module.work(case)[1]
        out.sum().backward()
    assert counter.get_total_flops() == linfusion_module.work(replace(case, mode="forward+backward"))[1]


def test_bytes_of_the_module_are_those_counted_by_hand():
    case = replace(MODULES[1], dtype="bfloat16")  # 48 tokens, C = 32, r = 2
    weights = 4 * 32 * 32 + 2 * (2 * 32 * 2)
    assert linfusion_module.work(case)[0] == 2 * (2 * 48 * 32 + weights)
    case = replace(case, mode="forward+backward")
    assert linfusion_module.work(case)[0] == 2 * (5 * 48 * 32 + 3 * weights)


@pytest.mark.parametrize("provider", ["sdpa", "eager", "linattn-cpu"])
def test_a_training_step_gives_every_gradient(provider):
    pytest.importorskip("diffusers")
    contender = linfusion_module.prepare(provider, replace(MODULES[0], mode="forward+backward"), CPU, None, 1.0)
    with contender.scope():
        gradients = contender.call()
    assert gradients[0].shape == (2, 24, 16)
    assert len(gradients) == 1 + (5 if provider == "sdpa" else 17)
    assert all(g.isfinite().all() and g.any() for g in gradients[1:])


def test_larger_images_stay_below_their_limit_and_repeat_no_shape():
    for level in ("default", "full"):
        cases = [c for c in linfusion_module.cases(CPU, level) if c.mode == "forward"]
        own = [f"{name} {unet.image}" for name, unet in linfusion_module.UNETS.items()]
        larger = [4 * c.B * c.H * c.N**2 * c.D for c in cases if c.name not in own]
        assert larger and max(larger) <= linfusion_module.MOST_FLOPS["cpu", level]
        shapes = [(c.name.split()[0], c.H, c.N, c.D, c.dtype) for c in cases]
        assert len(set(shapes)) == len(shapes)
    for name, unet in linfusion_module.UNETS.items():
        own = [(c.H, c.N, c.D) for c in cases if c.name == f"{name} {unet.image}" and c.dtype == "float32"]
        assert own == [layer[:3] for layer in unet.layers], "the model's own size is complete, whatever it costs"


def test_compiled_contenders_sit_out_what_would_only_cost_time():
    left_out = linfusion_module.left_out
    own, larger = (Case(name, 2, 8, 64, 64, 160, 160, "float32") for name in ("SD1.5 512", "SD1.5 1024"))
    assert left_out("linattn-cpu-compiled", own, CPU, "default") is None
    assert "--full" in left_out("linattn-cpu-compiled", larger, CPU, "default")
    assert "--full" in left_out("sdpa-compiled", replace(own, mode="forward+backward"), CPU, "default")
    assert left_out("linattn-cpu-compiled", larger, CPU, "full") is None
    assert left_out("linattn-cpu", larger, CPU, "default") is None


def test_contenders_that_are_left_out_are_recorded_with_their_reason(tmp_path):
    from benchmarks.harness import runner

    facts = dict.fromkeys(("device", "isa", "threads", "torch", "triton", "linattn", "commit", "date"), "")
    recorder = record.Recorder(tmp_path / "a.csv")
    runner.run_case(
        *(linfusion_module.FAMILY, MODULES[0], ["sdpa", "sdpa-compiled"], CPU, None, None, recorder, facts),
        seconds=0.1, limit=1.0, left_out={"sdpa": "no", "sdpa-compiled": "not now"},
    )  # fmt: skip
    assert [(row["provider"], row["skipped"]) for row in recorder.rows] == [
        ("sdpa", "no"),
        ("sdpa-compiled", "not now"),
    ]


def module_rows(tmp_path, ratios, **changes):
    """A record of SD 1.5's layers of 1280 channels: {tokens: how many times faster than softmax, which takes 10 ms}."""
    recorder = record.Recorder(tmp_path / "linfusion_module.csv")
    common = {"family": "linfusion_module", "mode": "forward", "timing": "eager", "metric": "time", "unit": "ms"}
    common |= {"B": 2, "H": 8, "D": 160, "E": 160, "dtype": "bfloat16", "layout": "BNHD", "device": "Some CPU"}
    common |= {"isa": "avx2", "threads": 2, "torch": "2.13", "linattn": "0", "commit": "abc", "date": "2026-01-02"}
    for tokens, ratio in ratios.items():
        row = common | {"N": tokens, "M": tokens, "case": "SD1.5 512" if tokens < 1024 else "SD1.5 1024"} | changes
        recorder.add(**row, provider="sdpa", p50=10.0)
        recorder.add(**row, provider="linattn-cpu", p50=10.0 / ratio, over_sdpa=ratio, over_eager=1.25)
    recorder.close()
    return tables.Results({"cpu-x": record.read(tmp_path / "linfusion_module.csv")})


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        # Twice as fast at twice the tokens, half as fast at half of them: the crossing lies between.
        ({64: 0.25, 256: 0.5, 1024: 2.0}, "overtakes softmax at about N = 510 with 1280 channels"),
        ({64: 0.5, 256: 2.0, 1024: 0.5, 4096: 2.0}, "overtakes softmax at about N = 2,000 with 1280 channels"),
        ({256: 1.5, 1024: 4.0}, "is faster at every size measured with 1280 channels (N = 256 and up)"),
        ({64: 0.5, 256: 0.9}, "is slower at every size measured with 1280 channels (up to N = 256)"),
    ],
    ids=["crosses", "the last crossing", "always", "never"],
)
def test_the_crossover_is_stated(tmp_path, ratios, sentence):
    text = tables.generators()["linfusion-module"].render(module_rows(tmp_path, ratios))
    assert f"- SD1.5, bfloat16: {sentence}." in text
    assert "| SD1.5 512 | 256 | 8 x 160 | 1280 | bfloat16 | 10 | — | — |" in text


def test_a_whole_unet_is_added_up_only_where_every_layer_was_measured(tmp_path):
    render, summary = (tables.generators()[name].render for name in ("linfusion-module", "linfusion-unets"))
    rows = []
    for heads, tokens, dim, _ in linfusion_module.UNETS["SD1.5"].layers:
        results = module_rows(tmp_path, {tokens: 4.0}, H=heads, D=dim, case="SD1.5 512")
        rows += results.devices["cpu-x"]
    assert "all 16 self-attention modules: 0.16 s -> 0.04 s, 4.0x" in render(tables.Results({"cpu-x": rows}))
    assert "all 16" not in render(tables.Results({"cpu-x": rows[2:]}))
    line = "| SD1.5, 16 modules | bfloat16 | 0.16 s | **0.04 s** | 4.0x |"
    assert line in summary(tables.Results({"cpu-x": rows}))
    assert "No results" in summary(tables.Results({"cpu-x": rows[2:]}))


# ---- the sweep that replaces the tests where there is no pytest ------------------------------------------------


def test_the_sweep_rejects_wrong_and_unwritten_values():
    exact = torch.ones(4, dtype=torch.float64)
    good, nan = torch.ones(4), torch.tensor([1.0, 1.0, float("nan"), 1.0])
    assert correctness.compare(good, exact, good)["ok"]
    assert not correctness.compare(good * 1.01, exact, good)["ok"]
    assert not correctness.compare(nan, exact, good)["ok"]
    assert not correctness.compare(nan, exact, nan)["ok"], "a yardstick that fails is no excuse"


def test_the_sweep_passes_here_and_sees_every_gradient():
    check = correctness.Check("own denominators", "bfloat16", 24, 16, N=60, M=50, denominators=True)
    entries = correctness.run_check(check, "cpu", CPU)
    assert [e["quantity"] for e in entries if not e["ok"]] == []
    seen = {e["quantity"] for e in entries}
    assert seen == {"out", "out, no gradients", *(f"grad_{n}" for n in ("q", "k", "v", "q_denom", "k_denom"))}


def test_a_check_that_raises_is_a_failure_not_the_end():
    def broken():
        raise RuntimeError("no such kernel")

    (entry,) = correctness._guarded(broken, "check", "cuda")
    assert not entry["ok"]
    assert "no such kernel" in entry["quantity"]


def test_tuning_tries_the_present_choice_first_and_nothing_twice():
    choices = tuning.candidates({"BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "D0": 64})
    assert choices[0] == {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    assert len({tuple(sorted(c.items())) for c in choices}) == len(choices) == 18


def test_tuning_drives_the_triton_launchers(tmp_path):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off")
    from linattn.triton_kernels import linear_attention as kernels

    before = kernels.blocks
    arguments = f"--device cpu --tokens 40 --dims 40 --most 1 --kernels apply state --out {tmp_path / 't.csv'}"
    assert tuning.main(arguments.split()) == 0
    assert kernels.blocks is before, "the kernels are as they were"
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [(row["kernel"], row["default"], row["error"]) for row in rows] == [("apply", "1", ""), ("state", "1", "")]


# ---- record and tables ------------------------------------------------------------------------------------------


def fill(path, **changes):
    """A record of one case on a CPU: eager, SDPA and ours; `changes` override columns of our row."""
    recorder = record.Recorder(path)
    common = {"family": "linear_attention", "case": "SD1.5 512", "mode": "forward", "timing": "eager", "metric": "time"}
    common |= {"unit": "ms", "B": 2, "H": 8, "N": 4096, "M": 4096, "D": 40, "E": 40, "dtype": "bfloat16"}
    common |= {"layout": "BNHD", "device": "Some CPU", "isa": "avx2", "threads": 2, "torch": "2.13", "linattn": "0"}
    common |= {"commit": "abc", "date": "2026-01-02"}
    for provider, p50, over_sdpa in (("eager", 9.0, None), ("sdpa", 300.0, None), ("linattn-cpu", 2.0, 150.0)):
        row = common | {
            "provider": provider,
            "p50": p50,
            "over_sdpa": over_sdpa,
            "GB_per_s": 5.2,
            "fraction_of_floor": 0.5,
        }
        recorder.add(**row | (changes if provider.startswith("linattn") else {}))
    recorder.add(**common, provider="compiled", skipped="one call took 9 s")
    recorder.close()
    return recorder


def test_a_record_reads_back_what_was_written(tmp_path):
    written = fill(tmp_path / "a.csv").rows
    assert record.read(tmp_path / "a.csv") == written
    with pytest.raises(KeyError, match="no such columns"):
        record.Recorder(tmp_path / "b.csv").add(speed=1)
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="no benchmark record"):
        record.read(tmp_path / "c.csv")


def readme(tmp_path, *names):
    path = tmp_path / "README.md"
    path.write_text(
        "above\n" + "".join(f"<!-- table: {n} -->\nold\n<!-- end table -->\nbetween two tables\n" for n in names)
    )
    return path


def test_tables_are_generated_checked_and_stale_again_after_new_results(tmp_path):
    (tmp_path / "results" / "cpu-some").mkdir(parents=True)
    fill(tmp_path / "results" / "cpu-some" / "linear_attention.csv")
    (tmp_path / "results" / "cpu-some" / "tuning.csv").write_text("kernel,p50_ms\napply,1\n")
    path = readme(tmp_path, *tables.generators())
    options = ["--file", str(path), "--results", str(tmp_path / "results")]
    assert tables.main([*options, "--check"]) == 1
    assert "old" in path.read_text(), "--check writes nothing"
    assert tables.main(options) == 0
    assert tables.main([*options, "--check"]) == 0
    text = path.read_text()
    assert text.startswith("above\n")
    assert text.count("\nbetween two tables\n") == len(tables.generators())
    assert "| SD1.5 512 | 4,096 | 8 x 40 | bfloat16 | 9 | 300 | **2** (cpu) |" in text
    assert "never slower than SDPA | 150x | 150x | yes |" in text
    assert "**never run on a GPU yet**" in text
    fill(tmp_path / "results" / "cpu-some" / "linear_attention.csv", over_sdpa=0.5)
    assert tables.main([*options, "--check"]) == 1


def test_a_missed_goal_is_named_with_its_shape(tmp_path):
    fill(tmp_path / "a.csv", over_sdpa=0.5)
    text = tables.generators()["cpu-targets"].render(tables.Results({"cpu-x": record.read(tmp_path / "a.csv")}))
    assert "**missed** in 1 of 1 cases" in text
    assert "SD1.5 512 N 4096 8x40 bfloat16 BNHD forward (0.50x)" in text


def test_gpu_results_replace_the_statement_that_there_are_none(tmp_path):
    fill(tmp_path / "a.csv", provider="linattn-triton", N=16384, fraction_of_floor=0.7, over_sdpa=20.0, device="H200")
    results = tables.Results({"cuda-h200": record.read(tmp_path / "a.csv")})
    missing, support = (tables.generators()[name].render(results) for name in ("gpu-missing", "support"))
    assert "copy bandwidth | 70% .. 70% | **missed** in 1 of 1 cases |" in missing
    assert "No GPU was at hand" not in missing
    assert "on H200" in support


def test_every_table_says_so_where_nothing_is_recorded(tmp_path):
    for name, module in tables.generators().items():
        assert module.render(tables.Results({})), name


def test_documents_keep_the_tables_of_others():
    foreign = "<!-- table: linfusion-plugins -->\n| theirs |\n<!-- end table -->\n"
    text = f"a\n{foreign}b\n<!-- table: support -->\nold\n<!-- end table -->\nc\n"
    new = tables.filled(text, tables.Results({}), root="../", foreign=True)
    assert new.startswith(f"a\n{foreign}b\n<!-- table: support -->\n|") and "old" not in new
    with pytest.raises(ValueError, match="2 tables are opened, 1 are well formed"):
        tables.filled(f"<!-- table: support -->\n{foreign}", tables.Results({}), foreign=True)


def test_links_of_tables_in_docs_start_from_there(tmp_path):
    results = module_rows(tmp_path, {256: 1.5})
    text = "<!-- table: linfusion-module -->\n<!-- end table -->\n"
    assert "](../benchmarks/results/cpu-x/)" in tables.filled(text, results, root="../")
    assert "](benchmarks/results/cpu-x/)" in tables.filled(text, results)


def test_documents_are_readme_and_what_holds_a_table_of_ours(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, table in {"a.md": "support", "b.md": "linfusion-plugins"}.items():
        (tmp_path / "docs" / name).write_text(f"<!-- table: {table} -->\n<!-- end table -->\n")
    (tmp_path / "docs" / "c.md").write_text("no table\n")
    assert tables.documents(tmp_path) == [tmp_path / "README.md", tmp_path / "docs" / "a.md"]


def test_unknown_and_unclosed_tables_are_refused(tmp_path):
    with pytest.raises(KeyError, match="there is no table 'speed'"):
        tables.filled(readme(tmp_path, "speed").read_text(), tables.Results({}))
    with pytest.raises(ValueError, match="1 tables are opened, 0 are well formed"):
        tables.filled("<!-- table: support -->\n", tables.Results({}))


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="no recorded results (an sdist has none)")
def test_readme_and_docs_are_what_the_results_say():
    assert tables.main(["--check"]) == 0


# ---- the commands -----------------------------------------------------------------------------------------------


def test_a_smoke_run_writes_rows_and_a_figure(tmp_path):
    done = run_module(
        "benchmarks.linear_attention", "--device", "cpu", "--smoke", "--providers", "eager", "sdpa", "linattn-cpu",
        "--out", tmp_path, "--budget", 200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = record.read(tmp_path / "linear_attention.csv")
    assert {row["provider"] for row in rows} == {"eager", "sdpa", "linattn-cpu"}
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert row["skipped"] == ""
        assert 0 < float(row["best"]) <= float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["rounds"]) >= 3
    ours = [row for row in rows if row["provider"] == "linattn-cpu"]
    assert all(float(row["over_sdpa"]) > 0 and float(row["over_eager"]) > 0 for row in ours)
    assert (tmp_path / "linear_attention.png").stat().st_size > 5000
    policy = "freed memory is kept for reuse" if platform.libc_ver()[0] == "glibc" else "the C library's default"
    assert policy in done.stdout


def test_a_smoke_run_of_the_module_family_writes_rows_and_a_figure(tmp_path):
    pytest.importorskip("diffusers")
    done = run_module(
        "benchmarks.linfusion_module", "--device", "cpu", "--smoke", "--providers", "eager", "sdpa", "linattn-cpu",
        "--out", tmp_path, "--budget", 200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = record.read(tmp_path / "linfusion_module.csv")
    assert {(row["provider"], row["mode"], row["dtype"], row["skipped"]) for row in rows} == set(
        itertools.product(
            ("eager", "sdpa", "linattn-cpu"), ("forward", "forward+backward"), ("float32", "bfloat16"), ("",)
        )
    )
    assert (tmp_path / "linfusion_module.png").stat().st_size > 5000


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is measured on Linux only")
def test_peak_memory_counts_the_output():
    from benchmarks.harness.memory import peak_in_subprocess

    case = Case("large", 1, 4, 65536, 65536, 32, 32, "float32")
    peak = peak_in_subprocess("linear_attention", "linattn-cpu", case, CPU, timeout=120)
    out = 4 * 65536 * 32 * 4
    assert 0.95 * out <= peak < 1.5 * out


def test_gpu_lists_its_stages_without_running_them(tmp_path):
    done = run_module("benchmarks.gpu", "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["build", "correctness", "tests", "cuda", *benchmarks.families(), "tuning"]
    assert not (tmp_path / "out").exists()


def test_gpu_slices_add_up_to_its_time():
    """Benchmarks and tuning stop themselves inside their slices; what is left out costs nothing."""
    stages = gpu.plan(Path("out"), "cuda", False, 9.0)
    own = sum(stage.seconds for stage in stages if stage.name != "build")
    assert own <= 9.0 * 60 + 60
    for stage in stages:
        if "--budget" in stage.command:
            assert float(stage.command[stage.command.index("--budget") + 1]) < stage.seconds


def test_gpu_refuses_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_module("benchmarks.gpu", "--out", tmp_path)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr


def test_gpu_runs_every_stage_on_a_cpu_and_leaves_at_most_eight_files(tmp_path):
    done = run_module("benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "4", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in results["stages"]}
    left_out = dict.fromkeys(["build", "tests", "cuda", "tuning"], "left out")
    assert status == {"correctness": "ok"} | left_out | dict.fromkeys(benchmarks.families(), "ok")
    assert {"summary.md", "results.json", "correctness.json", "benchmarks.csv", "log.txt"} <= set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) <= gpu.MOST_FILES
    assert json.loads((tmp_path / "correctness.json").read_text())["failures"] == []
    assert record.read(tmp_path / "benchmarks.csv")
    assert "3 checks, 15 tensors" in (tmp_path / "summary.md").read_text()


def test_a_stage_that_hangs_or_crashes_loses_only_itself(tmp_path):
    hang = gpu.Stage("hang", [sys.executable, "-c", "import time; print('half', flush=True); time.sleep(600)"], 6)
    crash = gpu.Stage("crash", [sys.executable, "-c", "import os; print('last words', flush=True); os.abort()"], 60)
    deadline = time.perf_counter() + 300
    assert gpu.run(hang, tmp_path, deadline)["status"] == "stopped"
    crashed = gpu.run(crash, tmp_path, deadline)
    assert crashed["status"].startswith("failed")
    assert crashed["note"] == "last words"
    late = gpu.run(crash, tmp_path, time.perf_counter())
    assert (late["status"], late["note"]) == ("left out", "no time was left")
    assert "half" in (tmp_path / "log.txt").read_text()
