"""`linattn generate`: pictures as by the same calls in Python, records that draw them again, mistakes at no cost."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DModel,
)
from helpers.tiny_pipelines import FAMILIES, IMAGE_SIZE, tiny_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

import linattn
from linattn import bundled, cli
from linattn.adapters import CLEAR, LinFusion
from linattn.cli import doctor
from linattn.cli import generate as command
from linattn.pipelines import Stage, high_resolution

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a seven, a two and a four"
STEPS, GUIDANCE = 2, 3.0
FAST = ("--steps", str(STEPS), "--guidance", str(GUIDANCE), "--device", "cpu")
IMG2IMG = {
    "sd15": StableDiffusionImg2ImgPipeline,
    "sd21": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the three families, a student and a LoRA for each, and a picture to start from."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        pipe = tiny_pipeline(family)
        pipe.save_pretrained(root / family)
        student = LinFusion(**LinFusion.get_default_config(pipe)).copy_base_weights(pipe)
        for name, parameter in student.named_parameters():
            # Another function than that of the base weights: branches that add something.
            if ".to_q_.3" in name or ".to_k_.3" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
        student.save_pretrained(root / f"{family}_student")
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.unet)
        type(pipe).save_lora_weights(root / f"{family}_lora", unet_lora_layers=layers)
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "start.png")
    return root


@pytest.fixture
def generate(capsys, tmp_path, monkeypatch):
    """Run the command in a folder of its own; returns (exit status, paths on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["generate", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def draw(generate):
    """Run the command, insist on success; returns the path of its (first) picture."""

    def run(*arguments):
        status, paths, err = generate(*arguments)
        assert status == 0, err
        return Path(paths[0])

    return run


def record_of(picture):
    return json.loads(picture.with_suffix(".json").read_text())


def lora_file(models, family="sd15"):
    return models / f"{family}_lora" / "pytorch_lora_weights.safetensors"


def pixels(picture):
    return np.asarray(Image.open(picture))


def in_python(folder, attention, weights=None, kind=DiffusionPipeline, lora=None, seed=0, **options):
    """The same picture by the calls that a user would write."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if attention == "linfusion":
        LinFusion.construct_for(pipe, pretrained_model_name_or_path=weights, load_pretrained=weights is not None)
    if attention == "clear":
        CLEAR.construct_for(pipe, 3, 2, pretrained_model_name_or_path=weights, load_pretrained=weights is not None)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | options
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **options).images[0])


# ------------------------------------------------------------------------------------------------------ the picture


def test_without_options_the_bundled_model_draws_with_linear_attention(generate, tmp_path):
    status, paths, err = generate(PROMPT)
    assert status == 0, err
    assert paths == ["generated.png", "generated.json"]
    own = DiffusionPipeline.from_pretrained(bundled.path())
    size = own.unet.config.sample_size * own.vae_scale_factor
    assert Image.open("generated.png").size == (size, size)
    request = record_of(tmp_path / "generated.png")["request"]
    assert (request["model"], request["attention"], request["steps"]) == (bundled.path().name, "linfusion", 25)
    best = ("cuda", "float16") if torch.cuda.is_available() else ("cpu", "float32")
    assert (request["device"], request["dtype"]) == best
    assert "linfusion" in err and "Traceback" not in err


@pytest.mark.parametrize("attention", ["linfusion", "stock"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_is_what_the_same_calls_in_python_give(draw, models, family, attention):
    weights = {"linfusion": ("--weights", models / f"{family}_student"), "stock": ()}[attention]
    out = draw(PROMPT, "--model", models / family, "--attention", attention, *weights, *FAST, "--seed", 3)
    student = models / f"{family}_student" if weights else None
    assert np.array_equal(pixels(out), in_python(models / family, attention, student, seed=3))


@pytest.fixture(scope="module")
def plain(models):
    """The picture by SDXL without any further option."""
    return in_python(models / "sdxl", "stock")


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        pytest.param(("--size", "48x24"), {"width": 48, "height": 24}, id="size"),
        pytest.param(("--size", "24"), {"width": 24, "height": 24}, id="square"),
        pytest.param(("--negative-prompt", "a four"), {"negative_prompt": "a four"}, id="negative-prompt"),
        pytest.param(("--guidance", "1"), {"guidance_scale": 1.0}, id="no-guidance"),
        pytest.param(("--steps", "3"), {"num_inference_steps": 3}, id="steps"),
    ],
)
def test_every_option_of_drawing_does_what_its_counterpart_in_diffusers_does(draw, models, plain, options, keywords):
    expected = in_python(models / "sdxl", "stock", **keywords)
    drawn = pixels(draw(PROMPT, "--model", models / "sdxl", "--attention", "stock", *FAST, *options))
    assert np.array_equal(drawn, expected)
    assert not np.array_equal(drawn, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_img2img_starts_from_the_picture_at_the_nearest_size_the_model_can_draw(draw, models, family):
    start = models / "start.png"
    model = ("--model", models / family, "--weights", "base")
    out = draw(PROMPT, *model, *FAST, "--image", start, "--strength", "0.5")
    resized = Image.open(start).resize((56, 40))  # 53 x 41, in multiples of 8
    expected = in_python(
        models / family, "linfusion", kind=IMG2IMG[family], image=resized, strength=0.5, guidance_scale=GUIDANCE
    )
    assert np.array_equal(pixels(out), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_does_what_it_does_in_python(draw, models, family):
    lora = lora_file(models, family)
    drawn = draw(PROMPT, "--model", models / family, "--weights", "base", *FAST, "--lora", lora)
    assert np.array_equal(pixels(drawn), in_python(models / family, "linfusion", lora=lora))


def test_a_lora_counts_by_its_scale(draw, recorded, models):
    lora = (PROMPT, "--model", models / "sd15", "--weights", "base", *FAST, "--lora", lora_file(models))
    assert np.array_equal(pixels(draw(*lora, "--lora-scale", "0")), pixels(recorded.with_suffix(".png")))
    assert not np.array_equal(pixels(draw(*lora)), pixels(recorded.with_suffix(".png")))


def test_each_of_several_pictures_is_the_one_drawn_alone_with_its_seed(generate, draw, models, tmp_path):
    plain = (PROMPT, "--model", models / "sd15", "--weights", "base", *FAST)
    status, paths, err = generate(*plain, "--seed", 5, "--count", 3, "--out", "three.png")
    assert status == 0, err
    assert paths == ["three-1.png", "three-2.png", "three-3.png", "three.json"]
    pictures = json.loads(Path("three.json").read_text())["pictures"]
    assert [(p["file"], p["seed"]) for p in pictures] == list(zip(paths, (5, 6, 7), strict=False))
    for path, seed in zip(paths, (5, 6, 7), strict=False):
        assert draw(*plain, "--seed", seed, "--out", "alone.png").read_bytes() == Path(path).read_bytes()
    assert len({Path(path).read_bytes() for path in paths[:3]}) == 3


def test_bfloat16_draws_on_a_cpu(draw, models):
    model = (PROMPT, "--model", models / "sd15", "--weights", "base", *FAST)
    out = draw(*model, "--dtype", "bfloat16")
    assert record_of(out)["request"]["dtype"] == "bfloat16"
    narrow, wide = pixels(out), pixels(draw(*model))
    assert not np.array_equal(narrow, wide)


def test_the_extensions_that_are_offered_are_those_of_formats_that_can_be_read_and_written():
    kinds = {Image.registered_extensions()[suffix] for suffix in command.IMAGE_SUFFIXES}
    assert kinds <= set(Image.OPEN) & set(Image.SAVE)


@pytest.mark.parametrize("suffix", [".JPG", ".webp", ".tiff", ".bmp"])
def test_every_format_is_written_into_a_new_folder(draw, models, suffix):
    out = draw(PROMPT, "--model", models / "sd15", "--weights", "base", *FAST, "--out", f"new/folder/three{suffix}")
    assert out == Path(f"new/folder/three{suffix}")
    assert Image.open(out).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert out.with_suffix(".json").is_file()


def test_guidance_defaults_to_that_of_the_pipeline(draw, models):
    steps = ("--weights", "base", "--steps", "1")
    assert record_of(draw(PROMPT, "--model", models / "sd15", *steps))["request"]["guidance"] == 7.5
    assert record_of(draw(PROMPT, "--model", models / "sdxl", *steps))["request"]["guidance"] == 5.0
    assert record_of(draw(PROMPT, "--steps", "1"))["request"]["guidance"] == 2.5


def test_a_bundled_student_is_used_by_default_and_others_of_its_kind_are_not(draw, models, tmp_path, monkeypatch):
    folders = {name: tmp_path / "bundled" / name for name in ("other_linfusion", "tiny", "tiny_linfusion")}
    shutil.copytree(models / "sd15", folders["tiny"])
    shutil.copytree(models / "sd15_student", folders["tiny_linfusion"])
    shutil.copytree(models / "sdxl_student", folders["other_linfusion"])
    monkeypatch.setattr(bundled, "names", lambda: sorted(folders))
    monkeypatch.setattr(bundled, "path", lambda name="tiny": folders[name])
    out = draw(PROMPT, *FAST)
    assert record_of(out)["request"]["weights"] == "tiny_linfusion"
    assert np.array_equal(pixels(out), in_python(models / "sd15", "linfusion", models / "sd15_student"))
    assert record_of(draw(PROMPT, *FAST, "--weights", "base"))["sources"]["weights"] is None


# ------------------------------------------------------------------------------------------------------- the record


def everything(models, family="sd15"):
    """A command line that uses every kind of source."""
    return (
        PROMPT,
        *("--model", models / family, "--weights", models / f"{family}_student"),
        *("--lora", lora_file(models, family), "--lora-scale", "0.5"),
        *("--image", models / "start.png", "--strength", "0.5", "--size", "32"),
        *("--negative-prompt", "a four", "--seed", "9", *FAST),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_from_draws_the_same_file_bit_for_bit(generate, draw, models, family):
    first = draw(*everything(models, family), "--count", "2", "--out", "first.png")
    status, paths, err = generate("--from", "first.json", "--out", "again.png")
    assert status == 0, err
    assert paths == ["again-1.png", "again-2.png", "again.json"]
    for number in "12":
        assert Path(f"again-{number}.png").read_bytes() == Path(f"first-{number}.png").read_bytes()
    assert "the same pixels as recorded" in err and "warning" not in err
    again, before = json.loads(Path("again.json").read_text()), json.loads(Path("first.json").read_text())
    for record in (again, before):
        for picture in record["pictures"]:
            del picture["file"], picture["seconds"], picture["seconds_per_step"]
    assert again == before
    assert first == Path("first-1.png")


def test_from_draws_the_bundled_model_again_whatever_the_number_of_threads(draw):
    # At this size the order of the sums in torch's matrix products depends on the threads.
    first = draw(PROMPT, "--size", "128", "--steps", "3", "--device", "cpu")
    torch.set_num_threads(2)  # put back by the fixture one_thread
    again = draw("--from", "generated.json", "--out", "again.png")
    assert again.read_bytes() == first.read_bytes()
    assert record_of(again)["machine"]["threads"] == 1
    assert torch.get_num_threads() == 2


def test_the_record_says_everything_with_nothing_left_to_be_resolved(draw, models):
    out = draw(*everything(models))
    record = record_of(out)
    assert record["request"] == {
        "prompt": PROMPT,
        "negative_prompt": "a four",
        "model": str(models / "sd15"),
        "attention": "linfusion",
        "weights": str(models / "sd15_student"),
        "window_size": None,
        "down_factor": None,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seed": 9,
        "count": 1,
        "width": 32,
        "height": 32,
        "lora": str(lora_file(models)),
        "lora_scale": 0.5,
        "image": str(models / "start.png"),
        "strength": 0.5,
        "stages": None,
        "base_attention": None,
        "device": "cpu",
        "dtype": "float32",
    }
    assert record["versions"] == doctor.versions()
    assert record["backend"] == linattn.backend.choose("linear_attention", torch.device("cpu"), torch.float32)
    scheduler = DiffusionPipeline.from_pretrained(models / "sd15").scheduler
    assert record["scheduler"]["class"] == type(scheduler).__name__
    assert record["scheduler"]["config"] == json.loads(json.dumps(dict(scheduler.config)))
    (picture,) = record["pictures"]
    assert (picture["file"], picture["seed"], picture["width"], picture["height"]) == (out.name, 9, 32, 32)
    assert 0 < picture["seconds_per_step"] <= picture["seconds"]


def test_the_digests_are_those_of_the_files_that_are_read(draw, models):
    sources = record_of(draw(*everything(models)))["sources"]
    for name, folder in {"model": models / "sd15", "weights": models / "sd15_student"}.items():
        read = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        assert sources[name]["files"] == {k: hashlib.sha256(f.read_bytes()).hexdigest() for k, f in read.items()}
    for name, file in {"lora": lora_file(models), "image": models / "start.png"}.items():
        assert sources[name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_stock_attention_records_no_weights_and_no_backend(draw, models):
    record = record_of(draw(PROMPT, "--model", models / "sd15", "--attention", "stock", *FAST))
    assert record["request"]["weights"] is record["sources"]["weights"] is record["backend"] is None


@pytest.fixture(scope="module")
def first_picture(models):
    out = models / "first.png"
    assert (
        cli.main(["generate", PROMPT, "--model", str(models / "sd15"), "--weights", "base", *FAST, f"--out={out}"]) == 0
    )
    return out


@pytest.fixture
def recorded(first_picture, tmp_path):
    """The record of a picture by the sd15 pipeline with base weights, beside it, in the test's own folder."""
    shutil.copy(first_picture, tmp_path)
    return Path(shutil.copy(first_picture.with_suffix(".json"), tmp_path))


def moved_copy(models, tmp_path):
    """Everything of `everything(models)` in another place."""
    copy = tmp_path / "copy"
    for name in ("sd15", "sd15_student", "sd15_lora"):
        shutil.copytree(models / name, copy / name)
    shutil.copy(models / "start.png", copy)
    return copy


def test_from_finds_what_has_moved_where_it_is_told(generate, draw, models, tmp_path):
    copy = moved_copy(models, tmp_path)
    first = draw(*everything(copy), "--out", "first.png")
    copy.rename(tmp_path / "moved")
    copy = tmp_path / "moved"
    status, _, err = generate("--from", "first.json", "--out", "again.png")
    assert status == 1 and "does not exist" in err and str(tmp_path) in err
    moved = ("--model", copy / "sd15", "--weights", copy / "sd15_student")
    moved += ("--lora", lora_file(copy), "--image", copy / "start.png")
    again = draw("--from", "first.json", "--out", "again.png", *moved)
    assert again.read_bytes() == first.read_bytes()


def test_a_record_can_be_used_from_another_folder(draw, models, tmp_path, monkeypatch):
    relative = (os.path.relpath(a, tmp_path) if isinstance(a, Path) else a for a in everything(models))
    first = draw(*relative, "--out", "first.png").absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert draw("--from", "../first.json", "--out", "again.png").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("model", "sd15/unet/diffusion_pytorch_model.safetensors"),
        ("model", "sd15/scheduler/scheduler_config.json"),
        ("weights", "sd15_student/diffusion_pytorch_model.safetensors"),
        ("lora", "sd15_lora/pytorch_lora_weights.safetensors"),
        ("image", "start.png"),
    ],
)
def test_from_refuses_files_that_are_not_the_recorded_ones(
    generate, draw, models, tmp_path, nothing_heavy, source, file
):
    copy = moved_copy(models, tmp_path)
    with nothing_heavy.allowed():
        draw(*everything(copy), "--out", "first.png")
    path = copy / file
    if path.suffix == ".safetensors":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif path.suffix == ".json":
        path.write_text(path.read_text().replace("0.012", "0.013"))
    else:
        Image.new("RGB", (32, 32)).save(path)
    status, paths, err = generate("--from", "first.json", "--out", "again.png")
    assert (status, paths) == (1, [])
    assert f"{source} is not what the picture was drawn with" in err and path.name in err
    assert not Path("again.png").exists()


