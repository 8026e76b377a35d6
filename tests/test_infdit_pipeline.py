"""InfDiTUpscalePipeline: recorded runs of the original, any picture to any size, bounded memory, seeds, mistakes."""

import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import goldens
from helpers.goldens import relative_error
from helpers.memory import PeakMemory

pytest.importorskip("diffusers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')

from PIL import Image, ImageCms
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from linattn.adapters import InfDiTTransformer2DModel, InfDiTUpscalePipeline
from linattn.adapters.infdit import images, pipeline, streaming
from linattn.schedulers import EDMScheduler, PeRFlowScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

SAMPLERS = ("heun", "ddim", "dpmsolver++")
SCHEDULES = ("full", "layer_major", "streaming")
#: README of the goldens: float32, relative, for a sampler's run.
TOLERANCE = 2e-5
#: Blocks of 16 x 16 pixels.
SMALL = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "block_size": 4, "vector_dim": 0}


def network(seed=0, **sizes):
    """A small network whose parameters are all at work: those that start at zero are drawn as well."""
    torch.manual_seed(seed)
    model = InfDiTTransformer2DModel(**SMALL | sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder(dim=24):
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=dim,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config).eval()


def upscaler(model=None, image_encoder=None, **scheduler):
    pipe = InfDiTUpscalePipeline(model or network(), EDMScheduler(**scheduler), image_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return upscaler()


def photograph(height, width, channels=3, seed=0, dtype=np.uint8):
    values = np.random.default_rng(seed).random((height, width, channels))
    return (values * np.iinfo(dtype).max).round().astype(dtype)


def seeded(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


def run(pipe, image, scale=4.0, seed=0, **options):
    """The result as a tensor, not clamped: (n, 3, H, W)."""
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(seed)} | options
    return pipe(image, scale, **options).images


# ---------------------------------------------------------------------------------------------- goldens of the original


RUNS = {
    "sampler_heun": ({}, "lr", {"x_after0": 1, "x_after2": 5}),
    "sampler_heun_noinit": ({}, "noise", {"x_after0": 1, "x_after2": 5}),
    "sampler_ddim": ({"sampler": "ddim", "eta": 0.1}, "lr", {"x_after0": 0, "x_after1": 1}),
}


@pytest.fixture(scope="module")
def original():
    stored, metadata = goldens.load("infdit", "tiny_weights")
    sizes = metadata["meta"]
    model = network(
        **{key: sizes[key] for key in ("hidden_size", "num_layers", "num_attention_heads", "vector_dim")},
        block_size=sizes["image_block_size"] // 4,
    )
    model.load_official_state_dict({key[2:]: x.float() for key, x in stored.items()})
    return model


@goldens.needs_goldens
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_the_original(name, schedule, original, monkeypatch):
    config, start, states = RUNS[name]
    golden, _ = goldens.load("infdit", name)
    block = original.block_pixels
    noises = [golden[key][0] for key in sorted(golden) if key.startswith("noise")]
    drawn = iter([noise[:, top : top + block] for noise in noises for top in range(0, noise.shape[1], block)])
    monkeypatch.setattr(pipeline, "_normal", lambda *_: next(drawn))
    seen = []
    sample = run(
        upscaler(original, **config),
        golden["lr_u8"],
        num_inference_steps=len(golden["sigmas"]) - 1,
        start=start,
        image_embeds=golden["vector"],
        schedule=schedule,
        callback_on_step_end=lambda pipe, index, t, tensors: seen.append(tensors["sample"].clone()),
    )
    assert relative_error(sample, golden["sample"]) < TOLERANCE
    for key, index in states.items():
        assert relative_error(seen[index], golden[key]) < TOLERANCE
    # A number beside a whole one is cut down to it or not.
    levels = torch.from_numpy(images.to_bytes(sample[0], "truncate")).int()
    assert (levels - golden["image_u8"][0].int()).abs().max() <= 1
    # The original draws noise for the last step too, which ends at level 0.
    assert len(list(drawn)) == (name == "sampler_ddim")


@goldens.needs_goldens
@pytest.mark.parametrize("name", RUNS)
def test_truncated_bytes_are_those_of_the_original(name):
    golden, _ = goldens.load("infdit", name)
    assert np.array_equal(images.to_bytes(golden["sample"][0], "truncate"), golden["image_u8"][0].numpy())


@goldens.needs_goldens
def test_both_views_are_those_of_the_original():
    golden, _ = goldens.load("infdit", "preprocess")
    small = golden["crop32"][0]
    twice, four = (images.views(small, (32 * scale, 64 * scale), 64, 4) for scale in (2, 4))
    assert torch.equal(twice.lr_up, golden["up2"])
    assert torch.equal(twice.lr, golden["lr_for_scale2"])
    assert torch.equal(four.lr_up[..., :64, :64], golden["up4_topleft64"])
    assert torch.equal(four.lr, golden["crop32"]) and torch.equal(four.lr_picture, golden["crop32"])


@goldens.needs_goldens
def test_bytes_become_the_numbers_of_the_original():
    golden, _ = goldens.load("infdit", "preprocess")
    (picture,) = images.read(golden["u8"])
    top, left = round((37 - 32) / 2), round((70 - 64) / 2)
    assert torch.equal(picture.pixels[None, :, top : top + 32, left : left + 64], golden["crop32"])


@goldens.needs_goldens
def test_clip_sees_the_pixels_that_it_saw_in_the_original():
    golden, _ = goldens.load("infdit", "preprocess")
    pixels = images.clip_pixels(golden["crop32"])
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.equal(pixels[..., ::8, ::8], golden["clip_pixels_every8"])


# ---------------------------------------------------------------------------------------------------- views and padding


def test_padding_changes_no_pixel_of_the_picture():
    pixels = images.read(photograph(37, 70))[0].pixels
    views = images.views(pixels, (148, 280), 128)
    assert views.lr_up.shape[2:] == (256, 384) and views.lr.shape[2:] == (64, 96)
    assert torch.equal(views.lr[0, :, :37, :70], pixels)
    assert torch.equal(views.lr_up[..., :148, :280], images.resize(pixels[None], (148, 280)).clamp(-1, 1))


@pytest.mark.parametrize("size", [(5, 16), (16, 16), (40, 3), (1, 1)])
def test_padding_mirrors_the_picture_as_often_as_it_takes(size):
    x = torch.randn(1, 2, *size)
    grown = images.mirrored(x, 40, 16)
    added = ((0, 0), (0, 0), (0, 40 - size[0]), (0, 16 - size[1]))
    assert np.array_equal(grown.numpy(), np.pad(x.numpy(), added, mode="symmetric"))


@pytest.mark.parametrize("height", [101, 102, 103, 149])
def test_low_resolution_lies_over_the_output_also_where_that_is_no_multiple_of_four(height):
    """As if the picture went on, with its last row, up to where the sizes divide."""
    x = torch.randn(1, 3, 50, 8)
    longer = F.pad(x, (0, 0, 0, 150), mode="replicate")
    expected = F.interpolate(longer, size=(height, 8), mode="bicubic", antialias=True)  # 200 rows to 4 height / 4
    reduced = images.reduced(x, (height, 32), 4)
    assert reduced.shape[2] == math.ceil(height / 4)
    torch.testing.assert_close(reduced, expected[:, :, : reduced.shape[2]])


def test_what_lies_below_a_block_does_not_change_it(pipe):
    """Blocks see up and left, and one block of the low resolution on: a taller picture begins as the shorter one does.

    So padding reaches the blocks at the edge alone, and noise does not depend on the size below.
    """
    tall = photograph(21, 12)
    short = run(pipe, tall[:16])
    assert torch.equal(run(pipe, tall)[:, :, :32, :], short[:, :, :32, :])


SIZES = {
    "four": ((7, 9), {}, (28, 36)),
    "one": ((20, 17), {"scale": 1}, (20, 17)),
    "a half": ((13, 10), {"scale": 2.5}, (32, 25)),
    "any": ((11, 13), {"scale": 3.37}, (37, 44)),
    "more": ((5, 4), {"scale": 8.0}, (40, 32)),
    "height": ((10, 20), {"height": 33}, (33, 66)),
    "width": ((10, 20), {"width": 30}, (15, 30)),
    "both": ((10, 20), {"height": 11, "width": 47}, (11, 47)),
    "a single pixel": ((1, 1), {"scale": 4}, (4, 4)),
}


@pytest.mark.parametrize(("given", "options", "wanted"), SIZES.values(), ids=SIZES)
def test_any_size_comes_out_as_asked(given, options, wanted, pipe):
    sample = run(pipe, photograph(*given), num_inference_steps=1, **options)
    assert sample.shape == (1, 3, *wanted) and sample.isfinite().all()


def test_the_network_sees_the_views_of_the_scale(pipe, monkeypatch):
    """c_in [noisy | enlarged], and the low resolution, of a picture enlarged by 2.5."""
    seen = {}
    strips, prepare = type(pipe.transformer).strips, type(pipe.transformer).prepare_lr

    def spy(self, read, height, width, timestep, *rest, **options):
        seen.setdefault("input", read(0, height))
        seen.setdefault("timestep", timestep)
        return strips(self, read, height, width, timestep, *rest, **options)

    monkeypatch.setattr(type(pipe.transformer), "strips", spy)
    monkeypatch.setattr(
        type(pipe.transformer), "prepare_lr", lambda self, lr, **k: seen.update(lr=lr) or prepare(self, lr, **k)
    )
    photo = photograph(13, 10)
    run(pipe, photo, 2.5)
    views = images.views(images.read(photo)[0].pixels, (32, 25), 16)
    assert torch.equal(seen["lr"], views.lr) and seen["lr"].shape == (1, 3, 8, 8)
    c_in = 1 / math.hypot(40, 0.5)
    torch.testing.assert_close(seen["input"][:, 3:], views.lr_up * c_in)
    noise = torch.randn(3, 16, 32, generator=seeded(0))
    torch.testing.assert_close(seen["input"][0, :3, :16], (views.lr_up[0, :, :16] + 40 * noise) * c_in)
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].item() == pytest.approx(math.log(40) / 4)


