"""Training of Inf-DiT: the recorded loss with every gradient, pairs and their random numbers, whole runs."""

import copy
import io
import json
import logging
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("diffusers", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("scipy", reason='training needs the extra: pip install "linattn[train]"')

import scipy.stats
from helpers import goldens, runs
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from linattn.adapters import InfDiTTransformer2DModel, InfDiTUpscalePipeline
from linattn.adapters.infdit.official import to_official_names
from linattn.cli import main
from linattn.cli.distill import resolve
from linattn.distill import checkpoint, data, noise, pipelines, recipe
from linattn.distill.data.degradation import FACTOR, degrade
from linattn.distill.denoiser import InfDiTDenoiser
from linattn.distill.objectives.edm import EDMTraining, edm_losses, with_dropped
from linattn.distill.student import WholeModel
from linattn.distill.trainer import Trainer
from linattn.distill.upscaling import Upscaling, named
from linattn.schedulers import EDMScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

#: README of the goldens: float32, relative L2.
RECORDED = 1e-5
#: Chance that a right share is taken for a wrong one, at a seed that is fixed.
UNLIKELY = 1e-3
TINY = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "block_size": 4, "vector_dim": 8}
SIDE = 32  # of the crops: 2 x 2 blocks of 4 x 4 tokens of 4 x 4 pixels


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


# -------------------------------------------------------------------------------------------------- the recorded loss


@pytest.fixture(scope="module")
def recorded():
    """The golden's tensors; one step of the objective from them; the gradients under the golden's names."""
    tensors, metadata = goldens.load("infdit", "train_loss")
    sizes = metadata["meta"]
    model = InfDiTTransformer2DModel(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        block_size=sizes["image_block_size"] // 4,
        vector_dim=sizes["vector_dim"],
    )
    model.load_official_state_dict({k[2:]: v.float() for k, v in tensors.items() if k.startswith("w.")})
    objective = EDMTraining(InfDiTDenoiser(model), noise.EDMSchedule())
    condition = {"lr_up": tensors["lr_up"], "lr_image": tensors["lr"], "image_embeds": tensors["vector"]}
    inputs = [tensors[name] for name in ("hr", "noise", "sigmas")]
    losses = objective(*inputs, condition, tuple(tensors["pos_offset_row_col"].tolist()))
    losses["loss"].backward()
    gradients = copy.deepcopy(model)
    for own, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        own.data = parameter.grad
    return tensors, losses, to_official_names(gradients), (objective, condition)


def test_losses_are_the_recorded_ones(recorded):
    tensors, losses, _, (objective, condition) = recorded
    schedule, sigmas = objective.schedule, tensors["sigmas"]
    noisy = schedule.add_noise(tensors["hr"], tensors["noise"], sigmas)
    offset = tuple(tensors["pos_offset_row_col"].tolist())
    with torch.no_grad():
        denoised = objective.student(noisy, sigmas, condition, position_offset=offset)
    made = edm_losses(denoised, tensors["hr"], schedule.loss_weights(sigmas))
    assert goldens.relative_error(made, tensors["loss_per_sample"]) < RECORDED
    assert goldens.relative_error(losses["loss"], tensors["loss_per_sample"].mean()) < RECORDED
    errors = ((denoised - tensors["hr"]) ** 2).mean()
    torch.testing.assert_close(losses["error"], errors, rtol=1e-5, atol=0)
    assert not losses["error"].requires_grad


def test_gradients_are_the_recorded_ones(recorded):
    tensors, _, gradients, _ = recorded
    in_full = [key for key in tensors if key.startswith("grad.")]
    assert len(in_full) == 11
    for key in in_full:
        assert goldens.relative_error(gradients[key.removeprefix("grad.")], tensors[key]) < RECORDED, key


def test_every_gradient_has_the_recorded_norm_and_there_are_no_others(recorded):
    tensors, _, gradients, _ = recorded
    norms = {key.removeprefix("gnorm."): value for key, value in tensors.items() if key.startswith("gnorm.")}
    assert gradients.keys() == norms.keys()
    largest = max(norms.values())
    for key, norm in norms.items():
        made = gradients[key].norm()
        if key.endswith("cross_k_ln.bias"):  # a shift of all keys changes nothing: its true gradient is 0
            assert made < RECORDED * largest
        else:
            torch.testing.assert_close(made, norm.reshape(()), rtol=RECORDED, atol=0, msg=key)


def test_the_offset_of_positions_reaches_the_network(recorded):
    """The losses cannot tell: attention knows differences of positions alone."""
    tensors, _, _, (objective, condition) = recorded
    seen = []
    handle = objective.student.model.register_forward_pre_hook(
        lambda _module, _inputs, options: seen.append(options["position_offset"]), with_kwargs=True
    )
    inputs = [tensors[name] for name in ("hr", "noise", "sigmas")]
    with torch.no_grad():
        objective(*inputs, condition, (3, 6))
        objective(*inputs, condition)
    handle.remove()
    assert seen == [(3, 6), (0, 0)]


