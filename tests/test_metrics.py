"""Figures of picture sets: known answers, the conventions they follow, and `linattn eval` on folders and captions."""

import json
import math
import os
import random
import shlex
import signal
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

import torch
from helpers.runs import in_child, reset_accelerator, together
from helpers.tiny_pipelines import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from linattn import bundled, cli, evaluate, feature_networks, metrics
from linattn.cli import _eval_drawing as drawing
from linattn.cli import _eval_pictures as command

pytestmark = pytest.mark.usefixtures("one_thread")

D = 4


def gaussian(n, scale, shift=0.0, d=D):
    """n samples whose own mean and covariance are exactly `shift` and `scale` times its transpose."""
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.as_tensor(scale, dtype=torch.float64).T + shift


# ------------------------------------------------------------------------------------------------- Frechet distance


def test_the_distance_of_two_gaussians_is_the_closed_form():
    a, b = torch.tensor([1.0, 2.0, 3.0, 0.5]).double(), torch.tensor([2.0, 2.0, 0.5, 1.5]).double()
    shift = torch.tensor([1.0, 0.0, -2.0, 0.25]).double()
    found = metrics.frechet_distance(gaussian(50, a.diag(), shift), metrics.statistics(gaussian(80, b.diag())))
    assert found.n == 50
    assert found.value == pytest.approx(float((shift**2).sum() + ((a - b) ** 2).sum()), rel=1e-9)


def test_the_distance_is_scipys_root_of_the_product_and_that_of_canvases():
    from scipy.linalg import sqrtm

    x, y = gaussian(60, torch.randn(D, D), 1.0), gaussian(70, torch.randn(D, D))
    a, b = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    expected = D + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = metrics.frechet_distance(x, metrics.statistics(y)).value
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx(evaluate.frechet_distance(x.numpy(), y.numpy()), rel=1e-9)


def test_the_interval_is_as_wide_as_the_distance_scatters():
    scale = torch.randn(D, D, dtype=torch.float64)
    reference = metrics.statistics(gaussian(500, torch.eye(D)))
    draws = 200
    found = [metrics.frechet_distance(torch.randn(300, D).double() @ scale, reference) for _ in range(draws)]
    scatter = np.std([figure.value for figure in found], ddof=1)
    claimed = np.mean([figure.high - figure.value for figure in found]) / 1.96
    # Four standard errors of a standard deviation from so many draws, and as much again for the first order.
    assert claimed == pytest.approx(scatter, rel=8 / math.sqrt(2 * draws))


def test_features_that_cannot_vary_change_nothing():
    scale = torch.randn(D, D)
    x, y = gaussian(60, scale, 1.0), gaussian(70, torch.eye(D))
    plain = metrics.frechet_distance(x, metrics.statistics(y))
    x, y = (torch.cat([z, torch.ones(len(z), 2)], 1) for z in (x, y))
    assert metrics.frechet_distance(x, metrics.statistics(y)) == pytest.approx(plain, rel=1e-6)


