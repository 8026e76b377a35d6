"""`linattn upscale`: the pictures that were meant, results whole or not at all, stopped lists, mistakes at no cost."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from linattn import adapters, bundled, cli, schedulers
from linattn.cli import _upscale_files as files
from linattn.cli import _upscale_pictures as pictures
from linattn.cli import _upscale_progress
from linattn.cli import upscale as command
from linattn.cli._upscale_request import DECISIVE, FORMAT

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {
    "model_index.json": {"_class_name": "InfDiTUpscalePipeline", "transformer": ["a", "B"], "scheduler": ["a", "C"]},
    "transformer/config.json": {"_class_name": "InfDiTTransformer2DModel"},
    "scheduler/scheduler_config.json": {"_class_name": "EDMScheduler", "sampler": "heun"},
    "transformer/diffusion_pytorch_model.safetensors": "weights",
}


class StandIn:
    """The pipeline's interface, for what does not depend on the model: a picture, enlarged, with noise of the seed."""

    def __init__(self):
        self.scheduler = types.SimpleNamespace(config={"sampler": "heun"}, timesteps=[])
        self.calls = []  # the arguments of every call
        self.value = 0.0  # of the sample
        self.at = lambda number: None  # called with the number of each picture before it is drawn

    def __call__(
        self, image, scale=4.0, *, height=None, width=None, generator, callback_on_step_end, progress, **options
    ):
        self.calls.append({"image": image, "scale": scale, "height": height, "width": width, **options})
        self.at(len(self.calls))
        size = (width, height) if height else (round(image.width * scale), round(image.height * scale))
        count = 2 * options["num_inference_steps"] - 1
        self.scheduler.timesteps = [0.0] * count
        for index in range(count):
            callback_on_step_end(self, index, None, {"sample": torch.full((1, 3, 2, 2), self.value)})
            progress(index + 1, count)
        profile = image.info.get("icc_profile") if image.mode != "CMYK" else None
        image = image.convert("RGB") if image.mode == "CMYK" else image
        large = np.asarray(image.resize(size), dtype=np.float32)
        noise = torch.rand(size[1], size[0], generator=generator).numpy() * 9
        pixels = (large * 0.9 + (noise if large.ndim == 2 else noise[..., None])).astype(np.uint8)
        result = Image.fromarray(pixels)
        result.info |= {"icc_profile": profile} if profile else {}
        return types.SimpleNamespace(images=[result])


def save_model(folder):
    for name, content in MODEL.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def pipe(monkeypatch):
    """A stand-in in place of every model that is loaded; `loaded` counts how often."""
    stand_in = StandIn()
    stand_in.loaded = 0

    def load(request, model):
        stand_in.loaded += 1
        return stand_in

    monkeypatch.setattr(command, "_load", load)
    return stand_in


@pytest.fixture
def upscale(capsys, tmp_path, monkeypatch, pipe):
    """Run the command in a folder of its own with the stand-in; returns (exit status, paths on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model")

    def run(*arguments):
        model_given = "--model" in arguments or "--from" in arguments
        words = [*arguments, *([] if model_given else ["--model", model]), "--device", "cpu"]
        status = cli.main(["upscale", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


def draw(path, size=(6, 4), seed=0, mode="RGB", **options):
    """A picture of noise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": None}[mode]
    shape = (size[1], size[0], *([channels] if channels else []))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode=None if mode != "CMYK" else "CMYK").save(path, **options)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


def tree(folder):
    """Every file below a folder, and its bytes."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record_of(path):
    return json.loads(Path(f"{path}.json").read_text())


def assert_only_pairs(folder):
    """Every picture is whole and has its own record; nothing else is there but records that wait for their pictures."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
            entry = record_of(path)["pictures"][0]
            assert entry["bytes"] == path.stat().st_size
            data = f"{picture.width}x{picture.height} ".encode() + picture.tobytes()
            assert entry["pixels_sha256"] == hashlib.sha256(data).hexdigest()
        elif path.is_file():
            assert path.name.startswith(files.PART) or json.loads(path.read_text())["format"] == FORMAT


# ------------------------------------------------------------------------------------------------ which pictures


def test_without_further_options_a_picture_is_four_times_as_large_in_a_folder_of_results(upscale, pipe):
    draw("cat.jpg", (6, 4))
    status, paths, err = upscale("cat.jpg")
    assert (status, paths) == (0, ["upscaled/cat_x4.png"]), err
    assert Image.open(paths[0]).size == (24, 16)
    assert pipe.calls[0]["num_inference_steps"] == 20 and pipe.calls[0]["start"] == "lr"
    assert "1 written" in err and "Traceback" not in err


def test_the_bundled_model_is_the_default(upscale, pipe, monkeypatch):
    monkeypatch.setattr(bundled, "names", lambda: ["tiny_infdit"])
    monkeypatch.setattr(bundled, "path", lambda name: Path("model"))
    draw("cat.png")
    assert cli.main(["upscale", "cat.png", "--device", "cpu"]) == 0
    record = record_of("upscaled/cat_x4.png")
    assert record["request"]["model"] == record["sources"]["model"]["name"] == "tiny_infdit"
    assert record["sources"]["model"]["kind"] == "bundled" and pipe.loaded == 1


@pytest.fixture
def photos():
    for name in (
        "b.png",
        "A.JPG",
        "c.webp",
        "deep/d.tif",
        "deep/er/e.bmp",
        ".hidden.png",
        ".git/f.png",
        "deep/._d.png",
    ):
        path = draw(Path("photos", name))
        assert path.is_file()
    Path("photos/notes.txt").write_text("no picture")


GIVEN = {
    "files": (["photos/c.webp", "photos/b.png"], ["c", "b"]),
    "folder": (["photos"], ["A", "b", "c"]),
    "recursive": (["photos", "--recursive"], ["A", "b", "c", "deep/d", "deep/er/e"]),
    "pattern": (["photos/*"], ["A", "b", "c", "d"]),
    "pattern of folders": (["photos/*/*.tif"], ["d"]),
    "deep pattern": (["photos/**"], ["A", "b", "c", "d", "e"]),
    "duplicates": (["photos/b.png", "./photos/b.png", "photos", "photos/../photos/*.png"], ["b", "A", "c"]),
    "list": (["@list.txt"], ["c", "A", "e"]),
    "list option": (["--list", "list.txt", "photos/b.png"], ["b", "c", "A", "e"]),
}