@pytest.mark.parametrize("level", ["hi", "lo"])
def test_denoiser_is_the_recorded_preconditioned_network(level):
    tensors, metadata = goldens.load("infdit", "model_forward")
    weights, _ = goldens.load("infdit", "tiny_weights")
    sizes = metadata["meta"]
    model = InfDiTTransformer2DModel(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        block_size=sizes["image_block_size"] // 4,
        vector_dim=sizes["vector_dim"],
    )
    model.load_official_state_dict({k.removeprefix("w."): v.float() for k, v in weights.items()})
    lr = tensors["lr"].float()
    models = pipelines.InfDiT(InfDiTUpscalePipeline(model, EDMScheduler()))
    condition = {"lr_image": lr, "lr_up": models.enlarge(lr), "image_embeds": tensors["vector"].float()}
    with torch.no_grad():
        made = models.denoiser(model)(
            tensors[f"{level}.x"].float(), tensors[f"{level}.sigma"].float().reshape(-1).expand(len(lr)), condition
        )
    assert goldens.relative_error(made, tensors[f"{level}.full"].float()) < RECORDED


# ------------------------------------------------------------------------------------------------ noise and its numbers


def drawn(numbers, *, seed=3, dropout=0.07, max_offset=896, shape=(3, 16, 16), **options):
    schedule = noise.EDMSchedule(**options)
    return noise.draw_pairs(numbers, shape, seed=seed, schedule=schedule, dropout=dropout, max_offset=max_offset)


@pytest.fixture(scope="module")
def many():
    return drawn(range(3000), dropout=0.07, shape=(3, 4, 4))


def test_logarithms_of_noise_levels_are_normal(many):
    assert scipy.stats.kstest(many.timesteps.log().double(), "norm", (-1.0, 1.4)).pvalue > UNLIKELY
    other = drawn(range(2000), shape=(3, 4, 4), log_mean=0.5, log_std=0.1).timesteps
    assert scipy.stats.kstest(other.log().double(), "norm", (0.5, 0.1)).pvalue > UNLIKELY
    assert drawn(range(50), log_mean=-9.0, sigma_min=0.001).timesteps.min() == torch.tensor(0.001)


def test_low_resolution_is_dropped_with_its_probability_and_replaced_by_clamped_noise(many):
    share = scipy.stats.binomtest(int(many.dropped.sum()), len(many.dropped), 0.07)
    assert share.pvalue > UNLIKELY
    assert many.lr_noise.shape == (3000, 3, 1, 1) and many.lr_up_noise.shape == (3000, 3, 4, 4)
    for made in (many.lr_noise, many.lr_up_noise):
        assert (made[~many.dropped] == 0).all() and made.abs().max() == 1
    inside = many.lr_up_noise[many.dropped]
    clamped = scipy.stats.binomtest(int((inside == 1).sum()), inside.numel(), scipy.stats.norm.sf(1))
    assert clamped.pvalue > UNLIKELY
    both = many.lr_up_noise[many.dropped][:, :, 0, 0] - many.lr_noise[many.dropped][:, :, 0, 0]
    assert (both != 0).any(), "independent of each other"
    image = torch.full((3, 1, 2, 2), 5.0)
    replaced = with_dropped(image, torch.ones(3, 1, 2, 2), torch.tensor([True, False, True]))
    assert replaced.mean((1, 2, 3)).tolist() == [1, 5, 1]