def test_statistics_from_a_file_give_the_same_figures_with_or_without_the_features(tmp_path):
    x, y = gaussian(60, torch.randn(D, D), 1.0), gaussian(70, torch.eye(D))
    before = metrics.statistics(y, {"features": "some"})
    metrics.save_statistics(tmp_path / "a.safetensors", before)
    after = metrics.load_statistics(tmp_path / "a.safetensors")
    assert after.about == {"features": "some"} and after.n == 70 and torch.equal(after.features, y)
    bare = metrics.Statistics(before.mean, before.covariance, 70)
    metrics.save_statistics(tmp_path / "b.safetensors", bare)
    assert metrics.load_statistics(tmp_path / "b.safetensors").features is None
    expected = metrics.frechet_distance(x, before)
    assert metrics.frechet_distance(x, after) == expected == metrics.frechet_distance(x, bare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_with_no_more_pictures_than_features_there_is_no_interval():
    reference = metrics.statistics(gaussian(30, torch.eye(D)))
    assert metrics.frechet_distance(torch.randn(D, D), reference).low is None
    assert metrics.frechet_distance(torch.randn(D + 1, D), reference).low is not None


@pytest.mark.parametrize(
    ("features", "named"),
    [
        (torch.zeros(3), "expected (n, d)"),
        (torch.zeros(1, D), "n >= 2, got (1, 4)"),
        (torch.zeros(3, D + 1), "have 5 dimensions, those of the reference 4"),
        (torch.full((3, D), math.nan), "finite"),
    ],
    ids=["shape", "one", "other-network", "nan"],
)
def test_features_that_do_not_fit_are_named(features, named):
    reference = metrics.statistics(gaussian(30, torch.eye(D)))
    with pytest.raises(ValueError) as error:
        metrics.frechet_distance(features, reference)
    assert named in str(error.value)


def test_a_file_that_holds_no_statistics_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        metrics.load_statistics(file)
    save_file({"mean": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no statistics"):
        metrics.load_statistics(file)
    metrics.save_statistics(file, metrics.Statistics(torch.zeros(2), torch.eye(3), 5))
    with pytest.raises(ValueError, match=r"expected mean \(d,\)"):
        metrics.load_statistics(file)


# --------------------------------------------------------------------------------------------- precision and recall

# On a line, so that every ball is an interval. r_1 of the real ones is 1, 1, 1, 1, 7; of the others 3.5, 3.5, 1, 1.
REAL = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])[:, None]
DRAWN = torch.tensor([0.5, 4.0, 20.0, 21.0])[:, None]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_precision_recall_density_and_coverage_of_a_set_on_a_line(rows):
    found = metrics.precision_recall(DRAWN, REAL, neighbours=1, density_neighbours=1, rows=rows)
    assert {name: (figure.value, figure.n) for name, figure in found.items()} == {
        "precision": (2 / 4, 4),  # 0.5 and 4
        "recall": (4 / 5, 5),  # all but 10
        "density": (1.0, 4),  # two balls hold 0.5, two hold 4
        "coverage": (4 / 5, 5),  # all but 2
    }
    # r_2 of the real ones is 2, 1, 1, 2, 8.
    found = metrics.precision_recall(DRAWN, REAL, neighbours=1, density_neighbours=2, rows=rows)
    assert found["precision"].value == 2 / 4 and found["recall"].value == 4 / 5
    assert found["density"].value == (2 + 2 + 0 + 0) / 2 / 4 and found["coverage"].value == 4 / 5


def test_equal_sets_have_all_sets_apart_nothing_and_changing_places_swaps_precision_and_recall():
    x = torch.randn(40, 3)
    same = metrics.precision_recall(x, x)
    assert [same[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert same["precision"].low == pytest.approx(0.025 ** (1 / 40)) and same["precision"].high == 1
    apart = metrics.precision_recall(x + 100, x)
    assert [figure.value for figure in apart.values()] == [0, 0, 0, 0]
    one, other = metrics.precision_recall(0.3 * x, x), metrics.precision_recall(x, 0.3 * x)
    assert one["precision"].value == other["recall"].value > one["recall"].value == other["precision"].value


def test_more_pictures_than_neighbours_are_needed():
    with pytest.raises(ValueError, match="n >= 4"):
        metrics.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="n >= 6"):
        metrics.precision_recall(torch.zeros(9, 2), torch.zeros(5, 2))


# ------------------------------------------------------------------------------------------------------- CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights with the tokenizer of the bundled model, whose text is cut to 8 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(bundled.path("tiny_sd") / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


CAPTIONS = ["a seven and a two", "a one", "a three, a nine, a four and a four", "an eight"]


def test_the_clip_score_is_the_cosine_and_not_below_zero(clip_folder):
    clip = metrics.Clip.from_pretrained(clip_folder)
    pictures = [torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8) for _ in range(12)]
    captions = 3 * CAPTIONS
    found = metrics.clip_scores(pictures, captions, clip)
    processor = clip.processor
    with torch.no_grad():
        image = clip.model.get_image_features(**processor(images=pictures, return_tensors="pt"))
        tokens = processor.tokenizer(captions, padding=True, truncation=True, max_length=8, return_tensors="pt")
        text = clip.model.get_text_features(**tokens)
    cosines = torch.cosine_similarity(*(getattr(x, "pooler_output", x) for x in (image, text)))
    assert (cosines > 0.1).all() and len(set(cosines.tolist())) == 12
    torch.testing.assert_close(found, 100 * cosines, atol=1e-4, rtol=1e-5)
    # A pair's own, whatever else is scored.
    assert torch.equal(metrics.clip_scores(pictures[5:6], captions[5:6], clip), found[5:6])
    clip.model.text_projection.weight.data.neg_()
    assert (metrics.clip_scores(pictures, captions, clip) == 0).all()


def test_a_text_that_is_too_long_keeps_its_end_token(clip_folder):
    clip = metrics.Clip.from_pretrained(clip_folder)
    tokens = clip(text=["a three " * 10], return_tensors="pt", padding=True)["input_ids"]
    assert tokens.shape == (1, 8) and tokens[0, -1] == clip.config.text_config.eos_token_id


def test_a_mean_has_students_interval():
    found = metrics.mean_figure(torch.tensor([1.0, 2.0, 3.0]))
    assert found == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3), rel=1e-6)