def test_from_warns_of_other_versions_and_draws(generate, recorded):
    record = json.loads(recorded.read_text())
    record["versions"]["torch"] = "1.0.0"
    Path("old.json").write_text(json.dumps(record))
    status, paths, err = generate("--from", "old.json", "--out", "again.png")
    assert (status, paths) == (0, ["again.png", "again.json"])
    assert f"torch 1.0.0 then, {torch.__version__} now" in err
    assert record_of(Path("again.png"))["versions"] == doctor.versions()


def test_from_draws_in_another_dtype_and_says_that_it_is_another_picture(generate, recorded):
    status, paths, err = generate("--from", recorded, "--out", "again.png", "--dtype", "bfloat16")
    assert (status, paths) == (0, ["again.png", "again.json"])
    assert "dtype float32 then, bfloat16 now" in err and "not the same pixels as recorded: again.png" in err


def test_from_says_when_the_pixels_are_not_the_recorded_ones(generate, recorded):
    record = json.loads(recorded.read_text())
    record["pictures"][0]["pixels_sha256"] = "0" * 64
    Path("first.json").write_text(json.dumps(record))
    status, _, err = generate("--from", "first.json", "--out", "again.png")
    assert status == 0 and "warning: not the same pixels as recorded: again.png" in err


def test_what_was_drawn_before_an_interruption_is_on_record(generate, draw, models, monkeypatch):
    finish, calls = command._to_picture, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(*args)

    monkeypatch.setattr(command, "_to_picture", interrupted)
    plain = (PROMPT, "--model", models / "sd15", "--weights", "base", *FAST)
    status, paths, _ = generate(*plain, "--count", "3", "--out", "many.png")
    assert (status, paths) == (130, ["many-1.png"])
    assert [p["file"] for p in json.loads(Path("many.json").read_text())["pictures"]] == ["many-1.png"]
    draw("--from", "many.json", "--out", "again.png")
    assert Path("again-1.png").read_bytes() == Path("many-1.png").read_bytes()


