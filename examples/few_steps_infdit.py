"""Inf-DiT in few steps, small: train a teacher that needs many, distil it, and score both on held-out photographs.

    python examples/few_steps_infdit.py --out build/infdit_steps             a teacher of its own: 39 calls to 4
    python examples/few_steps_infdit.py --out build/infdit_one --bundled     the bundled tiny Inf-DiT: 3 calls to 1

The bundled network starts from so little noise that its steps add nothing. So the teacher here is one of its size that
is trained as Inf-DiT is, to remove noise that was added to the photograph itself, and starts from noise that hides all
that the small picture lacks. Its network and its patches are those of train_tiny_infdit.py.
Students are low-rank updates: the ends of these networks were set by least squares, and Adam would blur them.

Scores, for both held-out photographs: PSNR and SSIM, with the difference to the same number of calls of the teacher and
its 95 % interval (tiles of one photograph, paired); detail, the power of what lies above the small picture's
frequencies, of the photograph's own; and CPU seconds. They go into OUT/scores.json, and a table is printed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here or made here

import numpy as np
import torch
import torch.nn.functional as F
import train_tiny_infdit as tiny
from PIL import Image

from linattn import bundled
from linattn.adapters import InfDiTUpscalePipeline
from linattn.bundled import photographs
from linattn.cli import main as command
from linattn.schedulers import EDMScheduler
from linattn.schedulers.edm import preconditioning

#: Noise that hides what the small picture lacks (of deviation 0.06 to 0.2), down to noise that nobody sees.
TEACHER = tiny.Recipe(sigma_max=1.0, sigma_min=0.01, rate=3e-3)


def corrupt(recipe: tiny.Recipe, clean: torch.Tensor, sigma: torch.Tensor, rng: torch.Generator) -> tiny.Batch:
    """As EDM does it: x = clean + sigma N(0, 1). (train_tiny_infdit.py: around the enlarged picture.)"""
    lr = F.interpolate(clean, scale_factor=1 / photographs.SCALE, mode="bicubic", antialias=True).clamp(-1, 1)
    lr = ((lr + 1) * 127.5).round() / 127.5 - 1
    lr_up = F.interpolate(lr, scale_factor=photographs.SCALE, mode="bicubic", antialias=True).clamp(-1, 1)
    sigma = sigma.view(-1, 1, 1, 1)
    noisy = clean + sigma * torch.randn(clean.shape, generator=rng)
    c = preconditioning(sigma)
    seen = torch.cat([noisy, lr_up], 1) * c.c_in
    return tiny.Batch(seen, c.c_noise.flatten(), lr, (clean - c.c_skip * noisy) / c.c_out, c.c_out)


def make_teacher(out: pathlib.Path, steps: int) -> float:
    """A pipeline in OUT/teacher, with noise levels of its own; the CPU seconds of its training."""
    tiny.corrupt = corrupt  # that its training and its first weights are made with
    recipe = dataclasses.replace(TEACHER, steps=steps)
    facts = tiny.train_network(recipe, out / "network")
    tiny.write_pipeline(recipe, out / "teacher", out / "network")
    return facts["cpu_seconds"]


def distil(out: pathlib.Path, teacher: pathlib.Path, settings: list[str]) -> float:
    """`linattn distill infdit_few_steps` on the photographs; its CPU seconds."""
    pictures = out / "photographs"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in photographs.TRAINING:
        Image.fromarray(photographs.load(name)).save(pictures / f"{name}.png")
    settings = [
        *(f"model.pretrained={teacher}", f"output.folder={out / 'run'}", "data.kind=images", f"data.path={pictures}"),
        *("data.resolution=64", "data.workers=0", "data.upscaling={degradation: bicubic, full_resolution: 0.7}"),
        *("training.mixed_precision=no", "training.gradient_checkpointing=false", "training.gradient_accumulation=1"),
        *("training.lr_schedule=cosine", "training.ema_decay=0.95"),
        *("objective.max_offset=0", "output.log_with=null", "output.checkpoint_every=100", *settings),
    ]
    words = ["distill", "infdit_few_steps", *(word for setting in settings for word in ("--set", setting))]
    print("linattn", *words)
    started = time.process_time()
    if command(words):
        raise SystemExit(1)
    return time.process_time() - started


def detail(picture: Image.Image, photograph: Image.Image) -> float:
    """Power of what a picture has above what its own small copy has, of the photograph's."""

    def above(image: Image.Image) -> np.ndarray:
        rest = np.asarray(image, float) - np.asarray(photographs.enlarged(photographs.small(image), "bicubic"), float)
        inner = slice(photographs.BORDER, -photographs.BORDER)
        return (rest[inner, inner] ** 2).mean()

    return float(above(picture) / above(photograph))


