"""Distil a conditional model of your own to four steps with FlashTraining.

    python examples/flash_custom_model.py                 (offline; a minute or two of one core)

The model enlarges digits of 4 x 4 pixels to 8 x 8. The small picture goes through a convolutional network of its own,
and what comes out is concatenated to the noisy picture. Nothing in linattn knows such a model. What distilling it takes
are the two classes and the function between the two lines of ===: the network (yours anyway), one that reads the
network's conditions out of a dictionary, and the loop.

Scikit-learn's handwritten digits are the data. Every fifth one is left out and drawn at the end, by the teacher and by
the student: how far from the small picture they are if they are reduced again, and how many of them a classifier of
real digits takes for the right one.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from linattn.distill.discriminator import Discriminator, features_of
from linattn.distill.noise import draw_flash
from linattn.distill.noise_process import NoiseProcess
from linattn.distill.objectives.flash import FlashTraining, Phases, rollout, sampling_timesteps, unconditional
from linattn.distill.objectives.perflow import teacher_of

BATCH, GRID_STEPS, GUIDANCE = 64, 8, 1.5


# ======================================================================================================================
class Enlarger(nn.Module):
    """Any network: noisy picture, timestep and condition to a prediction."""

    def __init__(self):
        super().__init__()
        layers = [
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 8, 3, padding=1),
        ]
        self.look = nn.Sequential(*layers)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        size = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
        self.unet = UNet2DModel(in_channels=1 + 8, out_channels=1, **size, **blocks)

    def forward(self, noisy, timesteps, small):
        return self.unet(torch.cat([noisy, self.look(small)], dim=1), timesteps).sample


class Denoiser(nn.Module):
    """The same as a function of a dictionary of conditions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, noisy, timesteps, condition):
        return self.model(noisy, timesteps, condition["small"])


def distilled(teacher, process, batches, phases, steps):
    student, judged = copy.deepcopy(teacher).requires_grad_(True), ("mid_block",)
    clean, condition = next(batches)
    seen = features_of(Denoiser(teacher), judged, clean, torch.zeros(len(clean), dtype=torch.long), condition)
    judge = Discriminator({name: value.shape[1:] for name, value in seen.items()})
    training = FlashTraining(Denoiser(student), Denoiser(teacher), process, discriminator=judge, features=judged)
    optimizer = torch.optim.AdamW(training.parameters(), lr=2e-4)
    for step, (clean, condition) in zip(range(steps), batches, strict=False):
        draws = draw_flash(range(BATCH * step, BATCH * (step + 1)), clean.shape[1:], seed=0)
        absent = unconditional(condition, {"small": "zero"})
        training(clean, draws, condition, absent, phases.at(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


# ======================================================================================================================


def digits():
    """Pictures (n, 1, 8, 8) in -1..1 and which digits they are; those to learn from, and those that are left out."""
    found = load_digits()
    pictures, names = torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target)
    left_out = torch.arange(len(names)) % 5 == 0
    return (pictures[~left_out], names[~left_out]), (pictures[left_out], names[left_out])


def reduced(pictures):
    return F.avg_pool2d(pictures, 2)


def batches_of(pictures, seed):
    """Batches without end: pictures, and their condition."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        clean = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        yield clean, {"small": reduced(clean)}


def trained_teacher(process, batches, steps):
    """By the ordinary loss; the condition of one sample in ten is dropped, so that it can be guided."""
    model = Enlarger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, (clean, condition) in zip(range(steps), batches, strict=False):
        small = condition["small"] * (torch.rand(BATCH, 1, 1, 1) > 0.1)
        noise, timesteps = torch.randn_like(clean), torch.randint(process.num_timesteps, (BATCH,))
        noisy = process.add_noise(clean, noise, timesteps)
        F.mse_loss(model(noisy, timesteps, small), process.target(clean, noise, timesteps)).backward()
        optimizer.step()
        slower.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def by_teacher(model, process, condition, steps):
    """DDIM, guided: two calls a step."""
    absent = unconditional(condition, {"small": "zero"})
    guidance = torch.tensor([GUIDANCE])
    noise = torch.randn(len(condition["small"]), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    path = teacher_of(Denoiser(model), condition, absent, guidance)
    return rollout(path, noise, torch.tensor([0]), process.grid(steps))


@torch.no_grad()
def by_student(model, process, condition, steps):
    """One call a step: what it takes for clean, noised again to the next level that it was trained at."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(len(condition["small"]), 1, 8, 8, generator=generator)
    levels = sampling_timesteps(process.grid(GRID_STEPS), steps).tolist()
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        timesteps = torch.full((len(noisy),), level)
        clean = process.clean(Denoiser(model)(noisy, timesteps, condition), noisy, timesteps)
        if following is not None:
            noise = torch.randn(clean.shape, generator=generator)
            noisy = process.add_noise(clean, noise, torch.tensor(following))
    return clean


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=1000, help="of the teacher's training [%(default)s]")
    parser.add_argument("--steps", type=int, default=300, help="of the distillation, four phases [%(default)s]")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    (pictures, names), (unseen, right) = digits()
    process = NoiseProcess.from_scheduler(DDPMScheduler())
    teacher = trained_teacher(process, batches_of(pictures, seed=1), args.teacher_steps)
    phases = Phases.of(
        steps=max(args.steps // 4, 1),
        grid_steps=GRID_STEPS,
        guidance=(GUIDANCE, GUIDANCE),
        weights=[(0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2)],
        dmd=[0, 0.1, 0.2, 0.3],
        adversarial=[0, 0.05, 0.1, 0.1],
    )
    student = distilled(teacher, process, batches_of(pictures, seed=2), phases, args.steps)

    reader = LogisticRegression(max_iter=2000).fit(pictures.flatten(1), names)
    condition = {"small": reduced(unseen)}
    drawn = {
        f"teacher, {GRID_STEPS} steps ({2 * GRID_STEPS} calls)": by_teacher(teacher, process, condition, GRID_STEPS),
        "teacher, 4 steps (8 calls)": by_teacher(teacher, process, condition, 4),
        "student, 4 steps (4 calls)": by_student(student, process, condition, 4),
        "student, 1 step (1 call)": by_student(student, process, condition, 1),
        "real": unseen,
    }
    scores = {}
    for way, made in drawn.items():
        made = made.clamp(-1, 1)
        error = F.mse_loss(reduced(made), condition["small"]).sqrt().item()
        scores[way] = error, reader.score(made.flatten(1), right)
        print(f"{way:32} {scores[way][0]:.3f} from the small picture, {scores[way][1]:.3f} read right")
    return scores


if __name__ == "__main__":
    main()
