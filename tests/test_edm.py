"""EDM: noise levels, preconditioning and samplers, against the original's goldens, exact solutions and diffusers."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import goldens

from linattn.schedulers import edm
from linattn.schedulers.edm import karras_sigmas, preconditioning

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

FLOAT32 = 2.0**-23
# A Gaussian of the data, N(MEAN, DEVIATION^2), has an exact denoiser and an exact flow.
MEAN, DEVIATION = 0.3, 0.7


def scheduler(steps=None, sigmas=None, **config):
    diffusers = pytest.importorskip(
        "diffusers", reason='the scheduler needs the extra: pip install "linattn[diffusers]"'
    )
    del diffusers
    from linattn.schedulers import EDMScheduler

    made = EDMScheduler(**config)
    if steps is not None or sigmas is not None:
        made.set_timesteps(steps, sigmas=sigmas)
    return made


def denoiser(x, sigma):
    """E[clean | x] for the Gaussian."""
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def flow(x, sigma, until):
    """Where the probability flow carries x from noise level sigma to `until`."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + until**2) / (DEVIATION**2 + sigma**2))


def network(x, sigma, sigma_data=0.5):
    """F of which `denoiser` is the D."""
    c = preconditioning(torch.tensor(sigma, dtype=torch.float64), sigma_data)
    return (denoiser(x, sigma) - c.c_skip * x) / c.c_out


def sampled(made, x, model=network, **options):
    """The sample after each call."""
    states = []
    for t in made.timesteps:
        x = made.step(model(x, math.exp(4 * t)), t, x, **options).prev_sample
        states.append(x)
    return states


# ------------------------------------------------------------------------------------------- levels and preconditioning


@goldens.needs_goldens
@pytest.mark.parametrize("name", ["sampler_heun", "sampler_heun_noinit", "sampler_ddim"])
def test_noise_levels_are_those_of_the_original(name):
    expected = goldens.load("infdit", name)[0]["sigmas"]
    # The original interpolates in float32: roundings of sigma_max^(1/7), which the power makes 7 times larger.
    rounding = FLOAT32 * 7 * (40 / 0.002) ** (1 / 7)
    torch.testing.assert_close(karras_sigmas(len(expected) - 1), expected, rtol=rounding, atol=0)


def test_twenty_noise_levels_are_those_of_the_official_run():
    printed = (
        "40 30.09 22.37 16.41 11.87 8.446 5.909 4.055 2.724 1.787 1.140 0.7059 0.4218 0.2419 0.1322 0.06828 0.03291"
    )
    expected = [float(number) for number in f"{printed} 0.01457 0.005790 0.002 0".split()]
    torch.testing.assert_close(karras_sigmas(20), torch.tensor(expected), rtol=5e-4, atol=0)


