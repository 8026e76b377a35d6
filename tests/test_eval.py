"""`linattn eval`: from a model to tables and JSON and back by the recorded command; mistakes cost one line."""

import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import torch
from helpers.tiny_pipelines import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from linattn import bundled, cli, evaluate
from linattn.adapters import CLEAR, LinFusion
from linattn.bundled import canvases
from linattn.cli import _variants
from linattn.cli import eval as command

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--n", "2", "--digits", "2", "--steps", "1")
SETS = ("2 digits", "seen")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a pipeline of random weights and two students: `distilled`, and `copied`, which learnt nothing."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline("sd15")
    pipe.save_pretrained(root / "pipe")
    student = LinFusion(**LinFusion.get_default_config(pipe)).copy_base_weights(pipe)
    student.save_pretrained(root / "copied")
    for name, parameter in student.named_parameters():
        if ".to_q_.3" in name or ".to_k_.3" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    student.save_pretrained(root / "distilled")
    pipe = tiny_pipeline("flux-schnell")
    pipe.save_pretrained(root / "flux")
    clear = CLEAR.construct_for(pipe, window_size=2, down_factor=2, load_pretrained=False)
    clear.unmount()
    clear.save_pretrained(root / "clear")
    return root


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command in a folder of its own; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def record(run):
    """Run the command, insist on success; returns the JSON."""

    def record(*arguments, out="eval.json"):
        status, _, err = run(*arguments, "--out", out)
        assert status == 0, err
        return json.loads(Path(out).read_text())

    return record


def timeless(record):
    """Without what differs from run to run."""
    record = json.loads(json.dumps(record))
    for variant in record["variants"].values():
        assert variant["summary"].pop("seconds") > 0
    return {key: value for key, value in record.items() if key != "command"}


# ------------------------------------------------------------------------------------------------------ the results


def test_every_variant_and_the_real_digits_are_a_row_and_a_record(run, models, tmp_path):
    model = ("--model", models / "pipe", "--student", models / "distilled")
    status, out, err = run(*model, *SMALL, "--out", "new/scores.json", "--pictures", "new/drawn")
    assert status == 0, err
    for title in (*(_variants.TITLES[name] for name in _variants.OF_UNETS), "real digits"):
        assert sum(line.startswith(title) for line in out.splitlines()) == 3  # one per table
    for difference in ("zeroed − teacher", "before − zeroed", "after − before", "after − teacher"):
        assert difference in out
    assert "new/scores.json" in err

    record = json.loads(Path("new/scores.json").read_text())
    assert list(record["variants"]) == ["teacher", "zeroed", "before", "after"]
    assert record["settings"]["n"] == 2 and record["settings"]["digits"] == [2]
    for variant in record["variants"].values():
        assert set(variant["summary"]["exact"]) == {*SETS, "held out"}
        assert all(len(variant["pictures"][name]["seen"]) == 2 for name in SETS)
    errors = {name: variant["summary"]["error"] for name, variant in record["variants"].items()}
    assert errors["teacher"] is None and all(errors[name][0] > 0 for name in ("zeroed", "before", "after"))
    assert len({tuple(errors[name]) for name in ("zeroed", "before", "after")}) == 3
    assert len(record["sources"]["weights"]["sha256"]) == 64

    sheets = {path.stem for path in Path("new/drawn").iterdir()}
    assert sheets == {f"{v}_{s}" for v in record["variants"] for s in ("2_digits", "seen")}
    width, height = Image.open("new/drawn/after_seen.png").size
    assert (width, height) == (2 * (canvases.RESOLUTION + command.LINE), canvases.RESOLUTION + command.LINE)
    assert sorted(path.name for path in Path("new").iterdir()) == ["drawn", "scores.json"]


def test_the_recorded_command_gives_the_same_figures(record, models):
    first = record("--model", models / "pipe", "--student", models / "distilled", *SMALL, "--seed", 5)
    words = shlex.split(first["command"])
    assert words[:2] == ["linattn", "eval"]
    again = record(*words[2:-2], out="again.json")
    assert timeless(again) == timeless(first)
    other = record(*words[2:-2], "--seed", "6", out="other.json")
    assert other["sets"][0]["seeds"] != first["sets"][0]["seeds"]
    assert timeless(other)["variants"] != timeless(first)["variants"]


def test_a_student_that_has_learnt_nothing_is_before_and_variants_come_as_named(record, models):
    chosen = ("--variants", "after", "before", "teacher")
    found = record("--model", models / "pipe", "--student", models / "copied", *SMALL, *chosen)
    assert list(found["variants"]) == ["after", "before", "teacher"]
    after, before = found["variants"]["after"], found["variants"]["before"]
    assert after["pictures"] == before["pictures"] and after["pairs"] == before["pairs"]
    assert [(d["of"], d["minus"]) for d in found["differences"]] == [
        ("before", "after"),
        ("teacher", "after"),
        ("teacher", "before"),
    ]