# ----------------------------------------------------------------------------------------------------- what it says


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_counts_the_steps_on_stderr_and_stdout_holds_paths_only(generate, models, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    model = ("--model", models / "sd15", "--weights", "base")
    status, paths, _ = generate(
        PROMPT, *model, *FAST, "--count", "2", "--image", models / "start.png", "--strength", 0.5
    )
    assert (status, paths) == (0, ["generated-1.png", "generated-2.png", "generated.json"])
    # Half of two steps, twice.
    assert "drawing 2/2" in terminal.getvalue() and "2/2 [" in terminal.getvalue()


def test_no_bar_where_stderr_is_no_terminal_and_no_remarks_of_libraries(generate, models):
    _, _, err = generate(PROMPT, "--model", models / "sdxl", "--weights", "base", *FAST)
    assert len(err.splitlines()) == 1, err


def test_the_help_explains_every_option_and_its_examples_are_valid(capsys):
    parser = cli.build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["generate", "--help"])
    text = capsys.readouterr().out
    examples = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("  linattn generate")]
    assert len(examples) >= 4
    for line in examples:
        args = parser.parse_args(shlex.split(line)[1:])
        if args.from_record is None:
            command._check_values(command._request_from(args))
    subparser = next(a for a in parser._actions if a.dest == "command").choices["generate"]
    assert all(action.help for action in subparser._actions)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def nothing_heavy(monkeypatch):
    """Loading a pipeline's weights is an error, except inside `nothing_heavy.allowed()`."""
    load = command._load

    class Guard:
        open = False

        @contextlib.contextmanager
        def allowed(self):
            self.open = True
            yield
            self.open = False

    guard = Guard()

    def guarded(*args):
        if not guard.open:
            pytest.fail("weights were about to be loaded")
        return load(*args)

    monkeypatch.setattr(command, "_load", guarded)
    return guard