# ------------------------------------------------------------------------------------------------- schedules and memory


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_schedule_gives_the_same_picture(sampler):
    """Also strips of two rows of blocks over five rows, the last one ragged; noise of later steps included."""
    pipe, photo = upscaler(sampler=sampler, eta=0.5), photograph(19, 12)
    full = run(pipe, photo, schedule="full", num_inference_steps=3)
    ways = [*SCHEDULES[1:], "ar2", streaming.Plan("streaming", 2), streaming.Plan("layer_major", 2, keep_lr=False)]
    for way in ways:
        sample = run(pipe, photo, schedule=way, num_inference_steps=3)
        assert relative_error(sample, full) < TOLERANCE, way


@pytest.mark.parametrize("sampler", [*SAMPLERS, "churn"])
def test_strips_are_updated_as_the_scheduler_updates_the_whole(sampler, monkeypatch):
    """One step after the other by `scheduler.step`, with the whole picture in memory."""
    config = {"s_churn": 2.0} if sampler == "churn" else {"sampler": sampler, "eta": 0.5}
    pipe, photo, drawn = upscaler(**config), photograph(8, 6), []
    normal = pipeline._normal
    monkeypatch.setattr(pipeline, "_normal", lambda *a: drawn.append(normal(*a)) or drawn[-1])
    sample = run(pipe, photo, num_inference_steps=4, schedule="streaming")

    noises = iter([torch.cat(pair, 1)[None] for pair in zip(drawn[::2], drawn[1::2], strict=True)])
    views, scheduler, model = images.views(images.read(photo)[0].pixels, (32, 24), 16), pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(4)
    x = views.lr_up + scheduler.init_noise_sigma * next(noises)
    for call, t in zip(scheduler.calls, scheduler.timesteps, strict=True):
        seen = scheduler.scale_model_input(torch.cat([x, views.lr_up], 1), t)
        with torch.no_grad():
            output = model(seen, t, views.lr).sample
        x = scheduler.step(output, t, x, noise=next(noises) if call.noise else None).prev_sample
    assert relative_error(sample, x[:, :, :32, :24]) < TOLERANCE
    assert next(noises, None) is None


