"""Piecewise reflow: what the student learns from, against the original's goldens and against exactly known flows."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')

from helpers import goldens

from linattn.distill.objectives import perflow
from linattn.schedulers import PeRFlowScheduler, piecewise

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

# Relative, of one rounding: between two orders of float32 arithmetic, and in float64.
FLOAT32, FLOAT64 = 2.0**-23, 1e-12

KINDS = [("ddim_eps", False), ("diff_eps", False), ("velocity", False), ("velocity", True)]
NAMES = ["ddim_eps", "diff_eps", "velocity", "flow matching"]
every_kind = pytest.mark.parametrize(("kind", "is_flow"), KINDS, ids=NAMES)


def scalars():
    return json.loads(goldens.path("perflow", "scalars.json").read_text())


def diffusion():
    return PeRFlowScheduler()._marginal


FLOW = piecewise.Marginal()
FOUR = piecewise.window_bounds(4)


def shaped(values, like):
    return values.view(-1, *[1] * (like.ndim - 1))


# ------------------------------------------------------------------------------------------------ against the original


def golden_teacher(noisy, timesteps, condition):
    """The goldens' network as a `Denoiser`; what SDXL adds is there if the condition has it."""
    a, b = scalars()["config"]["a"], scalars()["config"]["b"]
    text = condition["prompt"].double().mean((1, 2))
    if "pooled" in condition:
        text = text + 0.1 * condition["pooled"].double().mean(1) + 1e-4 * (4 * 1024 / 6)
    return torch.tanh(a * noisy.double() + shaped(b * timesteps.double() + text, noisy)).float()


def golden_student(noisy, timesteps, text):
    return torch.tanh(0.3 * noisy.double() + shaped(0.0005 * timesteps.double() + text.double().mean((1, 2)), noisy))


def solve_cases():
    return [
        (f"sd.{kind}.g{g}.n{n}.end", kind, g, n) for kind in ("epsilon", "v_prediction") for g in ("1", "7.5") for n in
        (2, 5, 8, 10)
    ] + [(f"sdxl.epsilon.g{g}.n10.end", "epsilon", g, 10) for g in ("1.0", "7.5")]  # fmt: skip


@goldens.needs_goldens
@pytest.mark.parametrize(("name", "prediction_type", "guidance", "steps"), solve_cases())
def test_teacher_solves_its_ode_as_the_original_does(name, prediction_type, guidance, steps):
    tensors, _ = goldens.load("perflow", "teacher_ode")
    condition, unconditional = ({"prompt": tensors[f"{sign}prompt_embeds"]} for sign in ("", "negative_"))
    if name.startswith("sdxl"):
        condition["pooled"], unconditional["pooled"] = tensors["pooled"], tensors["negative_pooled"]
    told = []

    def denoiser(noisy, timesteps, condition):
        told.append(timesteps[:5])
        return golden_teacher(noisy, timesteps, condition)

    teacher = perflow.teacher_of(denoiser, condition, unconditional, float(guidance))
    window = tensors["t_start"], tensors["t_end"]
    options = dict(steps=steps, prediction_type=prediction_type)
    made = perflow.solve(teacher, tensors["latents"], *window, diffusion(), **options, legacy_grid=True)
    # A rounding for each step, which guidance multiplies.
    tolerance = steps * float(guidance) * FLOAT32
    assert goldens.relative_error(made, tensors[name]) < tolerance
    if name.startswith("sd."):
        assert torch.equal(torch.stack(told, 1), tensors[f"sd.n{steps}.timesteps"])
    # With steps that divide a window, the grid that ends at its end is the original's.
    ours = perflow.solve(teacher, tensors["latents"], *window, diffusion(), **options)
    if 250 % steps == 0:
        # But for the last window, where the original leaves from level 24 to "-1" and ours to 0: the same level.
        assert goldens.relative_error(ours, tensors[name]) < tolerance
    else:
        assert goldens.relative_error(ours, tensors[name]) > 1e-4


