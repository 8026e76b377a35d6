"""The bundled models: what is in the folders, that they load and draw, how good they are, and how they were trained."""

import dataclasses
import importlib.util
import json
import logging
import pathlib
import random
import socket
import sys
import warnings
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from safetensors import safe_open

from linattn import bundled, evaluate
from linattn.adapters import CLEAR, LinFusion
from linattn.bundled import canvases, digits

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LIMITS = {  # bytes
    "tiny_sd": 8_000_000,
    "tiny_sd_linfusion": 3_000_000,
    "tiny_flux": 3_000_000,
    "tiny_flux_clear": 3_000_000,
    "tiny_flux_clear_down_4": 3_000_000,
    "tiny_infdit": 3_000_000,
    "tiny_sd_perflow": 4_500_000,
    "tiny_sd_flash": 4_500_000,
}
# What else there is to the others: test_bundled_infdit.py, test_few_steps.py.
DRAWING = [name for name in LIMITS if name not in ("tiny_infdit", "tiny_sd_perflow", "tiny_sd_flash")]


def script_of(name: str) -> str:
    """The script that made a bundled model."""
    return "train_tiny_flux" if name.startswith("tiny_flux") else "train_tiny_sd"


def load_script(name: str, monkeypatch):
    """A training script as a module, and what it changes of the process put back by `monkeypatch`."""
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("the training scripts need transformers 5")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the script sets it for itself; here it is taken back afterwards
    monkeypatch.syspath_prepend(EXAMPLES)  # what the scripts share
    for shared in ("tiny_training", "train_tiny_sd"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def files(folder: pathlib.Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(bundled.path("tiny_sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestFolder:
    def test_is_found_by_name(self):
        assert "tiny_sd" in bundled.names()
        assert bundled.path() == bundled.path("tiny_sd")
        assert (bundled.path() / "model_index.json").is_file()

    def test_another_name_is_an_error_that_lists_the_names(self):
        with pytest.raises(ValueError, match=r"'big_sd'; available: .*tiny_sd"):
            bundled.path("big_sd")

    @pytest.mark.parametrize("name", bundled.names())
    def test_holds_weights_and_text_and_nothing_pickled(self, name):
        assert {pathlib.Path(file).suffix for file in files(bundled.path(name))} <= {".safetensors", ".json", ".txt"}

    @pytest.mark.parametrize("name", bundled.names())
    def test_does_not_say_where_it_was_made(self, name):
        assert not [f for f in bundled.path(name).rglob("*.json") if "_name_or_path" in f.read_text()]

    @pytest.mark.parametrize("name", bundled.names())
    def test_is_small(self, name):
        folder = bundled.path(name)
        assert sum((folder / file).stat().st_size for file in files(folder)) <= LIMITS[name]

    @pytest.mark.parametrize("name", DRAWING)
    def test_card_says_how_it_was_made(self, name):
        card = json.loads((bundled.path(name) / "card.json").read_text())
        assert {"what", "data", "command", "date", "recipe", "stages", "seconds", "scores", "versions"} <= card.keys()
        assert card["command"].startswith(f"python examples/{script_of(name)}.py --out DIR")
        assert "--smoke" not in card["command"] and "--set" not in card["command"]
        assert {"python", "torch", "diffusers", "transformers", "tokenizers"} <= card["versions"].keys()
        assert card["scores"]["settings"]["n"] >= 100

    @pytest.mark.parametrize("name", LIMITS)
    def test_weights_are_half_precision(self, name):
        for file in bundled.path(name).rglob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                kinds = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118  (no iterator)
            assert kinds == {torch.float16}, file

    def test_recorded_scores_tell_good_attention_from_bad(self):
        """What the model is for: the intervals of the four variants do not meet where they should not."""
        scores = json.loads((bundled.path() / "card.json").read_text())["scores"]
        exact = {name: scores[name]["exact"] for name in ("teacher", "zeroed", "before", "after", "real digits")}
        value, low, high = 0, 1, 2
        assert exact["zeroed"]["held out"][high] < exact["teacher"]["held out"][low]
        assert exact["zeroed"]["3 digits"][high] < exact["after"]["3 digits"][low]
        assert exact["before"]["held out"][high] < exact["after"]["held out"][low]
        assert exact["zeroed"]["held out"][high] < 0.2 < 0.5 < exact["teacher"]["2 digits"][value]
        hardest = f"{canvases.LONGEST} digits"
        assert exact["teacher"][hardest][high] < exact["real digits"][hardest][low]
        assert scores["after"]["error"][high] < scores["before"]["error"][low]

    def test_recorded_scores_of_windows_tell_distilled_from_not(self):
        scores = json.loads((bundled.path("tiny_flux") / "card.json").read_text())["scores"]
        drawn = ("teacher", "alone", "before", "after", "before, pooled", "after, pooled")
        exact = {name: scores[name]["exact"]["held out"] for name in drawn}
        value, low, high = 0, 1, 2
        assert exact["alone"][high] < 0.05 and exact["teacher"][low] > 0.3
        for kind in ("", ", pooled"):
            before, after = f"before{kind}", f"after{kind}"
            assert exact[before][high] < exact[after][low]
            assert scores[after]["error"][high] < scores[before]["error"][low]
            assert scores[after]["canvas_distance"][high] < scores[before]["canvas_distance"][low]
        assert exact["after"][value] < exact["teacher"][value]  # a window of this size takes something away
        hardest = f"{canvases.LONGEST} digits"
        assert scores["teacher"]["exact"][hardest][high] < scores["real digits"]["exact"][hardest][low]


class TestFlux:
    def test_loads_offline_and_draws_with_windows_and_without(self, monkeypatch):
        from diffusers import FluxPipeline, FluxTransformer2DModel

        def refuse(*_):
            raise AssertionError("something looked at the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        pipe = FluxPipeline.from_pretrained(bundled.path("tiny_flux"))
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.transformer) is FluxTransformer2DModel and not pipe.transformer.config.guidance_embeds
        orders = [(digit,) for digit in range(10)] + [(digit, (digit + 3) % 10) for digit in range(10)]
        prompts = [canvases.caption(order) for order in orders]

        def drawn():
            pictures = evaluate.draw(
                pipe, prompts, seeds=range(len(orders)), steps=10, guidance_scale=5.0, side=canvases.RESOLUTION
            )
            return pictures, evaluate.score_canvases(pictures, orders).exact.mean()

        stock, accuracy = drawn()
        assert accuracy >= 0.5  # chance is one in ten for a single digit, and less for its number
        for student in ("tiny_flux_clear", "tiny_flux_clear_down_4"):
            clear = CLEAR.construct_for(pipe, pretrained_model_name_or_path=bundled.path(student))
            windowed, accuracy = drawn()
            clear.unmount()
            assert accuracy >= 0.1 and not torch.equal(windowed, stock)
        assert torch.equal(drawn()[0], stock)

    def test_the_recipe_of_the_trainer_makes_the_shipped_student(self):
        """The script hands its own numbers to the recipe; both say the same, so that either command makes it."""
        from linattn.distill import recipe

        card = json.loads((bundled.path("tiny_flux_clear") / "card.json").read_text())["recipe"]
        found = recipe.load("clear_tiny_flux", [])
        assert found.training.steps == card["student_steps"]
        assert found.student.options["window_size"] == card["window_size"]
        config = json.loads((bundled.path("tiny_flux_clear_down_4") / "config.json").read_text())
        assert (config["window_size"], config["down_factor"]) == (card["window_size"], card["down_factor"])

    def test_the_script_trains_and_writes_the_same_files_as_the_bundled_models(self, monkeypatch, tmp_path):
        script = load_script("train_tiny_flux", monkeypatch)
        out, threads = tmp_path / "models", torch.get_num_threads()
        try:
            assert script.main(["--smoke", "--threads", "1", "--out", str(out)]) == 0
        finally:
            torch.set_num_threads(threads)
        for name in ("tiny_flux", "tiny_flux_clear", "tiny_flux_clear_down_4"):
            assert files(out / name) == files(bundled.path(name))
            card = json.loads((out / name / "card.json").read_text())
            shipped = json.loads((bundled.path(name) / "card.json").read_text())
            assert card.keys() == shipped.keys() and card["scores"].keys() == shipped["scores"].keys()
            assert shipped["recipe"] == json.loads(json.dumps(dataclasses.asdict(script.Recipe())))
        assert str(tmp_path) not in "".join(file.read_text() for file in out.rglob("*.json"))


class TestPipeline:
    def test_loads_offline_without_a_remark(self, monkeypatch):
        from diffusers import StableDiffusionPipeline
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401  (the remarks of importing are not ours)

        def refuse(*_):
            raise AssertionError("something looked at the network")

        remarks = logging.Handler(logging.WARNING)
        said = []
        remarks.emit = lambda record: said.append(record.getMessage())
        monkeypatch.setattr(socket.socket, "connect", refuse)
        libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        for library in libraries:
            library.addHandler(remarks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pipe = StableDiffusionPipeline.from_pretrained(bundled.path("tiny_sd"))
        finally:
            for library in libraries:
                library.removeHandler(remarks)
        assert said == []
        assert pipe.safety_checker is None

    def test_is_made_of_stock_classes(self, pipe):
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        assert type(pipe.vae) is AutoencoderKL and type(pipe.unet) is UNet2DConditionModel
        assert type(pipe.text_encoder) is CLIPTextModel and isinstance(pipe.tokenizer, CLIPTokenizer)
        assert type(pipe.scheduler) is DDIMScheduler

    @pytest.mark.filterwarnings(
        "ignore:.torch_dtype. is deprecated"
    )  # its new name is too new for our oldest diffusers
    @pytest.mark.parametrize("wanted", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_all_parts_load_in_one_precision(self, wanted):
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(bundled.path("tiny_sd"), torch_dtype=wanted)
        assert {part.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder)} == {wanted or torch.float32}

    def test_both_layouts_of_the_tokenizer_agree(self, pipe):
        from transformers import CLIPTokenizer

        folder = bundled.path("tiny_sd") / "tokenizer"
        old = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        for text in ("a seven, a two and an eight", "My cat wrote 7!", "naïve Ünïcode, 12 ✓"):
            assert old(text).input_ids == pipe.tokenizer(text).input_ids
        words = ("a", "seven", ",", "a", "two", "and", "an", "eight")
        assert pipe.tokenizer.tokenize("a seven, a two and an eight") == [f"{word}</w>" for word in words]

    def test_the_longest_caption_fits(self, pipe):
        assert (
            len(pipe.tokenizer(canvases.caption((8,) * canvases.LONGEST)).input_ids) <= pipe.tokenizer.model_max_length
        )

    def test_text_encoder_has_the_keys_of_published_ones(self):
        # transformers 4 ignores any others and draws from random weights.
        with safe_open(bundled.path("tiny_sd") / "text_encoder" / "model.safetensors", "pt") as weights:
            assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118  (no iterator)

    @pytest.mark.parametrize("attention", ["stock", "linear"])
    def test_draws_what_is_asked_for(self, pipe, attention):
        orders = [(digit,) for digit in range(10)] + [(digit, (digit + 3) % 10) for digit in range(10)]
        prompts = [canvases.caption(order) for order in orders]
        student = bundled.path("tiny_sd_linfusion")
        mounted = (
            LinFusion.construct_for(pipe, pretrained_model_name_or_path=student) if attention == "linear" else None
        )
        try:
            pictures = evaluate.draw(pipe, prompts, seeds=range(len(orders)), steps=10, guidance_scale=2.5)
        finally:
            if mounted is not None:
                mounted.unmount()
        assert pictures.shape[1:] == (3, canvases.RESOLUTION, canvases.RESOLUTION)
        # Chance is one in ten for a single digit, and less for its number; the recorded scores are in card.json.
        assert evaluate.score_canvases(pictures, orders).exact.mean() >= 0.35

    def test_autoencoder_keeps_digits_that_it_never_saw(self, pipe):
        split, words, rng = digits.load(), random.Random(0), torch.Generator().manual_seed(0)
        orders = [canvases.draw_order(words, canvases.LONGEST) for _ in range(20)]
        pens = canvases.make_pens(20, rng)
        pictures = canvases.draw(orders, split.test, split.test_labels, pens, rng=rng, words=words)
        with torch.no_grad():
            back = pipe.vae(pictures * 2 - 1).sample / 2 + 0.5
        assert evaluate.score_canvases(back, orders).place.mean() >= 0.95


class TestTrainingScript:
    @pytest.fixture
    def script(self, monkeypatch):
        module = load_script("train_tiny_sd", monkeypatch)
        threads = torch.get_num_threads()
        yield module
        torch.set_num_threads(threads)

    def test_trains_writes_the_same_files_as_the_bundled_models_and_resumes(self, script, tmp_path, capsys):
        out, work = tmp_path / "models", tmp_path / "models.stages"
        assert script.main(["--smoke", "--threads", "1", "--out", str(out)]) == 0
        for name in ("tiny_sd", "tiny_sd_linfusion"):
            assert files(out / name) == files(bundled.path(name))
            card = json.loads((out / name / "card.json").read_text())
            shipped = json.loads((bundled.path(name) / "card.json").read_text())
            assert card.keys() == shipped.keys() and card["scores"].keys() == shipped["scores"].keys()
        assert str(tmp_path) not in "".join(file.read_text() for file in out.rglob("*.json"))

        # A run that was killed during one of its stages: those before it are kept, and the model is the same.
        weights = out / "tiny_sd" / "unet" / "diffusion_pytorch_model.safetensors"
        first = weights.read_bytes()
        for stage in ("diffusion", "pipeline"):
            (work / stage / "stage.json").unlink()
        capsys.readouterr()
        assert script.main(["--smoke", "--threads", "1", "--out", str(out), "--until", "pipeline"]) == 0
        said = capsys.readouterr().out
        assert "vae: done already" in said and "cells: done already" in said and "diffusion: step" in said
        unet = work / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
        assert unet.read_bytes() == first
        assert not [entry.name for entry in (*work.iterdir(), *out.iterdir()) if entry.name.startswith(".")]

        # Another recipe does not reuse the stages that depend on what is different.
        recipe = dataclasses.replace(script.SMOKE, student_steps=3)
        assert script.STAGES.finished(work / "pipeline", recipe) is not None
        assert script.STAGES.finished(work / "student", recipe) is None

    def test_a_long_stage_goes_on_from_its_checkpoint_to_the_same_bits(self, script, tmp_path, monkeypatch):
        recipe = dataclasses.replace(script.SMOKE, canvas_steps=5)
        monkeypatch.setattr(script, "CHECKPOINT_EVERY", 2)
        folders = {name: tmp_path / name for name in ("vae", "cells", "whole", "stopped")}
        for folder in folders.values():
            folder.mkdir()
        script.train_vae(recipe, folders["vae"])
        script.encode_cells(recipe, folders["cells"], folders["vae"])

        def train(out):
            script.train_diffusion(recipe, out, folders["vae"], folders["cells"])
            return (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

        save = script.save_checkpoint

        def save_and_die(*arguments):
            save(*arguments)
            if arguments[-1] == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(script, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(folders["stopped"])
        monkeypatch.setattr(script, "save_checkpoint", save)
        stopped = train(folders["stopped"])
        (tmp_path / "diffusion.checkpoint").unlink()
        assert train(folders["whole"]) == stopped

    @pytest.mark.parametrize(
        ("setting", "said"), [("vae_step=3", "there is no 'vae_step'"), ("vae_steps=", "expected a value in JSON")]
    )
    def test_a_wrong_setting_is_one_clear_line(self, script, tmp_path, capsys, setting, said):
        with pytest.raises(SystemExit):
            script.main(["--out", str(tmp_path / "models"), "--set", setting])
        assert said in capsys.readouterr().err and not (tmp_path / "models").exists()

    def test_its_defaults_are_what_made_the_bundled_models(self, script):
        for name in ("tiny_sd", "tiny_sd_linfusion"):
            card = json.loads((bundled.path(name) / "card.json").read_text())
            assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(script.Recipe())))