@pytest.mark.parametrize("given", GIVEN)
def test_files_folders_patterns_and_lists_each_picture_once_in_order(upscale, photos, given):
    text = "# a list\n\n  photos/c.webp  \nphotos/A.JPG\r\n#photos/b.png\nphotos/c.webp\nphotos/dee*/er\n"
    Path("list.txt").write_text(text, encoding="utf-8-sig")
    arguments, names = GIVEN[given]
    status, paths, err = upscale(*arguments, "--out", "out")
    assert status == 0, err
    assert paths == [f"out/{name}_x4.png" for name in names]


def test_a_list_comes_from_stdin_too(upscale, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("photos/b.png\n"))
    assert upscale("--list", "-")[1] == ["upscaled/b_x4.png"]


def test_a_file_that_is_named_itself_needs_no_extension_and_may_look_like_a_pattern(upscale):
    for name in ("cat[1].png", "@cat.png", "#cat.png"):
        draw(name)
    draw("cat.png").rename("cat")
    status, paths, err = upscale("cat[1].png", "./@cat.png", "#cat.png", "cat")
    assert status == 0, err
    assert paths == [f"upscaled/{name}_x4.png" for name in ("cat[1]", "@cat", "#cat", "cat")]


def test_a_name_that_is_no_text_goes_through_lists_records_and_stdout(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    name = b"caf\xe9.png"
    draw("cat.png").rename(os.fsdecode(name))
    Path("list.txt").write_bytes(name + b"\n")
    for paths, done in ((b"upscaled/caf\xe9_x4.png\n", "1 written"), (b"", "1 done before")):
        stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["upscale", "@list.txt", "--model", "model", "--device", "cpu"]) == 0
        assert stdout.buffer.getvalue() == paths and done in capsys.readouterr().err
    record = json.loads(Path(os.fsdecode(b"upscaled/caf\xe9_x4.png.json")).read_text())
    assert os.fsencode(record["request"]["image"]).endswith(name)


def test_results_in_the_folder_of_the_pictures_are_not_enlarged_by_the_next_run(upscale, pipe):
    draw("photos/cat.png"), draw("photos/dog.png")
    assert upscale("photos", "--out", "photos")[0] == 0
    shell = sorted(str(path) for path in Path("photos").glob("*.png"))
    assert len(shell) == 4
    for arguments in (shell, ["photos"], ["photos/*.png"]):
        status, paths, err = upscale(*arguments, "--out", "photos")
        assert (status, paths) == (0, []) and "2 done before" in err, err
        assert "2 of the pictures in photos were made by this command" in err
    assert upscale("photos/cat_x4.png", "--out", "photos")[0] == 2
    # Into another folder they are pictures like others.
    assert upscale("photos/cat_x4.png", "--out", "more")[1] == ["more/cat_x4_x4.png"]
    assert len(pipe.calls) == 3


# --------------------------------------------------------------------------------------------------------- names


def test_names_come_from_the_pictures_and_say_what_was_done(upscale):
    draw("cat.png", (8, 4))
    for options, name in (
        (["--scale", "2.5"], "cat_x2.5.png"),
        (["--size", "16x8"], "cat_16x8.png"),
        (["--width", "16"], "cat_16xauto.png"),
        (["--height", "16"], "cat_autox16.png"),
        (["--suffix", ".large", "--format", "webp"], "cat.large.webp"),
    ):
        status, paths, err = upscale("cat.png", *options)
        assert (status, paths) == (0, [f"upscaled/{name}"]), err


def test_the_same_name_in_two_folders_is_refused_and_kept_apart_on_request(upscale, pipe):
    draw("all/a/cat.png", seed=1), draw("all/b/cat.jpg", seed=2)
    status, paths, err = upscale("all/a/cat.png", "all/b/cat.jpg")
    assert (status, paths) == (2, []) and pipe.loaded == 0
    assert "'all/a/cat.png' and 'all/b/cat.jpg' would both become" in err and "--relative-to" in err
    both = ["upscaled/a/cat_x4.png", "upscaled/b/cat_x4.png"]
    assert upscale("all/a/cat.png", "all/b/cat.jpg", "--relative-to", "all")[1] == both
    status, paths, err = upscale("all", "--recursive")
    assert (status, paths) == (0, []) and "2 done before" in err
    status, _, err = upscale("all/a/cat.png", "--relative-to", "all/b")
    assert status == 2 and "is not inside that folder" in err


def test_pictures_of_a_folder_that_differ_in_their_extensions_keep_them(upscale):
    draw("in/cat.png", seed=1), draw("in/cat.JPG", seed=2), draw("in/dog.png", seed=3)
    names = ["upscaled/cat_jpg_x4.png", "upscaled/cat_png_x4.png", "upscaled/dog_x4.png"]
    assert upscale("in")[1] == names


def test_an_input_is_never_written_over(upscale, pipe):
    draw("in/cat.png"), draw("in/dog.png")
    before = tree("in")
    for options in ([], ["--overwrite"]):
        status, _, err = upscale("in", "--suffix", "", "--out", "in", *options)
        assert status == 2 and "which is an input" in err
    assert tree("in") == before and pipe.loaded == 0
    # Nor one under another name.
    Path("out").mkdir()
    Path("out/cat_x4.png").symlink_to(Path("in/cat.png").absolute())
    assert upscale("in/cat.png", "--out", "out", "--overwrite")[0] == 2


# ------------------------------------------------------------------------------------------------- what is asked for


