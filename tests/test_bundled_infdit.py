"""The bundled Inf-DiT: the photographs and their split, how enlargements are scored, what the model is worth."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("PIL")

from PIL import Image
from safetensors import safe_open
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from linattn import bundled
from linattn.adapters import InfDiTUpscalePipeline
from linattn.bundled import photographs

MODEL = "tiny_infdit"
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
CROPS = {"chelsea": (136, 80, 328, 208), "china": (192, 64, 384, 192)}  # left, top, right, bottom


def card() -> dict:
    return json.loads((bundled.path(MODEL) / "card.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    pipe = InfDiTUpscalePipeline.from_pretrained(bundled.path(MODEL), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def script(monkeypatch):
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("the training scripts need transformers 5")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the script sets it for itself; here it is taken back afterwards
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "tiny_training", raising=False)
    spec = importlib.util.spec_from_file_location("train_tiny_infdit", EXAMPLES / "train_tiny_infdit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class TestPhotographs:
    def test_are_colour_pictures_of_eight_bits_that_cannot_be_changed(self):
        for name in photographs.SOURCES:
            pixels = photographs.load(name)
            assert (
                pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape[:2]) >= 300
            )
            with pytest.raises(ValueError, match="read-only"):
                pixels[0, 0, 0] = 0

    def test_are_split_without_overlap(self):
        assert not set(photographs.HELD_OUT) & set(photographs.TRAINING)
        assert {*photographs.HELD_OUT, *photographs.TRAINING} == set(photographs.SOURCES)

    def test_no_training_photograph_looks_like_a_held_out_one(self):
        """The middle of one against every part of the others, small and grey: a copy would be found by correlation."""

        def grey(name: str) -> np.ndarray:
            picture = Image.fromarray(photographs.load(name)).convert("L")
            return np.asarray(picture.resize((64, 64 * picture.height // picture.width)), float)

        def best_match(scene: np.ndarray, part: np.ndarray) -> float:
            windows = np.lib.stride_tricks.sliding_window_view(scene, part.shape).reshape(-1, part.size)
            windows = windows - windows.mean(1, keepdims=True)
            part = (part - part.mean()).ravel()
            norms = np.linalg.norm(windows, axis=1) * np.linalg.norm(part)
            return float((windows @ part / np.maximum(norms, 1e-9)).max())

        for held_out in photographs.HELD_OUT:
            part = grey(held_out)[8:32, 16:48]
            assert best_match(grey(held_out), part) == pytest.approx(1)
            for name in photographs.TRAINING:
                assert best_match(grey(name), part) < 0.8, (held_out, name)

    def test_an_unknown_name_is_an_error_that_lists_the_names(self):
        with pytest.raises(ValueError, match=r"'cat'; there are chelsea, china, "):
            photographs.load("cat")

    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage", None)
        photographs.load.cache_clear()
        with pytest.raises(ImportError, match=re.escape("skimage is missing: pip install 'linattn[demo]'")):
            photographs.load("chelsea")

    def test_small_and_enlarged_are_four_times_apart(self):
        for name in photographs.HELD_OUT:
            photograph = photographs.original(name)
            small = photographs.small(photograph)
            assert [4 * side for side in small.size] == [*photograph.size]
            assert photographs.enlarged(small, "lanczos").size == photograph.size


@pytest.fixture(scope="module")
def photograph():
    return photographs.original("chelsea")


@pytest.fixture(scope="module")
def pictures(photograph):
    small = photographs.small(photograph)
    return {name: photographs.enlarged(small, name) for name in ("bicubic", "lanczos")}


@pytest.fixture(scope="module")
def score(photograph, pictures):
    return photographs.Score(photograph, pictures)


class TestScore:
    def test_is_that_of_the_whole_photograph_without_its_border(self, photograph, pictures, score):
        inner = (slice(photographs.BORDER, -photographs.BORDER),) * 2
        truth, given = np.asarray(photograph), np.asarray(pictures["bicubic"])
        assert score.psnr("bicubic").value == pytest.approx(
            peak_signal_noise_ratio(truth[inner], given[inner]), abs=1e-5
        )
        _, similarities = structural_similarity(
            truth, given, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, full=True
        )
        assert score.ssim("bicubic").value == pytest.approx(similarities[inner].mean(), abs=1e-5)

    def test_tiles_fill_the_photograph(self, photograph, score):
        sides = [side - 2 * photographs.BORDER for side in photograph.size]
        assert score.pixels.sum() == sides[0] * sides[1] and score.pixels.min() >= photographs.TILE**2
        assert score.tiles == np.prod([side // photographs.TILE for side in sides])

    def test_differences_are_paired(self, score):
        assert score.psnr("bicubic", "bicubic") == (0, 0, 0) and score.ssim("lanczos", "lanczos") == (0, 0, 0)
        difference, alone = score.psnr("lanczos", "bicubic"), score.psnr("lanczos")
        assert difference.value == pytest.approx(alone.value - score.psnr("bicubic").value, abs=2e-5)
        assert difference.low < difference.value < difference.high
        assert difference.high - difference.low < 0.2 * (alone.high - alone.low)

    def test_the_photograph_itself_has_no_error(self, photograph):
        assert photographs.Score(photograph, {"itself": photograph}).ssim("itself") == (1, 1, 1)

    def test_a_picture_of_another_size_is_an_error(self, photograph):
        with pytest.raises(ValueError, match=r"crooked is \(8, 8\), the photograph \(448, 300\)"):
            photographs.Score(photograph, {"crooked": photograph.resize((8, 8))})


class TestModel:
    def test_weights_are_small_and_of_half_precision(self):
        (weights,) = bundled.path(MODEL).rglob("*.safetensors")
        assert weights.stat().st_size <= 3_000_000
        with safe_open(weights, "pt") as tensors:
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float16}  # noqa: SIM118

    def test_loads_as_float32(self, pipe):
        assert pipe.transformer.dtype == torch.float32 and pipe.image_encoder is None

    @pytest.mark.parametrize("name", photographs.HELD_OUT)
    def test_is_closer_to_a_part_of_a_held_out_photograph_than_filters_are(self, pipe, name):
        photograph = photographs.original(name).crop(CROPS[name])
        small = photographs.small(photograph)
        pictures = {filter: photographs.enlarged(small, filter) for filter in ("bicubic", "lanczos")}
        pictures["ours"] = pipe(small, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        score = photographs.Score(photograph, pictures)
        for filter in ("bicubic", "lanczos"):
            assert score.psnr("ours", filter).value > 0.1, filter
            assert score.ssim("ours", filter).value > 0.005, filter

    @pytest.mark.parametrize("name", photographs.HELD_OUT)
    def test_recorded_scores_beat_bicubic_beyond_doubt(self, name):
        scores, low = card()["scores"], 1
        for steps in scores["steps"]:
            ours = scores[name][f"{steps} steps"]
            assert ours["psnr above bicubic"][low] > 0 and ours["ssim above bicubic"][low] > 0
            assert all(ours[metric][0] > scores[name]["lanczos"][metric][0] for metric in ("psnr", "ssim"))

    def test_card_says_how_it_was_made(self):
        found = card()
        assert {"what", "data", "command", "date", "recipe", "stages", "seconds", "scores", "versions"} <= found.keys()
        assert found["command"].startswith("python examples/train_tiny_infdit.py --out DIR")
        assert "--smoke" not in found["command"] and "--set" not in found["command"]
        assert list(found["data"]["held out"]) == list(photographs.HELD_OUT)
        assert list(found["data"]["trained on"]) == list(photographs.TRAINING)

    def test_says_which_start_it_knows(self, pipe):
        """Noise around the enlarged picture: its scheduler has less noise than a picture has contrast."""
        assert 0 < pipe.scheduler.config.sigma_min < pipe.scheduler.config.sigma_max < 1


class TestScript:
    def test_trains_and_writes_the_same_files_as_the_bundled_model(self, script, tmp_path, monkeypatch):
        small = photographs.original
        monkeypatch.setattr(photographs, "original", lambda name: small(name).crop((0, 0, 96, 96)))
        out = tmp_path / "out"
        assert script.main(["--out", str(out), "--smoke", "--threads", "1"]) == 0
        made, shipped = out / MODEL, bundled.path(MODEL)
        names = [
            sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) for folder in (made, shipped)
        ]
        assert names[0] == names[1]
        written = json.loads((made / "card.json").read_text())
        assert written.keys() == card().keys() and set(written["scores"]) == set(card()["scores"])
        assert "--smoke" in written["command"] and str(tmp_path) not in (made / "card.json").read_text()

    def test_its_defaults_are_what_made_the_bundled_model(self, script):
        assert card()["recipe"] == json.loads(json.dumps(dataclasses.asdict(script.Recipe())))

    def test_starts_better_than_bicubic_before_any_step(self, script):
        """What is prepared by least squares: D is closer to the clean picture than the enlarged one, at all levels."""
        recipe = script.Recipe()
        rng, words = script.generators(0)
        patches, net = script.Patches(recipe), script.new_network(recipe)
        script.prepare(net, recipe, patches, words, rng)
        clean = patches.draw(24, words)
        for sigma in (recipe.sigma_max, recipe.sigma_min):
            batch = script.corrupt(recipe, clean, torch.full((24,), sigma), rng)
            c = script.preconditioning(torch.tensor(sigma))
            noisy, lr_up = (batch.seen / c.c_in).chunk(2, 1)
            assert (noisy - lr_up).std().item() == pytest.approx(sigma, rel=0.01)  # of 300,000 numbers
            with torch.no_grad():
                given = net(batch.seen, batch.c_noise, batch.lr, return_dict=False)[0]
            errors = [(x - clean).square().mean().item() for x in (c.c_skip * noisy + c.c_out * given, lr_up)]
            assert errors[0] < 0.97 * errors[1]

    def test_prepares_a_modulation_that_undoes_c_out(self, script):
        recipe = script.Recipe()
        rng, words = script.generators(0)
        net = script.new_network(recipe)
        script.prepare(net, recipe, script.Patches(recipe), words, rng)
        sigma = torch.tensor([recipe.sigma_max, (recipe.sigma_max * recipe.sigma_min) ** 0.5, recipe.sigma_min])
        c = script.preconditioning(sigma)
        with torch.no_grad():
            scale = 1 + net.modulation_out(net._condition(c.c_noise, None, 3))[:, recipe.width :]
        undone = scale * (c.c_out / c.c_out[0])[:, None]
        assert (undone - 1).abs().max() < 0.05  # sums of weights of half precision

    def test_noise_levels_are_those_of_the_sampler(self, script):
        recipe = script.Recipe()
        sigma = script.draw_sigmas(recipe, 64, torch.Generator().manual_seed(0))
        assert (sigma == sigma.max()).float().mean() == recipe.top_share and sigma.max() == recipe.sigma_max
        assert recipe.sigma_min <= sigma.min() < 1.05 * recipe.sigma_min


def test_quick_demo_shows_and_scores_all_ways(tmp_path):
    command = [sys.executable, "-m", "linattn", "demo", "--quick", "--part", "infdit", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "infdit.json").read_text())
    assert figures["photograph"] in photographs.HELD_OUT
    assert set(figures["scores"]) == set(figures["seconds"]) == {"bicubic", "lanczos", "linattn"}
    assert figures["scores"]["linattn"]["psnr above bicubic"][0] > 0
    assert figures["backend"] in ("cpu", "reference") and f"backend {figures['backend']!r}" in done.stdout
    assert figures["peak_bytes"] is None or figures["peak_bytes"] > 5 * 2**20
    picture = Image.open(tmp_path / "infdit.png")
    assert picture.width > 4 * 384 and picture.height > 3 * 256
