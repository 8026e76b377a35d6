"""The bundled model: what is in the folder, that it loads like any other, that it draws, and how it was trained."""

import dataclasses
import importlib.util
import json
import logging
import pathlib
import socket
import warnings
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from safetensors import safe_open

from linattn import bundled, evaluate
from linattn.bundled import digits

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "train_tiny_sd.py"
MEGABYTE = 10**6


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
    def test_is_at_most_8_megabytes(self, name):
        folder = bundled.path(name)
        assert sum((folder / file).stat().st_size for file in files(folder)) <= 8 * MEGABYTE

    def test_card_says_how_it_was_made_and_how_good_it_is(self):
        card = json.loads((bundled.path() / "card.json").read_text())
        assert {"what", "data", "command", "date", "recipe", "stages", "seconds", "scores", "versions"} <= card.keys()
        assert card["command"].startswith("python examples/train_tiny_sd.py") and "--smoke" not in card["command"]
        assert {"python", "torch", "diffusers", "transformers", "tokenizers"} <= card["versions"].keys()
        assert card["scores"]["samples"] >= 200
        for name in ("accuracy", "free_prompt_accuracy", "numeral_accuracy"):
            assert card["scores"][name] >= 0.95, name


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
        for text in ("a handwritten three", "My cat wrote 7!", "naïve Ünïcode, 12 ✓"):
            assert old(text).input_ids == pipe.tokenizer(text).input_ids
        assert pipe.tokenizer.tokenize("a drawing of the number eight") == [
            f"{word}</w>" for word in ("a", "drawing", "of", "the", "number", "eight")
        ]

    def test_text_encoder_has_the_keys_of_published_ones(self):
        # transformers 4 ignores any others and draws from random weights.
        with safe_open(bundled.path("tiny_sd") / "text_encoder" / "model.safetensors", "pt") as weights:
            assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118  (no iterator)

    def test_draws_what_is_asked_for(self, pipe):
        labels = list(range(10)) * 2
        pictures = evaluate.draw(pipe, [digits.prompt(d) for d in labels], seeds=range(20), steps=10)
        assert pictures.shape == (20, 3, 64, 64)
        assert evaluate.accuracy(pictures, labels) >= 0.9

    def test_understands_other_words_and_numerals(self, pipe):
        asked = ["please draw me a big 3", "my cat wrote the number five yesterday", "8", "zero!", "nine, in black ink"]
        pictures = evaluate.draw(pipe, asked * 2, seeds=range(10), steps=10)
        assert evaluate.accuracy(pictures, [3, 5, 8, 0, 9] * 2) >= 0.8

    def test_autoencoder_keeps_digits_that_it_never_saw(self, pipe):
        split = digits.load()
        pictures = digits.render(split.test[:50])
        with torch.no_grad():
            back = pipe.vae(pictures * 2 - 1).sample / 2 + 0.5
        assert evaluate.accuracy(back, split.test_labels[:50]) >= 0.95


class TestTrainingScript:
    @pytest.fixture
    def script(self, monkeypatch):
        if int(version("transformers").split(".")[0]) < 5:
            pytest.skip("the training script needs transformers 5")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the script sets it for itself; here it is taken back afterwards
        spec = importlib.util.spec_from_file_location("train_tiny_sd", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, "train_tiny_sd", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        threads = torch.get_num_threads()
        yield module
        torch.set_num_threads(threads)

    def test_trains_writes_the_same_files_as_the_bundled_model_and_resumes(self, script, tmp_path, capsys):
        out, work = tmp_path / "model", tmp_path / "model.stages"
        assert script.main(["--smoke", "--threads", "1", "--out", str(out)]) == 0
        assert files(out) == files(bundled.path("tiny_sd"))
        card = json.loads((out / "card.json").read_text())
        shipped = json.loads((bundled.path("tiny_sd") / "card.json").read_text())
        assert card.keys() == shipped.keys() and card["scores"].keys() == shipped["scores"].keys()
        assert str(tmp_path) not in "".join(file.read_text() for file in out.rglob("*.json"))

        # A run that was killed during its last stage: the first two are kept, the model is written all the same.
        first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for stage in ("prompts/stage.json", "prompts/model_index.json"):
            (work / stage).unlink()
        capsys.readouterr()
        assert script.main(["--smoke", "--threads", "1", "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert "vae: done already" in said and "diffusion: done already" in said and "prompts: step" in said
        assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
        assert not [entry.name for entry in (*work.iterdir(), *tmp_path.iterdir()) if entry.name.startswith(".")]

        # Another recipe does not reuse these stages.
        recipe = dataclasses.replace(script.SMOKE, vae_steps=3)
        assert script.finished_stage(work / "vae", script.SMOKE) is not None
        assert script.finished_stage(work / "vae", recipe) is None

    def test_its_defaults_are_what_made_the_bundled_model(self, script):
        card = json.loads((bundled.path("tiny_sd") / "card.json").read_text())
        assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(script.Recipe())))