def test_a_bound_on_memory_leads_to_the_schedule_that_fits(pipe, monkeypatch):
    plans = []
    plan = streaming.plan
    monkeypatch.setattr(streaming, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    photo = photograph(96, 12)
    free = run(pipe, photo, max_memory=None, num_inference_steps=1)
    assert plans[-1].schedule == "full"
    tight = run(pipe, photo, max_memory="1 MiB", num_inference_steps=1)
    assert plans[-1].schedule != "full"
    assert relative_error(tight, free) < TOLERANCE
    run(pipe, photo, max_memory=None, schedule="streaming", num_inference_steps=1)
    assert plans[-1].schedule == "streaming"


def test_a_run_stays_within_its_memory():
    pipe, photo = upscaler(), torch.rand(3, 128, 32)
    bound, peaks = 3 * 2**20, {}
    for limit in (None, bound):
        with PeakMemory() as memory:
            memory.ignore(photo, *pipe.transformer.parameters())
            run(pipe, photo, num_inference_steps=2, max_memory=limit)
        peaks[limit] = memory.peak
    assert peaks[bound] < bound < peaks[None]


def test_a_bound_that_is_too_low_is_reported_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "_sample", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"max_memory: expected at least .* beside 0 MiB for the sampler's pictures"):
        run(pipe, photograph(8, 8), max_memory=1000)
    # The first would fit.
    with pytest.raises(ValueError, match=r"2048 x 2048 pixels"):
        run(pipe, [photograph(4, 4), photograph(512, 512)], max_memory="20MiB")