def test_a_single_step_starts_at_the_noisiest_level():
    assert karras_sigmas(1, 0.01, 3.0, 5.0).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_keeps_input_and_target_at_variance_one(sigma_data):
    sigma = torch.logspace(-3, 2, 11, dtype=torch.float64)
    c = preconditioning(sigma, sigma_data)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c.c_in**2 * (sigma**2 + sigma_data**2), one)
    # The target is (clean - c_skip (clean + sigma noise)) / c_out.
    variance = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2) / c.c_out**2
    torch.testing.assert_close(variance, one)
    torch.testing.assert_close(c.c_noise.mul(4).exp(), sigma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_preconditioning_is_at_least_float32_and_has_the_shape_of_sigma(dtype):
    c = preconditioning(torch.tensor([[1.0], [2.0]], dtype=dtype))
    assert {part.dtype for part in c} == {torch.promote_types(dtype, torch.float32)}
    assert {part.shape for part in c} == {(2, 1)}
    assert preconditioning(2).c_skip.shape == ()


BAD = {
    "no steps": (lambda: karras_sigmas(0), "steps must be an integer of at least 1, got 0"),
    "steps not whole": (lambda: karras_sigmas(2.5), "steps must be an integer of at least 1, got 2.5"),
    "sigma_min of 0": (lambda: karras_sigmas(5, 0.0), "sigma_min=0.0"),
    "sigmas swapped": (lambda: karras_sigmas(5, 2.0, 1.0), "sigma_min=2.0, sigma_max=1.0"),
    "rho of 0": (lambda: karras_sigmas(5, rho=0.0), "rho must be above 0, got 0.0"),
    "sigma_data of 0": (lambda: preconditioning(1.0, 0.0), "sigma_data must be above 0, got 0.0"),
    "rising sigmas": (lambda: edm.heun_calls([1.0, 2.0]), "sigmas must be at least two falling numbers"),
    "one sigma": (lambda: edm.multistep_calls([1.0]), "sigmas must be at least two falling numbers"),
    "negative sigma": (lambda: edm.euler_calls([1.0, -1.0]), "none below 0"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(case):
    call, message = case
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_the_mathematics_needs_torch_only():
    code = (
        "import sys; sys.modules['diffusers'] = None; sys.modules['numpy'] = None\n"
        "from linattn.schedulers.edm import karras_sigmas, preconditioning, heun_calls\n"
        "heun_calls(karras_sigmas(3)), preconditioning(1.0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------- samplers


def textbook_heun(x, sigmas):
    """EDM, algorithm 1, as it stands there."""
    for sigma, after in itertools.pairwise(sigmas):
        d = (x - denoiser(x, sigma)) / sigma
        ahead = x + (after - sigma) * d
        if after > 0:
            d_ahead = (ahead - denoiser(ahead, after)) / after
            ahead = x + (after - sigma) * (d + d_ahead) / 2
        x = ahead
    return x


def test_heun_is_the_algorithm_of_the_paper():
    made = scheduler(6)
    x = torch.randn(50, dtype=torch.float64) * 40
    expected = textbook_heun(x, karras_sigmas(6, dtype=torch.float64).tolist())
    # The network is told float32 timesteps.
    torch.testing.assert_close(sampled(made, x)[-1], expected, rtol=1e-5, atol=1e-6)


def textbook_churn(x, sigmas, noises, s_churn, s_tmin, s_tmax, s_noise):
    """EDM, algorithm 2, as it stands there, from an x that the first step's noise has been added to already."""
    n = len(sigmas) - 1
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0
        hat = sigma + gamma * sigma
        if i:
            x = x + math.sqrt(hat**2 - sigma**2) * s_noise * noises[i]
        d = (x - denoiser(x, hat)) / hat
        ahead = x + (after - hat) * d
        if after > 0:
            ahead = x + (after - hat) * (d + (ahead - denoiser(ahead, after)) / after) / 2
        x = ahead
    return x


@pytest.mark.parametrize("s_churn", [1.0, 100.0], ids=["churn", "as much as allowed"])
def test_churn_is_the_algorithm_of_the_paper(s_churn):
    options = {"s_churn": s_churn, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.007}
    made = scheduler(6, **options)
    sigmas = karras_sigmas(6, dtype=torch.float64).tolist()
    noises = torch.randn(6, 50, dtype=torch.float64)
    x = start = torch.randn(50, dtype=torch.float64) * made.init_noise_sigma
    for i, t in enumerate(made.timesteps):
        # The call that ends step k adds the noise of step k + 1.
        x = made.step(network(x, math.exp(4 * t)), t, x, noise=noises[min(i // 2 + 1, 5)]).prev_sample
    torch.testing.assert_close(x, textbook_churn(start, sigmas, noises, **options), rtol=1e-5, atol=1e-6)


def test_churn_of_the_first_step_raises_the_starting_level():
    assert scheduler(4, s_churn=1.0).init_noise_sigma == pytest.approx(40 * 1.25)
    assert scheduler(4, s_churn=1.0, s_tmax=39.0).init_noise_sigma == 40


@goldens.needs_goldens
def test_the_stochastic_steps_are_those_of_the_original():
    """x' = x + (s' sqrt(1 - eta^2) - s) d + eta s' noise: D follows from a state and the next, whatever the network."""
    golden, _ = goldens.load("infdit", "sampler_ddim")
    made = scheduler(2, sampler="ddim", eta=0.1)
    states = [golden["x_start"], golden["x_after0"], golden["x_after1"]]
    for i, (x, after) in enumerate(itertools.pairwise(states)):
        sigma, until = golden["sigmas"][i].item(), golden["sigmas"][i + 1].item()
        slope = (after - x - 0.1 * until * golden[f"noise{i + 1}"]) / (until * math.sqrt(1 - 0.1**2) - sigma)
        c = preconditioning(sigma)
        output = (x - sigma * slope - c.c_skip * x) / c.c_out
        out = made.step(output, made.timesteps[i], x, noise=golden[f"noise{i + 1}"])
        assert goldens.relative_error(out.prev_sample, after) < 2e-5
        assert goldens.relative_error(out.pred_original_sample, x - sigma * slope) < 2e-5


ORDERS = {"heun": 2, "dpmsolver++": 2, "ddim": 1}


@pytest.mark.parametrize("sampler", ORDERS)
def test_error_shrinks_with_the_order_of_the_sampler(sampler):
    """Down to a small level, because the last step, to 0, is one of Euler whatever the sampler."""
    x = torch.linspace(-60, 60, 7, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        made = scheduler(steps, sampler=sampler, eta=0.0)
        level = made.sigmas[-2].item()
        before_last = sampled(made, x, exact_levels(made))[-2]
        errors.append((before_last - flow(x, 40.0, level)).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[sampler], abs=0.25)


def exact_levels(made):
    """`network` at the levels in float64: those that timesteps give are rounded."""
    levels = iter([call.sigma for call in made.calls])
    return lambda x, _: network(x, next(levels))


@pytest.mark.parametrize("sampler", ORDERS)
def test_the_last_step_ends_at_the_estimate_of_the_data(sampler):
    made = scheduler(3, sampler=sampler, eta=0.0)
    x = torch.randn(20, dtype=torch.float64) * 40
    for t in made.timesteps:
        out = made.step(network(x, math.exp(4 * t)), t, x)
        x = out.prev_sample
    assert torch.equal(x, out.pred_original_sample)


@pytest.mark.parametrize(("sampler", "calls"), [("heun", 9), ("dpmsolver++", 5), ("ddim", 5)])
def test_there_is_a_timestep_for_each_call(sampler, calls):
    made = scheduler(5, sampler=sampler)
    assert len(made.timesteps) == len(made.calls) == calls
    assert made.num_inference_steps == 5 and made.sigmas.shape == (6,)
    torch.testing.assert_close(made.timesteps[0].mul(4).exp(), torch.tensor(40.0))


def test_samples_are_updated_in_pieces_as_they_are_as_a_whole():
    for calls in (edm.heun_calls(karras_sigmas(3)), edm.multistep_calls(karras_sigmas(3))):
        for call in calls:
            x, denoised, history, noise = torch.randn(4, 6, 10)
            whole = call.update(x, denoised, history, noise)
            pieces = [
                call.update(*(part[rows] for part in (x, denoised, history, noise))) for rows in ([0, 1], [2, 3, 4, 5])
            ]
            assert torch.equal(torch.cat(pieces), whole)


# ------------------------------------------------------------------------------------------------------------ scheduler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_is_kept_in_float32_or_wider(dtype):
    made = scheduler(3)
    x = (torch.randn(8) * 40).to(dtype)
    out = made.step(torch.randn(8).bfloat16(), made.timesteps[0], x)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.promote_types(dtype, torch.float32)


def test_a_network_in_bfloat16_leaves_the_sample_unrounded():
    made, exact = scheduler(4), scheduler(4)
    x = torch.randn(1000, dtype=torch.float64) * 40
    rough = sampled(made, x.float(), lambda x, sigma: network(x.double(), sigma).bfloat16())[-1]
    rounded = sampled(exact, x, lambda x, sigma: network(x, sigma).bfloat16().double())[-1]
    # What is left is rounding of the state in float32, and outputs that it made round the other way.
    assert goldens.relative_error(rough, rounded) < 2.0**-8 * 0.1


def test_custom_noise_levels_are_sampled_at():
    made = scheduler(sigmas=[10.0, 1.0, 0.1])
    assert made.sigmas.tolist() == pytest.approx([10, 1, 0.1, 0]) and made.init_noise_sigma == 10
    assert [call.sigma for call in made.calls] == [10, 1, 1, 0.1, 0.1]
    assert scheduler(sigmas=torch.tensor([10.0, 1.0, 0.0])).num_inference_steps == 2


@pytest.mark.parametrize("sampler", ORDERS)
def test_a_run_that_begins_later_is_a_run_over_the_remaining_levels(sampler):
    made, rest = scheduler(5, sampler=sampler, eta=0.0), scheduler(sampler=sampler, eta=0.0)
    rest.set_timesteps(sigmas=made.sigmas[2:])
    begin = 2 * made.order
    x = torch.randn(30, dtype=torch.float64) * made.sigmas[2]
    made.set_begin_index(begin)
    assert made.begin_index == begin
    late, model = x, exact_levels(rest)
    for t in made.timesteps[begin:]:
        late = made.step(model(late, None), t, late).prev_sample
    # made's levels are float64, those of rest were rounded.
    torch.testing.assert_close(late, sampled(rest, x, exact_levels(rest))[-1], rtol=1e-6, atol=1e-6)


def test_the_first_timestep_says_where_to_begin():
    for sampler in ORDERS:
        made = scheduler(5, sampler=sampler)
        t = made.timesteps[2 * made.order]
        made.step(torch.zeros(3), t, torch.zeros(3))
        assert made.begin_index == 2 * made.order and made.step_index == 2 * made.order + 1


def test_a_second_run_knows_nothing_of_the_first():
    for sampler in ORDERS:
        made = scheduler(4, sampler=sampler, eta=0.0)
        x = torch.randn(9, dtype=torch.float64) * 40
        first = sampled(made, x)[-1]
        made.set_timesteps(4)
        made.step(torch.ones(9), made.timesteps[0], x)
        made.set_timesteps(4)
        assert torch.equal(sampled(made, x)[-1], first)


def test_fresh_noise_comes_from_the_generators_of_the_images():
    made = scheduler(2, sampler="ddim", eta=0.5)
    x = torch.randn(2, 3, 4, 4)

    def stepped(sample, seeds):
        made.set_timesteps(2)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made.step(torch.zeros_like(sample), made.timesteps[0], sample, generator=generator).prev_sample

    both = stepped(x, [3, 4])
    assert torch.equal(both[1:], stepped(x[1:], [4]))
    assert not torch.equal(both[1:], stepped(x[1:], [5]))


def test_the_scheduler_is_saved_and_loaded(tmp_path):
    made = scheduler(sigma_max=20.0, sampler="ddim", eta=0.3, s_noise=1.1)
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    assert [loaded.config[name] for name in ("sigma_max", "sampler", "eta", "s_noise")] == [20.0, "ddim", 0.3, 1.1]
    made.set_timesteps(3)
    loaded.set_timesteps(3)
    assert loaded.calls == made.calls


def test_add_noise_is_the_noise_of_the_timesteps():
    made = scheduler(4)
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    noisy = made.add_noise(clean, noise, made.timesteps[[0, 4]])
    sigmas = torch.tensor([made.calls[0].sigma, made.calls[4].sigma]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(noisy, clean + sigmas * noise)


MISUSE = {
    "sampler": (lambda: scheduler(sampler="euler"), "sampler must be one of heun, ddim, dpmsolver++, lcm, got 'euler'"),
    "eta": (lambda: scheduler(eta=1.5), "eta must be between 0 and 1, got 1.5"),
    "no grid": (lambda: scheduler(grid_steps=0), "grid_steps must be None or a whole number of at least 1, got 0"),
    "more steps than the grid": (
        lambda: scheduler(5, sampler="lcm", grid_steps=4),
        "num_inference_steps must be from 1 to grid_steps (4), got 5",
    ),
    "churn without heun": (lambda: scheduler(sampler="ddim", s_churn=1.0), 'only sampler="heun" has churn'),
    "churn below 0": (lambda: scheduler(s_churn=-1.0), "s_churn=-1.0"),
    "churn's bounds": (lambda: scheduler(s_tmin=2.0, s_tmax=1.0), "s_tmin=2.0, s_tmax=1.0"),
    "sigma_data": (lambda: scheduler(sigma_data=0.0), "sigma_data must be above 0, got 0.0"),
    "sigma_max": (lambda: scheduler(sigma_max=0.001), "sigma_max=0.001"),
    "neither steps nor sigmas": (lambda: scheduler().set_timesteps(), "expected one of num_inference_steps and sigmas"),
    "steps and sigmas": (lambda: scheduler(3, [1.0]), "expected one of num_inference_steps and sigmas"),
    "no steps": (lambda: scheduler(0), "steps must be an integer of at least 1, got 0"),
    "rising sigmas": (lambda: scheduler(sigmas=[1.0, 2.0]), "sigmas must be at least two falling numbers"),
    "no sigmas": (lambda: scheduler(sigmas=[]), "sigmas must be at least two falling numbers"),
    "begin within a step": (lambda: scheduler(3).set_begin_index(1), "begin_index=1 is within step 0"),
    "begin after the end": (lambda: scheduler(3).set_begin_index(5), "begin_index must be between 0 and 4, got 5"),
    "not set up": (lambda: scheduler().step(torch.zeros(1), 0.0, torch.zeros(1)), "call set_timesteps first"),
    "shapes": (
        lambda: (s := scheduler(3)).step(torch.zeros(2), s.timesteps[0], torch.zeros(1)),
        "must have the same shape, got (2,), (1,) and None",
    ),
    "unknown timestep": (
        lambda: scheduler(3).step(torch.zeros(1), 500, torch.zeros(1)),
        "timestep must be one of",
    ),
    "too many steps": (
        lambda: [sampled(s := scheduler(2), torch.zeros(1)), s.step(torch.zeros(1), s.timesteps[-1], torch.zeros(1))],
        "all 3 steps were done",
    ),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_of_the_scheduler_is_named(case):
    call, message = case
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_a_step_out_of_turn_is_refused():
    made = scheduler(4)
    made.step(torch.zeros(1), made.timesteps[0], torch.zeros(1))
    with pytest.raises(ValueError, match="timestep must be one of"):
        made.step(torch.zeros(1), made.timesteps[3], torch.zeros(1))


@pytest.mark.parametrize(("steps", "places"), [(1, [0]), (2, [0, 10]), (3, [0, 6, 12]), (4, [0, 5, 10, 15])])
def test_students_of_few_steps_are_sampled_at_every_nth_level_of_their_grid(steps, places):
    made = scheduler(steps, sampler="lcm", grid_steps=20)
    assert [call.sigma for call in made.calls] == karras_sigmas(20, dtype=torch.float64)[places].tolist()
    assert made.sigmas[-1] == 0 and made.num_inference_steps == steps
    plain = scheduler(steps, sampler="lcm")
    assert plain.sigmas.tolist() == karras_sigmas(steps).tolist(), "without a grid, the levels of the others"
    other = scheduler(steps, grid_steps=20)
    assert other.sigmas.tolist() == karras_sigmas(steps).tolist(), "the grid is that of one sampler"


def test_samples_of_few_steps_are_estimates_noised_anew():
    made = scheduler(4, sampler="lcm", grid_steps=20)
    x, noise = torch.randn(2, 30, dtype=torch.float64)
    for i, t in enumerate(made.timesteps):
        out = made.step(torch.randn(30, dtype=torch.float64), t, x, noise=noise)
        x = out.prev_sample
        torch.testing.assert_close(x, out.pred_original_sample + (made.calls[i + 1].sigma * noise if i < 3 else 0))
    assert torch.equal(x, out.pred_original_sample)


# ------------------------------------------------------------------------------------------------------------ diffusers


def theirs(name, **config):
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)(sigma_min=0.002, sigma_max=40.0, sigma_data=0.5, rho=7.0, **config)
    made.set_timesteps(7)
    return made


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_levels_and_preconditioning_are_those_of_diffusers(name):
    other, made = theirs(name), scheduler(7, sampler="ddim", eta=0.0)
    torch.testing.assert_close(made.sigmas, other.sigmas)
    torch.testing.assert_close(made.timesteps, other.timesteps)
    assert theirs(name).init_noise_sigma == pytest.approx(
        math.hypot(made.init_noise_sigma, 1)
    )  # theirs counts the data
    x, output = torch.randn(2, 30)
    for sigma in other.sigmas[:-1]:
        c = preconditioning(sigma)
        torch.testing.assert_close(c.c_in * x, other.precondition_inputs(x, sigma))
        torch.testing.assert_close(made.denoised(output, x, sigma.item()), other.precondition_outputs(x, output, sigma))


PAIRS = {
    "euler": ("EDMEulerScheduler", {}, {"sampler": "ddim", "eta": 0.0}),
    "dpmsolver++": ("EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}, {"sampler": "dpmsolver++"}),
}


@pytest.mark.parametrize(("name", "options", "config"), PAIRS.values(), ids=PAIRS.keys())
def test_the_samplers_that_diffusers_has_give_the_same_samples(name, options, config):
    other, made = theirs(name, **options), scheduler(7, **config)
    mine = yours = torch.randn(40) * 40
    for i, (t, u) in enumerate(zip(made.timesteps, other.timesteps, strict=True)):
        sigma = made.calls[i].sigma
        mine = made.step(torch.tanh(mine * 0.1 + sigma), t, mine).prev_sample
        other.scale_model_input(yours, u)
        yours = other.step(torch.tanh(yours * 0.1 + sigma), u, yours).prev_sample
        torch.testing.assert_close(mine, yours, rtol=2e-5, atol=2e-5)