@goldens.needs_goldens
@pytest.mark.parametrize("case", [f"{i:02d}" for i in range(18)])
def test_training_step_is_that_of_the_original(case):
    tensors, _ = goldens.load("perflow", "train_step")
    settings = scalars()["train_cases"][case]
    golden = {key.removeprefix(f"{case}."): value for key, value in tensors.items() if key.startswith(f"{case}.")}
    condition, unconditional = {"prompt": tensors["text_embeds"]}, {"prompt": tensors["null_embeds"]}
    if "sdxl" in settings["script"]:
        condition["pooled"], unconditional["pooled"] = tensors["pooled"], tensors["null_pooled"]
    dropped = perflow.with_dropped(condition, unconditional, torch.tensor([0, 0, 1, 0, 0, 1]).bool())
    assert torch.equal(dropped["prompt"], tensors["text_embeds_dropped"])
    if "pooled" in dropped:
        assert torch.equal(dropped["pooled"], tensors["pooled_dropped"])
    if settings["cfg_sync"]:
        teacher = perflow.teacher_of(golden_teacher, dropped)
    else:
        teacher = perflow.teacher_of(golden_teacher, condition, unconditional, settings["teacher_guidance"])
    t = golden["timepoints"]
    made = perflow.segment(
        tensors["latents"],
        golden["noises"],
        t,
        teacher,
        diffusion(),
        piecewise.window_bounds(settings["windows"]),
        prediction_type=settings["pred_type"],
        steps=settings["solving_steps"],
        begin_at_noise=settings["zero_snr"],
        legacy_grid=True,
    )
    rounding = FLOAT32 * settings["solving_steps"] * settings["teacher_guidance"]
    assert torch.equal(made.start.float(), golden["t_start"]) and torch.equal(made.end.float(), golden["t_end"])
    assert goldens.relative_error(made.z_start, golden["latents_start"]) < FLOAT32
    assert goldens.relative_error(made.z_end, golden["latents_end"]) < rounding
    assert goldens.relative_error(made.z_t, golden["latents_t"]) < rounding
    # Targets are differences of the two ends, divided: what is left of a number after cancellation has its rounding.
    p, q = piecewise.target_coefficients(made.start, made.end, diffusion(), settings["pred_type"])
    terms = shaped(p, made.z_start).abs() * made.z_start.abs() + shaped(q, made.z_end).abs() * made.z_end.abs()
    assert (made.target - golden["targets"]).norm() < rounding * terms.norm()
    prediction = golden_student(made.z_t, t.double() * 1000, dropped["prompt"])
    assert goldens.relative_error(prediction, golden["model_pred"]) < rounding
    assert torch.allclose(t * 1000, golden["model_t"])
    options = {key: settings[key] for key in ("distance", "huber_c", "reweighting")}
    # The loss itself on the golden's tensors, then the whole chain.
    loss = perflow.perflow_loss(golden["model_pred"], golden["targets"], t, **options)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(settings["loss"], rel=4 * FLOAT32)
    chain = perflow.perflow_loss(prediction.float(), made.target, t, **options)
    assert chain.item() == pytest.approx(settings["loss"], rel=1e-4)


@goldens.needs_goldens
def test_times_are_on_the_levels_of_the_original():
    tensors, _ = goldens.load("perflow", "train_step")
    for case, settings in scalars()["train_cases"].items():
        levels = 1000 if settings["discrete_timesteps"] == -1 else settings["discrete_timesteps"]
        t = tensors[f"{case}.timepoints"].double()
        # The middle of the numbers that are rounded down to this level.
        assert torch.allclose(perflow.times(1 - t + 0.5 / levels, levels), t, atol=1e-6)


def test_times_are_uniform_on_their_levels_and_never_zero():
    uniform = torch.arange(4000, dtype=torch.float64) / 4000
    values, counts = perflow.times(uniform, 200).unique(return_counts=True)
    torch.testing.assert_close(values, torch.arange(1, 201, dtype=torch.float64) / 200)
    assert (counts - 20).abs().max() <= 1  # 200 k / 4000 is rounded
    assert perflow.times(torch.tensor(1 - 2.0**-24)) > 0
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        perflow.times(uniform, 0)


# ---------------------------------------------------------------------------------------------------------- identities


@every_kind
def test_student_that_says_the_target_reaches_the_end_of_the_window_from_every_time(kind, is_flow):
    generator = torch.Generator().manual_seed(0)
    scheduler = PeRFlowScheduler(prediction_type=kind, use_flow_sigmas=is_flow)
    scheduler.set_timesteps(timesteps=[1000, 810, 750, 745, 501, 500, 400, 250, 249, 1])
    t = scheduler.timesteps.double() / 1000
    clean, noise = torch.randn(2, len(t), 3, 2, 2, generator=generator, dtype=torch.float64).unbind()
    made = perflow.segment(
        clean,
        noise,
        t,
        lambda z, timesteps: torch.tanh(0.7 * z + 0.001 * shaped(timesteps.double(), z)),
        scheduler._marginal,
        FOUR,
        prediction_type=kind,
        steps=4,
        teacher_prediction_type="flow" if is_flow else "epsilon",
    )
    out = scheduler.step(made.target, scheduler.timesteps, made.z_t)
    assert goldens.relative_error(out.pred_window_end, made.z_end) < FLOAT64
    following = torch.cat([t[1:], torch.zeros(1)])
    after = perflow.on_chord(made.z_start, made.z_end, made.start, made.end, following)
    assert goldens.relative_error(out.prev_sample, after) < FLOAT64
    assert torch.equal(perflow.on_chord(made.z_start, made.z_end, made.start, made.end, made.start), made.z_start)