def broken(models, tmp_path, what):
    """A copy of the sd15 pipeline with one thing wrong."""
    folder = tmp_path / "broken"
    shutil.copytree(models / "sd15", folder)
    index = json.loads((folder / "model_index.json").read_text())
    if what == "no index":
        (folder / "model_index.json").unlink()
    elif what == "no json":
        (folder / "model_index.json").write_text("{")
    elif what == "no vae":
        shutil.rmtree(folder / "vae")
    elif what == "pickled":
        (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    elif what == "variant":
        (folder / "vae/diffusion_pytorch_model.safetensors").rename(
            folder / "vae/diffusion_pytorch_model.fp16.safetensors"
        )
    elif what == "unet without config":
        (folder / "unet/config.json").unlink()
    elif what == "inpainting":
        config = json.loads((folder / "unet/config.json").read_text())
        (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    else:
        (folder / "model_index.json").write_text(json.dumps(index | what))
    return folder


OK = ("--model", "{models}/sd15", "--weights", "base")
MISTAKES = {
    "no prompt": ((), ["which prompt"]),
    "empty prompt": ((" ",), ["prompt is empty"]),
    "steps": ((PROMPT, "--steps", "0"), ["--steps", "1 or more", "got 0"]),
    "too many steps": ((PROMPT, *OK, "--steps", "1001"), ["--steps", "1000", "1001"]),
    "count": ((PROMPT, "--count", "0"), ["--count", "got 0"]),
    "negative seed": ((PROMPT, "--seed", "-1"), ["--seed", "got -1"]),
    "huge seed": ((PROMPT, "--seed", str(2**63)), ["--seed", "2^63"]),
    "guidance": ((PROMPT, "--guidance", "-1"), ["--guidance", "got -1"]),
    "guidance nan": ((PROMPT, "--guidance", "nan"), ["--guidance", "finite"]),
    "negative prompt without guidance": ((PROMPT, "--guidance", "1", "--negative-prompt", "x"), ["--negative-prompt"]),
    "size no number": ((PROMPT, "--size", "big"), ["--size", "WIDTHxHEIGHT", "'big'"]),
    "size zero": ((PROMPT, *OK, "--size", "0x32"), ["--size", "8 pixels", "got 0x32", "8x32"]),
    "size": ((PROMPT, *OK, "--size", "100x36"), ["multiples of 8", "got 100x36", "96x32 and 104x40"]),
    "one side": ((PROMPT, *OK, "--size", "96x36"), ["got 96x36", "96x32 and 96x40"]),
    "strength": ((PROMPT, *OK, "--image", "{models}/start.png", "--strength", "1.5"), ["--strength", "got 1.5"]),
    "no step": (
        (PROMPT, *OK, "--image", "{models}/start.png", "--strength", "0.1", "--steps", "5"),
        ["less than one step", "--steps 10"],
    ),
    "strength alone": ((PROMPT, "--strength", "0.5"), ["--strength", "--image"]),
    "scale alone": ((PROMPT, "--lora-scale", "0.5"), ["--lora-scale", "--lora"]),
    "no image": ((PROMPT, *OK, "--image", "{models}/strat.png"), ["--image", "did you mean", "start.png"]),
    "image no picture": ((PROMPT, *OK, "--image", "{models}/sd15/model_index.json"), ["--image", "cannot read"]),
    "no lora": ((PROMPT, *OK, "--lora", "{models}/nothing/x.safetensors"), ["--lora", "does not exist", "{models}"]),
    "lora folder": ((PROMPT, *OK, "--lora", "{models}/sd15_lora"), ["--lora", "is a folder"]),
    "pickled lora": ((PROMPT, *OK, "--lora", "{tmp}/lora.bin"), ["--lora", ".safetensors", "lora.bin"]),
    "damaged lora": ((PROMPT, *OK, "--lora", "{tmp}/lora.safetensors"), ["--lora: cannot read"]),
    "no extension": ((PROMPT, "--out", "three"), ["--out three", ".png", "none"]),
    "extension": ((PROMPT, "--out", "three.json"), ["--out three.json", ".png", "'.json'"]),
    "folder is a file": ((PROMPT, "--out", "{tmp}/lora.bin/x.png"), ["--out", "cannot write into {tmp}/lora.bin"]),
    "unwritable folder": ((PROMPT, "--out", "/proc/x.png"), ["--out /proc/x.png: cannot write into /"]),
    "out is a folder": ((PROMPT, "--out", "{tmp}/folder.png"), ["folder.png is a folder"]),
    "foreign json": ((PROMPT, "--out", "{models}/sd15/model_index.png"), ["would overwrite", "model_index.json"]),
    "own image": ((PROMPT, *OK, "--image", "{models}/start.png", "--out", "{models}/start.png"), ["overwrite --image"]),
    "model folder": (
        (PROMPT, "--model", "{models}/sd15x"),
        ["--model", "does not exist", "did you mean", "{models}/sd15"],
    ),
    "model far away": ((PROMPT, "--model", "{models}/sd15x9/ab/c"), ["--model", "does not exist"]),
    "model is a file": ((PROMPT, "--model", "{models}/start.png"), ["--model", "is a file"]),
    "no model folder name": ((PROMPT, "--model", "nothing"), ["--model", "'nothing' does not exist"]),
    "no pipeline": ((PROMPT, "--model", "{models}"), ["no diffusers pipeline", "model_index.json"]),
    "a student as model": (
        (PROMPT, "--model", "{models}/sd15_student"),
        ["no diffusers pipeline", "a single LinFusion"],
    ),
    "stock with weights": ((PROMPT, *OK, "--attention", "stock"), ["--weights base", "--attention linfusion"]),
    "a pipeline as weights": (
        (PROMPT, "--model", "{models}/sd15", "--weights", "{models}/sdxl"),
        ["--weights", "no LinFusion weights"],
    ),
    "a unet as weights": (
        (PROMPT, "--model", "{models}/sd15", "--weights", "{models}/sd15/unet"),
        ["a UNet2DConditionModel and no LinFusion weights"],
    ),
    "weights of another model": (
        (PROMPT, "--model", "{models}/sd15", "--weights", "{models}/sdxl_student"),
        ["--weights", "does not go with", "LinFusion does not fit this UNet"],
    ),
    "no weights folder": (
        (PROMPT, "--model", "{models}/sd15", "--weights", "{models}/sd15_studnet"),
        ["--weights", "did you mean", "sd15_student"],
    ),
    "unknown architecture": (
        (PROMPT, "--model", "{models}/sd15"),
        ["no published LinFusion weights are known for", "architecture is none of", "--weights base"],
    ),
    "float16 on a cpu": ((PROMPT, *OK, "--device", "cpu", "--dtype", "float16"), ["--dtype float16", "bfloat16"]),
    "name too long": ((PROMPT, *OK, "--out", "{tmp}/" + "x" * 300 + "/x.png"), ["File name too long"]),
    "late mistake": ((PROMPT, "--model", "nothing", "--out", "{tmp}/new/x.png"), ["'nothing' does not exist"]),
    "no record": (("--from", "{models}/nothing.json"), ["--from", "does not exist"]),
    "another json": (("--from", "{models}/sd15/model_index.json"), ["--from", "no record of linattn generate"]),
    "no json": (("--from", "{models}/start.png"), ["--from", "cannot read"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(generate, models, tmp_path, nothing_heavy, mistake):
    (tmp_path / "lora.bin").write_bytes(b"x" * 99)
    (tmp_path / "lora.safetensors").write_bytes(b"x" * 99)
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def filled(text):
        return text.replace("{models}", str(models)).replace("{tmp}", str(tmp_path))

    arguments, parts = MISTAKES[mistake]
    status, paths, err = generate(*map(filled, arguments))
    assert (status, paths) == (1, []), err
    assert err.startswith("linattn generate: ") and len(err.splitlines()) == 1
    for part in map(filled, parts):
        assert part in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no index", ["no diffusers pipeline"]),
        ("no json", ["cannot read", "model_index.json"]),
        ("no vae", ["incomplete", "vae"]),
        ("unet without config", ["no unet/config.json"]),
        ("pickled", ["no weights as safetensors", "unet", "diffusion_pytorch_model.bin"]),
        ("variant", ["no weights as safetensors", "vae", "fp16"]),
        ("inpainting", ["9 channels", "inpainting"]),
        ({"unet": [None, None]}, ["StableDiffusionPipeline, which has no UNet"]),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, ["a StableDiffusionInpaintPipeline", "this draws with"]),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_draw_is_refused_before_its_weights_are_read(
    generate, models, tmp_path, nothing_heavy, what, parts
):
    status, paths, err = generate(PROMPT, "--model", broken(models, tmp_path, what), "--weights", "base")
    assert (status, paths) == (1, []) and len(err.splitlines()) == 1
    for part in parts:
        assert part in err


def test_an_unconditional_pipeline_is_refused_by_its_class(generate, tmp_path, nothing_heavy):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    status, _, err = generate(PROMPT, "--model", tmp_path / "ddpm", "--attention", "stock")
    assert status == 1 and "a DDPMPipeline; this draws with StableDiffusionPipeline" in err


def test_damaged_weights_are_one_line(generate, models, tmp_path):
    folder = broken(models, tmp_path, {})
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, err = generate(PROMPT, "--model", folder, "--weights", "base", *FAST)
    assert status == 1 and "cannot load" in err and len(err.splitlines()) == 1


def test_a_lora_of_another_family_is_one_line(generate, models):
    model = ("--model", models / "sd15", "--weights", "base")
    status, paths, err = generate(PROMPT, *model, *FAST, "--lora", lora_file(models, "sdxl"))
    assert (status, paths) == (1, []) and "--lora" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("prefix", ["transformer.blocks.0.attn.to_q", "nothing"])
def test_a_lora_of_which_nothing_fits_is_refused_instead_of_drawn_without(generate, models, tmp_path, prefix):
    layers = {f"{prefix}.lora_A.weight": torch.ones(2, 16), f"{prefix}.lora_B.weight": torch.ones(16, 2)}
    save_file(layers, tmp_path / "lora.safetensors")
    model = ("--model", models / "sd15", "--weights", "base")
    status, paths, err = generate(PROMPT, *model, *FAST, "--lora", "lora.safetensors")
    assert (status, paths) == (1, []) and "--lora" in err and len(err.splitlines()) == 1


def test_a_missing_package_is_named_with_what_to_install(generate, monkeypatch, nothing_heavy):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    status, _, err = generate(PROMPT)
    assert status == 1 and "diffusers missing: pip install 'linattn[diffusers]'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_said_at_once(generate, models, nothing_heavy):
    status, _, err = generate(PROMPT, "--device", "cuda")
    assert status == 1 and "--device cpu" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "1"),
        ("--size", "32"),
        ("--steps", "2"),
        ("--attention", "stock"),
        ("--strength", "1"),
        ("--lora-scale", "1"),
        ("--count", "2"),
        (None, "a prompt"),
    ],
)
def test_from_takes_no_option_that_would_change_the_picture(generate, recorded, nothing_heavy, option, value):
    given = (value,) if option is None else (option, value)
    status, paths, err = generate("--from", recorded, "--out", "again.png", *given)
    assert (status, paths) == (1, []) and (option or "prompt") in err


def test_from_overwrites_neither_its_record_nor_its_picture(generate, recorded, models):
    before = recorded.read_bytes()
    for out in (recorded.with_suffix(".png"), recorded.with_suffix(".jpg")):
        status, paths, err = generate("--from", recorded, "--out", out)
        assert (status, paths) == (1, []) and "would overwrite" in err
    assert recorded.read_bytes() == before
    # Other pictures may take the place of earlier ones.
    out = recorded.with_suffix(".png")
    assert generate(PROMPT, "--model", models / "sd15", "--weights", "base", *FAST, "--out", out)[0] == 0


def test_from_takes_no_source_that_the_record_does_without(generate, recorded, models, nothing_heavy):
    for option, value in (("--weights", models / "sd15_student"), ("--lora", lora_file(models))):
        status, _, err = generate("--from", recorded, "--out", "again.png", option, value)
        assert status == 1 and f"drawn without {option}" in err


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("request",), None),
        (("request", "steps"), "2"),
        (("request", "seed"), True),
        (("request", "surprise"), 1),
        (("sources", "model"), None),
        (("sources", "model", "files"), 3),
        (("pictures", 0, "file"), 3),
        (("versions",), []),
    ],
    ids=str,
)
def test_a_damaged_record_is_refused_by_the_name_of_its_entry(generate, recorded, nothing_heavy, keys, value):
    record = json.loads(recorded.read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    recorded.write_text(json.dumps(record))
    status, paths, err = generate("--from", recorded, "--out", "again.png")
    assert (status, paths) == (1, [])
    assert "is damaged" in err and ".".join(str(key) for key in keys[:2]) in err


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect fails, and nothing says beforehand that there is no use in trying."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, in which `cache(repository, folder)` puts a copy of a folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0123456789abcdef0123456789abcdef01234567"

    def put(repository, folder):
        top = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, top / "snapshots" / revision)
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(revision)
        return revision

    return put