def test_the_sample_is_kept_in_float32_whatever_the_network_computes_in():
    model = network()
    exact, rough = run(upscaler(model), photograph(8, 8)), run(upscaler(network().bfloat16()), photograph(8, 8))
    assert rough.dtype == torch.float32 and not torch.equal(rough, rough.bfloat16().float())
    assert 0 < relative_error(rough, exact) < 0.1


# ------------------------------------------------------------------------------------------------------ seeds and lists


def test_a_seed_gives_the_same_picture_and_another_one_another(pipe):
    photo = photograph(8, 8)
    assert torch.equal(run(pipe, photo, seed=3), run(pipe, photo, seed=3))
    assert not torch.equal(run(pipe, photo, seed=3), run(pipe, photo, seed=4))


def test_noise_is_drawn_on_the_cpu_in_float32(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        pipeline, "_normal", lambda *a: drawn.append(torch.randn(3, *a[1:], generator=a[0])) or drawn[-1]
    )
    run(upscaler(network().bfloat16()), photograph(8, 8))
    assert {(noise.dtype, noise.device.type) for noise in drawn} == {(torch.float32, "cpu")}


def test_noise_of_later_steps_is_the_generators_too(monkeypatch):
    drawn = []
    normal = pipeline._normal
    monkeypatch.setattr(pipeline, "_normal", lambda *a: drawn.append(normal(*a)) or drawn[-1])
    pipe = upscaler(sampler="ddim")
    for seed in (1, 2, 1):
        run(pipe, photograph(8, 4), num_inference_steps=3, seed=seed)
    # Two rows of blocks, at the start and after two of the three steps.
    first, second, again = drawn[:6], drawn[6:12], drawn[12:]
    assert len({noise[0, 0, 0].item() for noise in first + second}) == 12
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_without_a_generator_the_global_one_is_drawn_from(pipe):
    torch.manual_seed(7)
    first = run(pipe, photograph(8, 8), generator=None)
    torch.manual_seed(7)
    assert torch.equal(run(pipe, photograph(8, 8), generator=None), first)