def test_offsets_are_uniform_and_one_for_a_batch():
    offsets = np.array([drawn([n, n + 1], shape=(3, 4, 4)).offset for n in range(2000)])
    assert offsets.shape == (2000, 2) and offsets.min() >= 0 and offsets.max() <= 896
    for axis in offsets.T:
        assert scipy.stats.kstest(axis, scipy.stats.randint(0, 897).cdf).pvalue > UNLIKELY
    sigmas = drawn(range(2000), shape=(3, 4, 4)).timesteps
    for a, b in ((offsets[:, 0], offsets[:, 1]), (offsets[:, 0], sigmas), (offsets[:, 1], sigmas)):
        assert scipy.stats.spearmanr(a, b).pvalue > UNLIKELY, "independent of each other and of the noise level"
    assert {drawn([n], max_offset=1).offset for n in range(40)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_random_numbers_belong_to_the_sample_and_the_seed():
    batch, alone = drawn([5, 6, 7], dropout=0.5), drawn([6], dropout=0.5)
    for name in ("timesteps", "noise", "dropped", "lr_noise", "lr_up_noise"):
        assert torch.equal(getattr(batch, name)[1:2], getattr(alone, name)), name
    assert batch.offset == drawn([5], dropout=0.5).offset
    own = np.random.Generator(np.random.Philox(key=[3, 5])).integers(0, 896, size=2, endpoint=True)
    assert batch.offset != tuple(own), "of numbers that are not the noise level's as well"
    assert drawn([5], seed=4).offset != batch.offset and drawn([6]).offset != batch.offset
    assert not torch.equal(drawn([6], seed=4).noise, alone.noise)
    assert torch.equal(drawn([6], dropout=0.0).noise, alone.noise), "what is dropped does not move what is drawn"


def test_weights_undo_the_factor_of_the_network():
    from linattn.schedulers.edm import preconditioning

    schedule, sigmas = noise.EDMSchedule(sigma_data=0.7), torch.tensor([0.01, 0.3, 5.0])
    torch.testing.assert_close(schedule.loss_weights(sigmas), preconditioning(sigmas, 0.7).c_out ** -2)
    clean, added = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(schedule.add_noise(clean, added, sigmas)[2], clean[2] + 5 * added[2])
    assert schedule.target(clean, added, sigmas) is clean
    for name in ("sigma_data", "log_std", "sigma_min"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            noise.EDMSchedule(**{name: 0})


# ------------------------------------------------------------------------------------------------------------- pairs


def coordinates(height, width):
    """A picture that says where each of its pixels lies: (row, column, 0)."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=-1))


CLEAN = Upscaling(degradation=named("bicubic"))


def test_crops_at_full_resolution_are_parts_of_the_picture_some_of_them_mirrored():
    settings = CLEAN.model_copy(update={"full_resolution": 1.0})
    picture, places, mirrored = coordinates(40, 60), set(), 0
    for seed in range(1500):
        made, low = data.pair(picture, (32, 48), np.random.default_rng(seed), settings)
        assert made.shape == (32, 48, 3) and low.shape == (8, 12, 3)
        rows, columns = made[:, 0, 0], made[0, :, 1].astype(int)
        assert (np.diff(rows) == 1).all() and len({*np.diff(columns)}) == 1
        mirrored += columns[0] > columns[-1]
        places.add((rows[0], columns.min()))
    assert places == {(top, left) for top in range(9) for left in range(13)}
    assert scipy.stats.binomtest(mirrored, 1500, 0.3).pvalue > UNLIKELY


def test_other_crops_cover_the_shorter_side_and_are_not_mirrored():
    settings = CLEAN.model_copy(update={"full_resolution": 0.0})
    lefts = set()
    for seed in range(200):
        made, _ = data.pair(coordinates(64, 160), (32, 32), np.random.default_rng(seed), settings)
        assert made[0, 0, 0] <= 1 and made[-1, 0, 0] >= 62, "from top to bottom"
        columns = made[0, :, 1].astype(int)
        assert columns[0] < columns[-1]
        lefts.add(columns[0])
    assert min(lefts) <= 1 and max(lefts) >= 94 and len(lefts) > 30


def test_full_resolution_is_chosen_with_its_probability():
    picture = coordinates(64, 64)
    made = [data.pair(picture, (32, 32), np.random.default_rng(seed), CLEAN)[0] for seed in range(1000)]
    full = sum(int(pixels[-1, 0, 0]) - int(pixels[0, 0, 0]) == 31 for pixels in made)
    assert scipy.stats.binomtest(full, 1000, 0.7).pvalue > UNLIKELY


def test_the_small_picture_is_the_degraded_crop():
    picture, settings = coordinates(48, 40), Upscaling(degradation=named("strong"))
    made, low = data.pair(picture, (32, 32), np.random.default_rng(5), settings)
    numbers = np.random.default_rng(5)
    numbers.random(4)  # where the crop lies
    assert np.array_equal(low, degrade(made, numbers, settings.degradation))
    with pytest.raises(ValueError, match=r"at least 32 x 32 pixels, got 31 x 40"):
        data.pair(coordinates(31, 40), (32, 32), numbers, settings)


PICTURES = {"a": (40, 40), "b": (16, 64), "c": (64, 36), "d": (33, 70), "e": (31, 90), "f": (32, 32)}  # height, width
LARGE = ["a", "c", "d", "f"]


def stored(name):
    """A smooth random picture as the bytes of a file."""
    numbers = np.random.default_rng(sum(name.encode()))
    height, width = PICTURES[name]
    small = Image.fromarray(numbers.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The pictures without captions, by kind of source."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images").mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for name in PICTURES:
            (root / "images" / f"{name}.png").write_bytes(stored(name))
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(stored(name))
            tar.addfile(member, io.BytesIO(stored(name)))
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [{"bytes": stored(name), "path": None} for name in PICTURES]})
    table.cast_column("image", datasets.Image()).save_to_disk(str(root / "arrow"))
    return {"images": root / "images", "webdataset": root / "0.tar", "datasets": root / "arrow"}


def settings(sources, kind="images", **changes):
    options = {"kind": kind, "path": str(sources[kind]), "resolution": SIDE, "workers": 0, **changes}
    return recipe.Data(**options)


@pytest.mark.parametrize("kind", ["images", "webdataset", "datasets"])
def test_pictures_need_no_captions_where_none_are_used(sources, kind, caplog):
    wanted = settings(sources, kind)
    with pytest.raises(data.DataError, match="caption"):
        data.open_source(wanted)
    source = data.open_source(wanted, captions=False)
    assert [source.size(index) for index in range(len(source))] == list(PICTURES.values())
    assert {source.caption(index) for index in range(len(source))} == {""}
    with caplog.at_level(logging.WARNING):
        large = data.LargeEnough(source, SIDE)
    assert "2 of 6 pictures have a side below 32 pixels" in caplog.text
    large = pickle.loads(pickle.dumps(large))
    assert [large.size(index) for index in range(len(large))] == [PICTURES[name] for name in LARGE]
    for index, name in enumerate(LARGE):
        inner = list(PICTURES).index(name)
        assert (large.key(index), large.stamp(index)) == (source.key(inner), source.stamp(inner))
        assert np.array_equal(np.array(large.image(index)), np.array(Image.open(io.BytesIO(stored(name)))))
        assert large.caption(index) == ""
    with pytest.raises(data.DataError, match=r"at least 100 x 100 pixels .*all 6 are smaller"):
        data.LargeEnough(source, 100)


def test_no_warning_where_all_pictures_are_large_enough(sources, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(data.LargeEnough(data.open_source(settings(sources), captions=False), 16)) == len(PICTURES)
    assert caplog.text == ""


def test_what_would_be_a_caption_is_not_read_where_none_are_used(sources, tmp_path):
    (tmp_path / "a.png").write_bytes(stored("a"))
    (tmp_path / "metadata.jsonl").write_text("no JSON")
    with pytest.raises(data.DataError, match="expected JSON"):
        data.open_source(settings({"images": tmp_path}))
    assert len(data.open_source(settings({"images": tmp_path}), captions=False)) == 1


def batches(wanted, *, first=0, count=3, seed=1, size=2, **share):
    source = data.LargeEnough(data.open_source(wanted, captions=False), wanted.resolution)
    order = data.Order.of(source, wanted, size, seed)
    return list(data.pair_loader(source, order, wanted, first=first, count=count, seed=seed, **share))


def assert_same(made, wanted):
    assert len(made) == len(wanted)
    for a, b in zip(made, wanted, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_pairs_are_the_same_from_every_source_process_and_worker(sources):
    wanted = batches(settings(sources))
    assert [b["number"].tolist() for b in wanted] == [[0, 1], [2, 3], [4, 5]]
    assert wanted[0]["image"].shape == (2, 3, 32, 32) and wanted[0]["lr_image"].shape == (2, 3, 8, 8)
    assert all(b[name].min() >= -1 and b[name].max() <= 1 for b in wanted for name in ("image", "lr_image"))
    for kind in ("webdataset", "datasets"):
        assert_same(batches(settings(sources, kind)), wanted)
    assert_same(batches(settings(sources, workers=2)), wanted)
    assert_same(batches(settings(sources), first=1, count=2), wanted[1:])
    shares = [batches(settings(sources), count=2, rank=rank, world=2) for rank in range(2)]
    assert_same([shares[k % 2][k // 2] for k in range(3)], wanted)
    assert not torch.equal(batches(settings(sources), seed=2)[0]["image"], wanted[0]["image"])
    epochs = torch.cat([batch["lr_image"] for batch in batches(settings(sources), count=3 * len(LARGE) // 2)])
    assert len(epochs.unique(dim=0)) == 3 * len(LARGE), "a picture is degraded anew in every epoch"
    with pytest.raises(ValueError, match="0 <= rank < world"):
        batches(settings(sources), rank=2, world=2)


def test_a_broken_picture_is_named(sources, tmp_path):
    content = stored("a")
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(data.DataError, match=r"sample 'a\.png'"):
        batches(settings({"images": tmp_path}), size=1, count=1)


# --------------------------------------------------------------------------------------------------------- whole runs


def tiny_clip():
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=TINY["vector_dim"])
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sources):
    """A pipeline, one without an image vector, a CLIP, and the pictures."""
    root = tmp_path_factory.mktemp("infdit")
    torch.manual_seed(1)
    for name, vector_dim, encoder in (("infdit", 8, tiny_clip()), ("plain", 0, None)):
        model = InfDiTTransformer2DModel(**TINY | {"vector_dim": vector_dim})
        for parameter in model.parameters():  # nothing of a trained model is zero
            parameter.data.add_(torch.randn(parameter.shape) * 0.02)
        InfDiTUpscalePipeline(model, EDMScheduler(sigma_data=0.4), encoder).save_pretrained(root / name)
    tiny_clip().save_pretrained(root / "clip")
    (root / "images").symlink_to(sources["images"])
    return root


SMALL = (
    "data.kind=images",
    f"data.resolution={SIDE}",
    "data.workers=0",
    "training.batch_size=2",
    "training.steps=3",
    "training.warmup_steps=0",
    "training.learning_rate=1e-3",
    "training.final_learning_rate=1e-4",
    "training.mixed_precision=no",
    "training.gradient_checkpointing=false",
    "training.ema_decay=null",
    "output.log_with=null",
)


def small(folders, out, *overrides, start="infdit"):
    model = ["model.config=null", "model.image_encoder=null", f"model.pretrained={folders / start}"] if start else []
    places = [f"data.path={folders / 'images'}", f"output.folder={out}"]
    return recipe.load("infdit", [*SMALL, *model, *places, *overrides])


def trainer_of(*arguments, **options):
    runs.reset_accelerator()
    wanted = small(*arguments, **options)
    pipeline_class = resolve(wanted.model.pipeline, "model.pipeline")
    return Trainer(wanted, pipeline_class=pipeline_class, say=lambda _: None)


def train(folders, out, *overrides, **options):
    trainer = trainer_of(folders, out, *overrides, **options)
    trainer.final = trainer.run()
    return trainer


def weights(out, part="transformer"):
    return load_file(out / "final" / part / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} the first"


def test_the_shipped_recipe_has_the_published_settings():
    made = recipe.load("infdit")
    wanted = made.objective
    assert (wanted.log_sigma_mean, wanted.log_sigma_std, wanted.sigma_min) == (-1.0, 1.4, 0.001)
    assert (wanted.lr_dropout, wanted.max_offset) == (0.07, 7 * 128)
    assert made.data.resolution == 512 and made.data.workers == 6
    assert (made.data.upscaling.full_resolution, made.data.upscaling.flip) == (0.7, 0.3)
    assert made.data.upscaling.degradation == named("strong")
    training = made.training
    assert (training.optimizer, training.learning_rate, training.betas) == ("adamw", 1e-4, (0.9, 0.999))
    assert (training.epsilon, training.weight_decay, training.max_grad_norm) == (1e-8, 1e-4, 0.1)
    assert (training.steps, training.warmup_steps, training.batch_size) == (1_000_000, 10_000, 1)
    assert training.mixed_precision == "bf16" and training.ema_decay is not None
    assert made.model.config == {} and made.student.adapter is None
    assert made.output.checkpoint_every == 5000


def test_learning_rate_rises_then_falls_to_its_tenth(folders, tmp_path):
    options = ["training.steps=10", "training.warmup_steps=2"]
    trainer = trainer_of(folders, tmp_path, *options)
    _, _, schedule = trainer._prepare()
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    falling = [1e-3 + (1e-4 - 1e-3) * k / 8 for k in range(8)]
    assert rates == pytest.approx([0, 0.5e-3, *falling]) and schedule.get_last_lr()[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("start", ["infdit", "plain", None])
def test_shipped_recipe_moves_the_whole_network_and_nothing_else(folders, tmp_path, start):
    """In bfloat16, as shipped, from a pipeline with an image vector, from one without, and from new weights."""
    new = [f"model.config={json.dumps(TINY)}", f"model.image_encoder={folders / 'clip'}"] if start is None else []
    options = ["training.mixed_precision=bf16", "training.gradient_checkpointing=true", *new]
    trainer = trainer_of(folders, tmp_path / "run", *options, start=start)
    before = {name: value.clone() for name, value in trainer.student.model.state_dict().items()}
    assert set(trainer.trainable) == {name for name, _ in trainer.models.model.named_parameters()}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trainer.trainable.values())
    final = trainer.run()
    after = weights(tmp_path / "run")
    assert before.keys() == after.keys()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not still, f"{still} did not move in three steps"
    loaded = InfDiTUpscalePipeline.from_pretrained(final)
    assert all(torch.equal(value, after[name]) for name, value in loaded.transformer.state_dict().items())
    if start is not None:
        stock = InfDiTUpscalePipeline.from_pretrained(folders / start)
        assert all(torch.equal(value, before[name]) for name, value in stock.transformer.state_dict().items())
        assert (
            dict(loaded.scheduler.config) == dict(stock.scheduler.config) and loaded.scheduler.config.sigma_data == 0.4
        )
    if start == "plain":
        assert loaded.image_encoder is None
    else:
        wanted = tiny_clip().state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.image_encoder.state_dict().items())
    assert loaded(Image.new("RGB", (9, 7)), num_inference_steps=1).images[0].size == (36, 28)


def test_new_weights_are_those_of_the_seed(folders, tmp_path):
    options = [f"model.config={json.dumps(TINY | {'vector_dim': 0})}", "model.image_encoder=null"]
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # what came before does not matter
        trainer = trainer_of(folders, tmp_path, *options, f"training.seed={seed}", start=None)
        states.append(trainer.student.model.state_dict())
    key = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_training_lowers_the_loss(folders, tmp_path):
    """At fixed noise levels, on a picture that is not drawn again: what is learnt is not that picture."""
    options = ["training.steps=40", "training.learning_rate=3e-3", "training.batch_size=4", "training.max_grad_norm=1"]
    trainer = trainer_of(folders, tmp_path, *options, "data.upscaling={degradation: bicubic}", start="plain")
    batch = trainer.task.encode(
        next(
            iter(
                trainer.task.batches(
                    trainer.source, trainer.order, first=999, count=1, text_cache=None, latent_cache=None
                )
            )
        ),
        trainer.models,
        trainer.schedule,
        torch.device("cpu"),
    )
    batch["timesteps"] = torch.full((4,), 0.5)
    losses = []
    for run in (lambda: None, trainer.run):
        run()
        with torch.no_grad():
            losses.append(trainer.objective(**batch)["loss"].item())
    assert losses[1] < 0.8 * losses[0], losses


def test_the_batch_becomes_what_the_objective_needs(folders, tmp_path):
    trainer = trainer_of(folders, tmp_path, "objective.lr_dropout=0.5", "training.batch_size=8")
    (batch,) = trainer.task.batches(trainer.source, trainer.order, first=0, count=1, text_cache=None, latent_cache=None)
    made = trainer._encode(batch)
    random = noise.draw_pairs(range(8), (3, SIDE, SIDE), seed=0, schedule=trainer.schedule, dropout=0.5, max_offset=896)
    assert made["clean"] is batch["image"] and torch.equal(made["noise"], random.noise)
    assert torch.equal(made["timesteps"], random.timesteps) and made["position_offset"] == random.offset
    assert trainer.schedule.sigma_data == trainer.objective.student.sigma_data == 0.4, "the pipeline's own"
    dropped, condition = random.dropped, made["condition"]
    assert 0 < dropped.sum() < 8
    enlarged = torch.nn.functional.interpolate(batch["lr_image"], (SIDE, SIDE), mode="bicubic", antialias=True)
    assert torch.equal(condition["lr_image"][~dropped], batch["lr_image"][~dropped])
    assert torch.equal(condition["lr_image"][dropped], random.lr_noise[dropped])
    assert torch.equal(condition["lr_up"][~dropped], enlarged.clamp(-1, 1)[~dropped])
    assert torch.equal(condition["lr_up"][dropped], random.lr_up_noise[dropped])
    vector = trainer.models.pipeline.encode_image(batch["lr_image"])
    assert torch.equal(condition["image_embeds"], vector) and not vector.requires_grad
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(8))


def test_objective_s_settings_reach_the_noise(folders, tmp_path):
    options = ["objective.log_sigma_mean=-2", "objective.log_sigma_std=0.5", "objective.sigma_min=0.01"]
    schedule = trainer_of(folders, tmp_path, *options).schedule
    assert (schedule.log_mean, schedule.log_std, schedule.sigma_min) == (-2, 0.5, 0.01)


EVERYTHING = [
    "training.steps=8",
    "training.gradient_accumulation=2",
    "training.ema_decay=0.9",
    "training.warmup_steps=2",
    "objective.lr_dropout=0.3",
    "output.checkpoint_every=1",
]


def test_run_killed_at_random_moments_ends_in_the_same_bits(folders, tmp_path):
    duration = runs.timed(lambda: train(folders, tmp_path / "whole", *EVERYTHING))
    killed = runs.killed_until_done(train, folders, tmp_path / "killed", *EVERYTHING, duration=duration)
    assert killed >= 1
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    state, other = (checkpoint.read_state(checkpoint.latest(tmp_path / name)) for name in ("whole", "killed"))
    assert state == other


def test_two_processes_end_in_the_bits_of_one_that_accumulates_twice_as_much(folders, tmp_path):
    """DDP halves each process's gradients and adds them; accumulation halves each micro step's and adds them."""
    options = ["training.steps=4", "training.ema_decay=0.5", "objective.lr_dropout=0.5"]
    train(folders, tmp_path / "one", *options, "training.gradient_accumulation=2")
    assert runs.together(train, folders, tmp_path / "two", *options) == [0, 0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_gradient_checkpointing_changes_no_bit(folders, tmp_path):
    train(folders, tmp_path / "a")
    train(folders, tmp_path / "b", "training.gradient_checkpointing=true")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def train_sharded(folders, out, *overrides):
    """One process of a run under FSDP."""
    accelerator = runs.sharded_accelerator("InfDiTBlock")
    trainer = Trainer(
        small(folders, out, *overrides),
        pipeline_class=InfDiTUpscalePipeline,
        accelerator=accelerator,
        say=lambda _: None,
    )
    trainer.run()
    pieces = {type(p).__name__ for p in trainer.student.model.parameters()}
    assert pieces == {"DTensor"}, f"nothing was sharded: {pieces}"


def test_fully_sharded_run_ends_where_the_replicated_one_does(folders, tmp_path):
    options = ["training.steps=2", "training.max_grad_norm=0.5"]
    assert runs.together(train, folders, tmp_path / "replicated", *options) == [0, 0]
    assert runs.together(train_sharded, folders, tmp_path / "sharded", *options) == [0, 0]
    replicated, sharded = weights(tmp_path / "replicated"), weights(tmp_path / "sharded")
    assert replicated.keys() == sharded.keys()
    for key, value in replicated.items():
        if not key.endswith("cross_attn.norm_k.bias"):  # a gradient of 0 up to rounding: Adam steps where that points
            # Gradients are reduced in other orders; Adam turns a rounding into a small share of its step of 1e-3.
            torch.testing.assert_close(sharded[key], value, rtol=0, atol=2e-5)
    loaded = InfDiTUpscalePipeline.from_pretrained(tmp_path / "sharded" / "final")
    assert type(loaded.transformer) is InfDiTTransformer2DModel


def test_checkpoints_hold_the_pipeline_and_the_average_is_what_is_exported(folders, tmp_path):
    options = ["training.ema_decay=0.6", "output.checkpoint_every=1", "output.keep_checkpoints=null"]
    train(folders, tmp_path, *options)
    newest = checkpoint.latest(tmp_path)
    raw, average = load_file(newest / "trainable.safetensors"), load_file(newest / "ema.safetensors")
    kept = InfDiTUpscalePipeline.from_pretrained(newest / "pipeline")
    assert all(torch.equal(value, raw[name]) for name, value in kept.transformer.state_dict().items())
    final = weights(tmp_path)
    assert all(torch.equal(value, average[name]) for name, value in final.items())
    assert any(not torch.equal(value, raw[name]) for name, value in final.items())


def test_validation_enlarges_pictures_and_changes_nothing(folders, tmp_path):
    files = [str(folders / "images" / f"{name}.png") for name in ("a", "b")]
    shown = f"output.validation={{images: {json.dumps(files)}, every: 2, steps: 2}}"
    train(folders, tmp_path / "a", shown)
    train(folders, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    sheets = sorted((tmp_path / "a" / "validation").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000002.png", "step-00000003.png"]
    first, second = (np.asarray(Image.open(sheet)).astype(int) for sheet in sheets)
    (h1, w1), (h2, w2) = ((FACTOR * side for side in PICTURES[name]) for name in ("a", "b"))
    assert first.shape == (h1 + h2, 2 * w2, 3)
    bicubic = Image.open(files[0]).resize((w1, h1), Image.Resampling.BICUBIC)
    assert (first[:h1, :w1] == np.asarray(bicubic)).all() and (second[:h1, :w1] == first[:h1, :w1]).all()
    assert (first[h1:, w2:] != second[h1:, w2:]).any(), "the student has learnt"


def test_the_model_itself_is_trained_and_no_second_copy_is_held(folders, tmp_path):
    trainer = trainer_of(folders, tmp_path)
    assert trainer.student.model is trainer.models.model is trainer.models.pipeline.transformer
    blank = trainer.student.blank()
    assert isinstance(blank, WholeModel) and blank.model is not trainer.student.model
    assert blank.trainable().keys() == trainer.trainable.keys()
    assert not any(p.requires_grad for p in trainer.models.pipeline.image_encoder.parameters())
    trainer.student.model.__class__ = type("Sharded", (InfDiTTransformer2DModel,), {})  # as fully_shard does it
    assert type(trainer.student.blank().model) is InfDiTTransformer2DModel


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["model.pretrained=null"], "model.pretrained: required, and missing"),
        (["model.config={}"], "model.config: expected null beside model.pretrained"),
        (["model.pretrained=null", "model.config={}", "model.pipeline=null"], "model.pipeline: expected module:Class"),
        (["student.adapter=a:B"], "student.adapter: expected null beside objective.kind: edm, got 'a:B'"),
        (["student.train=lora"], "student.train: expected 'full' beside objective.kind: edm, got 'lora'"),
        (["data.caption_drop=0.1"], "data.caption_drop: expected 0.0 beside objective.kind: edm"),
        (["data.image_key=file"], "data.image_key: expected null beside objective.kind: edm, got 'file'"),
        (["data.resize=squash"], "data.resize: expected 'crop' beside objective.kind: edm, got 'squash'"),
        (["data.random_flip=true"], "data.random_flip: expected false beside objective.kind: edm, got true"),
        (["data.cache={latents: true}"], "data.cache.latents: expected false beside objective.kind: edm"),
        (["output.validation.prompts=[a cat]"], "output.validation.prompts: expected [] beside objective.kind: edm"),
        (["training.lr_schedule=linear"], "training.final_learning_rate: expected null beside training.lr_schedule"),
        (["training.final_learning_rate=1"], "training.final_learning_rate: expected less than training.learning_rate"),
        (["objective.lr_dropout=1.5"], "objective.lr_dropout: expected a number"),
        (["objective={kind: attention}"], "student.adapter: expected module:Class beside objective.kind: attention"),
    ],
)
def test_what_does_not_go_together_is_told_by_key(folders, tmp_path, options, line):
    with pytest.raises(recipe.RecipeError) as caught:
        small(folders, tmp_path, *options)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


def test_what_belongs_to_enlarging_is_refused_elsewhere():
    overrides = ["output.validation.images=[a.png]", "model.image_encoder=b"]
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load("linfusion_sd15", ["data.path=p", "output.folder=o", *overrides])
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "model.image_encoder",
        "output.validation.images",
    ]


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ("infdit", ["data.resolution=40"], "data.resolution: expected a multiple of 16 for a InfDiTUpscalePipeline"),
        ("infdit", ["data.resolution=80"], r"expected pictures of at least 80 x 80 pixels"),
        ("infdit", ["output.validation.images=[absent.png]"], "output.validation.images: expected image files, got"),
        ("infdit", ["model.image_encoder=./absent"], "model.image_encoder: expected a folder that exists"),
        ("infdit", ["model.text_length=12"], "model.text_length: expected null beside objective.kind: edm"),
        ("infdit", ["model.pipeline=null"], "model.pipeline: expected the import path of InfDiTUpscalePipeline"),
        ("infdit", ["model.pipeline=linattn.adapters:CLEAR"], "InfDiTUpscalePipeline for .*, got 'CLEAR'"),
        ("infdit", ["model.pipeline=linattn.adapters:Inf"], "model.pipeline: linattn.adapters has no 'Inf'"),
        (None, ["model.image_encoder=null"], r"model\.image_encoder: expected the name .*vector_dim = 768"),
        (None, ["model.image_encoder=CLIP"], r"model\.image_encoder: expected one with vectors of 768 .*, got 8"),
        (None, ["model.config={hidden_sise: 3}"], r"model\.config: .*hidden_sise"),
        (None, ["model.config={hidden_size: 3}"], r"model\.config: hidden_size must be"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_and_exit_status_one(
    folders, tmp_path, capsys, start, options, message
):
    given = [*SMALL, f"data.path={folders / 'images'}", f"output.folder={tmp_path / 'run'}", "model.image_encoder=null"]
    if start:
        given += ["model.config=null", f"model.pretrained={folders / start}"]
    else:
        given += ["model.config={num_layers: 1}"]
    options = [option.replace("CLIP", str(folders / "clip")) for option in options]
    arguments = [part for option in (*given, *options) for part in ("--set", option)]
    assert main(["distill", "infdit", *arguments]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told) and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_another_scale_is_refused(folders, tmp_path):
    model = InfDiTTransformer2DModel(**TINY | {"vector_dim": 0, "sr_scale": 2, "lr_patch_size": 2})
    InfDiTUpscalePipeline(model, EDMScheduler()).save_pretrained(tmp_path / "two")
    with pytest.raises(recipe.RecipeError, match=r"model\.pretrained: expected sr_scale = 4 .*got 2"):
        trainer_of(folders, tmp_path / "run", f"model.pretrained={tmp_path / 'two'}")


def test_classes_that_the_recipe_names_have_to_be_handed_in(folders, tmp_path):
    new = [f"model.config={json.dumps(TINY)}", f"model.image_encoder={folders / 'clip'}"]
    with pytest.raises(TypeError, match=r"the class that model\.pipeline names"):
        Trainer(small(folders, tmp_path, *new, start=None))
    with pytest.raises(ValueError, match=r"model\.pipeline: expected the import path of InfDiTUpscalePipeline"):
        Trainer(small(folders, tmp_path))


def test_command_trains_and_says_where_the_result_is(folders, tmp_path, capsys):
    given = [*SMALL, f"data.path={folders / 'images'}", f"output.folder={tmp_path / 'run'}", "training.steps=1"]
    given += ["model.config=null", "model.image_encoder=null", f"model.pretrained={folders / 'plain'}"]
    arguments = ["distill", "infdit", *(part for option in given for part in ("--set", option))]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "InfDiTUpscalePipeline); trains" in told and "4 pictures" in told and not (tmp_path / "run").exists()
    runs.reset_accelerator()
    assert main(arguments) == 0
    assert f"done: {tmp_path / 'run' / 'final'}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["student"]["adapter"] is None
    assert recipe.load(tmp_path / "run" / "recipe.yaml").data.upscaling.degradation == named("strong")
    with pytest.raises(recipe.RecipeError, match=r"data\.cache: expected text: true"):
        trainer_of(folders, tmp_path / "other", start="plain").prepare()