def test_teacher_of_a_gaussian_converges_to_its_exact_flow():
    """Data ~ N(m, s^2): the flow keeps (z - a m) / sqrt(a^2 s^2 + c^2)."""
    mean, spread = 0.7, 0.4

    def exact_teacher(levels, says):
        def teacher(z, timesteps):
            a, c = (shaped(x, z) for x in levels(timesteps))
            variance = a**2 * spread**2 + c**2
            clean = mean + a * spread**2 / variance * (z - a * mean)
            noise = (z - a * clean) / c
            return {"epsilon": noise, "v_prediction": a * noise - c * clean, "flow": noise - clean}[says]

        return teacher

    marginal = diffusion()
    abar = marginal.alphas_cumprod
    at_index = lambda index: (abar[index].sqrt(), (1 - abar[index]).sqrt())  # noqa: E731
    at_sigma = lambda timesteps: (1 - timesteps.double() / 1000, timesteps.double() / 1000)  # noqa: E731
    start, end = FOUR[:-1], FOUR[1:]
    z = torch.randn(4, 50, dtype=torch.float64)
    for process, levels, says in (
        (marginal, at_index, "epsilon"),
        (marginal, at_index, "v_prediction"),
        (FLOW, at_sigma, "flow"),
    ):
        (a_s, c_s), (a_e, c_e) = ([shaped(x, z) for x in process.levels(t)] for t in (start, end))
        scale = ((a_e**2 * spread**2 + c_e**2) / (a_s**2 * spread**2 + c_s**2)).sqrt()
        wanted = a_e * mean + scale * (z - a_s * mean)
        errors = []
        for steps in (5, 10, 50):
            made = perflow.solve(exact_teacher(levels, says), z, start, end, process, steps=steps, prediction_type=says)
            errors.append(goldens.relative_error(made, wanted))
        # First order, on grids that end at the window's end (with the error of half a level of the table, if at all).
        assert errors[1] < 0.6 * errors[0] and errors[2] < 0.25 * errors[1], says


def test_steps_that_do_not_divide_a_window_end_at_its_end():
    told = []

    def teacher(z, index):
        told.append(index)
        return 0 * z

    z = torch.ones(4, 1, dtype=torch.float64)
    made = perflow.solve(teacher, z, FOUR[:-1], FOUR[1:], diffusion(), steps=8)
    assert torch.stack(told, 1)[0].tolist() == [999, 968, 936, 905, 874, 843, 812, 780]
    abar = diffusion().alphas_cumprod
    # A teacher that sees no noise only rescales, all the way to the end's level.
    torch.testing.assert_close(made[:, 0], (abar[[749, 499, 249, 0]] / abar[[999, 749, 499, 249]]).sqrt())
    legacy = perflow.solve(teacher, z, FOUR[:-1], FOUR[1:], diffusion(), steps=8, legacy_grid=True)
    assert (legacy - made).abs().max() > 1e-4


def test_guidance_is_one_batch_and_may_differ_by_sample():
    calls = []

    def denoiser(noisy, timesteps, condition):
        calls.append(len(noisy))
        return noisy + shaped(timesteps, noisy) + shaped(condition["c"], noisy)

    noisy, t = torch.zeros(3, 2, 2), torch.tensor([1.0, 2.0, 3.0])
    condition, empty = {"c": torch.tensor([10.0, 20.0, 30.0])}, {"c": torch.zeros(1)}
    made = perflow.teacher_of(denoiser, condition, empty, torch.tensor([1.0, 2.0, 3.0]))(noisy, t)
    assert made[:, 0, 0].tolist() == [11.0, 42.0, 93.0] and calls == [6]
    for guidance in (None, 1.0):
        assert perflow.teacher_of(denoiser, condition, None, guidance)(noisy, t)[:, 0, 0].tolist() == [11.0, 22.0, 33.0]
    assert calls == [6, 3, 3]