# ------------------------------------------------------------------------------------------------- feature networks


@pytest.mark.parametrize("height, width", [(40, 25), (7, 11)], ids=["smaller", "larger"])
def test_pictures_are_resized_bicubically_antialiased_clipped_and_not_rounded(height, width):
    picture = np.random.default_rng(0).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    found = feature_networks.resize(picture, 16)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    filtered = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True)[0]
    assert filtered.min() < 0 and filtered.max() > 255
    assert found.dtype == torch.float32 and found.min() == 0 and found.max() == 255
    assert (found - filtered.clamp(0, 255)).abs().max() < 1e-3  # Pillow's weights are float32; an 8-bit step is 1
    assert (found - found.round()).abs().max() > 0.4


def test_a_picture_is_read_as_rgb_and_squared_around_its_middle(tmp_path):
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "grey.png")
    assert feature_networks.read_picture(tmp_path / "grey.png")[1, 2].tolist() == [6, 6, 6]
    picture = np.zeros((4, 10, 3), dtype=np.uint8)
    picture[:, 3:7] = 200
    assert (feature_networks.square(picture, 4) == 200).all() and (feature_networks.square(picture, 9) == 200).all()
    assert (feature_networks.square(picture.transpose(1, 0, 2), 4) == 200).all()


def test_the_judge_of_digits_is_a_network_that_is_there_offline():
    from linattn.bundled import canvases, digits

    split, rng = digits.load(), torch.Generator().manual_seed(0)
    orders = [(1, 2), (2, 1), (8,), (1, 2, 2)]
    pens = canvases.make_pens(8, rng)
    drawn = canvases.draw(orders, split.train, split.train_labels, pens, rng=rng, words=random.Random(0))
    pictures = [
        *((x.permute(1, 2, 0) * 255).round().byte().numpy() for x in drawn),
        np.full((30, 30, 3), 255, np.uint8),
    ]
    features = feature_networks.load("digits")(pictures)
    assert features.shape == (5, 19) and (features[4] == 0).all()
    assert features[:4, 10:].sum(1).tolist() == [len(order) for order in orders]
    assert features[2, :10].argmax() == 8
    assert set(features[0, :10].topk(2).indices.tolist()) == {1, 2} == set(features[1, :10].topk(2).indices.tolist())