def test_local_models_draw_without_a_network_and_nothing_is_unpickled(draw, models, no_network, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was about to be read"))
    draw(*everything(models))
    draw(PROMPT, "--steps", "1")


def test_a_model_that_is_not_cached_is_said_with_its_cause(generate, cache, nothing_heavy):
    status, _, err = generate(PROMPT, "--model", "nobody/nothing")
    assert status == 1 and len(err.splitlines()) == 1
    assert "'nobody/nothing'" in err and huggingface_hub.constants.HF_HUB_CACHE in err and "HF_HUB_OFFLINE" in err


def test_a_dead_network_is_named_as_such(generate, cache, no_network, nothing_heavy):
    status, _, err = generate(PROMPT, "--model", "nobody/nothing")
    assert status == 1 and len(err.splitlines()) == 1
    assert "'nobody/nothing'" in err and "check the network" in err and "HF_HUB_OFFLINE" not in err


def test_a_folder_that_looks_like_a_hub_name_gets_the_nearest_folder_too(generate, cache, tmp_path):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    status, _, err = generate(PROMPT, "--model", "runs/modle")
    assert status == 1 and "did you mean 'runs/model'?" in err and "HF_HUB_OFFLINE" in err


def test_a_cached_model_and_its_cached_student_draw_offline_and_their_revisions_are_recorded(draw, models, cache):
    revision = cache("somebody/model", models / "sd15")
    cache("somebody/student", models / "sd15_student")
    first = draw(PROMPT, "--model", "somebody/model", "--weights", "somebody/student", *FAST)
    assert np.array_equal(pixels(first), in_python(models / "sd15", "linfusion", models / "sd15_student"))
    sources = record_of(first)["sources"]
    for source, name in (("model", "somebody/model"), ("weights", "somebody/student")):
        assert (sources[source]["kind"], sources[source]["name"], sources[source]["revision"]) == (
            "hub",
            name,
            revision,
        )
    assert draw("--from", "generated.json", "--out", "again.png").read_bytes() == first.read_bytes()


def test_published_weights_are_looked_up_by_the_architecture_before_any_weights_are_read(
    generate, models, tmp_path, cache, nothing_heavy
):
    folder = broken(models, tmp_path, {})
    sd15 = {
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | sd15))
    status, _, err = generate(PROMPT, "--model", folder)
    assert status == 1 and "--weights: 'Yuanshi/LinFusion-1-5'" in err and "HF_HUB_OFFLINE" in err


def test_published_weights_are_looked_up_by_the_name_of_the_repository(draw, models, cache):
    cache("Lykon/dreamshaper-8", models / "sd15")
    cache("Yuanshi/LinFusion-1-5", models / "sd15_student")
    out = draw(PROMPT, "--model", "Lykon/dreamshaper-8", *FAST)
    assert record_of(out)["request"]["weights"] == "Yuanshi/LinFusion-1-5"
    assert np.array_equal(pixels(out), in_python(models / "sd15", "linfusion", models / "sd15_student"))


# ---------------------------------------------------------------------------------------------------- FLUX and SD3


