"""Degradation of pictures: kernels against their definitions, draws against their probabilities, every stage."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("scipy", reason='training needs the extra: pip install "linattn[train]"')

import pydantic
import scipy.stats
from PIL import Image

from linattn.distill.data import degradation
from linattn.distill.data.degradation import bell, degrade, draw_kernel, sinc
from linattn.distill.recipe import Recipe, RecipeError
from linattn.distill.upscaling import DEGRADATIONS, Degradation, Noise, Resize, Upscaling, named

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

DRAWS = 4000
#: Chance that a right share is taken for a wrong one, at a seed that is fixed: once it holds, it holds.
UNLIKELY = 1e-3


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(height=48, width=64, seed=0):
    """Smooth colours with an edge and a texture: every stage has something to damage."""
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], axis=-1)
    smooth[height // 4 : height // 2, width // 4 : width // 2] = [0.9, 0.2, 0.1]
    textured = smooth * 0.7 + 0.3 * rng(seed).random((height, width, 1))
    return degradation.to_bytes(textured)


def is_drawn_with(counts, shares, draws=DRAWS):
    observed = [counts[name] for name in shares]
    assert sum(observed) == draws, "nothing else is drawn"
    p = scipy.stats.chisquare(observed, [share * draws for share in shares.values()]).pvalue
    assert p > UNLIKELY, (counts, shares)


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture(scope="module")
def kernels():
    numbers = rng()
    return [draw_kernel(numbers, named("strong").first.blur) for _ in range(DRAWS)]


def test_shapes_are_drawn_with_their_probabilities(kernels):
    shares = {"gaussian": 0.45, "gaussian_oblong": 0.25, "generalized": 0.12, "generalized_oblong": 0.03}
    shares |= {"plateau": 0.12, "plateau_oblong": 0.03}
    is_drawn_with(Counter(k.kind for k in kernels), {k: 0.9 * v for k, v in shares.items()} | {"sinc": 0.1})


def test_every_odd_size_from_7_to_21_is_drawn_equally_often(kernels):
    is_drawn_with(Counter(len(k.values) for k in kernels), dict.fromkeys(range(7, 22, 2), 1 / 8))


def test_kernels_sum_to_one_and_are_symmetric_about_their_centre(kernels):
    for kernel in kernels[:500]:
        values = kernel.values
        assert values.shape == (len(values),) * 2
        assert values.sum() == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(values, values[::-1, ::-1], atol=1e-12)


def test_only_oblong_kernels_change_when_they_are_turned(kernels):
    for kernel in kernels[:500]:
        is_round = np.allclose(kernel.values, np.rot90(kernel.values), atol=1e-12)
        if kernel.kind.endswith("_oblong"):
            assert not is_round, kernel
        else:
            assert is_round and np.allclose(kernel.values, kernel.values.T, atol=1e-12), kernel


@pytest.mark.parametrize("plateau", [False, True])
@pytest.mark.parametrize(("n", "sigma", "angle", "beta"), [(7, (1.0, 2.0), 0.3, 1.0), (21, (2.5, 0.4), -2.0, 1.7)])
def test_bells_are_their_formula(n, sigma, angle, beta, plateau):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag(np.square(sigma)) @ turn.T)
    wanted = np.empty((n, n))
    for row in range(n):
        for column in range(n):
            u = np.array([row - n // 2, column - n // 2])
            m = u @ inverse @ u
            wanted[row, column] = 1 / (1 + m**beta) if plateau else math.exp(-(m**beta) / 2)
    np.testing.assert_allclose(bell(n, sigma, angle, beta=beta, plateau=plateau), wanted / wanted.sum(), rtol=1e-9)


def test_widths_angles_and_exponents_are_drawn_from_their_ranges(monkeypatch):
    made = []
    monkeypatch.setattr(degradation, "bell", lambda n, sigma, angle, **kw: made.append((sigma, angle, kw)))
    numbers, settings = rng(), named("strong").first.blur
    kinds = [draw_kernel(numbers, settings).kind for _ in range(DRAWS)]
    kinds = [kind for kind in kinds if kind != "sinc"]
    widths = [s for sigma, _, _ in made for s in sigma]
    assert 0.2 <= min(widths) < 0.25 and 2.95 < max(widths) <= 3.0
    for kind, (sigma, angle, _) in zip(kinds, made, strict=True):
        assert (sigma[0] != sigma[1] and angle != 0) if kind.endswith("_oblong") else (sigma[0] == sigma[1])
    angles = [angle for _, angle, _ in made if angle]
    assert -math.pi < min(angles) < -3 and 3 < max(angles) < math.pi
    for family, low, high, below in (("gaussian", 1, 1, 0), ("generalized", 0.5, 4, 0.5), ("plateau", 1, 2, 0)):
        mine = [kw for kind, (_, _, kw) in zip(kinds, made, strict=True) if kind.startswith(family)]
        betas = [kw["beta"] for kw in mine]
        assert all(kw["plateau"] == (family == "plateau") for kw in mine)
        assert low <= min(betas) and max(betas) <= high and max(betas) > low + 0.95 * (high - low) - 1e-9
        assert scipy.stats.binomtest(sum(b < 1 for b in betas), len(betas), below).pvalue > UNLIKELY, family


@pytest.mark.parametrize("cutoff", [math.pi / 3, math.pi / 2, 0.9 * math.pi])
def test_sinc_passes_what_is_below_its_cut_off_and_nothing_above(cutoff):
    n, frequencies = 161, 256
    response = np.abs(np.fft.fft2(sinc(n, cutoff), (frequencies, frequencies)))
    axis = 2 * math.pi * np.fft.fftfreq(frequencies)
    radius = np.hypot(*np.meshgrid(axis, axis))
    assert response[0, 0] == pytest.approx(1, rel=1e-9)
    # What a cut after n taps leaves of the edge: the overshoot of Gibbs, 9 % of the step, where the edge is near.
    near = 8 * math.pi / n
    assert np.abs(response[radius < cutoff - near] - 1).max() < 0.09
    assert response[radius > cutoff + near].max() < 0.09
    edge = response[np.abs(radius - cutoff) < math.pi / frequencies]
    assert edge.mean() == pytest.approx(0.5, abs=0.05)


def test_short_sincs_have_higher_cut_offs(monkeypatch):
    cutoffs = {7: [], 13: []}
    monkeypatch.setattr(degradation, "sinc", lambda n, cutoff: cutoffs[n].append(cutoff))
    numbers = rng()
    for n in (7, 13):
        for _ in range(1000):
            degradation.draw_sinc(numbers, n)
    assert math.pi / 3 < min(cutoffs[7]) < math.pi / 3 + 0.01 and math.pi / 5 < min(cutoffs[13]) < math.pi / 5 + 0.01
    assert max(cutoffs[7] + cutoffs[13]) < math.pi


def test_filtering_is_a_weighted_sum_of_the_neighbours_mirrored_at_the_edge():
    pixels, kernel = rng().random((9, 12, 3), dtype=np.float32), bell(7, (1.0, 2.0), 0.5)
    made = degradation.filtered(pixels, kernel)
    mirrored = np.pad(pixels, ((3, 3), (3, 3), (0, 0)), mode="reflect").astype(np.float64)
    wanted = np.zeros((9, 12, 3))
    for row in range(7):
        for column in range(7):
            wanted += kernel[row, column] * mirrored[row : row + 9, column : column + 12]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, wanted, atol=1e-6)


# ----------------------------------------------------------------------------------------------- resizing, noise, JPEG


@pytest.mark.parametrize("place", ["first", "second"])
def test_factors_are_drawn_with_their_probabilities_from_their_ranges(place):
    settings, numbers = getattr(named("strong"), place).resize, rng()
    scales = [degradation.draw_scale(numbers, settings) for _ in range(DRAWS)]
    kinds = Counter("enlarge" if s > 1 else "reduce" if s < 1 else "unchanged" for s in scales)
    wanted = {"first": (0.2, 0.7, 0.1, 0.3, 1.5), "second": (0.3, 0.4, 0.3, 0.6, 1.2)}[place]
    is_drawn_with(kinds, dict(zip(("enlarge", "reduce", "unchanged"), wanted, strict=False)))
    assert wanted[3] < min(scales) < wanted[3] + 0.01 and wanted[4] - 0.01 < max(scales) < wanted[4]


def test_ways_of_resizing_are_drawn_equally_often_and_do_not_smooth_twice():
    numbers = rng()
    is_drawn_with(
        Counter(degradation.draw_resize(numbers) for _ in range(DRAWS)), dict.fromkeys(degradation.RESIZES, 1 / 3)
    )
    stripes = np.tile(np.array([0.0, 0.0, 1.0, 0.0], dtype=np.float32)[None, :, None], (8, 4, 1))
    assert degradation.resized(stripes, (2, 4), "area") == pytest.approx(0.25)
    assert degradation.resized(stripes, (2, 4), "bilinear") == pytest.approx(0.5), "two of four pixels are read"


@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_its_width_and_grey_noise_no_colour(grey):
    noise = degradation.gaussian_noise(np.zeros((100, 100, 3), np.float32), rng(), 0.05, grey)
    assert noise.shape == (100, 100, 1 if grey else 3)
    # Chi-square of the sum of squares.
    p = scipy.stats.chi2.cdf((noise**2).sum() / 0.05**2, noise.size)
    assert UNLIKELY < p < 1 - UNLIKELY


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_is_that_of_a_camera_that_counts_photons(grey):
    pixels = np.full((150, 150, 3), 51 / 255, np.float32)
    pixels[:, 75:] = 204 / 255
    noise = degradation.poisson_noise(pixels, rng(), grey)
    photons = 2  # two levels
    assert noise.shape == (150, 150, 1 if grey else 3)
    for part, level in ((noise[:, :75], 0.2), (noise[:, 75:], 0.8)):
        counts = (part + level) * photons
        np.testing.assert_allclose(counts, counts.round(), atol=1e-4)
        for k in range(4):
            p = scipy.stats.poisson.pmf(k, level * photons)
            assert scipy.stats.binomtest(int((counts.round() == k).sum()), counts.size, p).pvalue > UNLIKELY


def test_kinds_of_noise_are_drawn_with_their_probabilities(monkeypatch):
    seen = []
    none = np.zeros((2, 2, 1), np.float32)
    monkeypatch.setattr(
        degradation, "gaussian_noise", lambda _p, _r, sigma, grey: seen.append(("gaussian", grey, sigma)) or none
    )
    monkeypatch.setattr(degradation, "poisson_noise", lambda _p, _r, grey: seen.append(("poisson", grey, 0)) or none)
    numbers, pixels = rng(), np.zeros((2, 2, 3), np.float32)
    for _ in range(DRAWS):
        degradation.noisy(pixels, numbers, named("strong").first.noise)
    shares = {("gaussian", True): 0.2, ("gaussian", False): 0.3, ("poisson", True): 0.2, ("poisson", False): 0.3}
    is_drawn_with(Counter((kind, bool(grey)) for kind, grey, _ in seen), shares)
    widths = [sigma * 255 for kind, _, sigma in seen if kind == "gaussian"]
    assert 1 <= min(widths) < 1.1 and 14.9 < max(widths) <= 15


def test_poisson_noise_is_scaled():
    pixels = picture().astype(np.float32) / 255 * 0.5 + 0.25  # far from where it would be clamped
    made = [degradation.noisy(pixels, rng(), Noise(gaussian=0, poisson_scale=(s, s))) - pixels for s in (0.1, 0.2)]
    np.testing.assert_allclose(made[1], 2 * made[0], atol=1e-6)


def test_noise_stays_between_black_and_white():
    pixels = np.zeros((32, 32, 3), np.float32)
    pixels[16:] = 1
    for gaussian in (0, 1):
        made = degradation.noisy(pixels, rng(), Noise(gaussian=gaussian, sigma=(50, 50), poisson_scale=(5, 5)))
        assert made.dtype == np.float32 and made.min() == 0 and made.max() == 1


def test_jpeg_is_that_of_pillow_at_the_quality_that_was_drawn():
    image = picture()
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=35)
    made = degradation.jpeg(image.astype(np.float32) / 255, 35)
    np.testing.assert_array_equal(degradation.to_bytes(made), np.asarray(Image.open(file)))
    numbers = rng()
    drawn = Counter(degradation.draw_quality(numbers, (60, 64)) for _ in range(DRAWS))
    is_drawn_with(drawn, dict.fromkeys(range(60, 65), 1 / 5))


# ------------------------------------------------------------------------------------------------------------ the whole


HARMLESS = {"blur": {"probability": 0}, "resize": {"enlarge": 0, "reduce": 0, "unchanged": 1}}
HARMLESS |= {"noise": {"gaussian": 1, "sigma": [0, 0]}, "jpeg": [100, 100]}
STAGES = {
    "blur": {"blur": {"probability": 1, "sigma": [2, 2], "sinc": 0}},
    "sinc": {"blur": {"probability": 1, "sinc": 1}},
    "enlarging": {"resize": {"enlarge": 1, "reduce": 0, "unchanged": 0}},
    "reducing": {"resize": {"enlarge": 0, "reduce": 1, "unchanged": 0}},
    "gaussian noise": {"noise": {"gaussian": 1, "sigma": [9, 9]}},
    "poisson noise": {"noise": {"gaussian": 0, "poisson_scale": [1, 1]}},
    "jpeg": {"jpeg": [40, 40]},
}


def with_stage(place, changes):
    content = {"first": dict(HARMLESS), "second": dict(HARMLESS), "final_sinc": 0}
    if place:
        content[place] = content[place] | changes
    return Upscaling.model_validate({"degradation": content}).degradation


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_the_picture(place, stage, monkeypatch):
    monkeypatch.setattr(degradation, "draw_resize", lambda _: "bilinear")
    image = picture()
    plain = degrade(image, rng(), with_stage(None, {}))
    damaged = degrade(image, rng(), with_stage(place, STAGES[stage]))
    assert damaged.shape == plain.shape and np.abs(damaged.astype(int) - plain).max() > 2


def test_final_sinc_changes_the_picture(monkeypatch):
    monkeypatch.setattr(degradation, "draw_resize", lambda _: "area")
    settings = with_stage(None, {})
    ringing = settings.model_copy(update={"final_sinc": 1.0})
    plain, rung = (degrade(picture(), rng(3), s).astype(int) for s in (settings, ringing))
    assert np.abs(rung - plain).max() > 2


def test_parts_of_the_second_stage_happen_with_their_probabilities(monkeypatch):
    """Second blur 0.5, final sinc 0.8, and JPEG last in half of the pictures."""
    events = []
    identity = lambda name: lambda pixels, *_: events[-1].append(name) or pixels  # noqa: E731
    for name in ("filtered", "noisy", "jpeg"):
        monkeypatch.setattr(degradation, name, identity(name))
    numbers, image, settings, draws = rng(), picture(8, 8), named("strong"), 1000
    for _ in range(draws):
        events.append([])
        degrade(image, numbers, settings)
    blur, noise, compressed = "filtered", "noisy", "jpeg"
    shares = {}
    for blurred, p in (([blur], 0.5), ([], 0.5)):
        for end, q in (([compressed, blur], 0.4), ([blur, compressed], 0.4), ([compressed], 0.2)):
            shares[(blur, noise, compressed, *blurred, noise, *end)] = p * q
    is_drawn_with(Counter(map(tuple, events)), shares, draws)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_same_seed_gives_the_same_picture_and_nothing_else_matters(name):
    image, settings = picture(), named(name)
    before = image.copy(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = degrade(image, rng(7), settings)
    np.random.random()
    torch.rand(1)
    assert np.array_equal(first, degrade(image, rng(7), settings)) and np.array_equal(image, before[0])
    if name != "bicubic":
        np.random.set_state(("MT19937", before[1], 624, 0, 0.0))
        torch.set_rng_state(before[2])
        others = [degrade(image, rng(seed), settings) for seed in range(8)]
        assert len({other.tobytes() for other in others}) == 8
        assert torch.equal(torch.get_rng_state(), before[2]), "no global random number is drawn"


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 51), (40, 64)])
def test_any_size_is_reduced_by_four_rounded_up(name, size):
    for seed in range(5):
        made = degrade(picture(*size), rng(seed), named(name))
        assert made.shape == (-(-size[0] // 4), -(-size[1] // 4), 3) and made.dtype == np.uint8


@pytest.mark.parametrize("place", ["first", "second"])
def test_mild_blurs_less_than_strong(place):
    """Mean squared distance from the centre, over the kernels that are no sincs (these have negative weights)."""

    def spread(name):
        settings = getattr(named(name), place).blur.model_copy(update={"sinc": 0.0})
        drawn = [draw_kernel(numbers, settings).values for numbers in [rng()] for _ in range(500)]
        axes = [np.arange(len(values)) - len(values) // 2 for values in drawn]
        return np.mean([(values.sum(1) * axis**2).sum() for values, axis in zip(drawn, axes, strict=True)])

    assert spread("mild") < 0.75 * spread("strong")


def test_bicubic_is_the_smoothed_reduction_and_draws_nothing():
    image, numbers = picture(), rng()
    before = numbers.bit_generator.state
    channels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    wanted = torch.nn.functional.interpolate(channels, (12, 16), mode="bicubic", antialias=True).clamp(0, 1)
    made = degrade(image, numbers, named("bicubic"))
    np.testing.assert_array_equal(made, (wanted[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8))
    assert numbers.bit_generator.state == before


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8"):
        degrade(image, rng(), named("strong"))


# ------------------------------------------------------------------------------------------------------------- settings


def recipe_with(value):
    return Recipe.parse(
        {
            "model": {"pretrained": "owner/model"},
            "student": {"adapter": None},
            "objective": {"kind": "edm"},
            "data": {"kind": "images", "path": "p", "resolution": 512, "upscaling": {"degradation": value}},
            "training": {"steps": 1, "batch_size": 1, "learning_rate": 1.0},
            "output": {"folder": "out"},
        }
    )


def test_the_published_settings_are_known_by_name():
    strong, mild = (recipe_with(name).data.upscaling.degradation for name in ("strong", "mild"))
    assert strong == Degradation() and strong.second.blur.shapes == strong.first.blur.shapes
    assert (strong.first.blur.sigma, strong.second.blur.sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert (mild.first.blur.sigma, mild.second.blur.sigma) == ((0.2, 1.5), (0.2, 1.0))
    assert (strong.second.noise.sigma, strong.second.noise.poisson_scale) == ((1, 12), (0.05, 1.0))
    assert mild.first.noise == strong.first.noise and mild.second.resize == strong.second.resize
    assert recipe_with("bicubic").data.upscaling.degradation.method == "bicubic"


def test_keys_that_differ_from_strong_leave_the_others_as_they_are():
    made = recipe_with({"final_sinc": 0, "second": {"blur": {"sinc": 0.5}, "noise": None}}).data.upscaling.degradation
    assert made.final_sinc == 0 and made.second.blur.sinc == 0.5
    assert made.second.blur.probability == 0.5 and made.second.blur.sigma == (0.2, 1.5)
    assert made.first == Degradation().first and made.second.noise == Degradation().second.noise
    again = Recipe.parse(recipe_with({"second": {"jpeg": [30, 95]}}).model_dump())
    assert again.data.upscaling.degradation.second.jpeg == (30, 95)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("harsh", "expected strong, mild, bicubic, or keys that differ, got 'harsh'"),
        ({"first": {"blur": {"sgima": [1, 2]}}}, ".first.blur.sgima: unknown key; did you mean"),
        ({"first": {"blur": {"sigma": [3, 2]}}}, ".first.blur.sigma: expected two numbers, 0 <= first <= second"),
        ({"first": {"blur": {"sizes": [6, 21]}}}, ".first.blur.sizes: expected two odd numbers"),
        ({"second": {"jpeg": [0, 95]}}, ".second.jpeg: expected two whole numbers"),
        ({"second": {"resize": {"scale": [1.1, 1.5]}}}, ".second.resize.scale: expected 0 < first <= 1 <= second"),
        (
            {"second": {"resize": {"enlarge": 0.5}}},
            ".second.resize: expected enlarge, reduce, unchanged to add up to 1",
        ),
        ({"first": {"blur": {"shapes": {"plateau": 0.5}}}}, "plateau_oblong to add up to 1, got 0.45, 0.25, 0.12"),
    ],
)
def test_wrong_settings_are_told_by_key(value, line):
    with pytest.raises(RecipeError) as caught:
        recipe_with(value)
    (told,) = caught.value.problems
    assert told.startswith("data.upscaling.degradation") and line in told


def test_settings_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Resize().scale = (1, 2)