def test_what_was_read_is_what_the_variants_of_the_library_draw(record, models):
    found = record("--model", models / "pipe", "--student", models / "distilled", *SMALL)
    pipe = tiny_pipeline("sd15")
    drawn = {}
    evaluate.evaluate_canvases(
        pipe,
        _variants.variants(models / "distilled"),
        n=2,
        lengths=(2,),
        steps=1,
        keep=lambda name, one, pictures: drawn.setdefault((name, one.name), pictures),
    )
    for (name, one), pictures in drawn.items():
        seen = ["".join(map(str, order)) for order in evaluate.read_canvases(pictures)]
        assert found["variants"][name]["pictures"][one]["seen"] == seen
        if name != "teacher":
            errors = evaluate.image_errors(pictures, drawn["teacher", one])
            assert found["variants"][name]["pictures"][one]["error"] == pytest.approx(errors, rel=1e-4)
    # All variants have left the pipeline as it was.
    assert [type(m) for m in pipe.unet.modules()] == [type(m) for m in tiny_pipeline("sd15").unet.modules()]


def test_without_a_student_it_says_so_and_scores_the_others(run, models):
    status, out, err = run("--model", models / "pipe", *SMALL)
    assert status == 0
    assert "no student" in err and "--student" in err and "'after' cannot be drawn" in err
    assert "after distillation" not in out and "before distillation" in out


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the library for, which is not run; ends in Ctrl-C."""
    calls = []

    def evaluate_canvases(pipe, variants, **options):
        calls.append(SimpleNamespace(variants=variants, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_canvases", evaluate_canvases)
    return calls


def test_a_bundled_model_comes_with_its_student(run, models, calls, tmp_path, monkeypatch):
    root = tmp_path / "bundle"
    shutil.copytree(models / "pipe", root / "tiny_sd")
    shutil.copytree(models / "distilled", root / "tiny_sd_linfusion")
    for name in ("tiny_sd", "tiny_sd_linfusion"):
        (root / name / "card.json").write_text("{}")
    monkeypatch.setattr(bundled, "_root", lambda: root)
    assert run()[0] == 130
    after = calls[0].variants["after"]
    assert list(calls[0].variants) == list(_variants.OF_UNETS)
    assert Path(after.keywords["weights"]) == root / "tiny_sd_linfusion"


def test_a_transformer_has_its_own_control_and_its_students_window_before_distillation(record, models):
    found = record("--model", models / "flux", "--student", models / "clear", *SMALL)
    assert list(found["variants"]) == list(_variants.OF_TRANSFORMERS)
    errors = {name: variant["summary"]["error"] for name, variant in found["variants"].items()}
    assert errors["teacher"] is None and errors["alone"][0] > 0
    # This student learnt nothing, so it is what it was before: with its window, which is not that of the control.
    assert errors["before"] == errors["after"] != errors["alone"]


def test_a_transformer_without_a_student_is_scored_beside_its_control(run, models, calls):
    status, _, err = run("--model", models / "flux", *SMALL)
    assert status == 130 and list(calls[0].variants) == ["teacher", "alone"]
    assert "'before' and 'after' cannot be drawn" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--variants", "zeroed"), "--variants zeroed: a FluxPipeline has teacher, alone, before, after"),
        (("--variants", "teacher", "before"), "--variants before: there is no student"),
    ],
    ids=["not-its-control", "no-window"],
)
def test_a_variant_that_a_transformer_does_not_have_is_one_line(run, models, arguments, named):
    status, _, err = run("--model", models / "flux", *arguments)
    assert status == 1 and named in err and err.count("\n") == 1


def test_a_student_for_the_other_kind_of_model_is_refused(run, models):
    for model, student, kind in (("flux", "distilled", "CLEAR"), ("pipe", "clear", "LinFusion")):
        status, _, err = run("--model", models / model, "--student", models / student)
        assert status == 1 and f"holds no {kind} weights" in err


def test_quick_is_small_unless_an_option_says_otherwise(run, models, calls):
    model = ("--model", models / "pipe", "--student", models / "copied")
    assert run(*model)[0] == 130
    assert run(*model, "--quick", "--steps", "3", "--threads", "2")[0] == 130
    full, quick = calls
    assert (full.n, full.lengths, full.steps) == (100, [2, 3, 4], 15)
    assert quick.n < 20 and len(quick.lengths) == 1 and quick.steps == 3
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ((0.126, 0.1, 0.2), "+0.13 [+0.10, +0.20]"),
        ((-0.001, -0.2, 0.004), "+0.00 [-0.20, +0.00]"),
        (None, "–"),
    ],
    ids=["plain", "nothing-has-no-sign-of-its-own", "none"],
)
def test_figures_in_tables(figure, text):
    assert command._number(figure, 2, "+") == text


# --------------------------------------------------------------------------------------------------------- mistakes


def test_what_ends_early_leaves_what_was_there(run, models, calls):
    Path("eval.json").write_text('{"format": "linattn eval 1", "mine": true}')
    assert run("--model", models / "pipe", *SMALL)[0] == 130
    assert json.loads(Path("eval.json").read_text())["mine"] is True
    assert [path.name for path in Path().iterdir()] == ["eval.json"]


@pytest.fixture
def nothing_loaded(monkeypatch):
    def load_pipeline(path):
        raise AssertionError("mistakes are found before anything is loaded")

    monkeypatch.setattr(command, "load_pipeline", load_pipeline)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--n", "1"), "--n: expected 2 or more, got 1"),
        (("--steps", "0"), "--steps: expected 1 or more, got 0"),
        (("--steps", "1001"), "--steps: expected at most the 1000"),
        (("--threads", "0"), "--threads: expected 1 or more"),
        (("--seed", "-1"), "--seed: expected 0 to"),
        (("--guidance", "nan"), "--guidance: expected 0 or more, got nan"),
        (("--digits", "2", "5"), "--digits: expected different numbers from 1 to 4, got 2 5"),
        (("--digits", "2", "2"), "--digits: expected different"),
        (("--variants", "teacher", "teacher"), "--variants: expected each once"),
        (("--variants", "teacher", "after"), "--variants after: there is no student"),
        (("--variants", "teacher", "--student", "x"), "--student x is drawn by the variant 'after'"),
        (("--model", "no-such-model"), "--model: the folder 'no-such-model' does not exist"),
        (("--student", "no-such-student"), "--student: the folder 'no-such-student' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_that_names_it(run, models, nothing_loaded, arguments, named):
    status, out, err = run("--model", models / "pipe", *arguments)
    assert status == 1 and out == ""
    assert err.startswith("linattn eval: ") and named in err and err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_student_that_is_none_or_of_another_model_is_refused(run, models, nothing_loaded, tmp_path):
    def refused(student):
        status, _, err = run("--model", models / "pipe", "--student", student)
        assert status == 1 and err.count("\n") == 1, err
        return err

    assert "no LinFusion weights" in refused(models / "pipe" / "unet")
    shutil.copytree(models / "copied", tmp_path / "pickled")
    (tmp_path / "pickled" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "pickled" / "model.bin")
    assert "no .safetensors" in refused(tmp_path / "pickled")
    LinFusion(**LinFusion.get_default_config(tiny_pipeline("sd21"))).save_pretrained(tmp_path / "wider")
    assert "does not go with" in refused(tmp_path / "wider")


@pytest.mark.parametrize("option", ["--out", "--pictures"])
def test_where_nothing_can_be_written_nothing_is_drawn(run, models, nothing_loaded, option):
    Path("file").write_text("")
    status, _, err = run("--model", models / "pipe", option, "file/below/it")
    assert status == 1 and f"{option} file/below/it: cannot write into file" in err


def test_a_folder_and_a_foreign_file_are_not_overwritten(run, models, nothing_loaded):
    Path("folder").mkdir()
    Path("notes.json").write_text('{"mine": true}')
    for out, named in (("folder", "it is a folder"), ("notes.json", "no JSON of linattn eval")):
        status, _, err = run("--model", models / "pipe", "--out", out)
        assert status == 1 and named in err
    assert Path("notes.json").read_text() == '{"mine": true}'


@pytest.mark.parametrize("module, package", [("sklearn", "scikit-learn"), ("diffusers", "diffusers")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(run, nothing_loaded, monkeypatch, module, package):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == module else found(name))
    status, _, err = run("--quick")
    assert status == 1 and err == f"linattn eval: {package} missing: pip install 'linattn[demo]'\n"


def test_a_model_whose_weights_are_damaged_is_one_line(run, models, tmp_path):
    shutil.copytree(models / "pipe", tmp_path / "broken")
    file = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in weights.items()}, file)
    status, _, err = run("--model", tmp_path / "broken", *SMALL, "--variants", "teacher")
    assert status == 1 and "'teacher'" in err and "not finite" in err
    file.write_bytes(b"no weights")
    status, _, err = run("--model", tmp_path / "broken", *SMALL, "--variants", "teacher")
    assert status == 1 and "--model: cannot load" in err and err.count("\n") == 1
    assert not Path("eval.json").exists()