TRANSFORMERS = ("flux", "flux-schnell", "sd3")
LENGTH = 48  # tokens that the T5 of these models reads, and so the pipelines are told to pad to


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """A folder with pipelines, and with weights of CLEAR for each: a folder as saved, and files named as published."""
    root = tmp_path_factory.mktemp("transformers")
    for family in TRANSFORMERS:
        pipe = tiny_pipeline(family)
        (pipe.tokenizer_3 if family == "sd3" else pipe.tokenizer_2).model_max_length = LENGTH
        pipe.save_pretrained(root / family)
        files = root / f"{family}_files"
        files.mkdir()
        for size, factor, name in ((3, 2, "clear_local_3_down_2"), (2, 1, "clear_local_2")):
            clear = CLEAR.construct_for(pipe, size, factor, load_pretrained=False)
            with torch.no_grad():
                for key, parameter in clear.trainable_parameters().items():
                    if "to_q" in key:
                        parameter.mul_(1.5)
            save_file(
                {k: v.contiguous() for k, v in clear.published_state_dict().items()}, files / f"{name}.safetensors"
            )
            if factor > 1:
                clear.save_pretrained(root / f"{family}_student")
            clear.unmount()
    return root


def of_flux(family="flux"):
    return {"max_sequence_length": LENGTH} | ({"true_cfg_scale": 1.0} if family == "flux-schnell" else {})


def size_of(file):
    return Image.open(file).size


SMALL = ("--steps", "2", "--device", "cpu", "--size", "32x16")


@pytest.mark.parametrize("attention", ["clear", "stock"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_draw_what_the_same_calls_in_python_give(draw, transformers, family, attention):
    student = transformers / f"{family}_student" if attention == "clear" else None
    weights = ("--weights", student) if student else ("--attention", "stock")
    out = draw(PROMPT, "--model", transformers / family, *weights, *SMALL, "--guidance", 3, "--seed", 3)
    options = {"width": 32, "height": 16, "seed": 3, "max_sequence_length": LENGTH}
    if family == "flux-schnell":  # reads no guidance: it is drawn twice, with and without the prompt
        options |= {"true_cfg_scale": 3.0, "negative_prompt": "", "guidance_scale": 1.0}
    assert np.array_equal(pixels(out), in_python(transformers / family, attention, student, **options))
    request = record_of(out)["request"]
    assert (request["attention"], request["guidance"]) == (attention, 3.0)
    assert (request["window_size"], request["down_factor"]) == ((3, 2) if student else (None, None))


@pytest.mark.parametrize(("family", "guidance"), [("flux", 3.5), ("flux-schnell", 1.0), ("sd3", 7.0)])
def test_transformers_have_the_guidance_and_the_size_of_their_pipeline_unless_told(
    draw, transformers, family, guidance
):
    model = ("--model", transformers / family, "--attention", "stock", "--steps", "1", "--device", "cpu")
    out = draw(PROMPT, *model)
    request = record_of(out)["request"]
    assert request["guidance"] == guidance
    assert size_of(out) == (IMAGE_SIZE, IMAGE_SIZE) == (request["width"], request["height"])


def test_a_negative_prompt_counts_where_there_is_guidance_without_the_prompt(draw, transformers):
    model = (PROMPT, "--model", transformers / "flux-schnell", "--attention", "stock", *SMALL, "--guidance", "3")
    drawn = pixels(draw(*model, "--negative-prompt", "a four"))
    options = {"width": 32, "height": 16, "guidance_scale": 1.0, **of_flux(), "true_cfg_scale": 3.0}
    assert np.array_equal(drawn, in_python(transformers / "flux-schnell", "stock", negative_prompt="a four", **options))
    assert not np.array_equal(drawn, pixels(draw(*model)))


@pytest.mark.parametrize(("family", "kind"), [("flux", FluxImg2ImgPipeline), ("sd3", StableDiffusion3Img2ImgPipeline)])
def test_transformers_start_from_a_picture(draw, models, transformers, family, kind):
    start = models / "start.png"
    model = ("--model", transformers / family, "--weights", "base", "--window-size", 3, "--down-factor", 2)
    out = draw(PROMPT, *model, *SMALL, "--guidance", 3, "--image", start, "--strength", 0.5)
    resized = Image.open(start).resize((32, 16))
    options = {"image": resized, "strength": 0.5, "width": 32, "height": 16, "max_sequence_length": LENGTH}
    assert np.array_equal(pixels(out), in_python(transformers / family, "clear", kind=kind, **options))


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        pytest.param(("flux_student",), "flux_student/diffusion_pytorch_model.safetensors", id="saved"),
        pytest.param(
            ("flux_files/clear_local_3_down_2.safetensors",), "flux_files/clear_local_3_down_2.safetensors", id="file"
        ),
        pytest.param(
            ("flux_files", "--window-size", "3", "--down-factor", "2"),
            "flux_files/clear_local_3_down_2.safetensors",
            id="pooled-of-several",
        ),
        pytest.param(
            ("flux_files", "--window-size", "2"), "flux_files/clear_local_2.safetensors", id="local-of-several"
        ),
    ],
)
def test_weights_of_clear_are_a_folder_a_file_or_the_one_of_several_that_the_window_names(
    draw, transformers, weights, file
):
    name, *window = weights
    out = draw(PROMPT, "--model", transformers / "flux", "--weights", transformers / name, *window, *SMALL)
    size, factor = (2, 1) if "local_2" in file else (3, 2)
    pipe = DiffusionPipeline.from_pretrained(transformers / "flux")
    pipe.set_progress_bar_config(disable=True)
    CLEAR.construct_for(pipe, size, factor, pretrained_model_name_or_path=transformers / file)
    options = {"num_inference_steps": 2, "width": 32, "height": 16, **of_flux()}
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.array_equal(pixels(out), np.asarray(expected))
    record = record_of(out)
    assert (record["request"]["window_size"], record["request"]["down_factor"]) == (size, factor)
    assert Path(file).name in record["sources"]["weights"]["files"]
    assert {n for n in record["sources"]["weights"]["files"] if n.endswith(".safetensors")} == {Path(file).name}
    assert record["backend"] == linattn.backend.choose("window_attention", torch.device("cpu"), torch.float32)
    assert draw("--from", "generated.json", "--out", "again.png").read_bytes() == out.read_bytes()


def test_the_bundled_clear_of_a_bundled_flux_is_found_by_its_window(draw, transformers, tmp_path, monkeypatch):
    folders = {name: tmp_path / "bundled" / name for name in ("tiny", "tiny_a", "tiny_b")}
    shutil.copytree(transformers / "flux", folders["tiny"])
    shutil.copytree(transformers / "flux_student", folders["tiny_b"])
    pipe = DiffusionPipeline.from_pretrained(transformers / "flux")
    CLEAR.construct_for(pipe, 2, 1, load_pretrained=False).save_pretrained(folders["tiny_a"])
    monkeypatch.setattr(bundled, "names", lambda: sorted(folders))
    monkeypatch.setattr(bundled, "path", lambda name="tiny": folders[name])
    for options, name, window in (((), "tiny_a", 2), (("--down-factor", "2"), "tiny_b", 3)):
        request = record_of(draw(PROMPT, *SMALL, *options))["request"]
        assert (request["weights"], request["window_size"]) == (name, window)
        assert request["guidance"] == 2.5


# ------------------------------------------------------------------------------------------------ high resolution

STAGES = ("--high-resolution", "48x24,64x32", "--stage-steps", "3", "--stage-strength", "0.7,0.4")