OPTIONS = {
    ("--scale", "2.5"): {"scale": 2.5, "height": None, "width": None},
    ("--size", "24x16"): {"width": 24, "height": 16},
    ("--width", "13"): {"width": 13, "height": 9},
    ("--height", "9"): {"width": 14, "height": 9},
    ("--steps", "3"): {"num_inference_steps": 3},
    ("--start", "noise"): {"start": "noise"},
    ("--max-memory", "1.5GiB"): {"max_memory": "1.5GiB"},
    (): {"max_memory": "auto", "schedule": None, "scale": 4.0, "output_type": "pil"},
    ("--schedule", "streaming"): {"schedule": "streaming"},
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_option_reaches_the_pipeline(upscale, pipe, options):
    draw("cat.png", (6, 4))
    status, _, err = upscale("cat.png", *options)
    assert status == 0, err
    assert OPTIONS[options].items() <= pipe.calls[0].items()


def test_the_seed_alone_decides_over_the_noise_whatever_else_is_in_the_list(upscale):
    for name in ("a", "b", "c"):
        draw(f"{name}.png", seed=7)
    assert upscale("a.png", "b.png", "c.png", "--seed", "3")[0] == 0
    assert upscale("b.png", "--seed", "3", "--out", "alone")[0] == 0
    assert upscale("b.png", "--seed", "4", "--out", "other")[0] == 0
    assert np.array_equal(pixels("upscaled/b_x4.png"), pixels("alone/b_x4.png"))
    assert np.array_equal(pixels("upscaled/b_x4.png"), pixels("upscaled/c_x4.png"))
    assert not np.array_equal(pixels("upscaled/b_x4.png"), pixels("other/b_x4.png"))


SHAPES = {
    "smaller": ((6, 4), ["--width", "5"], "is larger (6x4) than the result would be (5x3)"),
    "one side smaller": ((6, 4), ["--size", "100x3"], "is larger (6x4)"),
    "distorted": ((600, 400), ["--size", "1200x900"], "has another shape (600x400) than --size 1200x900"),
    "jpg": ((2, 7000), ["--scale", "10", "--format", "jpg"], "at most 65500 pixels a side"),
    "webp": ((7000, 2), ["--format", "webp"], "at most 16383 pixels a side, 28000x8 is more: --format png"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_size_that_cannot_be_is_refused_for_that_picture_before_any_work(upscale, pipe, case):
    size, options, message = SHAPES[case]
    draw("cat.png", size)
    status, paths, err = upscale("cat.png", *options)
    assert (status, paths) == (1, []) and message in err
    assert pipe.calls == []


def test_a_shape_that_is_off_by_rounding_is_no_other_shape(upscale, pipe):
    draw("a.png", (1366, 768)), draw("b.png", (5, 3))
    assert upscale("a.png", "--size", "1920x1080")[0] == 0
    assert upscale("b.png", "--size", "16x9")[0] == 0


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_the_orientation_of_a_camera_is_applied(upscale, pipe, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw("cat.png", (6, 4), exif=exif)
    assert upscale("cat.png")[0] == 0
    expected = ImageOps.exif_transpose(Image.open("cat.png"))
    assert np.array_equal(np.asarray(pipe.calls[0]["image"]), np.asarray(expected))
    assert not np.array_equal(np.asarray(expected), pixels("cat.png"))
    result = Image.open("upscaled/cat_x4.png")
    assert result.size == tuple(4 * side for side in expected.size) and not result.getexif()


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_every_format_is_written_with_the_colour_profile_of_the_picture(upscale, kind):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    draw("cat.png", icc_profile=profile)
    status, paths, err = upscale("cat.png", "--format", kind)
    assert (status, paths) == (0, [f"upscaled/cat_x4.{kind}"]), err
    written = Image.open(paths[0])
    assert written.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
    assert written.info["icc_profile"] == profile


def test_a_profile_for_other_colours_is_left_out_with_a_warning(upscale):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"CMYK"
    draw("cat.jpg", mode="CMYK", icc_profile=bytes(profile))
    status, paths, err = upscale("cat.jpg")
    assert status == 0 and "colour profile was left out" in err
    assert "icc_profile" not in Image.open(paths[0]).info


def test_transparency_goes_into_png_and_webp_and_is_refused_for_jpg(upscale):
    draw("cat.png", mode="RGBA")
    for kind in ("png", "webp"):
        assert Image.open(upscale("cat.png", "--format", kind)[1][0]).mode == "RGBA"
    status, paths, err = upscale("cat.png", "--format", "jpg")
    assert (status, paths) == (1, []) and "transparency" in err and not Path("upscaled/cat_x4.jpg").exists()


def test_of_a_cameras_mpo_the_first_frame_is_the_picture(upscale):
    frames = [Image.open(draw(f"{n}.png", seed=n)) for n in (1, 2)]
    frames[0].save("cat.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert Image.open("cat.jpg").format == "MPO"
    status, paths, err = upscale("cat.jpg")
    assert (status, len(paths)) == (0, 1), err


# ------------------------------------------------------------------------------------------------------- bad files


def bad(name):
    """A file that cannot be enlarged; returns its path and what is said of it."""
    path = Path(name)
    if name == "text.png":
        path.write_text("no picture")
        return "is no picture"
    if name == "empty.png":
        path.write_bytes(b"")
        return "is no picture"
    if name == "cut.png":
        data = draw("whole.png", (40, 40)).read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return "cannot be read: "
    if name == "frames.webp":
        frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 255)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        return "has 2 frames"
    if name == "gone.png":
        path.symlink_to("nowhere.png")
        return "does not exist"
    if name == "listed.png":
        Path("list.txt").write_text("listd.png\nlisted.png\n")
        path = draw("listd.png")
        return "does not exist: did you mean 'listd.png'?"
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["text.png", "empty.png", "cut.png", "frames.webp", "gone.png", "listed.png"])
def test_one_bad_file_does_not_stop_the_rest(upscale, name):
    message = bad(name)
    draw("a.png"), draw("z.png")
    status, paths, err = upscale("a.png", "@list.txt" if name == "listed.png" else name, "z.png", "--quiet")
    assert status == 1
    assert {"upscaled/a_x4.png", "upscaled/z_x4.png"} <= set(paths)
    (line,) = err.splitlines()
    assert line.startswith(f"linattn upscale: {name}: ") and message in line
    assert_only_pairs("upscaled")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("image: expected 3 channels, got 7"), "b.png: image: expected 3 channels, got 7"),
        (MemoryError("no more"), "b.png: out of memory; --max-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "b.png: out of memory; --max-memory"),
        (KeyError("x"), "b.png: KeyError: 'x'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_pipeline_refuses_does_not_stop_the_rest(upscale, pipe, error, message):
    for name in "abc":
        draw(f"{name}.png")

    def fail(number):
        if number == 2:
            raise error

    pipe.at = fail
    status, paths, err = upscale("a.png", "b.png", "c.png")
    assert status == 1 and paths == ["upscaled/a_x4.png", "upscaled/c_x4.png"]
    assert f"linattn upscale: {message}" in err and "2 written, 1 failed" in err
    pipe.at = lambda number: None
    status, paths, err = upscale("a.png", "b.png", "c.png")
    assert (status, paths) == (0, ["upscaled/b_x4.png"]) and "1 written, 2 done before" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_no_picture_is_a_failure(upscale, pipe, value):
    draw("cat.png")
    pipe.value = value
    status, paths, err = upscale("cat.png")
    assert (status, paths) == (1, []) and "not finite in float32" in err and not Path("upscaled").exists()


def test_a_disk_that_is_full_stops_the_list_since_every_other_result_would_be_lost_too(upscale, pipe, monkeypatch):
    for name in "abc":
        draw(f"{name}.png")

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    status, paths, err = upscale("a.png", "b.png", "c.png")
    assert (status, paths, len(pipe.calls)) == (1, [], 1)
    assert "cannot write upscaled/a_x4.png" in err and "No space left" in err
    assert tree("upscaled") == {}


# ------------------------------------------------------------------------------------------- what is there already


def test_a_second_run_does_only_what_is_missing(upscale, pipe):
    for name in "abc":
        draw(f"{name}.png", seed=ord(name))
    assert upscale("a.png", "c.png")[0] == 0
    before = tree("upscaled")
    status, paths, err = upscale("a.png", "b.png", "c.png")
    assert (status, paths) == (0, ["upscaled/b_x4.png"]) and "1 written, 2 done before" in err
    assert before.items() <= tree("upscaled").items()
    assert pipe.loaded == 2
    status, paths, err = upscale("a.png", "b.png", "c.png", "--overwrite")
    assert (status, paths, pipe.loaded) == (0, [], 2), "a model was loaded although nothing was to do"


CHANGES = {
    "scale": ["--suffix", "_x4", "--scale", "2"],
    "width": ["--suffix", "_x4", "--width", "24"],
    "height": ["--suffix", "_x4", "--height", "16"],
    "steps": ["--steps", "30"],
    "sampler": ["--sampler", "ddim"],
    "start": ["--start", "noise"],
    "seed": ["--seed", "1"],
    "dtype": ["--dtype", "bfloat16"],
}


@pytest.mark.parametrize("name", DECISIVE)
def test_a_result_of_other_settings_is_refused_by_name_and_replaced_on_request(upscale, name):
    draw("cat.png")
    assert upscale("cat.png")[0] == 0
    before = tree("upscaled")
    status, paths, err = upscale("cat.png", *CHANGES[name])
    assert (status, paths) == (1, [])
    assert (
        "upscaled/cat_x4.png exists, made with other settings" in err and f"--{name} " in err and "--overwrite" in err
    )
    assert tree("upscaled") == before
    assert upscale("cat.png", *CHANGES[name], "--overwrite")[1] == ["upscaled/cat_x4.png"]
    assert tree("upscaled") != before
    assert_only_pairs("upscaled")
    assert upscale("cat.png", *CHANGES[name])[:2] == (0, [])


@pytest.mark.parametrize("options", [("--schedule", "streaming"), ("--max-memory", "1GiB"), ("--quiet",)])
def test_what_changes_no_more_than_the_last_bits_is_no_other_setting(upscale, options):
    draw("cat.png")
    assert upscale("cat.png")[0] == 0
    assert upscale("cat.png", *options)[:2] == (0, [])


def test_results_follow_the_picture_and_the_model_not_their_places(upscale, tmp_path):
    draw("cat.png", seed=1)
    assert upscale("cat.png")[0] == 0
    os.utime("cat.png", (1, 1))
    assert upscale("cat.png")[:2] == (0, []), "the same picture, copied"
    shutil.move("cat.png", draw("moved/cat.png"))
    shutil.copytree("model", "copied")
    assert upscale("moved/cat.png", "--model", "copied")[:2] == (0, []), "the same picture and model elsewhere"
    draw("moved/cat.png", seed=2)
    status, _, err = upscale("moved/cat.png")
    assert status == 1 and "made from another picture" in err
    shutil.copy("moved/cat.png", "cat.png")
    draw("moved/cat.png", seed=1)
    Path("copied/transformer/diffusion_pytorch_model.safetensors").write_text("other weights")
    status, _, err = upscale("moved/cat.png", "--model", "copied")
    assert status == 1 and "made with other model files" in err


def in_the_way(what):
    """Put something where the result of cat.png goes."""
    picture, record = Path("upscaled/cat_x4.png"), Path("upscaled/cat_x4.png.json")
    if what == "a picture of somebody":
        record.unlink()
        draw(picture)
    elif what == "an edited result":
        draw(picture, (24, 16), seed=9)
    elif what == "a damaged record":
        record.write_text(json.dumps({"format": FORMAT}))
    elif what == "another format":
        record.write_text(record.read_text().replace(FORMAT, "linattn upscale 99"))
    elif what == "a json of somebody":
        record.write_text('{"caption": "a cat"}')
    elif what == "only a json of somebody":
        picture.unlink()
        record.write_text('{"caption": "a cat"}')
    elif what == "a folder":
        picture.unlink()
        picture.mkdir()


IN_THE_WAY = {
    "a picture of somebody": "exists and nothing says how it was made",
    "an edited result": "was changed since it was made",
    "a damaged record": "its record is damaged",
    "another format": "another format of records (linattn upscale 99)",
    "a json of somebody": "no record of linattn upscale",
    "only a json of somebody": "no record of linattn upscale",
    "a folder": "upscaled/cat_x4.png is a folder",
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_nothing_is_written_over_silently(upscale, pipe, what):
    draw("cat.png", (6, 4)), draw("dog.png")
    assert upscale("cat.png")[0] == 0
    in_the_way(what)
    before = tree("upscaled")
    status, paths, err = upscale("cat.png", "dog.png")
    assert (status, paths) == (1, ["upscaled/dog_x4.png"]), "and the rest is done"
    assert IN_THE_WAY[what] in err
    assert before.items() <= tree("upscaled").items()
    status, paths, _ = upscale("cat.png", "--overwrite")
    if "json" in what or what == "a folder":
        assert status == 1 and before.items() <= tree("upscaled").items(), "not even then: it is no result"
    else:
        assert (status, paths) == (0, ["upscaled/cat_x4.png"])
        assert_only_pairs("upscaled")


def test_a_result_that_another_process_wrote_meanwhile_is_not_made_again_nor_written_over(upscale, pipe):
    draw("a.png"), draw("b.png")
    model = ["--model", "model", "--device", "cpu"]

    def meanwhile(number):
        if number == 1:  # while the first is drawn, another process does the second
            assert cli.main(["upscale", "b.png", *model]) == 0

    pipe.at = meanwhile
    status, _, err = upscale("a.png", "b.png")
    assert status == 0 and len(pipe.calls) == 2 and "1 written, 1 done before" in err

    pipe.at = lambda number: draw("upscaled/c_x4.png", seed=5)
    draw("c.png")
    status, paths, err = upscale("c.png")
    assert (status, paths) == (1, []) and "has appeared meanwhile" in err
    assert np.array_equal(pixels("upscaled/c_x4.png"), pixels(draw("same.png", seed=5)))


# ----------------------------------------------------------------------------------------------- whole or not at all

STEPS = ("open", "fsync", "unlink", "replace")


@pytest.mark.parametrize("overwriting", [False, True], ids=["new", "overwriting"])
def test_a_kill_at_any_step_of_writing_leaves_nothing_or_a_pair(tmp_path, overwriting):
    old, new = b"old picture", b"new picture"
    record = {"format": FORMAT, "pictures": [{"bytes": len(new)}], "is": "new"}

    def write_until(step, folder):
        """Write in a process that is killed before its `step`th change of the disk; whether it came to its end."""
        child = os.fork()
        if child == 0:  # nothing of the test's own process may run on here
            count = 0

            def killing(function):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            try:
                for name in STEPS[1:]:
                    setattr(os, name, killing(getattr(os, name)))
                files.open = killing(open)
                files.write_pair(folder / "a.png", new, record)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    finished = [False]
    seen = set()
    while not finished[-1]:
        folder = tmp_path / str(len(finished))
        folder.mkdir()
        if overwriting:
            files.write_pair(folder / "a.png", old, record | {"is": "old"})
        finished.append(write_until(len(finished), folder))
        found = files.read(folder / "a.png.json")
        state = (folder / "a.png").read_bytes() if (folder / "a.png").exists() else None, found and found["is"]
        seen.add(state)
        assert state[0] is None or state in {(old, "old"), (new, "new")}, f"step {len(finished) - 1}: {state}"
        # And whatever it was, the next run makes it whole.
        files.write_pair(folder / "a.png", new, record)
        assert (folder / "a.png").read_bytes() == new and files.read(folder / "a.png.json")["is"] == "new"
    assert len(finished) > 6 and (new, "new") in seen and ((None, "new") in seen)
    assert sorted(tree(folder)) == ["a.png", "a.png.json"], "no parts are left where nothing was killed"


PROCESS = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell of the tests has done to it
    sys.path[:0] = {paths!r}
    from test_upscale import StandIn
    from linattn import cli
    from linattn.cli import upscale as command
    def at(number):
        if number == 4:
            print("drawing the fourth", file=sys.stderr, flush=True)
            time.sleep(600)
    def load(request, model):
        pipe = StandIn()
        pipe.at = at
        return pipe
    command._load = load
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_list_leaves_whole_results_and_goes_on(upscale, number):
    for n in range(6):
        draw(f"in/{n}.png", (60, 40), seed=n)
    script = textwrap.dedent(PROCESS).format(paths=[str(Path(__file__).parent)])
    words = [sys.executable, "-c", script, "upscale", "in", "--model", "model", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert any(line.startswith("drawing the fourth") for line in running.stderr)
            running.send_signal(number)
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert out.splitlines() == [f"upscaled/{n}_x4.png" for n in range(3)]
    stopped = tree("upscaled")
    assert sorted(stopped) == sorted(f"{n}_x4.png{more}" for n in range(3) for more in ("", ".json"))
    assert_only_pairs("upscaled")
    if number == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
    else:
        assert running.returncode == 130 and "Traceback" not in err
        assert "3 written" in err and "stopped with 3 to do; the same command goes on from there" in err
    status, paths, err = upscale("in")
    assert (status, paths) == (0, [f"upscaled/{n}_x4.png" for n in range(3, 6)]) and "3 done before" in err
    assert stopped.items() <= tree("upscaled").items()


def test_a_signal_that_comes_while_a_pair_is_written_waits_for_its_end(upscale, pipe, monkeypatch):
    draw("a.png"), draw("b.png")
    replace, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        return replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    status, paths, err = upscale("a.png", "b.png")
    assert (status, paths, len(calls)) == (130, ["upscaled/a_x4.png"], 2)
    assert sorted(tree("upscaled")) == ["a_x4.png", "a_x4.png.json"]
    assert "1 written" in err and "stopped with 1 to do" in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_crashed_machine_left_is_removed_and_what_is_being_written_is_not(upscale):
    draw("cat.png")
    old, new = (Path("upscaled", f"{files.PART}{name}.part") for name in ("old", "new"))
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * files.STALE,) * 2)
    assert upscale("cat.png")[0] == 0
    assert not old.exists() and new.exists()


def test_results_have_the_permissions_that_files_have_here(upscale):
    draw("cat.png")
    before = os.umask(0o027)
    try:
        assert upscale("cat.png")[0] == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in Path("upscaled").iterdir()} == {0o640}


# -------------------------------------------------------------------------------------------------------- the record


def test_a_record_says_everything_that_made_the_picture(upscale):
    draw("cat.png", (6, 4))
    assert upscale("cat.png", "--steps", "3", "--seed", "5")[0] == 0
    record = record_of("upscaled/cat_x4.png")
    assert record["format"] == FORMAT
    request = record["request"]
    assert request["image"] == os.path.abspath("cat.png") and request["model"] == os.path.abspath("model")
    assert (request["steps"], request["seed"], request["sampler"], request["scale"]) == (3, 5, "heun", 4.0)
    assert (request["device"], request["dtype"]) == ("cpu", "float32")
    digest = hashlib.sha256(Path("cat.png").read_bytes()).hexdigest()
    assert record["sources"]["image"]["sha256"] == digest
    names = {name for name in MODEL if name.endswith((".json", ".safetensors"))}
    assert set(record["sources"]["model"]["files"]) == names
    assert record["backend"] == "cpu" and record["machine"]["threads"] == 1 and record["versions"]["torch"]
    (entry,) = record["pictures"]
    assert (entry["width"], entry["height"], entry["calls"]) == (24, 16, 5)


@pytest.fixture
def recorded(upscale):
    draw("in/cat.png", seed=1)
    assert upscale("in/cat.png", "--scale", "2.5", "--seed", "3", "--start", "noise", "--suffix", "+")[0] == 0
    return Path("upscaled/cat+.png.json")


def test_a_record_makes_the_same_picture_again(upscale, pipe, recorded):
    status, paths, err = upscale("--from", recorded, "--out", "again")
    assert (status, paths) == (0, ["again/cat+.png"]), err
    assert "the same pixels as recorded" in err
    assert Path(paths[0]).read_bytes() == Path("upscaled/cat+.png").read_bytes()
    first, second = (dict(call, image=np.asarray(call["image"]).tolist()) for call in pipe.calls)
    assert first == second
    # And what was moved is found where it is now.
    shutil.move("in", "there"), shutil.move("model", "elsewhere")
    status, _, err = upscale("--from", recorded, "there/cat.png", "--model", "elsewhere", "--out", "third")
    assert status == 0 and "the same pixels as recorded" in err


def test_other_pixels_than_recorded_are_said(upscale, recorded):
    record = json.loads(recorded.read_text())
    record["pictures"][0]["pixels_sha256"] = "0" * 64
    record["versions"]["torch"] = "1.0"
    recorded.write_text(json.dumps(record))
    status, _, err = upscale("--from", recorded, "--out", "again", "--quiet")
    assert status == 0 and "warning: not the same pixels as recorded: cat+.png" in err and "torch 1.0 then" in err


FROM = {
    "where the result lies": ([], 1, "upscaled/cat+.png exists"),
    "other settings": (["--steps", "3", "--suffix", "x"], 2, "--steps, --suffix cannot be given with it"),
    "two pictures": (["in/cat.png", "in/cat.png"], 2, "at most one IMAGE"),
    "another picture": (["other.png", "--out", "new"], 1, "image is not what the picture was drawn with"),
    "another model": (["--model", "other", "--out", "new"], 1, "model is not what the picture was drawn with"),
    "no such picture": (["nothing.png", "--out", "new"], 2, "give it as IMAGE"),
    "over the picture": (["--out", "over"], 2, "would overwrite the picture"),
}


@pytest.mark.parametrize("case", FROM)
def test_what_cannot_give_the_recorded_picture_is_refused_before_any_work(upscale, pipe, recorded, case):
    arguments, expected, message = FROM[case]
    draw("other.png", seed=2)
    shutil.copytree("model", "other")
    Path("other/transformer/config.json").write_text("{}")
    Path("over").mkdir()
    Path("over/cat+.png").symlink_to(Path("in/cat.png").absolute())
    before = tree(".")
    status, paths, err = upscale("--from", recorded, *arguments)
    assert (status, paths) == (expected, []) and message in err, err
    assert tree(".") == before and len(pipe.calls) == 1


@pytest.mark.parametrize(
    "key", ["request", "sources", "versions", "machine", "pictures", "request.seed", "request.image"]
)
def test_a_damaged_record_is_named(upscale, recorded, key):
    record = json.loads(recorded.read_text())
    top, _, name = key.partition(".")
    if name:
        record[top][name] = None
    else:
        del record[top]
    recorded.write_text(json.dumps(record))
    status, _, err = upscale("--from", recorded, "--out", "again")
    assert status == 2 and "is damaged" in err and top in err


# ------------------------------------------------------------------------------------------------------ what it says


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_has_the_time_left_over_all_pictures(upscale, monkeypatch):
    draw("a.png", (600, 400)), draw("b.png", (6, 4))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_upscale_progress.tqdm, "mininterval", 0, raising=False)
    status, paths, _ = upscale("a.png", "b.png", "--steps", "2")
    assert (status, len(paths)) == (0, 2)
    shown = terminal.getvalue()
    assert "1/2 a.png:  " in shown and "2/2 b.png" in shown and "/3.84Mpx" in shown and "<" in shown
    assert "in 0." not in shown, "no lines besides the bar"


def test_lines_where_there_is_no_terminal_and_the_time_left(upscale, pipe, monkeypatch):
    draw("a.png"), draw("b.png")
    monkeypatch.setattr(_upscale_progress, "INTERVAL", -1.0)
    status, _, err = upscale("a.png", "b.png", "--steps", "2")
    assert status == 0 and "\r" not in err
    assert "1/2 a.png: 33%, 00:00 left" in err
    assert "1/2 a.png: 24x16 in " in err and "2/2 b.png: 24x16 in " in err


def test_the_time_left_is_in_proportion_to_the_pixels(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(_upscale_progress.time, "monotonic", lambda: clock[0])
    with _upscale_progress.Progress([100, 500, 400], quiet=False) as progress:
        progress.start("a.png")
        clock[0] += 10
        progress.finish("a_x4.png", "done")
        progress.start("b.png")
        progress.skip("bad")
        progress.start("c.png")
        clock[0] += 61
        progress.advance(1, 4)
    captured = capsys.readouterr()
    assert captured.out == "a_x4.png\n"
    assert captured.err.splitlines() == [
        "1/3 a.png: done, 01:30 left",  # 9 of 10 parts
        "2/3 b.png: bad",
        "3/3 c.png: 25%, 01:46 left",  # 3 of 5, the bad ones do not count: 71 s / 2 * 3
    ]


def test_quiet_says_only_what_went_wrong(upscale):
    draw("a.png")
    status, paths, err = upscale("a.png", "--quiet")
    assert (status, paths, err) == (0, ["upscaled/a_x4.png"], "")
    Path("b.png").write_text("no picture")
    status, paths, err = upscale("a.png", "b.png", "--quiet")
    assert (status, paths, err) == (1, [], "linattn upscale: b.png: is no picture that Pillow can read\n")


def test_the_help_explains_every_option_and_its_examples_are_valid(capsys):
    parser = cli.build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["upscale", "--help"])
    text = capsys.readouterr().out
    examples = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("  linattn upscale")]
    assert len(examples) >= 4
    for line in examples:
        args = parser.parse_args(shlex.split(line)[1:])
        if args.from_record is None:
            command._upscale_request.check_values(command._upscale_request.from_arguments(args))
    subparser = next(a for a in parser._actions if a.dest == "command").choices["upscale"]
    assert all(action.help for action in subparser._actions)
    fields = {field.name for field in dataclasses.fields(command.Request)}
    assert set(DECISIVE) | {"model", "image", "device", "max_memory", "schedule", "format"} == fields


# ---------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "nothing": ((), ["which pictures?"]),
    "an empty name": (("",), ["an empty one"]),
    "no such file": (("cta.png",), ["'cta.png' does not exist", "did you mean 'cat.png'"]),
    "no such folder": (("in/there/x.png",), ["'in/there' does not exist"]),
    "no match": (("*.tiff",), ["no file matches '*.tiff'"]),
    "no pictures": (("empty",), ["no pictures", ".png", "'empty'"]),
    "deeper": (("in",), ["no pictures", "--recursive"]),
    "empty list": (("@empty.txt",), ["which pictures?"]),
    "no list": (("@lst.txt",), ["--list: cannot read 'lst.txt'"]),
    "list is no text": (("@cat.png",), ["'cat.png' is no text file"]),
    "scale": (("cat.png", "--scale", "0.5"), ["--scale", "got 0.5"]),
    "scale nan": (("cat.png", "--scale", "nan"), ["--scale", "got nan"]),
    "scale inf": (("cat.png", "--scale", "inf"), ["--scale", "got inf"]),
    "size": (("cat.png", "--size", "big"), ["--size", "WIDTHxHEIGHT", "'big'"]),
    "size zero": (("cat.png", "--size", "0x9"), ["--width: expected 1 or more, got 0"]),
    "size and width": (("cat.png", "--size", "9x9", "--width", "9"), ["--size", "--width"]),
    "size and scale": (("cat.png", "--size", "9x9", "--scale", "2"), ["--scale", "one of them"]),
    "height": (("cat.png", "--height", "-1"), ["--height", "got -1"]),
    "steps": (("cat.png", "--steps", "0"), ["--steps", "got 0"]),
    "seed": (("cat.png", "--seed", "-1"), ["--seed", "got -1"]),
    "huge seed": (("cat.png", "--seed", str(2**63)), ["--seed", "2^63"]),
    "memory without unit": (("cat.png", "--max-memory", "4"), ["--max-memory", "12GiB", "'4'"]),
    "suffix": (("cat.png", "--suffix", "../x"), ["--suffix", "'../x'"]),
    "out is a file": (("cat.png", "--out", "empty.txt"), ["--out", "is a file"]),
    "out inside a file": (("cat.png", "--out", "empty.txt/x"), ["--out", "is a file"]),
    "no model": (("cat.png", "--model", "nothing"), ["--model", "'nothing' does not exist"]),
    "a checkpoint": (("cat.png", "--model", "empty.txt"), ["--model", "is a file", "convert_infdit_checkpoint"]),
    "no record": (("--from", "nothing.json"), ["--from", "does not exist"]),
    "another json": (("--from", "model/model_index.json"), ["--from", "no record of linattn upscale"]),
    "no json": (("--from", "cat.png"), ["--from: cannot read"]),
}