def test_inception_is_clean_fids_and_sees_299_pixels_in_0_to_255(monkeypatch, tmp_path):
    seen = []

    class Stub(torch.nn.Module):
        def __init__(self, path, download, resize_inside):
            super().__init__()
            seen.append((path, download, resize_inside))

        def forward(self, pictures):
            seen.append(pictures)
            return torch.zeros(len(pictures), 2048)

    torchscript = types.SimpleNamespace(InceptionV3W=Stub)
    helper = types.SimpleNamespace(inception_url="https://example.org/inception.pt")
    for name, module in (("", None), (".inception_torchscript", torchscript), (".downloads_helper", helper)):
        monkeypatch.setitem(sys.modules, f"cleanfid{name}", module or types.ModuleType("cleanfid"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fetch(url, path, progress):
        if not reachable:
            raise urllib.error.URLError("no route")
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    reachable = False
    with pytest.raises(feature_networks.Unavailable) as error:
        feature_networks.load("inception")
    for named in (
        "inception-2015-12-05.pt",
        "95 MB",
        "https://example.org",
        "no route",
        "put the file there",
        "digits",
    ):
        assert named in str(error.value)
    reachable = True
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    network = feature_networks.load("inception")
    assert network([picture]).shape == (1, 2048)
    assert seen[0] == (str(tmp_path / "checkpoints"), False, False)
    assert torch.equal(seen[1][0], feature_networks.resize(picture, 299)) and seen[1].max() > 200


OWN = """
import torch

def pooled(pictures):
    assert pictures.max() <= 1
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1)

def resized(pictures):
    assert pictures.shape[2:] == (8, 8)
    return pooled(pictures)

resized.size = 8

def flat(pictures):
    return pictures.mean((1, 2, 3))

def undefined(pictures):
    return pooled(pictures) / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """In a folder of its own with a module of feature networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    Path("my_features.py").write_text(OWN)
    return tmp_path


def test_a_network_of_ones_own_gets_pictures_in_0_to_1_of_the_size_it_names(own):
    pictures = [np.full((4, 6, 3), 51, np.uint8), np.full((8, 4, 3), 255, np.uint8)]
    for name in ("my_features:pooled", "my_features:resized"):
        features = feature_networks.load(name)(pictures)
        torch.testing.assert_close(features, torch.tensor([0.2, 1.0])[:, None].expand(2, 12))
    for name, named in (("flat", r"expected features \(1, d\), got \(1,\)"), ("undefined", "not finite")):
        with pytest.raises(ValueError, match=named):
            feature_networks.load(f"my_features:{name}")(pictures)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(own, capsys):
    """Run the command in a folder of its own; returns (exit status, stdout, stderr)."""

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd15").save_pretrained(folder)
    return folder


def write_pictures(folder, n, seed=0, side=8):
    rng = np.random.default_rng(seed)
    for number in range(n):
        (Path(folder) / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / f"{number % 2}" / f"{number:03d}.png")


POOLED = ("--features", "my_features:pooled")


def timeless(record):
    return {key: value for key, value in record.items() if key != "command"}


def test_the_figures_of_a_folder_are_those_of_the_library(run):
    write_pictures("drawn", 40)
    write_pictures("real", 35, seed=1)
    status, out, err = run("--folder", "drawn", "--against", "real", *POOLED)
    assert status == 0, err
    record = json.loads(Path("eval.json").read_text())
    sets = []
    for name in ("drawn", "real"):
        paths = command.pictures_of("--folder", Path(name))
        assert [path.parent.name for path in paths] == sorted(path.parent.name for path in paths)  # below it, by name
        network = feature_networks.load("my_features:pooled")
        sets.append(network([feature_networks.read_picture(path) for path in paths]))
    expected = {"frechet_distance": metrics.frechet_distance(sets[0], metrics.statistics(sets[1]))}
    expected |= metrics.precision_recall(*sets)
    assert record["figures"].keys() == expected.keys()
    for name, figure in expected.items():
        assert tuple(record["figures"][name].values()) == pytest.approx(tuple(figure), rel=1e-6)
        assert f"{figure.value:.3f}" in out and str(figure.n) in out
    assert record["pictures"]["n"] == 40 and record["against"]["n"] == 35
    assert shlex.split(record["command"])[:4] == ["linattn", "eval", "--folder", "drawn"]


def test_statistics_that_were_saved_stand_for_the_folder_unless_they_are_of_something_else(record, run):
    write_pictures("drawn", 40)
    write_pictures("real", 35, seed=1)
    of_folder = record("--folder", "drawn", "--against", "real", *POOLED, "--resolution", 6)
    statistics = ("--save-statistics", "real.safetensors", "--resolution", 6)
    assert record("--folder", "real", *POOLED, *statistics, out="real.json")["figures"] == {}
    of_file = record("--folder", "drawn", "--against", "real.safetensors", *POOLED, "--resolution", 6)
    assert of_file["figures"] == of_folder["figures"]
    tensors = load_file("real.safetensors")
    assert tensors["features"].shape == (35, 12) and tensors["covariance"].dtype == torch.float64
    for others, named in (
        ((*POOLED, "--resolution", 7), "resolution 6, this run 7"),
        (("--features", "my_features:resized", "--resolution", 6), "features my_features:pooled, this run"),
    ):
        status, _, err = run("--folder", "drawn", "--against", "real.safetensors", *others)
        assert status == 1 and named in err and err.count("\n") == 1


def test_a_picture_that_changes_is_measured_again_and_others_are_not(record, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 8)
    write_pictures("drawn", 24)
    write_pictures("real", 20, seed=1)
    arguments = ("--folder", "drawn", "--against", "real", *POOLED)
    first = record(*arguments)
    measured = []
    original = command._Set._pictures
    monkeypatch.setattr(command._Set, "_pictures", lambda self, part: measured.append(part) or original(self, part))
    assert record(*arguments) == first and measured == []
    write_pictures("drawn", 1, seed=7)
    second = record(*arguments)
    assert measured == [slice(0, 8)]
    assert second["pictures"]["sha256"] != first["pictures"]["sha256"] and second["against"] == first["against"]
    assert second["figures"] != first["figures"]
    assert record(*arguments, "--cache", "other") == second | {
        "command": second["command"].replace(" --threads", " --cache other --threads")
    }


def test_captions_are_drawn_with_their_numbers_as_seeds_just_as_generate_draws_them(record, run, model, capsys):
    Path("captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    write_pictures("real", 20, seed=1, side=32)
    options = ("--model", str(model), "--attention", "stock", "--steps", "2", "--guidance", "3.5")
    arguments = ("--captions", "captions.txt", "--against", "real", *POOLED, *options)
    found = record(*arguments, "--seed", 5, "--pictures", "drawn", "--n", 3)
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    for number in (0, 2):
        assert cli.main(["generate", CAPTIONS[number], "--seed", str(5 + number), *options]) == 0
        alone, here = (np.array(Image.open(path)) for path in ("generated.png", f"drawn/{number:06d}.png"))
        assert (alone == here).all()
    assert found["request"]["seed"] == 5 and found["request"]["guidance"] == 3.5 and "prompt" not in found["request"]
    assert found["captions"]["n"] == 3 and found["figures"]["frechet_distance"]["low"] is None
    capsys.readouterr()
    # More captions take what is there; another seed finds other pictures in its place and leaves them alone.
    before = Path("drawn/000001.png").stat().st_mtime_ns
    assert record(*arguments, "--seed", 5, "--pictures", "drawn")["pictures"]["n"] == 4
    status, _, err = run(*arguments, "--seed", 6, "--pictures", "drawn")
    assert status == 1 and "drawn/000000.png was not drawn from this caption, seed, model and options" in err
    assert Path("drawn/000001.png").stat().st_mtime_ns == before


def test_the_clip_score_of_a_folder_takes_captions_in_the_order_of_names(record, clip_folder):
    write_pictures("drawn", 4, side=20)
    Path("captions.txt").write_text("\n".join(CAPTIONS))
    arguments = ("--folder", "drawn", "--captions", "captions.txt", "--clip", clip_folder)
    found = record(*arguments, "--clip-prefix", "A photo depicts ")
    assert list(found["figures"]) == ["clip_score"]
    paths = command.pictures_of("--folder", Path("drawn"))
    pictures = [torch.from_numpy(feature_networks.read_picture(path)).permute(2, 0, 1) for path in paths]
    captions = [f"A photo depicts {caption}" for caption in CAPTIONS]
    expected = metrics.mean_figure(metrics.clip_scores(pictures, captions, metrics.Clip.from_pretrained(clip_folder)))
    assert tuple(found["figures"]["clip_score"].values()) == pytest.approx(tuple(expected))
    assert len(found["sources"]["clip"]["sha256"]) == 64
    # Another prefix is not taken from the cache; and the recorded command gives the record.
    assert record(*arguments)["figures"] != found["figures"]
    assert record(*shlex.split(found["command"])[2:-2]) == found


# -------------------------------------------------------------------------------------------- killed, and in several


@pytest.fixture
def many(own, model, clip_folder, monkeypatch):
    """The command line of a run in three chunks, and the record of one that nothing disturbs."""
    monkeypatch.setattr(command, "CHUNK", 4)
    Path("captions.txt").write_text("\n".join(CAPTIONS * 3)[:-1])
    write_pictures("real", 9, seed=1, side=32)
    arguments = ["eval", "--captions", "captions.txt", "--against", "real", *POOLED, "--clip", str(clip_folder)]
    arguments += ["--model", str(model), "--attention", "stock", "--steps", "1", "--threads", "1", "--out", "eval.json"]
    whole, part = own / "whole", own / "part"
    for folder in (whole, part):
        folder.mkdir()
        for name in ("captions.txt", "my_features.py", "real"):
            (folder / name).symlink_to(own / name)
    os.chdir(whole)
    assert cli.main(arguments) == 0
    os.chdir(part)
    return arguments, json.loads((whole / "eval.json").read_text())


def ended(child):
    child.join(timeout=120)
    child.kill()
    return child.exitcode


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_record(many, monkeypatch):
    arguments, expected = many

    def killed(at):
        """Killed when the file with this number is complete but not yet in its place."""
        replace, count = os.replace, iter(range(at, -1, -1))

        def or_die(source, target):
            if next(count) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = or_die
        cli.main(arguments)

    kept = {}
    # While drawing the second picture; before the features of the first chunk; and so on, each from where it stands.
    for at in (1, 4, 5, 1):
        assert ended(in_child(killed, at)) == -signal.SIGKILL
        assert not Path("eval.json").exists()
        now = {path: path.stat().st_mtime_ns for path in Path("eval.cache").rglob("*.*") if path.suffix != ".part"}
        assert kept.items() <= now.items()
        kept = now
    assert 0 < sum(path.suffix == ".png" for path in kept) < 12
    assert cli.main(arguments) == 0
    assert json.loads(Path("eval.json").read_text()) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(Path("eval.cache").rglob("*.part"))


def test_two_processes_share_the_pictures_and_give_the_record_of_one(many):
    arguments, expected = many

    def one_of_two():
        reset_accelerator()
        drawn = []
        draw = drawing.Drawing.draw

        def counted(self, path, number, caption):
            drawn.append(number)
            draw(self, path, number, caption)

        drawing.Drawing.draw = counted
        status = cli.main(arguments)
        Path(f"drawn-{os.environ['RANK']}").write_text(" ".join(map(str, drawn)))
        os._exit(status)

    assert together(one_of_two) == [0, 0]
    assert json.loads(Path("eval.json").read_text()) == expected
    assert Path("drawn-0").read_text() == "0 1 2 3 8 9 10 11" and Path("drawn-1").read_text() == "4 5 6 7"


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("mistakes are found before anything is loaded")

    monkeypatch.setattr(feature_networks, "load", load)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--folder drawn", "nothing to compute: give --against, --clip or --save-statistics"),
        ("--folder drawn --against nowhere", "--against: expected a folder of pictures, 'nowhere' does not exist"),
        ("--folder empty --against drawn", "--folder: expected 2 or more pictures"),
        ("--folder drawn --against drawn --steps 3", "--steps is for drawing from --captions"),
        ("--folder drawn --against drawn --digits 3", "--digits is for models that draw digits"),
        ("--folder drawn --against drawn --resolution 0", "--resolution: expected 1 or more, got 0"),
        ("--folder drawn --against my_features.py", "--against: my_features.py cannot be read as safetensors"),
        ("--folder drawn --clip x/y", "--captions is not given"),
        ("--folder drawn --captions two.txt --clip x/y", "--captions: 2 of them, and 3 pictures in drawn"),
        ("--folder drawn --against drawn --clip-prefix x", "--clip-prefix goes with --clip"),
        ("--folder drawn --save-statistics x.npz", "expected a .safetensors file, got 'x.npz'"),
        ("--captions nothing.txt --against drawn", "--captions: cannot read nothing.txt"),
        ("--captions gap.txt --against drawn", "--captions: line 2 of gap.txt is empty"),
        ("--captions two.txt --against drawn --n 3", "--n: two.txt has 2 captions, got 3"),
        ("--captions two.txt --against drawn --model none", "--model: the folder 'none' does not exist"),
        ("--captions two.txt --against drawn --guidance -1", "--guidance: expected 0 or more, got -1"),
        ("--against drawn", "--against goes with --folder or --captions, neither of which is given"),
        ("--dtype float16", "--dtype goes with --folder or --captions"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(run, nothing_is_loaded, arguments, named):
    write_pictures("drawn", 3)
    Path("empty").mkdir()
    Path("two.txt").write_text("one\ntwo\n")
    Path("gap.txt").write_text("one\n\nthree\n")
    status, out, err = run(*arguments.split())
    assert status == 1 and out == ""
    assert err.startswith("linattn eval: ") and named in err and err.count("\n") == 1
    assert not Path("eval.json").exists()


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ("resnet", "expected inception, digits or MODULE:CALLABLE, got 'resnet'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("my_features:g", "module my_features has no 'g'"),
        ("my_features:flat", "expected features (3, d), got (3,)"),
        ("my_features:undefined", "not finite"),
    ],
)
def test_a_network_that_cannot_be_had_is_one_line(run, features, named):
    write_pictures("drawn", 3)
    status, _, err = run("--folder", "drawn", "--against", "drawn", "--features", features)
    assert status == 1 and "--features" in err and named in err and err.count("\n") == 1


def test_what_has_to_be_fetched_is_named_where_there_is_no_network(run, monkeypatch):
    write_pictures("drawn", 3)
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    status, _, err = run("--folder", "drawn", "--against", "drawn")
    assert status == 1 and "inception needs clean-fid" in err and "pip install 'linattn[eval]'" in err
    Path("three.txt").write_text("one\ntwo\nthree\n")
    status, _, err = run("--folder", "drawn", "--captions", "three.txt", "--clip", "openai/clip-vit-large-patch14")
    assert status == 1 and "'openai/clip-vit-large-patch14' is no folder here" in err and err.count("\n") == 1


def test_a_file_that_is_no_picture_is_named(run):
    write_pictures("drawn", 3)
    Path("drawn/1/001.png").write_bytes(b"no picture")
    status, _, err = run("--folder", "drawn", "--against", "drawn", *POOLED)
    assert status == 1 and "cannot read drawn/1/001.png as a picture" in err and err.count("\n") == 1