def by_helper(folder, stages, attention=None, kind=DiffusionPipeline, **options):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    adapter = None if attention is None else attention(pipe)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2} | options
    return np.asarray(high_resolution(pipe, PROMPT, stages=stages, attention=adapter, **options).images[0])


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_stages_are_those_of_the_helper_and_the_record_draws_them_again(generate, draw, transformers, family):
    student = transformers / f"{family}_student"
    out = draw(PROMPT, "--model", transformers / family, "--weights", student, *SMALL, *STAGES, "--guidance", "1.5")
    more = {"guidance_scale": 1.5, **of_flux()}
    if family == "flux-schnell":
        more |= {"true_cfg_scale": 1.5, "negative_prompt": ""}
    expected = by_helper(
        transformers / family,
        [Stage(24, 48, num_inference_steps=3), Stage(32, 64, num_inference_steps=3, strength=0.4)],
        lambda pipe: CLEAR.construct_for(pipe, pretrained_model_name_or_path=student),
        **{"width": 32, "height": 16, **more},
    )
    assert size_of(out) == (64, 32)
    assert np.array_equal(pixels(out), expected)
    record = record_of(out)
    assert record["request"]["base_attention"] == "stock"
    assert record["request"]["stages"][1] == {
        "width": 64,
        "height": 32,
        "strength": 0.4,
        "steps": 3,
        "guidance": 1.5,
        "shift": 3.0,
        "ntk_factor": 1.0 if family == "sd3" else 10.0,
        "proportional_attention": True,
    }
    status, _, err = generate("--from", "generated.json", "--out", "again.png")
    assert status == 0 and "the same pixels as recorded" in err and "warning" not in err
    assert Path("again.png").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("options", "stage", "keywords"),
    [
        pytest.param(("--stage-guidance", "7.5"), {"guidance_scale": 7.5}, {}, id="guidance"),
        pytest.param(("--stage-shift", "2"), {"shift": 2.0}, {}, id="shift"),
        pytest.param(("--ntk-factor", "2"), {"ntk_factor": 2.0}, {}, id="ntk"),
        pytest.param(("--no-proportional-attention",), {"proportional_attention": False}, {}, id="proportional"),
        pytest.param(("--base-attention", "same"), {}, {"attention_in_base": True}, id="base"),
        pytest.param(("--stage-steps", "5"), {"num_inference_steps": 5}, {}, id="steps"),
    ],
)
def test_every_option_of_a_stage_does_what_its_counterpart_of_the_helper_does(
    draw, transformers, stock_stage, options, stage, keywords
):
    student = transformers / "flux_student"
    weights = ("--weights", student, "--high-resolution", "48x24")
    drawn = pixels(draw(PROMPT, "--model", transformers / "flux", *weights, *SMALL, "--steps", "4", *options))
    assert np.array_equal(drawn, one_stage(transformers, stage, keywords))
    assert not np.array_equal(drawn, stock_stage)


def one_stage(transformers, stage, keywords):
    return by_helper(
        transformers / "flux",
        [Stage(24, 48, **stage)],
        lambda pipe: CLEAR.construct_for(pipe, pretrained_model_name_or_path=transformers / "flux_student"),
        **{"width": 32, "height": 16, "num_inference_steps": 4, **of_flux(), **keywords},
    )


@pytest.fixture(scope="module")
def stock_stage(transformers):
    return one_stage(transformers, {}, {})


def test_stages_enlarge_a_given_picture(draw, models, transformers):
    start = models / "start.png"  # 53 x 41, whatever the model's multiple is
    stage = ("--high-resolution", "64x48", "--stage-strength", "0.5")
    out = draw(PROMPT, "--model", transformers / "flux", "--attention", "stock", *SMALL[:4], "--image", start, *stage)
    expected = by_helper(
        transformers / "flux", [Stage(48, 64, strength=0.5)], image=Image.open(start), guidance_scale=3.5, **of_flux()
    )
    assert np.array_equal(pixels(out), expected)
    request = record_of(out)["request"]
    assert request["width"] is request["height"] is request["strength"] is request["base_attention"] is None
    assert draw("--from", "generated.json", "--out", "again.png").read_bytes() == out.read_bytes()


def test_stages_are_for_stable_diffusion_too(draw, models):
    stage = ("--high-resolution", "48x32", "--stage-strength", "0.5", "--size", "24x16")
    out = draw(PROMPT, "--model", models / "sd15", "--weights", models / "sd15_student", *FAST, *stage)
    expected = by_helper(
        models / "sd15",
        [Stage(32, 48, strength=0.5)],
        lambda pipe: LinFusion.construct_for(pipe, pretrained_model_name_or_path=models / "sd15_student"),
        attention_in_base=True,
        width=24,
        height=16,
        guidance_scale=GUIDANCE,
    )
    assert np.array_equal(pixels(out), expected)
    assert record_of(out)["request"]["stages"][0]["shift"] is None


