"""Time and memory against tokens: sizes from any model's configuration, contenders that are what they are called, a
memory figure checked against a known allocation, and the plot and the table from a small record. No test depends on how
long anything takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks belong to the checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import scaling, tables  # noqa: E402
from benchmarks.harness import environment, memory, record  # noqa: E402
from benchmarks.harness.measure import Skip  # noqa: E402
from linattn import bundled  # noqa: E402

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def run_python(*arguments, **variables):
    """An interpreter of its own in the checkout, as a user runs it: Triton not interpreted."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "LINATTN_BACKEND")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env | variables, capture_output=True, text=True, timeout=480)


def smallest_case():
    return scaling.cases(CPU, "smoke")[0]


# ---- sizes ------------------------------------------------------------------------------------------------------

UNETS = {
    "attention everywhere": {
        "sample_size": 18, "block_out_channels": [16, 32], "attention_head_dim": 2, "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    },
    "attention from the second level on": {
        "sample_size": 16, "block_out_channels": [8, 24, 32], "attention_head_dim": [1, 3, 4], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip


def model_folder(path, unet, **changes):
    """Configuration files of a Stable Diffusion with this UNet; no weights."""
    files = {
        "unet": {"in_channels": 4, "cross_attention_dim": 12, "layers_per_block": 1} | unet | changes,
        "vae": {"block_out_channels": [8] * 4},
        "text_encoder": {"max_position_embeddings": 7},
    }
    for part, config in files.items():
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("unet", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("times", [1, 3])
def test_sizes_are_those_that_the_unet_sees(tmp_path, unet, times):
    """Tokens, heads and head dim of the first self-attention, read off a run of the UNet without data."""
    diffusers = pytest.importorskip("diffusers")
    sizes = scaling.geometry(model_folder(tmp_path, unet))
    side = sizes.side(times)
    assert (side, sizes.pixels) == (times * unet["sample_size"], 8)
    seen = []
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(json.loads((tmp_path / "unet" / "config.json").read_text()))
        for name, module in model.named_modules():
            if name.endswith(".attn1"):
                shape = (module.heads, module.inner_dim // module.heads)
                module.register_forward_pre_hook(lambda _, x, shape=shape: seen.append((x[0].shape[1], *shape)))
        latents, text = torch.empty(1, sizes.channels, side, side), torch.empty(1, sizes.text, sizes.text_width)
        model(latents, torch.empty(1), text)
    assert seen[0] == max(seen) == (sizes.tokens(side), sizes.heads, sizes.head_dim)
    assert sizes.side_of(sizes.tokens(side)) == side


def test_a_canvas_that_the_levels_do_not_divide_is_rounded_up(tmp_path):
    sizes = scaling.geometry(model_folder(tmp_path, UNETS["attention from the second level on"]))
    assert sizes.downsampled == 2
    assert [sizes.side(times) for times in (1, 1.05, 1.2)] == [16, 18, 20]
    assert sizes.tokens(18) == 81


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": [16, 24]}, r"sample_size of the UNet must be one number.*\[16, 24\]"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, r"\['DownBlock2D', 'DownBlock2D'\] has self-attention"),
    ],
    ids=["not square", "no attention"],
)
def test_models_that_cannot_be_measured_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        scaling.geometry(model_folder(tmp_path, UNETS["attention everywhere"], **changes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_canvas_is_the_trained_one_and_the_others_are_multiples(device):
    config = json.loads((bundled.path(scaling.MODEL) / "unet" / "config.json").read_text())
    cases = scaling.cases(torch.device(device), "default")
    tokens = [case.N for case in cases]
    assert tokens == sorted(set(tokens))
    sides = [scaling.canvas({"case": case.name}) for case in cases]
    assert sides[0] == config["sample_size"] * scaling.geometry(bundled.path(scaling.MODEL)).pixels
    assert {2 * sides[0], 4 * sides[0]} < set(sides)
    assert [case.N for case in cases] == [tokens[0] * (side // sides[0]) ** 2 for side in sides]


@pytest.fixture
def known_sizes(monkeypatch):
    """Canvases of 324 tokens as trained and up, whatever model is bundled."""
    sizes = scaling.Geometry(18, pixels=8, downsampled=1, heads=2, head_dim=16, text=32, text_width=64, channels=4)
    monkeypatch.setattr(scaling, "_geometry", lambda: sizes)


@pytest.mark.usefixtures("known_sizes")
def test_stock_attention_sits_out_where_it_takes_too_long_and_ours_goes_on():
    cases = scaling.cases(CPU, "default")
    here = [scaling.left_out("sdpa", case, CPU, "default") is None for case in cases]
    assert here[:4] == [True] * 4, "sizes that everyone can do"
    assert not here[-1], "the largest canvas shows ours alone"
    assert here == sorted(here, reverse=True)
    assert "--full" in scaling.left_out("sdpa", cases[-1], CPU, "default")
    assert all(scaling.left_out("linattn-cpu", case, CPU, "default") is None for case in cases)


# ---- contenders -------------------------------------------------------------------------------------------------


def output(provider, case):
    contender = scaling.prepare(provider, case, CPU, None, 1.0)
    with contender.scope():
        return contender.call()


def test_contenders_are_what_they_are_called():
    pytest.importorskip("diffusers")
    from linattn.adapters import LinearAttention

    for provider, processor in (("sdpa", "AttnProcessor2_0"), ("math", "AttnProcessor")):
        unet = scaling.load_unet(provider, torch.float32, CPU)
        assert {type(p).__name__ for p in unet.attn_processors.values()} == {processor}
    unet = scaling.load_unet("linattn-cpu", torch.float32, CPU)
    replaced = [isinstance(m, LinearAttention) for name, m in unet.named_modules() if name.endswith(".attn1")]
    assert replaced and all(replaced)
    others = {type(p).__name__ for name, p in unet.attn_processors.items() if ".attn2." in name}
    assert others == {"AttnProcessor2_0"}, "cross-attention is the same as on the stock side"


def test_both_stock_ways_are_one_function_and_ours_is_another():
    pytest.importorskip("diffusers")
    case = smallest_case()
    stock, naive, ours = (output(provider, case) for provider in ("sdpa", "math", "linattn-cpu"))
    sizes = scaling.geometry(bundled.path(scaling.MODEL))
    assert stock.shape == (2, sizes.channels, sizes.latent, sizes.latent)
    torch.testing.assert_close(stock, naive, rtol=1e-3, atol=1e-3)
    assert ours.isfinite().all()
    assert not torch.allclose(stock, ours, rtol=1e-3, atol=1e-3)


def test_ours_runs_on_the_backend_that_its_name_says():
    pytest.importorskip("diffusers")
    from linattn import backend

    contender = scaling.prepare("linattn-reference", smallest_case(), CPU, None, 1.0)
    with contender.scope():
        assert backend.choose("linear_attention", CPU, torch.float32) == "reference"


def test_the_unets_flops_are_those_of_a_run():
    pytest.importorskip("diffusers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    case = smallest_case()
    # torch counts no FLOPs of its fused kernel for CPUs, which cross-attention would run.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output("linattn-cpu", case)
    assert counter.get_total_flops() == scaling.work(case)[1]


def test_a_hopeless_size_is_not_even_built():
    from benchmarks.harness.roofline import Machine

    machine = Machine({1: 1.0}, {"float32": 1.0}, {"float32": 1.0})
    with pytest.raises(Skip, match="quadratic: one call would take"):
        scaling.prepare("sdpa", smallest_case(), CPU, machine, 1.0)


# ---- memory -----------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is measured on Linux only")
KNOWN = """
import sys
import torch
from dataclasses import replace
from benchmarks import scaling
from benchmarks.harness import memory
from benchmarks.harness.measure import Contender

def prepare(provider, case, device, machine, limit):
    def call():
        passing = torch.ones(case.N, 1 << 10)  # 4 KiB a token
        del passing
        return torch.ones(case.N, 1 << 8)
    return Contender(call)

family = replace(scaling.FAMILY, prepare=prepare)
case = replace(scaling.cases(torch.device("cpu"), "smoke")[0], N=int(sys.argv[1]))
print(memory.peak_of(family, "known", case, torch.device("cpu")))
"""


@linux
def test_peak_memory_is_that_of_a_known_allocation_which_is_gone_at_the_end():
    tokens = 1 << 14
    done = run_python("-c", KNOWN, tokens)
    assert done.returncode == 0, done.stderr
    # The kernel counts pages per thread and adds them up now and then.
    assert int(done.stdout) == pytest.approx(tokens * 4096, rel=0.02)


@linux
def test_unfused_attention_takes_its_two_matrices_more_than_fused(monkeypatch):
    """Measured as the runner does, from a process under the allocation policy for times."""
    pytest.importorskip("diffusers")
    for name, value in environment.ALLOCATION.items():
        monkeypatch.setenv(name, value)
    sizes = scaling.geometry(bundled.path(scaling.MODEL))
    case = scaling._case(sizes, sizes.side_of(2304), "float32")
    monkeypatch.setattr(scaling, "cases", lambda device, level: [case])
    peaks = {
        provider: memory.peak_in_subprocess(scaling.NAME, provider, listed, CPU, 480)
        for provider, listed in scaling.memory_cases(CPU)
        if provider in ("sdpa", "math")
    }
    matrices = scaling.naive_bytes(case)
    assert matrices == 2 * 2 * sizes.heads * 2304**2 * 4
    assert peaks["sdpa"] < matrices / 2, "fused: not one matrix"
    assert matrices <= peaks["math"] < 1.5 * matrices + peaks["sdpa"], "unfused: two of them, not three"


def test_memory_is_measured_under_the_systems_own_allocation(monkeypatch):
    seen = {}

    def run(command, *, env, **_):
        seen.update(env)
        return SimpleNamespace(returncode=0, stdout="7\n", stderr="")

    for name, value in environment.ALLOCATION.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory.subprocess, "run", run)
    case = scaling._case(scaling.geometry(bundled.path(scaling.MODEL)), 8, "float32")
    assert memory.peak_in_subprocess(scaling.NAME, "sdpa", case, CPU, 1) == 7
    assert "PATH" in seen and not set(environment.ALLOCATION) & set(seen)
    assert os.environ["MALLOC_MMAP_MAX_"] == environment.ALLOCATION["MALLOC_MMAP_MAX_"]


@pytest.mark.usefixtures("known_sizes")
def test_the_unfused_contender_is_measured_where_it_fits(monkeypatch):
    cases = scaling.cases(CPU, "default")
    monkeypatch.setattr(scaling, "_free_memory", lambda device: scaling.naive_bytes(cases[1]) / scaling.NAIVE_SHARE)
    listed = list(scaling.memory_cases(CPU))
    assert [case for provider, case in listed if provider == "math"] == [cases[1], cases[0]]
    ours = [f"linattn-{name}" for name in scaling.linear_attention.our_backends(CPU)]
    assert ours and [case for provider, case in listed if provider == ours[0]] == cases[::-1]
    assert cases[-1] not in [case for provider, case in listed if provider == "sdpa"]


# ---- plot and table ---------------------------------------------------------------------------------------------

SIZES = {144: 324, 288: 1296, 576: 5184, 1152: 20736}


def fill(folder, sizes=SIZES, **changes):
    """A record: stock quadratic in time and linear in memory, ours linear, unfused quadratic; not at the largest."""
    recorder = record.Recorder(folder / "scaling.csv")
    common = {"family": "scaling", "mode": "forward", "timing": "eager", "B": 2, "H": 2, "D": 16, "E": 16}
    common |= {"dtype": "float32", "layout": "BNHD", "device": "Some CPU", "isa": "avx2", "threads": 2}
    common |= {"torch": "2.13", "linattn": "0", "commit": "abc", "date": "2026-01-02"} | changes
    for side, n in sizes.items():
        row = common | {"case": f"tiny_sd {side}", "N": n, "M": n}
        time, memory_ = row | {"metric": "time", "unit": "ms"}, row | {"metric": "peak_memory", "unit": "MiB"}
        largest = n == max(sizes.values())
        stock, own = n**2 / 2e3, n / 2.0
        if largest:
            recorder.add(**time, provider="sdpa", skipped="quadratic")
        else:
            recorder.add(**time, provider="sdpa", p50=stock)
            recorder.add(**memory_, provider="sdpa", p50=n / 100)
            recorder.add(**memory_, provider="math", p50=n**2 / 1e4)
        recorder.add(**time, provider="linattn-cpu", p50=own, over_sdpa=None if largest else stock / own)
        recorder.add(**memory_, provider="linattn-cpu", p50=n / 80)
    recorder.close()
    return folder / "scaling.csv"


def test_the_plot_is_made_from_a_record_on_a_white_background(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    source = fill(tmp_path)
    assert scaling.main(["--plot", str(source), "--out", str(tmp_path / "made" / "here")]) == 0
    path = tmp_path / "made" / "here" / "scaling.png"
    assert capsys.readouterr().out == f"written: {path}\n"
    pixels = image.imread(path)
    assert pixels.shape[1] >= 1200, "as wide as a README shows it, twice over on a phone"
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all(), "white and opaque, also on a dark page"
    for colour in scaling.COLOURS.values():
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        near = (torch.from_numpy(pixels[..., :3]) - wanted).abs().amax(-1) < 0.02
        assert near.sum() > 200, f"{colour} is drawn"


def test_curves_hold_what_was_recorded(tmp_path):
    rows = record.read(fill(tmp_path))
    assert scaling.ours(rows) == "linattn-cpu"
    assert scaling.curve(rows, "linattn-cpu", "time") == {n: pytest.approx(n / 2e3, rel=1e-3) for n in SIZES.values()}
    assert list(scaling.curve(rows, "sdpa", "time")) == [324, 1296, 5184], "what was left out is no point"
    assert scaling.curve(rows, "math", "peak_memory")[324] == pytest.approx(324**2 / 1e4 * 2**20, rel=1e-3)
    assert scaling.exponent(scaling.curve(rows, "sdpa", "time")) == pytest.approx(2, abs=1e-3)
    assert scaling.exponent({1: 1.0, 10: 1.0, 100: 100.0}) == pytest.approx(2), "of the two largest sizes"
    assert scaling.exponent({324: 1.0}) is None


def test_a_record_without_memory_is_drawn_as_well(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row for row in record.read(fill(tmp_path)) if row["metric"] == "time"]
    scaling.figure(rows[:3], tmp_path / "a.png")  # and with a single size
    scaling.figure(rows, tmp_path / "b.png")
    assert min((tmp_path / name).stat().st_size for name in ("a.png", "b.png")) > 5000


def render(*paths):
    return tables.generators()["scaling"].render(tables.Results({p.parent.name: record.read(p) for p in paths}))


def test_the_table_says_what_was_measured_and_what_was_derived(tmp_path):
    text = render(fill(tmp_path))
    lines = text.splitlines()
    assert (
        "| 576 x 576 | 5,184 | 13.4 s | **2.59 s** | 5.2x | 51.8 MiB | **64.8 MiB** | 2.62 GiB | 4.48 min | 51.8 s |"
        in lines
    )
    assert "| 1152 x 1152 | 20,736 | — | **10.4 s** | — | — | **259 MiB** | — | — | 3.46 min |" in lines
    assert "computed and not measured" in text


def test_the_finding_is_stated_whatever_it_is(tmp_path):
    text = render(fill(tmp_path))
    assert (
        "- Time, from 1,296 to 5,184 tokens: stock grows as N^2.0, ours as N^1.0. "
        "Ours is the quicker one from 1,296 tokens on, and the slower one at 324." in text
    )
    assert "stock grows as N^1.0, ours as N^1.0; at 5,184 ours takes 1.25 times what stock takes." in text
    assert "unfused, it grows as N^2.0 (2.62 GiB at 5,184)" in text
    small = {144: 64, 288: 256, 576: 900, 1152: 1000}
    assert "Ours is the slower one up to 900 tokens" in render(fill(tmp_path, small))
    large = {144: 2000, 288: 8000, 576: 32000}
    assert "Ours is the quicker one at every size measured." in render(fill(tmp_path, large))


def test_a_record_of_another_family_makes_no_table(tmp_path):
    assert "No results are recorded yet" in render(fill(tmp_path, family="linear_attention"))


# ---- bad input --------------------------------------------------------------------------------------------------


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        scaling.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_plot_refuses_what_it_cannot_draw(tmp_path, capsys):
    assert f"found no file {tmp_path / 'no.csv'}" in refusal(capsys, "--plot", tmp_path / "no.csv")
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    assert "no benchmark record" in refusal(capsys, "--plot", tmp_path / "other.csv")
    other = fill(tmp_path, family="linear_attention")
    assert f"{other} holds no times of the family scaling" in refusal(capsys, "--plot", other)
    folder = fill(tmp_path)
    assert "scaling.csv" in refusal(capsys, "--plot", folder, "--out", folder), "a file is no folder"


def test_plot_says_that_matplotlib_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refusal(capsys, "--plot", fill(tmp_path), "--out", tmp_path)
    assert "drawing needs matplotlib (pip install 'linattn[test]')" in message


def test_the_record_that_is_drawn_by_default_is_the_only_one_or_the_cpus(tmp_path):
    with pytest.raises(ValueError, match="nothing is recorded"):
        scaling.default_record(tmp_path)
    paths = {}
    for name in ("cuda-h", "cpu-a", "cpu-b"):
        (tmp_path / name).mkdir()
        paths[name] = fill(tmp_path / name)
        if name != "cpu-b":
            assert scaling.default_record(tmp_path) == paths[name]
    with pytest.raises(ValueError, match=r"several runs are recorded, name one: .*cpu-a.*cpu-b"):
        scaling.default_record(tmp_path)


def test_unknown_options_and_devices_are_refused(capsys):
    assert "invalid choice: 'tpu'" in refusal(capsys, "--device", "tpu")
    assert "unrecognized arguments: --sizes" in refusal(capsys, "--sizes", "3")


# ---- the command ------------------------------------------------------------------------------------------------


def test_a_run_measures_every_contender_side_by_side(tmp_path):
    pytest.importorskip("diffusers")
    done = run_python(
        "-m", "benchmarks.scaling", "--device", "cpu", "--smoke", "--providers", "sdpa", "linattn-cpu",
        "--threads", "1", "--budget", "400", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = record.read(tmp_path / "scaling.csv")
    assert {(row["provider"], row["metric"], row["skipped"]) for row in rows} == {
        ("sdpa", "time", ""),
        ("linattn-cpu", "time", ""),
    }
    case = smallest_case()
    for row in rows:
        assert (row["case"], row["N"], row["B"]) == (case.name, str(case.N), "2")
        assert float(row["p50"]) > 0 and int(row["rounds"]) >= 3
    assert float(rows[1]["over_sdpa"]) > 0
    assert (tmp_path / "scaling.png").stat().st_size > 5000
