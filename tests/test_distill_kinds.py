"""Kinds of pipelines that step distillation takes: conditions made of pictures, PixArt, kinds of one's own."""

import contextlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')

from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionXLAdapterPipeline
from helpers import runs
from helpers.tiny_kinds import KINDS, OWN, tiny_adapter, tiny_kind
from helpers.tiny_pipelines import tiny_ip_adapter, tiny_pipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from linattn.cli import main
from linattn.cli.distill import resolve
from linattn.distill import pipelines, recipe
from linattn.distill.data.edges import canny
from linattn.distill.data.masks import ellipse_mask, random_mask
from linattn.distill.noise import _stream
from linattn.distill.pipelines import picture_conditioned
from linattn.distill.pipelines.face_swap import FaceSwap
from linattn.distill.trainer import Trainer
from linattn.schedulers import PeRFlowScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

SHOWN = ("inpainting", "upscaler", "adapter", OWN)
FAMILIES = ("sd15", "sdxl", "flux", "sd3")
SEED = 7
#: Of a few roundings in float32, relative to numbers about 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    for name in (*KINDS, OWN):
        tiny_kind(name).save_pretrained(root / name)
    for name in FAMILIES:
        tiny_pipeline(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    """Each kind as `load` finds it, once; and the stock pipeline."""
    kept = {}

    def of(name):
        if name not in kept:
            stock = DiffusionPipeline.from_pretrained(folders / name)
            stock.set_progress_bar_config(disable=True)
            kept[name] = pipelines.load(str(folders / name), kind=FaceSwap if name == OWN else None), stock
        return kept[name]

    return of


def photograph(height=48, width=64):
    """Smooth, with an edge or two."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2
    return Image.fromarray(np.stack([4 * x, 5 * y, 200 * disc + 20], axis=-1).clip(0, 255).astype(np.uint8))


def pixels_of(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def condition_of(models, captions, pixels, numbers):
    size = torch.tensor([pixels.shape[2:]] * len(pixels))
    text = models.encode_text(captions) | models.encode_sizes(size, torch.zeros_like(size), size)
    return text | models.picture_condition(pixels, numbers, SEED)


@contextlib.contextmanager
def calls_of(network):
    """The arguments of each call of a network, and what it returned."""
    made = []

    def before(_module, args, kwargs):
        lists = {name: [t.clone() for t in value] for name, value in kwargs.items() if isinstance(value, list)}
        made.append([args, kwargs | lists])  # the UNet empties the list of an adapter's features

    def after(_module, _args, _kwargs, output):
        made[-1].append(output[0])

    handles = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("name", [*FAMILIES, *KINDS, OWN])
def test_every_entry_of_a_condition_has_a_policy(loaded, name):
    models, _ = loaded(name)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    condition = condition_of(models, ["a two", ""], pixels, [0, 1])
    assert models.policies().keys() == condition.keys()
    assert all(len(value) == 2 for value in condition.values())
    assert set(models.policies().values()) <= {"empty", "zero", "keep"}
    assert "flash" in models.objectives and models.needs_pixels == (name in SHOWN)
    # What is kept where there is no prompt is none itself.
    empty = models.encode_text([""])
    assert all((policy == "keep") <= (entry not in empty) for entry, policy in models.policies().items())
    assert all((policy == "empty") <= (entry in empty) for entry, policy in models.policies().items())


@pytest.mark.parametrize("name", [*FAMILIES, *KINDS, OWN])
def test_feature_modules_are_there_and_unets_have_one(loaded, name):
    models, _ = loaded(name)
    assert models.feature_modules() == (("mid_block",) if models.component == "unet" else ())
    for module in models.feature_modules():
        models.model.get_submodule(module)


@pytest.mark.parametrize("name", ["sd15", "sd3", "upscaler", "pixart"])
def test_process_is_that_of_the_scheduler(loaded, name):
    models, stock = loaded(name)
    process, t = models.process(), torch.tensor([700])
    if name == "sd3":
        assert process.is_flow and process.shift == 3 and models.process(shift=2.0).shift == 2
        return
    assert process.prediction_type == stock.scheduler.config.prediction_type
    alpha, _ = process.levels(t)
    assert alpha.item() == pytest.approx(stock.scheduler.alphas_cumprod[700].sqrt().item(), rel=1e-6)


# ------------------------------------------------------------------------------------------- as the stock pipelines do


@pytest.mark.parametrize("name", KINDS)
def test_denoiser_calls_the_network_as_the_pipeline_does(loaded, name):
    """And says what it says; of PixArt without the variance."""
    models, stock = loaded(name)
    picture = photograph()
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    options |= {"generator": torch.manual_seed(1)}
    size = (48, 64)
    if name == "inpainting":
        mask = np.zeros((*size, 1), np.float32)
        mask[8:24, 8:40] = 1
        options |= {"image": picture, "mask_image": Image.fromarray((mask[..., 0] * 255).astype(np.uint8))}
    elif name == "upscaler":
        options |= {"image": picture.resize((16, 12)), "noise_level": 33}
    elif name == "adapter":
        edges = canny(np.array(picture)) * 255
        options |= {"image": Image.fromarray(edges.astype(np.uint8)).convert("RGB"), "adapter_conditioning_scale": 0.8}
    else:
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if name != "upscaler":
        options |= {"height": size[0], "width": size[1]}
    network = getattr(stock, models.component)
    with calls_of(network) as calls, torch.no_grad():
        stock("A two", **options)
    condition = condition_of(models, ["A two"], pixels_of(picture), [0])
    assert len(calls) == 2
    for args, kwargs, output in calls:
        sample, t = args if len(args) == 2 else (args[0], kwargs["timestep"])
        channels = models.pipeline.vae.config.latent_channels
        condition = dict(condition)
        if name in ("inpainting", "upscaler"):  # whose random numbers are another's
            condition["concat"] = sample[:, channels:]
        if name == "upscaler":
            condition["class_labels"] = torch.tensor([33])
        with torch.no_grad():
            said = models.denoiser(models.model)(sample[:, :channels], t.reshape(-1), condition)
        torch.testing.assert_close(said, output[:, :channels], **CLOSE)
    if name == "adapter":
        for i, feature in enumerate(kwargs["down_intrablock_additional_residuals"]):
            torch.testing.assert_close(condition[f"residual_{i}"], feature, **CLOSE)


@pytest.mark.parametrize("name", ["pixart", "pixart-sigma"])
def test_pixart_s_condition_matters_to_the_last_entry(loaded, name):
    models, _ = loaded(name)
    pixels = torch.zeros(1, 3, 32, 48)
    condition = condition_of(models, ["two"], pixels, [0])
    assert condition["encoder_attention_mask"].sum() == len("two") + 1
    assert set(condition) == set(models.policies()) and ("resolution" in condition) == (name == "pixart")
    noisy, t, denoiser = torch.randn(1, 4, 16, 24), torch.tensor([500]), models.denoiser(models.model)
    with torch.no_grad():
        said = denoiser(noisy, t, condition)
        for entry in condition:
            changed = condition | {entry: 1 - condition[entry] if "mask" in entry else 2 * condition[entry] + 1}
            assert (denoiser(noisy, t, changed) - said).abs().max() > 1e-4, entry
        # Where the mask says that there is no text, there may be anything.
        nothing = condition["encoder_attention_mask"] == 0
        padded = condition["encoder_hidden_states"].masked_fill(nothing[..., None], 7.0)
        torch.testing.assert_close(denoiser(noisy, t, condition | {"encoder_hidden_states": padded}), said, **CLOSE)


def test_pixart_s_length_of_text_is_the_pipeline_s_unless_it_is_given(folders):
    assert pipelines.load(str(folders / "pixart")).text_length == 120
    models = pipelines.load(str(folders / "pixart-sigma"), text_length=24)
    assert models.encode_text(["a two"])["encoder_hidden_states"].shape == (1, 24, 16)


# ----------------------------------------------------------------------------------------------- picture conditions


@pytest.mark.parametrize("name", SHOWN)
def test_picture_condition_is_of_the_sample_not_of_its_company(loaded, name):
    models, _ = loaded(name)
    pixels = torch.rand(3, 3, 32, 48) * 2 - 1
    together = models.picture_condition(pixels, [5, 6, 7], SEED)
    alone = models.picture_condition(pixels[1:2], [6], SEED)
    for entry, value in together.items():
        torch.testing.assert_close(value[1:2], alone[entry], **CLOSE)
    torch.manual_seed(0)
    np.random.seed(0)
    again = models.picture_condition(pixels, [5, 6, 7], SEED)
    assert all(torch.equal(value, again[entry]) for entry, value in together.items())
    if name != "adapter":  # nothing about which is random
        other = models.picture_condition(pixels, [5, 6, 7], SEED + 1)
        assert not torch.equal(together["concat"], other["concat"])


def test_inpainting_sees_the_mask_and_latents_of_what_it_leaves(loaded):
    models, stock = loaded("inpainting")
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    own = picture_conditioned.streams([3, 4], SEED)
    masks = [models.mask((32, 48), stream) for stream in own]
    noise = picture_conditioned.normal(own, (4, 16, 24))
    made = models.picture_condition(pixels, [3, 4], SEED)["concat"]
    for row, mask in enumerate(masks):
        mask = torch.from_numpy(mask)
        assert torch.equal(made[row, :1], mask[:, ::2, ::2])
        with torch.no_grad():
            posterior = stock.vae.encode((pixels[row] * (1 - mask))[None]).latent_dist
        expected = (posterior.mean + posterior.std * noise[row]) * stock.vae.config.scaling_factor
        torch.testing.assert_close(made[row, 1:], expected[0], **CLOSE)
    changed = pixels + torch.stack([torch.from_numpy(mask) for mask in masks])
    hidden = models.picture_condition(changed, [3, 4], SEED)["concat"]
    assert torch.equal(hidden, made), "what is masked is not seen"


def test_upscaler_sees_a_small_picture_noised_to_the_level_that_it_is_told(loaded):
    models, stock = loaded("upscaler")
    pixels = pixels_of(photograph())
    made = models.picture_condition(pixels.expand(3, -1, -1, -1), [0, 1, 2], SEED)
    levels = made["class_labels"]
    assert levels.dtype == torch.int64 and len(set(levels.tolist())) == 3 and (levels <= 350).all()
    own = picture_conditioned.streams([0, 1, 2], SEED)
    assert [int(stream.integers(0, 350, endpoint=True)) for stream in own] == levels.tolist()
    small = torch.nn.functional.interpolate(pixels, (12, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    noise = picture_conditioned.normal(own, (3, 12, 16))
    expected = stock.low_res_scheduler.add_noise(small.expand(3, -1, -1, -1), noise, levels)
    torch.testing.assert_close(made["concat"], expected, **CLOSE)
    low = pipelines.StableDiffusionUpscaler(models.pipeline, noise_level=0)
    assert low.picture_condition(pixels, [0], SEED)["class_labels"].tolist() == [0]


def test_adapter_is_given_edges_and_its_features_are_scaled(folders, loaded):
    models, stock = loaded("adapter")
    pixels = pixels_of(photograph())
    edges = models.edges(pixels)
    assert edges.shape == (1, 1, 48, 64) and torch.equal(edges[0, 0], torch.from_numpy(canny(np.array(photograph()))))
    with torch.no_grad():
        features = stock.adapter(edges.expand(-1, 3, -1, -1))
    made = models.picture_condition(pixels, [0], SEED)
    halved = pipelines.load(str(folders / "adapter"), options={"scale": 0.4}).picture_condition(pixels, [0], SEED)
    for i, feature in enumerate(features):
        torch.testing.assert_close(made[f"residual_{i}"], 0.8 * feature, **CLOSE)
        torch.testing.assert_close(halved[f"residual_{i}"], 0.4 * feature, **CLOSE)
    assert not any(parameter.requires_grad for parameter in models.pipeline.adapter.parameters())


def test_adapter_is_put_beside_a_plain_sdxl(folders, tmp_path):
    tiny_adapter().save_pretrained(tmp_path / "adapter")
    kind = pipelines.StableDiffusionXLAdapter
    with pytest.raises(ValueError, match=r"model\.options\.adapter: expected the name or folder of a T2IAdapter"):
        pipelines.load(str(folders / "sdxl"), kind=kind)
    models = pipelines.load(str(folders / "sdxl"), kind=kind, options={"adapter": str(tmp_path / "adapter")})
    assert type(models.pipeline) is StableDiffusionXLAdapterPipeline
    whole = pipelines.load(str(folders / "adapter"))
    pixels = pixels_of(photograph())
    made, expected = (m.picture_condition(pixels, [0], SEED) for m in (models, whole))
    assert all(torch.equal(made[entry], value) for entry, value in expected.items())


# ------------------------------------------------------------------------------------------------- a kind of one's own


def test_face_swap_tells_the_network_whose_face_and_hides_it(loaded):
    models, stock = loaded(OWN)
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    made = models.picture_condition(pixels, range(6), SEED)
    shades = [torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    with torch.no_grad():
        either = [
            stock.image_encoder((x / 2 + 0.5 - shades[0]) / shades[1]).image_embeds for x in (pixels, pixels.flip(-1))
        ]
    upright, mirrored = ((made["class_labels"] - e).abs().amax(1) < 1e-5 for e in either)
    assert (upright ^ mirrored).all() and upright.any() and mirrored.any()
    masks = made["concat"][:, :1]
    assert masks[:, :, 8, 8].all() and not masks[:, :, 0].any(), "the middle is hidden"
    noisy, t = torch.randn(6, 4, 16, 16), torch.full((6,), 500)
    condition = models.encode_text([""] * 6) | made
    with torch.no_grad():
        said = models.denoiser(models.model)(noisy, t, condition)
        other = models.denoiser(models.model)(noisy, t, condition | {"class_labels": made["class_labels"].flip(0)})
        expected = stock.unet(
            torch.cat([noisy, made["concat"]], 1),
            t,
            condition["encoder_hidden_states"],
            class_labels=made["class_labels"],
        ).sample
    torch.testing.assert_close(said, expected, **CLOSE)
    assert (other - said).abs().max() > 1e-4


def test_drawn_faces_are_those_of_the_picture_before(loaded):
    models, _ = loaded(OWN)
    one, two = photograph(32, 32), photograph(32, 32).transpose(Image.Transpose.ROTATE_90)
    shared = {"steps": 2, "guidance": 3.0, "height": 32, "width": 32, "seed": 3, "autocast": contextlib.nullcontext}
    seen = []
    vectors = models.vectors
    models.vectors = lambda pixels: seen.append(pixels) or vectors(pixels)
    try:
        models.draw(models.model, ["", ""], pictures=[one, two], **shared)
    finally:
        del models.vectors
    assert torch.equal(seen[0], pixels_of(two)) and torch.equal(seen[1], pixels_of(one))


def test_identity_encoder_is_any_frozen_module(folders, tmp_path):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(16))

        def forward(self, pixels):
            return pixels.mean((1, 2, 3))[:, None] * self.scale

    encoder = Mean()
    models = pipelines.load(str(folders / OWN), kind=FaceSwap, options={"identity": encoder})
    models.place(torch.device("cpu"), torch.bfloat16)
    assert not encoder.scale.requires_grad and encoder.scale.dtype == torch.float32
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    made = models.picture_condition(pixels, [0, 1], SEED)["class_labels"]
    torch.testing.assert_close(made, pixels.mean((1, 2, 3))[:, None].expand(2, 16), **CLOSE)

    tiny_ip_adapter()[1].save_pretrained(tmp_path / "clip")
    pipe = tiny_kind(OWN)
    pipe.register_modules(image_encoder=None)
    pipe.save_pretrained(tmp_path / "without")
    models = pipelines.load(str(tmp_path / "without"), kind=FaceSwap, options={"identity": str(tmp_path / "clip")})
    models.save(tmp_path / "saved", models.model)
    assert (tmp_path / "saved" / "image_encoder" / "model.safetensors").is_file()
    with pytest.raises(
        ValueError, match=r"model\.options\.identity: expected the name or folder of a CLIPVision.*got null"
    ):
        pipelines.load(str(tmp_path / "without"), kind=FaceSwap)


# ------------------------------------------------------------------------------------------------- edges and masks


def test_edges_are_thin_closed_and_where_the_picture_changes():
    square = np.zeros((40, 40), np.uint8)
    square[10:30, 12:28] = 200
    edges = canny(square)
    assert set(np.unique(edges)) == {0.0, 1.0}
    # Around the square, one pixel wide, on either side of the step.
    assert edges[15:25].sum(1).tolist() == [2] * 10 and edges[:, 15:25].sum(0).tolist() == [2] * 10
    assert not edges[13:27, 15:25].any() and not edges[:9].any() and not edges[:, :11].any()


def test_weak_edges_count_only_where_they_touch_strong_ones():
    step = np.zeros((20, 60), np.uint8)
    step[:, 10:] = 30  # a gradient of 120
    step[10:, 10:] = 80  # of 320
    assert (canny(step, 100, 200).sum(1) > 0).all(), "all of it touches"
    assert canny(step[:8], 100, 200).sum() == 0 and canny(step[:8], 100, 110).sum() == 8


def test_masks_are_rectangles_strokes_or_whole_and_depend_on_their_numbers_alone():
    masks = [random_mask((64, 96), _stream(SEED, number, part=4)) for number in range(200)]
    again = [random_mask((64, 96), _stream(SEED, number, part=4)) for number in range(200)]
    assert all((a == b).all() for a, b in zip(masks, again, strict=True))
    assert all(m.shape == (1, 64, 96) and m.dtype == np.float32 and set(np.unique(m)) <= {0, 1} for m in masks)
    shares = [m.mean() for m in masks]
    assert min(shares) > 0
    assert 30 <= sum(share == 1 for share in shares) <= 70  # of 200, a quarter expected: within 3.3 deviations
    partial = [random_mask((64, 96), _stream(SEED, number), whole=0.0) for number in range(100)]
    # Rows of a rectangle are all alike, those of a stroke are not.
    straight = sum(len({row.tobytes() for row in m[0] if row.any()}) <= 5 for m in partial)
    assert 30 <= straight <= 70 and max(m.mean() for m in partial) < 1
    assert random_mask((64, 96), _stream(SEED, 0), whole=1.0).all()


def test_faces_are_ellipses_about_the_middle():
    for number in range(20):
        mask = ellipse_mask((48, 64), _stream(SEED, number))[0]
        assert mask[24, 32] == 1 and not mask[0].any() and not mask[:, 0].any() and 0.1 < mask.mean() < 0.42
        inside = [np.flatnonzero(row) for row in mask if row.any()]
        assert all((np.diff(columns) == 1).all() for columns in inside)


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("name", SHOWN)
def test_drawing_is_the_scheduler_s_walk_with_guidance(loaded, name):
    models, _ = loaded(name)
    size = {"height": 48, "width": 64}
    shared = {"seed": 3, "autocast": contextlib.nullcontext, **size, "pictures": [photograph()]}
    first, second, third = models.draw(models.model, ["a two", "a three", "a two"], steps=2, guidance=3.0, **shared)
    assert first.size == (64, 48) and np.array_equal(first, third) and not np.array_equal(first, second)

    scheduler = LCMScheduler.from_config(models.pipeline.scheduler.config)
    few = {"arguments": {"timesteps": [999, 499], "guidance_scale": 1.0}, "scheduler": scheduler}
    (drawn,) = models.draw(models.model, ["a two"], steps=8, guidance=3.0, **few, **shared)
    assert scheduler.timesteps.tolist() == [999, 499]
    # By hand: two steps of consistency sampling.
    pixels = pixels_of(photograph())
    size = torch.tensor([[48, 64]])
    text = models.encode_text(["a two"]) | models.encode_sizes(size, 0 * size, size)
    condition = text | models.shown_condition(pixels, pixels, 3)
    generator = torch.Generator().manual_seed(3)
    factor = models.pipeline.vae_scale_factor
    sample = torch.randn(1, 4, 48 // factor, 64 // factor, generator=generator)
    denoiser, process = models.denoiser(models.model), models.process()
    with torch.no_grad():
        for t, following in ((999, 499), (499, None)):
            t = torch.tensor([t])
            clean = process.clean(denoiser(sample, t, condition), sample, t)
            if following is not None:
                noise = torch.randn(sample.shape, generator=generator)
                sample = process.add_noise(clean, noise, torch.tensor([following]))
        expected = models.pipeline.image_processor.postprocess(models.decode(clean))[0]
    assert np.abs(np.array(drawn, int) - np.array(expected, int)).max() <= 1

    # Guided: away from what the policies leave.
    few["arguments"] = {"timesteps": [999], "guidance_scale": 3.0}
    (drawn,) = models.draw(models.model, ["a two"], steps=8, guidance=1.0, **few, **shared)
    empty, policies = models.encode_text([""]), models.policies()
    absent = {
        entry: {"empty": empty.get(entry), "zero": torch.zeros_like(value), "keep": value}[policies[entry]]
        for entry, value in condition.items()
    }
    sample, t = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3)), torch.tensor([999])
    with torch.no_grad():
        seen, unseen = (denoiser(sample, t, c) for c in (condition, absent))
        clean = process.clean(3 * seen - 2 * unseen, sample, t)
        expected = models.pipeline.image_processor.postprocess(models.decode(clean))[0]
    assert np.abs(np.array(drawn, int) - np.array(expected, int)).max() <= 1

    with pytest.raises(ValueError, match=r"output\.validation\.images: expected pictures to show to a"):
        models.draw(models.model, ["a two"], steps=2, guidance=1.0, **{**shared, "pictures": ()})
    with pytest.raises(ValueError, match=r"arguments must be among .*, got eta"):
        models.draw(models.model, ["a two"], steps=2, guidance=1.0, arguments={"eta": 0.0}, **shared)


# ------------------------------------------------------------------------------------------------- what is refused


class Odd(torch.nn.Module):
    dim = 7


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        (None, "inpainting", {"whole": 1.5}, r"model\.options\.whole: expected a number from 0 to 1, got 1\.5"),
        (None, "inpainting", {"hole": 1}, r"model\.options: expected options of .*Inpainting \(whole\), got 'hole'"),
        (None, "upscaler", {"noise_level": 351}, r"model\.options\.noise_level: expected a number from 0 to 350"),
        (None, "adapter", {"low": 300.0}, r"model\.options: expected 0 <= low <= high"),
        (None, "sd15", {"whole": 0.5}, r"model\.options: expected options of StableDiffusion \(none\), got 'whole'"),
        (FaceSwap, "inpainting", {}, r"model\.options\.identity: expected the name or folder"),
        (FaceSwap, OWN, {"identity": Odd()}, r"model\.options\.identity: expected vectors of 16 numbers .*got 7"),
        (pipelines.StableDiffusionInpainting, "sd15", {}, r"a UNet with 9 input channels \(latents, a mask .*, got 4"),
    ],
)
def test_what_a_kind_cannot_do_is_refused_by_key(folders, kind, name, options, message):
    with pytest.raises(ValueError, match=message):
        pipelines.load(str(folders / name), kind=kind, options=options)


def test_a_kind_must_be_one(folders):
    with pytest.raises(ValueError, match=r"model\.kind: expected a subclass of linattn\.distill\.pipelines\.Kind, got"):
        pipelines.load(str(folders / "sd15"), kind=DiffusionPipeline)


# ------------------------------------------------------------------------------------------------------- whole runs

RECIPES = {
    "flash_pixart": "pixart",
    "flash_t2i_adapter": "adapter",
    "flash_inpainting": "inpainting",
    "flash_upscaler": "upscaler",
    "flash_faceswap": OWN,
}
#: Small and quick, on the CPU; everything else is as the shipped recipe has it.
SMALL = (
    "training.batch_size=2",
    "training.steps=3",
    "training.learning_rate=1e-3",
    "training.gradient_checkpointing=false",
    "data.resolution=32",
    "data.workers=0",
    "output.log_with=null",
    "output.validation.prompts=[]",
)
SMALL_FLASH = (
    "objective.phases.grid_steps=4",
    "objective.phases.steps=1",
    "objective.discriminator.learning_rate=1e-3",
    "student.lora.rank=2",
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    runs.reset_accelerator()
    yield
    runs.reset_accelerator()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of five pictures with captions."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(5):
        photograph(36 + 2 * i, 40).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a handwritten {i}")
    return root


def small(folders, photographs, out, name, *overrides, family=None):
    family = family or RECIPES[name]
    places = [f"model.pretrained={folders / family}", f"data.path={photographs}", f"output.folder={out}"]
    flash = SMALL_FLASH if name.startswith("flash") else ("objective.solver_steps=2",)
    adapter = ["model.options.adapter=null"] if name == "flash_t2i_adapter" else []  # it is in the folder
    length = ["model.text_length=12"] if family.startswith("pixart") else []
    precision = [] if any("mixed_precision" in o for o in overrides) else ["training.mixed_precision=no"]
    return recipe.load(name, [*SMALL, *flash, *places, *adapter, *length, *precision, *overrides])


def trainer_of(*arguments, **options):
    runs.reset_accelerator()
    wanted = small(*arguments, **options)
    named = {"model.kind": resolve(wanted.model.kind, "model.kind")} if wanted.model.kind else None
    return Trainer(wanted, named=named, say=lambda _: None)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_moves_the_low_rank_updates_and_the_judge_and_nothing_else(folders, photographs, tmp_path, name):
    shown = ["output.validation={prompts: [a two], steps: 2, teacher_steps: 2, height: 32, width: 32}"]
    if name != "flash_pixart":
        shown += [f"output.validation.images=[{photographs / '0.png'}]"]
    precision = recipe.load(name).training.mixed_precision
    trainer = trainer_of(folders, photographs, tmp_path, name, f"training.mixed_precision={precision}", *shown)
    frozen = {
        part: {key: value.clone() for key, value in module.state_dict().items()}
        for part, module in trainer.models.pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert frozen.keys() >= {"vae", "text_encoder"} | ({"adapter"} if name == "flash_t2i_adapter" else set())
    heads = {key: value.clone() for key, value in trainer._trained().items()}
    final = trainer.run()
    for part, state in frozen.items():
        for key, value in getattr(trainer.models.pipeline, part).state_dict().items():
            assert torch.equal(value, state[key]), f"{part}.{key} moved"
    after = trainer._trained()
    assert all(".lora_" in key for key in trainer.trainable)
    assert any(key.startswith("discriminator:") for key in after)
    # Low-rank updates begin at zero: the first factor has a gradient from the second step on, and barely one in bf16.
    still = [key for key, value in after.items() if torch.equal(value, heads[key]) and ".lora_A" not in key]
    assert not still, f"{still} did not move in three steps"
    (picture,) = (tmp_path / "validation").glob("*.png")
    assert Image.open(picture).size == (64, 32)  # teacher | student
    assert LCMScheduler.from_pretrained(final, subfolder="scheduler").config.timestep_spacing == "trailing"


def test_run_that_was_stopped_sees_the_same_masks(folders, photographs, tmp_path):
    whole = trainer_of(folders, photographs, tmp_path / "whole", "flash_inpainting").run()
    trainer_of(folders, photographs, tmp_path / "parts", "flash_inpainting", "training.steps=2").run()
    parts = trainer_of(folders, photographs, tmp_path / "parts", "flash_inpainting").run()
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_low_rank_updates_of_pixart_are_loaded_by_peft(folders, photographs, tmp_path):
    trainer = trainer_of(folders, photographs, tmp_path, "flash_pixart")
    final = trainer.run()
    assert json.loads((final / "adapter_config.json").read_text())["lora_alpha"] == 8
    stock = DiffusionPipeline.from_pretrained(folders / "pixart")
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500])
    condition = condition_of(trainer.models, ["a two"], torch.zeros(1, 3, 32, 32), [0])
    with torch.no_grad():
        before = trainer.models.denoiser(stock.transformer)(*inputs, condition)
        merged = PeftModel.from_pretrained(stock.transformer, final).merge_and_unload()
        after = trainer.models.denoiser(merged)(*inputs, condition)
        expected = trainer.models.denoiser(trainer.student.model)(*inputs, condition)
    torch.testing.assert_close(after, expected, **CLOSE)
    assert (after - before).abs().max() > 1e-3


def test_upscaler_s_pipeline_visits_the_trained_levels_by_its_saved_scheduler(folders, photographs, tmp_path):
    """Its call takes no timesteps."""
    final = trainer_of(folders, photographs, tmp_path, "flash_upscaler").run()
    pipe = DiffusionPipeline.from_pretrained(folders / "upscaler")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(final)
    pipe.scheduler = LCMScheduler.from_pretrained(final, subfolder="scheduler")
    (picture,) = pipe("a two", photograph(8, 12), num_inference_steps=4, guidance_scale=1.0).images
    assert picture.size == (48, 32) and pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_cached_captions_of_pixart_keep_their_masks(folders, photographs, tmp_path):
    plain = trainer_of(folders, photographs, tmp_path / "plain", "flash_pixart").run()
    cached = trainer_of(folders, photographs, tmp_path / "cached", "flash_pixart", "data.cache.text=true").run()
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (plain, cached))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["pixart", "inpainting"])
def test_straight_paths_can_be_taught_to_these_kinds_too(folders, photographs, tmp_path, family):
    options = ["objective.teacher_guidance=2.0", "training.lr_schedule=constant", "training.warmup_steps=0"]
    shown = "output.validation={prompts: [a two], steps: 4, teacher_steps: 2, height: 32, width: 32}"
    images = [] if family == "pixart" else [f"output.validation.images=[{photographs / '0.png'}]"]
    trainer = trainer_of(
        folders, photographs, tmp_path, "perflow_sd15", *options, shown, *images, "training.steps=1", family=family
    )
    final = trainer.run()
    pipe = DiffusionPipeline.from_pretrained(final)
    assert type(pipe) is type(trainer.models.pipeline) and type(pipe.scheduler) is PeRFlowScheduler
    tuned = getattr(pipe, trainer.models.component).state_dict()
    assert any(not torch.equal(value, tuned[key]) for key, value in trainer.models.model.state_dict().items())
    assert (tmp_path / "validation").is_dir()


@pytest.mark.parametrize(
    ("name", "family", "options", "line"),
    [
        (
            "flash_inpainting",
            None,
            ["output.validation.prompts=[a two]"],
            "output.validation.images: expected pictures for a StableDiffusionInpaintPipeline to see beside",
        ),
        (
            "flash_sd15",
            "sd15",
            ["output.validation.images=[{picture}]"],
            "output.validation.images: expected [] for a StableDiffusionPipeline (which sees prompts alone), got [",
        ),
        ("flash_upscaler", None, ["data.cache.latents=true"], "data.cache.latents: expected false for a StableDiff"),
        ("flash_upscaler", None, ["data.resolution=40"], "data.resolution: expected a multiple of 16 for a StableDiff"),
        (
            "flash_inpainting",
            None,
            ["objective.drop={{mask: 0.1}}"],
            "objective.drop: expected conditions of a StableDiffusionInpaintPipeline, encoder_hidden_states, conc",
        ),
    ],
)
def test_what_does_not_fit_the_kind_is_refused_by_key(folders, photographs, tmp_path, name, family, options, line):
    options = [option.format(picture=photographs / "0.png") for option in options]
    with pytest.raises(ValueError, match=re.escape(line)):
        trainer_of(folders, photographs, tmp_path / "run", name, *options, family=family)
    assert not (tmp_path / "run").exists()


def test_kind_that_is_named_must_be_handed_in(folders, photographs, tmp_path):
    with pytest.raises(
        TypeError, match=r"expected the class that model\.kind names \('linattn\.distill\.pipelines\.face"
    ):
        Trainer(small(folders, photographs, tmp_path, "flash_faceswap"))


def test_command_finds_the_kind_by_its_path(folders, photographs, tmp_path, capsys):
    wanted = small(folders, photographs, tmp_path / "run", "flash_faceswap")
    (tmp_path / "own.yaml").write_text(wanted.to_yaml())
    assert main(["distill", str(tmp_path / "own.yaml"), "--dry-run"]) == 0
    assert "StableDiffusionPipeline" in capsys.readouterr().out
    assert main(["distill", str(tmp_path / "own.yaml"), "--set", "model.kind=linattn.distill:Nothing"]) == 1
    assert "model.kind: linattn.distill has no 'Nothing'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- a model of one's own


def test_a_custom_model_is_distilled_in_under_forty_lines(capsys):
    """examples/flash_custom_model.py, between its two lines of ===; with a few steps of training."""
    path = Path(__file__).resolve().parents[1] / "examples" / "flash_custom_model.py"
    (code,) = re.findall(r"^# =+\n(.*?)^# =+$", path.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    spec = importlib.util.spec_from_file_location("flash_custom_model", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    scores = example.main(["--teacher-steps", "4", "--steps", "4"])
    assert len(capsys.readouterr().out.splitlines()) == len(scores) == 5
    assert scores["real"][0] == 0 and scores["real"][1] > 0.9
    assert all(np.isfinite(value).all() for value in scores.values())