def score(rows: dict[str, tuple], seed: int) -> dict:
    """By photograph and row: figures. rows: name -> (pipeline, scheduler, steps, row that it is compared with)."""
    scores = {}
    for name in photographs.HELD_OUT:
        photograph = photographs.original(name)
        small = photographs.small(photograph)
        pictures, facts = {"bicubic": photographs.enlarged(small, "bicubic")}, {"bicubic": {"calls": 0, "seconds": 0}}
        for row, (pipe, scheduler, steps, _) in rows.items():
            pipe.scheduler = scheduler
            pipe.set_progress_bar_config(disable=True)
            started = time.process_time()
            pictures[row] = pipe(
                small, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)
            ).images[0]
            facts[row] = {"calls": len(scheduler.calls), "seconds": round(time.process_time() - started, 2)}
        figures = photographs.Score(photograph, pictures)
        for row, fact in facts.items():
            fact |= {"psnr": figures.psnr(row), "ssim": figures.ssim(row)}
            fact["detail"] = round(detail(pictures[row], photograph), 3)
            if row in rows and (other := rows[row][3]):
                fact |= {
                    f"psnr above {other}": figures.psnr(row, other),
                    f"ssim above {other}": figures.ssim(row, other),
                }
        scores[name] = facts
    return scores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--bundled", action="store_true", help="distil the bundled model, 3 calls to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-steps", type=int, default=1200, help="of the teacher's training [1200]")
    parser.add_argument("--steps", type=int, default=None, help="of the student's training [150; --bundled 60]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the student's recipe")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    record = out / "scores.json"
    facts = json.loads(record.read_text()) if record.exists() else {}
    teacher = bundled.resolve("tiny_infdit") if options.bundled else out / "teacher"
    if not (pathlib.Path(teacher) / "model_index.json").exists():
        facts["teacher's training, CPU seconds"] = make_teacher(out, options.teacher_steps)
        record.write_text(json.dumps(facts))
    if options.bundled:
        few, many, steps = 1, 2, options.steps or 60
        own = ["objective.grid_steps=2", "objective.weights=[1.0]", "objective.variance=0.05", "training.batch_size=8"]
    else:
        few, many, steps, own = 4, 20, options.steps or 150, ["training.batch_size=4"]
    if not (out / "run" / "final").exists():
        own += [
            f"training.steps={steps}",
            f"training.warmup_steps={min(20, steps // 4)}",
            "training.learning_rate=1.0e-3",
            "student.train=lora",
            "student.lora.rank=16",
            f"training.seed={options.seed}",
            *options.set,
        ]
        facts["student's training, CPU seconds"] = distil(out, teacher, own)
        record.write_text(json.dumps(facts))

    one, student = (InfDiTUpscalePipeline.from_pretrained(teacher) for _ in range(2))
    student.transformer.load_lora_adapter(out / "run" / "final", use_safetensors=True)
    trained, levels = EDMScheduler.from_pretrained(out / "run" / "final" / "scheduler"), one.scheduler.config
    heun, multistep, plain = (
        EDMScheduler.from_config(levels, sampler=sampler, grid_steps=trained.config.grid_steps)
        for sampler in ("heun", "dpmsolver++", "lcm")
    )
    rows = {f"teacher, {many} steps of heun": (one, heun, many, None)}
    if not options.bundled:
        rows |= {
            f"teacher, {few} steps of heun": (one, heun, few, None),
            f"teacher, {few} steps of dpmsolver++": (one, multistep, few, None),
        }
    rows |= {
        f"teacher, {few} steps of lcm": (one, plain, few, None),
        f"student, {few} steps of lcm": (student, trained, few, f"teacher, {few} steps of lcm"),
    }
    facts["scores"] = score(rows, options.seed)
    record.write_text(json.dumps(facts, indent=1))
    for name, found in facts["scores"].items():
        print(f"\n{name:32} calls  CPU s   PSNR   SSIM  detail")
        for row, fact in found.items():
            print(
                f"{row:32} {fact['calls']:5} {fact['seconds']:6.2f} {fact['psnr'][0]:6.2f} {fact['ssim'][0]:6.4f} "
                f"{fact['detail']:6.3f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