@pytest.mark.parametrize("shared", [False, True], ids=["a generator each", "one for all"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_that_go_together_are_those_that_go_alone(sampler, shared):
    pipe = upscaler(sampler=sampler)
    photos = [photograph(9, 8, seed=seed) for seed in range(3)]

    def drawn(batch_size):
        return run(pipe, photos, generator=seeded(5) if shared else seeded(5, 6, 7), batch_size=batch_size)

    alone = drawn(1)
    for batch_size in (2, 3):
        together = drawn(batch_size)
        assert relative_error(together, alone) < TOLERANCE
    if not shared:
        assert torch.equal(run(pipe, photos[1], seed=6)[0], alone[1])


def test_lists_mix_sizes_and_kinds(pipe):
    one, two = photograph(8, 8), photograph(4, 12, seed=1)
    pictures = [Image.fromarray(one), torch.from_numpy(two).permute(2, 0, 1)]
    mixed = run(pipe, pictures, generator=seeded(1, 2), batch_size=2)
    assert [tuple(x.shape) for x in mixed] == [(3, 32, 32), (3, 16, 48)]
    assert torch.equal(mixed[0], run(pipe, one, seed=1)[0])
    assert torch.equal(mixed[1], run(pipe, two, seed=2)[0])


def test_the_start_from_noise_knows_the_picture_by_the_network_alone(pipe):
    photo = photograph(8, 8)
    start = run(pipe, photo, start="noise"), run(pipe, photo, start="lr")
    assert not torch.equal(*start)


# --------------------------------------------------------------------------------------------------------- image vector


def test_the_vector_is_that_of_the_low_resolution_without_its_padding(monkeypatch):
    pipe = upscaler(network(vector_dim=24), encoder())
    seen = []
    strips = InfDiTTransformer2DModel.strips

    def spy(self, read, height, width, timestep, embeds, **options):
        seen.append(embeds)
        return strips(self, read, height, width, timestep, embeds, **options)

    monkeypatch.setattr(InfDiTTransformer2DModel, "strips", spy)
    photo = photograph(10, 15)
    sample = run(pipe, photo, 2)
    lr = images.views(images.read(photo)[0].pixels, (20, 30), 16).lr_picture
    assert lr.shape == (1, 3, 5, 8)
    with torch.no_grad():
        vector = F.normalize(pipe.image_encoder(images.clip_pixels(lr, 32)).image_embeds, dim=-1)
    torch.testing.assert_close(seen[0], vector)
    assert torch.equal(run(pipe, photo, 2, image_embeds=vector), sample)
    assert not torch.equal(run(pipe, photo, 2, image_embeds=-vector), sample)


def test_each_picture_has_its_own_vector():
    pipe = upscaler(network(vector_dim=24), encoder())
    photos = [photograph(9, 8, seed=seed) for seed in range(2)]
    alone = run(pipe, photos[1], seed=2)
    vectors = torch.cat([pipe.encode_image(images.read(photo)[0].pixels[None]) for photo in photos])
    for options in ({"batch_size": 2}, {"image_embeds": vectors}, {"image_embeds": vectors, "batch_size": 2}):
        both = run(pipe, photos, generator=seeded(1, 2), **options)
        assert relative_error(both[1], alone[0]) < TOLERANCE


# -------------------------------------------------------------------------------------------------- pictures in and out


def palette(transparent):
    image = Image.fromarray(photograph(6, 5)).quantize(8)
    if transparent:
        image.info["transparency"] = 3
    return image


def keyed():
    image = Image.fromarray(photograph(6, 5) // 128 * 128)
    image.info["transparency"] = (128, 0, 128)
    return image


MODES = {
    "RGB": (lambda: Image.fromarray(photograph(6, 5)), "RGB", "RGB"),
    "RGBA": (lambda: Image.fromarray(photograph(6, 5, 4)), "RGBA", "RGBA"),
    "L": (lambda: Image.fromarray(photograph(6, 5)[..., 0]), "L", "L"),
    "LA": (lambda: Image.fromarray(photograph(6, 5, 4)).convert("LA"), "LA", "LA"),
    "1": (lambda: Image.fromarray(photograph(6, 5)[..., 0] > 99), "1", "L"),
    "palette": (lambda: palette(False), "P", "RGB"),
    "palette with a transparent colour": (lambda: palette(True), "P", "RGBA"),
    "RGB with a transparent colour": (keyed, "RGB", "RGBA"),
    "CMYK": (lambda: Image.fromarray(photograph(6, 5)).convert("CMYK"), "CMYK", "RGB"),
    "YCbCr": (lambda: Image.fromarray(photograph(6, 5)).convert("YCbCr"), "YCbCr", "RGB"),
}


@pytest.mark.parametrize(("make", "mode", "result"), MODES.values(), ids=MODES)
def test_pictures_of_pil_come_back_as_their_kind(make, mode, result, pipe):
    image = make()
    assert image.mode == mode
    (picture,) = images.read(image)
    shown = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(picture.pixels, shown[:3] * 2 - 1)
    if "A" in result:
        assert torch.equal(picture.alpha, shown[3:])
    large = pipe(image, 2, num_inference_steps=1).images[0]
    assert (large.mode, large.size) == (result, (10, 12))


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 255, 256], [32768, 65535, 1]], np.uint16)
    expected = torch.from_numpy(values.astype(np.float32) / 65535 * 2 - 1)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "png")
    for given in (values, Image.fromarray(values), Image.open(stream), Image.fromarray(values.astype(np.int32))):
        (picture,) = images.read(given)
        torch.testing.assert_close(picture.pixels, expected.expand(3, -1, -1))
        assert picture.grey
    colour = photograph(4, 5, 4, dtype=np.uint16)
    (picture,) = images.read(colour)
    torch.testing.assert_close(
        picture.pixels, torch.from_numpy(colour[..., :3] / 65535 * 2 - 1).permute(2, 0, 1).float()
    )
    torch.testing.assert_close(picture.alpha, torch.from_numpy(colour[..., 3:] / 65535).permute(2, 0, 1).float())