def test_the_progress_bar_counts_the_steps_of_all_stages(generate, transformers, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    model = ("--model", transformers / "flux", "--attention", "stock", *SMALL, "--count", "2")
    assert generate(PROMPT, *model, *STAGES)[0] == 0
    assert "14/14 [" in terminal.getvalue()  # twice 2, 3 and 2: diffusers rounds up what is left of the steps


STOCK = ("--attention", "stock")
HIGH = ("flux", *STOCK, "--high-resolution")
TRANSFORMER_MISTAKES = {
    "linfusion": (("flux", "--attention", "linfusion"), ["--attention linfusion is for", "FluxPipeline", "clear"]),
    "clear on a unet": (("{models}/sd15", "--attention", "clear"), ["--attention clear is for FLUX", "linfusion"]),
    "window of linfusion": (("{models}/sd15", "--window-size", "3"), ["--window-size goes with --attention clear"]),
    "nothing published": (("flux",), ["no CLEAR weights are published for this FluxPipeline", "--attention stock"]),
    "nothing published for sd3": (("sd3",), ["no CLEAR weights are published for this StableDiffusion3Pipeline"]),
    "base without a window": (("flux", "--weights", "base"), ["--weights base needs --window-size"]),
    "window 0": (("flux", "--weights", "base", "--window-size", "0"), ["--window-size: expected 1 or more, got 0"]),
    "which of several": (
        ("flux", "--weights", "{root}/flux_files"),
        ["--window-size", "clear_local_2.safetensors, clear_local_3_down_2.safetensors"],
    ),
    "none of several": (
        ("flux", "--weights", "{root}/flux_files", "--window-size", "5"),
        ["no clear_local_5.safetensors", "clear_local_3_down_2"],
    ),
    "another window": (
        ("flux", "--weights", "{root}/flux_student", "--window-size", "5"),
        ["--weights", "window_size", "5"],
    ),
    "weights of another model": (
        ("flux", "--weights", "{root}/sd3_student"),
        ["--weights", "does not go with", "SD3Transformer2DModel"],
    ),
    "published weights of another model": (
        ("sd3", "--weights", "{root}/flux_files/clear_local_2.safetensors"),
        ["--weights", "does not go with", "single_transformer_blocks"],
    ),
    "a unet as weights": (("flux", "--weights", "{models}/sd15/unet"), ["--weights", "UNet2DConditionModel"]),
    "no such file": (("flux", "--weights", "{root}/flux_files/clear.safetensors"), ["does not exist", "did you mean"]),
    "a pickle": (("flux", "--weights", "{models}/start.png"), ["--weights: expected a .safetensors file"]),
    "size": (
        ("flux", *STOCK, "--size", "32x18"),
        ["--size: width and height must be multiples of 4", "32x16 and 32x20"],
    ),
    "size of sd3": (("sd3", *STOCK, "--size", "100"), ["--size: this model knows positions up to 96 pixels"]),
    "negative prompt": (
        ("flux", *STOCK, "--negative-prompt", "x", "--guidance", "3"),
        ["--negative-prompt: this FLUX reads its guidance"],
    ),
    "negative prompt without guidance": (
        ("flux-schnell", *STOCK, "--negative-prompt", "x"),
        ["--negative-prompt needs --guidance above 1"],
    ),
    "no stages": (("flux", *STOCK, "--stage-steps", "3"), ["--stage-steps goes with --high-resolution"]),
    "no stages for the base": (("flux", *STOCK, "--base-attention", "same"), ["--base-attention goes with --high-res"]),
    "a stage by one number": ((*HIGH, "64"), ["--high-resolution: expected sizes", "'64'"]),
    "a stage between multiples": ((*HIGH, "64x31"), ["--high-resolution: width and height must be multiples of 4"]),
    "a smaller stage": ((*HIGH, "28x32"), ["28x32 is smaller than the picture before the stages, 32x32"]),
    "a smaller second stage": ((*HIGH, "48x48,64x32"), ["64x32 is smaller than the stage before it, 48x48"]),
    "a stage smaller than the image": (
        (*HIGH, "48x48", "--image", "{models}/start.png"),
        ["smaller than --image, 53x41"],
    ),
    "three values": ((*HIGH, "48x48,64x64", "--stage-steps", "3,4,5"), ["--stage-steps: expected one value", "got 3"]),
    "words": ((*HIGH, "48x48", "--stage-strength", "much"), ["--stage-strength: expected numbers", "'much'"]),
    "half a step": ((*HIGH, "48x48", "--stage-steps", "2.5"), ["--stage-steps: expected whole numbers", "'2.5'"]),
    "no strength": ((*HIGH, "48x48", "--stage-strength", "0"), ["--stage-strength: expected above 0", "got 0"]),
    "no step of a stage": (
        (*HIGH, "48x48", "--stage-strength", "0.1", "--stage-steps", "4"),
        ["less than one step: use --stage-steps 10 or more"],
    ),
    "steps": ((*HIGH, "48x48", "--stage-steps", "1001"), ["--stage-steps: expected at most the 1000"]),
    "no guidance": ((*HIGH, "48x48", "--stage-guidance", "-1"), ["--stage-guidance: expected 0 or more, got -1"]),
    "no shift": ((*HIGH, "48x48", "--stage-shift", "0"), ["--stage-shift: expected a number above 0, got 0"]),
    "shift of a unet": (
        ("{models}/sd15", *STOCK, "--high-resolution", "64x64", "--stage-shift", "3"),
        ["--stage-shift: the scheduler"],
    ),
    "ntk of stock": ((*HIGH, "48x48", "--ntk-factor", "2"), ["--ntk-factor goes with --attention clear"]),
    "ntk of sd3": (
        ("sd3", "--weights", "base", "--window-size", "3", "--high-resolution", "48x48", "--ntk-factor", "2"),
        ["--ntk-factor is about rotary positions"],
    ),
    "stock and stock": ((*HIGH, "48x48", "--base-attention", "same"), ["no meaning with --attention stock"]),
    "image and size": (
        (*HIGH, "64x64", "--image", "{models}/start.png", "--size", "64"),
        ["--size: with --image and --high-resolution only the stages"],
    ),
    "image and strength": (
        (*HIGH, "64x64", "--image", "{models}/start.png", "--strength", "0.5"),
        ["--strength: with --image", "--stage-strength"],
    ),
}


@pytest.mark.parametrize("mistake", TRANSFORMER_MISTAKES)
def test_a_mistake_with_a_transformer_or_stages_is_one_line_and_costs_nothing(
    generate, models, transformers, nothing_heavy, mistake
):
    def filled(text):
        return text.replace("{models}", str(models)).replace("{root}", str(transformers))

    (model, *arguments), parts = TRANSFORMER_MISTAKES[mistake]
    model = filled(model) if "{" in model else transformers / model
    status, paths, err = generate(PROMPT, "--model", model, *map(filled, arguments))
    assert (status, paths) == (1, []), err
    assert err.startswith("linattn generate: ") and len(err.splitlines()) == 1, err
    for part in parts:
        assert part in err


def test_published_clear_is_looked_up_on_the_hub_for_flux_of_that_size(generate, transformers, tmp_path, cache):
    folder = tmp_path / "dev"
    shutil.copytree(transformers / "flux", folder)
    config = json.loads((folder / "transformer/config.json").read_text())
    dev = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
    (folder / "transformer/config.json").write_text(json.dumps(config | dev))
    status, _, err = generate(PROMPT, "--model", folder)
    assert status == 1 and "clear_local_8_down_4 are published" in err and "--window-size" in err
    status, _, err = generate(PROMPT, "--model", folder, "--window-size", "16")
    assert status == 1 and "--weights: 'Huage001/CLEAR'" in err and "HF_HUB_OFFLINE" in err


def test_weights_of_clear_on_the_hub_are_chosen_by_the_window(draw, transformers, cache):
    revision = cache("somebody/clear", transformers / "flux_files")
    model = (PROMPT, "--model", transformers / "flux", "--weights", "somebody/clear", *SMALL)
    out = draw(*model, "--window-size", "3", "--down-factor", "2")
    source = record_of(out)["sources"]["weights"]
    assert (source["kind"], source["name"], source["revision"]) == ("hub", "somebody/clear", revision)
    assert list(source["files"]) == ["clear_local_3_down_2.safetensors"]
    assert draw("--from", "generated.json", "--out", "again.png").read_bytes() == out.read_bytes()
    assert draw(*model, "--window-size", "2", "--out", "other.png").read_bytes() != out.read_bytes()


def test_from_takes_no_option_of_stages(generate, recorded, nothing_heavy):
    for option, value in (("--high-resolution", "64x64"), ("--stage-steps", "3"), ("--window-size", "3")):
        status, paths, err = generate("--from", recorded, "--out", "again.png", option, value)
        assert (status, paths) == (1, []) and option in err


@pytest.mark.parametrize(("key", "value"), [("width", "64"), ("surprise", 1), ("proportional_attention", 1)])
def test_a_damaged_stage_of_a_record_is_refused_by_its_number(generate, recorded, nothing_heavy, key, value):
    record = json.loads(recorded.read_text())
    stage = {"width": 64, "height": 64, "strength": 0.7, "steps": 2, "guidance": None, "shift": None}
    stage |= {"ntk_factor": None, "proportional_attention": None}
    record["request"]["stages"] = [stage, stage | {key: value}]
    recorded.write_text(json.dumps(record))
    status, paths, err = generate("--from", recorded, "--out", "again.png")
    assert (status, paths) == (1, []) and "is damaged: request.stages.1 missing" in err


def test_pipeline_saved_with_perflows_scheduler_is_drawn_with(tmp_path):
    """diffusers finds the class only in a module that somebody has imported; so in a process of its own."""
    from diffusers import DiffusionPipeline

    from linattn.schedulers import PeRFlowScheduler

    pipe = DiffusionPipeline.from_pretrained(bundled.path("tiny_sd"))
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps", num_time_windows=4)
    pipe.save_pretrained(tmp_path / "pipe")
    options = ["--model", tmp_path / "pipe", "--attention", "stock", "--steps", "4", "--size", "64"]
    command = [sys.executable, "-m", "linattn", "generate", "a two", "--out", tmp_path / "two.png", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "two.png").size == (64, 64)