@pytest.fixture
def somewhere(upscale):
    """A folder with a picture, one deeper, and things that are none."""
    draw("cat.png"), draw("in/deep/er.png")
    Path("empty").mkdir()
    Path("empty.txt").write_text("# nothing\n")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_status_2_and_costs_nothing(upscale, somewhere, pipe, mistake):
    arguments, parts = MISTAKES[mistake]
    before = tree(".")
    status, paths, err = upscale(*arguments)
    assert (status, paths, pipe.loaded) == (2, [], 0), err
    assert err.startswith("linattn upscale: ") and len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert tree(".") == before


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no index", ["no diffusers pipeline"]),
        ("another class", ["a StableDiffusionPipeline", "InfDiTUpscalePipeline"]),
        ("no scheduler", ["incomplete", "scheduler"]),
        ("pickled", ["no weights as safetensors", "transformer", "diffusion_pytorch_model.bin"]),
        ("read-only out", ["cannot write into"]),
        ("float16", ["--dtype float16"]),
    ],
)
def test_a_model_that_cannot_enlarge_is_refused_before_its_weights_are_read(upscale, somewhere, pipe, what, parts):
    options = ()
    if what == "no index":
        Path("model/model_index.json").unlink()
    elif what == "another class":
        Path("model/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    elif what == "no scheduler":
        shutil.rmtree("model/scheduler")
    elif what == "pickled":
        weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
        weights.rename(weights.with_suffix(".bin"))
    elif what == "read-only out":
        options = ("--out", "/proc/x")
    else:
        options = ("--dtype", "float16")
    status, paths, err = upscale("cat.png", *options)
    assert (status, paths, pipe.loaded) == (1, [], 0) and len(err.splitlines()) == 1, err
    for part in parts:
        assert part in err


# -------------------------------------------------------------------------------------------------------- the hub


def test_a_model_of_the_hub_that_is_not_in_the_cache_is_said_offline(upscale, somewhere, pipe):
    status, paths, err = upscale("cat.png", "--model", "nobody/nothing")
    assert (status, paths, pipe.loaded) == (1, [], 0) and len(err.splitlines()) == 1
    assert "--model: 'nobody/nothing' is no folder here" in err and "HF_HUB_OFFLINE" in err


def test_a_model_of_the_hub_is_used_from_the_cache_at_its_revision(upscale, tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    top, revision = tmp_path / "hub/models--somebody--infdit", "5" * 40
    save_model(top / "snapshots" / revision)
    (top / "refs").mkdir()
    (top / "refs/main").write_text(revision)
    draw("cat.png")
    status, paths, err = upscale("cat.png", "--model", "somebody/infdit")
    assert status == 0, err
    source = record_of(paths[0])["sources"]["model"]
    assert (source["kind"], source["name"], source["revision"]) == ("hub", "somebody/infdit", revision)
    # A record is made again from its own revision, whatever is the newest today.
    shutil.copytree(top / "snapshots" / revision, top / "snapshots" / ("6" * 40))
    (top / "snapshots" / ("6" * 40) / "transformer/config.json").write_text("{}")
    (top / "refs/main").write_text("6" * 40)
    status, _, err = upscale("--from", "upscaled/cat_x4.png.json", "--out", "again")
    assert status == 0 and "the same pixels as recorded" in err, err


# ----------------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def infdit(tmp_path_factory):
    """A pipeline with a random network of blocks of 16 pixels, and its folder."""
    network = adapters.InfDiTTransformer2DModel(
        hidden_size=32, num_layers=2, num_attention_heads=2, patch_size=4, block_size=4, vector_dim=0
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp("infdit")
    adapters.InfDiTUpscalePipeline(network, schedulers.EDMScheduler()).save_pretrained(folder)
    # Loaded as the command does: weights lie otherwise in memory then, and the last bits of products depend on that.
    pipe = adapters.InfDiTUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture
def real(capsys, tmp_path, monkeypatch, infdit):
    """Run the command with the random network; returns (exit status, paths on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=infdit[1]):
        model = [] if "--from" in arguments else ["--model", model, "--steps", 3]
        status = cli.main(["upscale", *map(str, [*arguments, *model, "--device", "cpu"])])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


def in_python(infdit, path, sampler="heun", seed=0, **options):
    pipe, _ = infdit
    scheduler, pipe.scheduler = pipe.scheduler, schedulers.EDMScheduler(sampler=sampler)
    generator = torch.Generator().manual_seed(seed)
    try:
        return pipe(Image.open(path), num_inference_steps=3, generator=generator, **options).images[0]
    finally:
        pipe.scheduler = scheduler


IN_PYTHON = {
    "plain": ([], {}),
    "scale": (["--scale", "2.5"], {"scale": 2.5}),
    "width": (["--width", "50"], {"width": 50}),
    "seed": (["--seed", "5"], {"seed": 5}),
    "noise": (["--start", "noise"], {"start": "noise"}),
    "ddim": (["--sampler", "ddim"], {"sampler": "ddim"}),
    "dpmsolver++": (["--sampler", "dpmsolver++"], {"sampler": "dpmsolver++"}),
}


@pytest.mark.parametrize("case", IN_PYTHON)
def test_the_picture_is_what_the_same_calls_in_python_give(real, infdit, case):
    arguments, options = IN_PYTHON[case]
    draw("cat.png", (18, 11))
    status, paths, err = real("cat.png", *arguments, "--out", "out")
    assert status == 0, err
    assert np.array_equal(pixels(paths[0]), np.asarray(in_python(infdit, "cat.png", **options)))
    assert case == "plain" or not np.array_equal(pixels(paths[0]), np.asarray(in_python(infdit, "cat.png")))
    record = record_of(paths[0])
    assert record["pictures"][0]["calls"] == (3 if options.get("sampler", "heun") != "heun" else 5)
    assert record["scheduler"]["config"]["sampler"] == record["request"]["sampler"] == options.get("sampler", "heun")
    assert [line.partition(":")[0] for line in err.splitlines()][1:] == ["1/1 cat.png", "1 written"], "no other remarks"


@pytest.mark.parametrize("options", [("--schedule", "streaming"), ("--max-memory", "1.1M")], ids=" ".join)
def test_less_memory_gives_the_same_picture_within_rounding(real, monkeypatch, options):
    from linattn.adapters.infdit import streaming

    plan, plans = streaming.plan, []
    monkeypatch.setattr(streaming, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    draw("cat.png", (30, 40))
    _, (whole,), _ = real("cat.png")
    status, (strips,), err = real("cat.png", *options, "--out", "strips")
    assert status == 0, err
    assert abs(pixels(whole).astype(int) - pixels(strips)).max() <= 1
    assert plans[0].schedule == "full" and plans[-1].schedule != "full"
    if "streaming" in options:
        assert plans[-1].schedule == "streaming"


def test_memory_that_is_too_little_is_said_with_what_is_needed(real):
    draw("cat.png", (30, 40))
    status, paths, err = real("cat.png", "--max-memory", "1K")
    assert (status, paths) == (1, []) and "cat.png: max_memory: expected at least" in err


KINDS = {"L": "L", "LA": "LA", "RGBA": "RGBA", "P": "RGB", "I;16": "L", "CMYK": "RGB", "1": "L"}


@pytest.mark.parametrize("mode", KINDS)
def test_every_kind_of_picture_goes_through(real, infdit, mode):
    picture = Image.open(draw("rgb.png", (9, 7)))
    if mode == "I;16":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (7, 9), dtype=np.uint16))
    else:
        picture = picture.convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    name = "in.tif" if mode == "CMYK" else "in.png"
    picture.save(name)
    assert Image.open(name).mode == mode
    status, paths, err = real(name)
    assert status == 0, err
    assert Image.open(paths[0]).mode == KINDS[mode]
    assert np.array_equal(pixels(paths[0]), np.asarray(in_python(infdit, name)))


def test_a_profile_goes_through_the_pipeline_and_that_of_inks_does_not(real):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    draw("rgb.png", icc_profile=profile)
    draw("inks.jpg", mode="CMYK", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    status, paths, err = real("rgb.png", "inks.jpg")
    assert status == 0 and err.count("colour profile was left out") == 1
    assert [Image.open(path).info.get("icc_profile") for path in paths] == [profile, None]


def test_a_record_makes_the_same_bits_again(real):
    draw("cat.png", (18, 11))
    assert real("cat.png", "--seed", "7", "--sampler", "ddim", "--scale", "3")[0] == 0
    status, paths, err = real("--from", "upscaled/cat_x3.png.json", "--out", "again")
    assert status == 0 and "the same pixels as recorded" in err, err
    assert Path(paths[0]).read_bytes() == Path("upscaled/cat_x3.png").read_bytes()


def test_bfloat16_enlarges_on_a_cpu(real):
    draw("cat.png", (9, 7))
    _, (wide,), _ = real("cat.png")
    status, (narrow,), err = real("cat.png", "--dtype", "bfloat16", "--out", "narrow")
    assert status == 0, err
    assert record_of(narrow)["request"]["dtype"] == "bfloat16"
    assert not np.array_equal(pixels(wide), pixels(narrow))


def test_the_sampler_is_the_models_own_unless_another_is_asked_for(real, infdit):
    draw("cat.png", (9, 7))
    shutil.copytree(infdit[1], "ddim")
    schedulers.EDMScheduler(sampler="ddim", eta=0.3).save_pretrained("ddim/scheduler")
    assert real("cat.png", model="./ddim")[0] == 0
    record = record_of("upscaled/cat_x4.png")
    assert record["request"]["sampler"] == record["scheduler"]["config"]["sampler"] == "ddim"
    assert real("cat.png", "--sampler", "heun", "--out", "heun", model="./ddim")[0] == 0
    assert np.array_equal(pixels("heun/cat_x4.png"), np.asarray(in_python(infdit, "cat.png")))


@pytest.mark.parametrize("what", ["cut weights", "other weights", "another scheduler"])
def test_a_model_that_cannot_be_loaded_is_one_line(real, infdit, what):
    draw("cat.png")
    shutil.copytree(infdit[1], "broken")
    weights = Path("broken/transformer/diffusion_pytorch_model.safetensors")
    if what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "other weights":
        config = json.loads(Path("broken/transformer/config.json").read_text())
        Path("broken/transformer/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    else:
        index = json.loads(Path("broken/model_index.json").read_text())
        index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
        Path("broken/model_index.json").write_text(json.dumps(index))
    status, paths, err = real("cat.png", model="broken")
    assert (status, paths) == (1, []) and not Path("upscaled").exists()
    assert err.startswith("linattn upscale: --model: cannot load ") and len(err.splitlines()) == 1


def test_the_example_enlarges_as_the_pipeline_does(infdit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw("cat.png", (9, 7))
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "infdit_upscale.py"))["main"]
    main(["cat.png", "--model", str(infdit[1]), "--scale", "3", "--steps", "3", "--seed", "2", "--out", "large.png"])
    assert "wrote large.png, 27 x 21 pixels" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert np.array_equal(pixels("large.png"), np.asarray(in_python(infdit, "cat.png", scale=3, seed=2)))


def test_steps_are_those_that_the_models_card_was_scored_with(tmp_path):
    from linattn import bundled
    from linattn.cli._models import steps_of

    source = types.SimpleNamespace(path=tmp_path)
    assert steps_of(source) == 20
    (tmp_path / "card.json").write_text('{"scores": {"steps": [4, 8]}}')
    assert steps_of(source) == 4
    assert steps_of(types.SimpleNamespace(path=bundled.path("tiny_infdit"))) == 2