def test_numpy_and_tensors_and_pil_are_the_same_picture(pipe):
    photo = photograph(8, 6)
    expected = run(pipe, Image.fromarray(photo))
    floats = photo.astype(np.float32) / 255
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    for same in (photo, photo[None], floats, floats.astype(np.float64), tensor, tensor[None], tensor / 255 * 2 - 1):
        torch.testing.assert_close(run(pipe, same), expected)


def test_pictures_are_turned_upright():
    photo = photograph(4, 6)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.fromarray(photo).save(stream, "png", exif=exif)
    (picture,) = images.read(Image.open(stream))
    assert torch.equal(picture.pixels, images.read(np.rot90(photo, -1).copy())[0].pixels)


def test_a_malformed_orientation_is_none():
    stream = io.BytesIO()
    Image.fromarray(photograph(4, 6)).save(stream, "png", exif=b"Exif\0\0garbage")
    (picture,) = images.read(Image.open(stream))
    assert picture.size == (4, 6)


def test_transparency_is_enlarged_apart(pipe):
    photo = photograph(8, 6, 4)
    large = np.asarray(pipe(Image.fromarray(photo), 2, num_inference_steps=1, generator=seeded(0)).images[0])
    plain = np.asarray(pipe(Image.fromarray(photo[..., :3]), 2, num_inference_steps=1, generator=seeded(0)).images[0])
    assert np.array_equal(large[..., :3], plain)
    alpha = torch.from_numpy(photo[..., 3] / 255).float()[None, None]
    alpha = F.interpolate(alpha, size=(16, 12), mode="bicubic", antialias=True).clamp(0, 1)
    assert np.array_equal(large[..., 3], (alpha[0, 0] * 255).round().byte().numpy())
    photo[..., 3] = 255
    assert (np.asarray(pipe(photo, 2, num_inference_steps=1).images[0])[..., 3] == 255).all()


def test_colour_profiles_come_along_where_they_describe_the_result(pipe):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, expected in (("RGB", profile), ("CMYK", None)):
        image = Image.fromarray(photograph(4, 4)).convert(mode)
        image.info["icc_profile"] = profile
        assert pipe(image, 2, num_inference_steps=1).images[0].info.get("icc_profile") == expected