def test_losses_follow_their_formulas_and_reach_the_student_alone():
    prediction, target = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind()
    prediction.requires_grad_(), target.requires_grad_()
    t = torch.tensor([1.0, 0.95, 0.5, 0.1])
    square = (prediction - target) ** 2
    weight = 1 / (2.3 * torch.tensor([0.1, 0.1, 0.5, 0.9]))
    huber = ((square + 0.25).sqrt() - 0.5).mean()
    close = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(perflow.perflow_loss(prediction, target), square.mean(), **close)
    torch.testing.assert_close(perflow.perflow_loss(prediction, target, distance="huber", huber_c=0.5), huber, **close)
    weighted = perflow.perflow_loss(prediction, target, t, reweighting="reciprocal")
    torch.testing.assert_close(weighted, (weight[:, None, None] * square).mean(), **close)
    weighted.backward()
    assert prediction.grad is not None and target.grad is None
    assert perflow.perflow_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- convergence


class Mixture:
    """Three narrow Gaussians on a line, of which the best prediction of noise is known exactly.

    On a line paths do not cross, so the chords of a window do not either, and a student can learn them without error.
    """

    means = torch.tensor([-1.5, 0.2, 1.2], dtype=torch.float64)
    variance = 0.2**2

    def __init__(self, kind, is_flow):
        self.scheduler = PeRFlowScheduler(prediction_type=kind, use_flow_sigmas=is_flow)
        self.kind, self.is_flow, self.marginal = kind, is_flow, self.scheduler._marginal
        self.generator = torch.Generator().manual_seed(0)
        self.noise = self.normal(300)
        self.endpoint = self.noise
        for start, end in itertools.pairwise(FOUR):
            times = start.expand(300), end.expand(300)
            self.endpoint = perflow.solve(self.teacher, self.endpoint, *times, self.marginal, **self.solver)

    @property
    def solver(self):
        return dict(steps=10, prediction_type="flow" if self.is_flow else "epsilon")

    def normal(self, count):
        return torch.randn(count, 1, generator=self.generator, dtype=torch.float64)

    def predictions(self, z, a, c):
        """E[eps | z] and E[x_0 | z]."""
        distance, variance = z - a * self.means, a**2 * self.variance + c**2
        share = torch.softmax(-(distance**2) / (2 * variance), -1)
        clean = (share * (self.means + a * self.variance / variance * distance)).sum(-1, keepdim=True)
        return (z - a * clean) / c, clean

    def teacher(self, z, timesteps):
        sigma = timesteps.double()[:, None] / 1000
        if self.is_flow:
            noise, clean = self.predictions(z, 1 - sigma, sigma)
            return noise - clean
        abar = self.marginal.alphas_cumprod[timesteps][:, None]
        return self.predictions(z, abar.sqrt(), (1 - abar).sqrt())[0]

    def untuned(self, z, t):
        """What the student says before training: the teacher's prediction, whatever the student should predict."""
        if self.is_flow:
            return self.teacher(z, 1000 * t)
        return self.teacher(z, (1000 * t).round().long() - 1)

    def segment(self, count):
        t = perflow.times(torch.rand(count, generator=self.generator, dtype=torch.float64))
        which = torch.randint(3, (count,), generator=self.generator)
        clean = self.means[which][:, None] + self.variance**0.5 * self.normal(count)
        options = dict(prediction_type=self.kind, steps=10, teacher_prediction_type=self.solver["prediction_type"])
        return t, perflow.segment(clean, self.normal(count), t, self.teacher, self.marginal, FOUR, **options)

    @torch.no_grad()
    def error(self, student, steps):
        """Mean distance of samples to the ends of the teacher's paths from the same noise."""
        self.scheduler.set_timesteps(steps)
        z = self.noise
        for t in self.scheduler.timesteps:
            z = self.scheduler.step(student(z, (t.double() / 1000).expand(len(z))), t, z).prev_sample
        return (z - self.endpoint).abs().mean().item()


def features(z, t):
    """Window (B,), and (B, 34 x 6): bumps along z times powers of the place in the window."""
    start, end = piecewise.windows_of(t, FOUR)
    centres = torch.linspace(-4, 4, 32, dtype=torch.float64)
    bumps = torch.exp(-((z - centres) ** 2) / (2 * (1.5 * 8 / 31) ** 2))
    bumps = torch.cat([bumps, torch.ones_like(z), z], 1)
    powers = ((t - start) / (end - start))[:, None] ** torch.arange(6)
    return (4 * (1 - start)).round().long(), torch.einsum("bz,bp->bzp", bumps, powers).flatten(1)


@every_kind
def test_best_student_samples_the_ends_of_the_teachers_paths(kind, is_flow):
    """The minimum of the squared loss, found by least squares: in four and eight steps it is where the teacher is."""
    problem = Mixture(kind, is_flow)
    t, made = problem.segment(16000)
    window, inputs = features(made.z_t, t)
    weights = []
    for i in range(4):
        x, y = inputs[window == i], made.target[window == i]
        weights.append(torch.linalg.solve(x.T @ x + 1e-6 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y))
    weights = torch.stack(weights)

    def student(z, t):
        window, inputs = features(z, t)
        return torch.einsum("bf,bfo->bo", inputs, weights[window])

    before = [problem.error(problem.untuned, steps) for steps in (4, 8)]
    after = [problem.error(student, steps) for steps in (4, 8, 16)]
    assert after[0] < before[0] / 3 and after[1] < before[1] / 3
    assert after[0] > after[1] > after[2]


@pytest.mark.parametrize(("kind", "is_flow"), KINDS[1:3], ids=NAMES[1:3])
def test_small_network_learns_by_gradient_descent(kind, is_flow):
    """A correction to the teacher's prediction, zero at first. In these two kinds the teacher's prediction means
    another thing than the student's, so that sampling before training gives little more than noise."""
    problem = Mixture(kind, is_flow)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)).double()
    nn.init.zeros_(network[-1].weight), nn.init.zeros_(network[-1].bias)

    def student(z, t):
        phases = math.pi * t[:, None] * 2.0 ** torch.arange(4)
        return problem.untuned(z, t) + network(torch.cat([z, phases.sin(), phases.cos()], 1))

    before = problem.error(student, 4)
    steps = 250
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        t, made = problem.segment(256)
        loss = perflow.perflow_loss(student(made.z_t, t), made.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < sum(losses[:20]) / 2
    assert problem.error(student, 4) < before / 2


# ------------------------------------------------------------------------------------------------------------ bad input


def solved(start=1.0, end=0.75, marginal=None, **options):
    start, end = torch.full((2,), start), torch.full((2,), end)
    return perflow.solve(
        lambda z, t: z, torch.ones(2, 3), start, end, marginal or diffusion(), **{"steps": 2, **options}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solved(steps=0), "steps must be at least 1, got 0"),
        (lambda: solved(end=1.0), r"start must be above end, got \[1.0, 1.0\]"),
        (lambda: solved(prediction_type="sample"), "must be epsilon or v_prediction for this process, got 'sample'"),
        (lambda: solved(prediction_type="flow"), "must be epsilon or v_prediction for this process, got 'flow'"),
        (lambda: solved(marginal=FLOW), "must be flow for this process, got 'epsilon'"),
        (lambda: segmented(torch.tensor([0.0, 0.5])), r"t must be above 0 and at most 1, got \[0.0, 0.5\]"),
        (lambda: segmented(prediction_type="epsilon"), "must be ddim_eps or diff_eps, got 'epsilon'"),
        (lambda: segmented(marginal=FLOW), "flow matching needs prediction_type=\"velocity\", got 'ddim_eps'"),
        (lambda: perflow.teacher_of(None, {}, {}, 0.5), "guidance must be at least 1, got 0.5"),
        (lambda: perflow.teacher_of(None, {}, None, 2.0), "guidance 2.0 needs the unconditional condition"),
        (lambda: perflow.teacher_of(None, {"a": 0}, {"b": 0}, 2.0), r"same entries, got \['a'\] and \['b'\]"),
        (lambda: perflow.with_dropped({"a": 0}, {}, torch.ones(1)), r"same entries, got \['a'\] and \[\]"),
        (lambda: lost(distance="l1"), "distance must be one of l2, huber, got 'l1'"),
        (lambda: lost(reweighting="rcp_win"), "reweighting must be None or reciprocal, got 'rcp_win'"),
        (lambda: lost(reweighting="reciprocal"), "reweighting needs t"),
        (lambda: perflow.perflow_loss(torch.ones(2, 3), torch.ones(2)), r"same shape, got \(2, 3\), \(2,\)"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def segmented(t=None, marginal=None, prediction_type="ddim_eps"):
    z = torch.ones(2, 3)
    t = torch.tensor([1.0, 0.5]) if t is None else t
    options = dict(prediction_type=prediction_type, steps=2)
    return perflow.segment(z, z, t, lambda z, t: z, marginal or diffusion(), FOUR, **options)


def lost(**options):
    return perflow.perflow_loss(torch.ones(2, 3), torch.ones(2, 3), **options)