def test_output_types_are_the_same_picture(pipe):
    photo = photograph(8, 6)
    out = {kind: run(pipe, photo, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert torch.equal(out["pt"], out["latent"].clamp(-1, 1)) and not torch.equal(out["pt"], out["latent"])
    np.testing.assert_allclose(out["np"], (out["pt"].permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    assert np.array_equal(
        np.asarray(out["pil"][0]), ((out["pt"][0].double() + 1) * 127.5).round().byte().permute(1, 2, 0)
    )
    assert out["np"].dtype == np.float32
    with_alpha = run(pipe, photograph(8, 6, 4), output_type="np")
    assert with_alpha.shape == (1, 32, 24, 4) and with_alpha.min() >= 0 and with_alpha.max() <= 1
    assert isinstance(pipe(photo, num_inference_steps=1, return_dict=False), tuple)


def test_bytes_are_rounded_or_cut_off(pipe):
    pixels = torch.tensor([-1.2, -1.0, 0.0, 0.996, 1.0, 1.3]).view(1, 1, 6)
    assert images.to_bytes(pixels)[0, :, 0].tolist() == [0, 0, 128, 254, 255, 255]
    assert images.to_bytes(pixels, "truncate")[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    photo = photograph(8, 6)
    both = [
        np.asarray(run(pipe, photo, output_type="pil", rounding=kind)[0]).astype(int)
        for kind in ("nearest", "truncate")
    ]
    assert set(np.unique(both[0] - both[1])) == {0, 1}


# ------------------------------------------------------------------------------------------------ progress and callback


@pytest.mark.parametrize(("sampler", "calls"), [("heun", 5), ("ddim", 3), ("dpmsolver++", 3)])
def test_progress_counts_rows_of_blocks_in_every_call(sampler, calls):
    heard = []
    photos = [photograph(20, 4), photograph(4, 4)]  # five rows of blocks, and one
    run(
        upscaler(sampler=sampler),
        photos,
        num_inference_steps=3,
        schedule="streaming",
        progress=lambda *at: heard.append(at),
    )
    assert heard == [(i + 1, 6 * calls) for i in range(6 * calls)]


def test_the_callback_sees_every_call_and_may_change_the_sample(pipe):
    seen = []

    def callback(caller, index, timestep, tensors):
        assert caller is pipe
        seen.append((index, float(timestep), tensors["sample"].shape))
        if index == 2:
            return {"sample": torch.full_like(tensors["sample"], 0.25)}

    sample = run(pipe, photograph(6, 4), callback_on_step_end=callback)
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pytest.approx([math.log(40) / 4, math.log(0.002) / 4, math.log(0.002) / 4])
    assert {shape for _, _, shape in seen} == {(1, 3, 32, 16)}
    assert (sample == 0.25).all()


def test_a_callback_that_raises_stops_the_run_and_the_next_one_starts_afresh(pipe):
    def stop(*_):
        raise KeyboardInterrupt

    expected = run(pipe, photograph(6, 4))
    with pytest.raises(KeyboardInterrupt):
        run(pipe, photograph(6, 4), callback_on_step_end=stop)
    assert torch.equal(run(pipe, photograph(6, 4)), expected)


def test_given_noise_levels_are_sampled_at(pipe):
    levels = []
    run(
        pipe,
        photograph(4, 4),
        sigmas=[10.0, 0.5],
        callback_on_step_end=lambda p, i, t, _: levels.append(math.exp(4 * t)),
    )
    assert levels == pytest.approx([10, 0.5, 0.5])


def test_the_network_is_called_as_often_as_there_are_steps(pipe, monkeypatch):
    calls = []
    strips = InfDiTTransformer2DModel.strips
    monkeypatch.setattr(
        InfDiTTransformer2DModel, "strips", lambda self, *a, **k: calls.append(1) or strips(self, *a, **k)
    )
    pipe(photograph(4, 4))
    assert len(calls) == 39


# ------------------------------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("with_encoder", [True, False])
def test_the_pipeline_is_saved_and_loaded(with_encoder, tmp_path):
    image_encoder = encoder() if with_encoder else None
    pipe = upscaler(network(vector_dim=24 if with_encoder else 0), image_encoder, sampler="dpmsolver++", sigma_max=30.0)
    pipe.save_pretrained(tmp_path)
    loaded = InfDiTUpscalePipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is InfDiTTransformer2DModel and type(loaded.scheduler) is EDMScheduler
    assert (loaded.image_encoder is not None) == with_encoder
    assert (loaded.scheduler.config.sampler, loaded.scheduler.config.sigma_max) == ("dpmsolver++", 30.0)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor)
    # Products of matrices round by where in memory they lie.
    assert relative_error(run(loaded, photograph(5, 4)), run(pipe, photograph(5, 4))) < TOLERANCE
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert all(index[name][0].startswith("linattn.") for name in ("transformer", "scheduler"))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.py"))


def test_a_pipeline_without_its_encoder_takes_vectors():
    pipe = upscaler(network(vector_dim=24))
    assert run(pipe, photograph(4, 4), image_embeds=torch.randn(1, 24)).isfinite().all()


def test_an_offloaded_network_is_brought_in_before_it_is_asked_for_strips(monkeypatch):
    pipe, came = upscaler(), []
    pipe.transformer._hf_hook = type("Hook", (), {"pre_forward": lambda self, module: came.append(module)})()
    prepare = type(pipe.transformer).prepare_lr
    monkeypatch.setattr(
        type(pipe.transformer), "prepare_lr", lambda self, *a, **k: came.append("asked") or prepare(self, *a, **k)
    )
    run(pipe, photograph(4, 4))
    assert came == [pipe.transformer, "asked"]


# ------------------------------------------------------------------------------------------------------------ mistakes


GOOD = photograph(4, 4)
MISTAKES = {
    "no image": ({"image": "x.png"}, TypeError, "image must be a PIL image, a numpy array, a tensor or a list"),
    "empty list": ({"image": []}, ValueError, "image is an empty list"),
    "bytes of floats": ({"image": GOOD.astype(float)}, ValueError, r"must be in \[0, 1\], got 1.0 to 254.0"),
    "signed floats": ({"image": GOOD / 127.5 - 1}, ValueError, r"must be in \[0, 1\]"),
    "not a number": ({"image": GOOD * np.nan}, ValueError, r"must be in \[0, 1\], got nan"),
    "integers": ({"image": GOOD.astype(int)}, TypeError, "must be uint8, uint16 or floats, got int64"),
    "channels first": (
        {"image": GOOD.transpose(2, 0, 1)[..., :0]},
        ValueError,
        r"c of 1 to 4 channels, got \(3, 4, 0\)",
    ),
    "five channels": ({"image": photograph(4, 4, 5)}, ValueError, r"got \(4, 4, 5\)"),
    "mode F": ({"image": Image.fromarray(np.ones((4, 4), np.float32))}, ValueError, 'has mode "F"'),
    "mode I beyond 16 bits": ({"image": Image.fromarray(np.full((4, 4), 70000, np.int32))}, ValueError, "70000"),
    "tensor of bytes as floats": (
        {"image": torch.ones(3, 4, 4) * 255},
        ValueError,
        r"in \[-1, 1\] as a tensor, got 255",
    ),
    "tensor of integers": ({"image": torch.ones(3, 4, 4).long()}, TypeError, "floats or uint8 as a tensor"),
    "tensor of two channels": ({"image": torch.ones(2, 4, 4)}, ValueError, r"\(3, h, w\).*got \(2, 4, 4\)"),
    "scale below 1": ({"scale": 0.5}, ValueError, "scale must be at least 1, got 0.5"),
    "scale not finite": ({"scale": math.nan}, ValueError, "scale must be at least 1, got nan"),
    "scale of words": ({"scale": "4x"}, TypeError, "scale must be a number, got '4x'"),
    "smaller": ({"height": 3}, ValueError, "height must be at least that of the image, 4, got 3"),
    "width not whole": ({"width": 7.5}, TypeError, "width must be a whole number of pixels, got 7.5"),
    "start": ({"start": "black"}, ValueError, "start must be one of lr, noise, got 'black'"),
    "output_type": ({"output_type": "jpg"}, ValueError, "output_type must be one of pil, np, pt, latent, got 'jpg'"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding must be one of nearest, truncate, got 'up'"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size must be a whole number, at least 1, got 0"),
    "steps": ({"num_inference_steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
    "schedule": ({"schedule": "fast"}, ValueError, "schedule must be one of"),
    "max_memory": ({"max_memory": "much"}, ValueError, "max_memory must be bytes"),
    "too few generators": ({"generator": [torch.Generator()] * 2}, ValueError, "one for each of 1 pictures, got 2"),
    "a seed": ({"generator": [3]}, TypeError, "generator must be torch.Generator, got int"),
    "tensors for the callback": (
        {"callback_on_step_end_tensor_inputs": ["latents"]},
        ValueError,
        r"must be among sample, got \['latents'\]",
    ),
    "a vector for a network without": ({"image_embeds": torch.ones(1, 24)}, ValueError, "must be None"),
}


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_runs(options, error, message, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "_sample", lambda *_: pytest.fail("ran"))
    with pytest.raises(error, match=message):
        pipe(**{"image": GOOD} | options)


def test_mistakes_with_vectors_are_named(monkeypatch):
    pipe = upscaler(network(vector_dim=24))
    monkeypatch.setattr(pipe, "_sample", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"needs an image_encoder .* or the call image_embeds \(1, 24\)"):
        pipe(GOOD)
    with pytest.raises(ValueError, match=r"image_embeds must be \(2, 24\), got \(1, 24\)"):
        pipe([GOOD, GOOD], image_embeds=torch.ones(1, 24))


def test_generators_elsewhere_are_refused(pipe):
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match=r"generator must be on the CPU, .* got one on cuda:0"):
        pipe(GOOD, generator=Elsewhere())


def test_other_schedulers_and_networks_are_refused():
    with pytest.raises(TypeError, match="scheduler must be an EDMScheduler, got PeRFlowScheduler"):
        InfDiTUpscalePipeline(network(), PeRFlowScheduler())
    with pytest.raises(TypeError, match="transformer must be an InfDiTTransformer2DModel, got Linear"):
        InfDiTUpscalePipeline(torch.nn.Linear(1, 1), EDMScheduler())
