"""Few-step students of a bundled model: loaded, drawn with, and held against the teacher's DDIM.

A student is what `linattn distill` writes for the PeRFlow and Flash objectives, or one that ships with the package:

    way = few_steps.student("run/final", steps=4)
    plain = few_steps.teacher(steps=4)
    one, other = few_steps.score(way, n=100), few_steps.score(plain, n=100)
    few_steps.gain(one, other)           # of exact sequences: an interval; same prompts, same seeds

Scores are those of :mod:`linattn.evaluate`, in a plain dictionary that can be kept as JSON: what was read in every
picture, so that any two of them that drew the same orders can be compared afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from . import bundled, delta_weights
from ._quiet import quiet_diffusers
from .evaluate import FrechetEstimate, Interval, evaluate_canvases, interval, paired_interval

MODEL, GUIDANCE = "tiny_sd", 2.5
HELD_OUT = "held out"  # of linattn.evaluate: all orders that training left out, together
FORMAT = "linattn few steps 1"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of drawing.

    Attributes:
        pipe: a text-to-image pipeline with the scheduler that the way wants.
        steps, guidance: of a call.
        arguments: more arguments of a call; `timesteps` in the place of the number of steps.
    """

    pipe: object
    steps: int
    guidance: float = 1.0
    arguments: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def network_calls(self) -> int:
        """Evaluations of the network for one picture: guidance takes two a step."""
        return self.steps * (2 if self.guidance > 1 else 1)

    def __call__(self, prompt, *, guidance_scale: float, num_inference_steps: int, **options):
        # The signature is what linattn.evaluate.draw looks at.
        arguments = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **options}
        return self.pipe(prompt, **arguments | self.arguments)


def teacher(*, steps: int, guidance: float = GUIDANCE, spacing: str | None = None, model: str = MODEL) -> Way:
    """The model as it is, by DDIM.

    Args:
        spacing: which noise levels DDIM visits: "leading", "trailing", "linspace"; None: as the model's own scheduler.
        model: name of a bundled pipeline.
    """
    pipe = _pipeline(model)
    if spacing is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
    return Way(pipe, steps, guidance)


def student(folder: str | Path, *, steps: int, guidance: float = 1.0, model: str = MODEL) -> Way:
    """A student that was trained from a bundled model.

    Args:
        folder: with `scheduler/` and `delta_weights.safetensors`, `adapter/` beside it for one with linear attention,
            or `pytorch_lora_weights.safetensors` in the place of the delta; or the name of a bundled student.
        guidance: 1 for students that have their teacher's guidance in them.
        model: the teacher.

    Raises:
        FileNotFoundError: the folder has no scheduler, or no weights.
    """
    folder = Path(bundled.resolve(str(folder)))
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected a few-step student, with scheduler/scheduler_config.json")
    pipe = _pipeline(model)
    if (folder / "adapter").is_dir():
        from .adapters import LinFusion

        LinFusion.construct_for(pipe, pretrained_model_name_or_path=str(folder / "adapter"))
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
    else:
        # What the adapter replaced is in the adapter's own file.
        missing = "skip" if (folder / "adapter").is_dir() else "raise"
        delta_weights.merge(pipe.unet, delta_weights.load(folder), missing=missing, exact=False)
    pipe.scheduler = _scheduler(folder / "scheduler")
    return Way(pipe, steps, guidance, _levels(pipe, steps))


def _pipeline(model: str):
    """A bundled pipeline, float32 on the CPU, that shows no progress bars."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with quiet_diffusers():
        pipe = diffusers.DiffusionPipeline.from_pretrained(bundled.path(model), local_files_only=True)
    pipe.to("cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(folder: Path):
    import diffusers

    from . import schedulers

    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    kind = getattr(schedulers, name) if name in schedulers.__all__ else getattr(diffusers, name)
    return kind.from_pretrained(folder)


def _levels(pipe, steps: int) -> dict:
    """The levels that a student was trained to start from, where its sampler would not choose them by itself."""
    from .schedulers import few_step_arguments

    return few_step_arguments(pipe, steps) if "LCM" in type(pipe.scheduler).__name__ else {}


# ---------------------------------------------------------------------------------------------------------- scores


def score(
    way: Way,
    *,
    n: int = 100,
    lengths: Sequence[int] = (2, 3, 4),
    seed: int = 0,
    batch: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Draw the orders of :func:`linattn.evaluate.canvas_sets` and score them.

    Args:
        n, lengths, seed: what is drawn, see `canvas_sets`.
        progress: called after every batch with (pictures drawn, pictures in all).

    Returns:
        Plain values: how it was drawn; "exact": set -> a character per picture, 1 where it reads as asked; intervals
        of what `Evaluation.summary` gives; "canvas_distance_resampled"; "cpu_seconds": of this process and all its
        threads, per picture, as an interval over batches.
    """
    clock, times = [time.process_time()], []

    def advance(name: str, done: int, total: int) -> None:
        now = time.process_time()
        times.append((done, now - clock[-1]))
        clock.append(now)
        if progress is not None:
            progress(done, total)

    evaluation = evaluate_canvases(
        way,
        {"way": lambda pipe: contextlib.nullcontext()},
        n=n,
        lengths=lengths,
        seed=seed,
        steps=way.steps,
        guidance_scale=way.guidance,
        batch=batch,
        reference=None,
        progress=advance,
    )
    drawn, summary = evaluation.variants["way"], evaluation.summary("way")
    sizes = np.diff([0, *(done for done, _ in times)])
    # The first batch pays for allocation, and has read the digits in it; last ones of a set are smaller.
    per_picture = [seconds / size for size, (_, seconds) in list(zip(sizes, times, strict=True))[1:]]
    return {
        "format": FORMAT,
        "steps": way.steps,
        "guidance": way.guidance,
        "network_calls": way.network_calls,
        "sampler": type(way.pipe.scheduler).__name__,
        "settings": {"n": n, "digits": list(lengths), "seed": seed, "batch": batch},
        "exact": {name: "".join(f"{x:.0f}" for x in scores.exact) for name, scores in drawn.scores.items()},
        "held_out": [one.name for one in evaluation.sets if one.unseen],
        "summary": {
            "exact": {name: _rounded(figure) for name, figure in summary["exact"].items()},
            **{name: _rounded(summary[name]) for name in ("canvas_distance", "digits_distance", "canvas_diversity")},
        },
        "canvas_distance_resampled": _rounded(drawn.canvas_distance.resampled),
        "cpu_seconds": _rounded(interval(per_picture) if len(per_picture) > 1 else [per_picture[0]] * 3),
        "threads": torch.get_num_threads(),
    }


def _rounded(values) -> list[float] | None:
    return None if values is None else [float(f"{value:.5g}") for value in values]


def exact(record: Mapping, n: int | None = None) -> np.ndarray:
    """1 for every picture of the held-out orders that reads as asked, else 0, in float64.

    Args:
        n: of every set only the first n pictures: those that a smaller run would have drawn.
    """
    return np.array([float(mark) for name in record["held_out"] for mark in record["exact"][name][:n]])


def gain(records: Mapping | Sequence[Mapping], plain: Mapping) -> Interval:
    """How much more often pictures read as asked than those of another way: paired by prompt and seed.

    Where one drew fewer pictures than the other, what both drew is compared.

    Args:
        records: of one way; of several, for example students of several training seeds: their mean.
        plain: of the way that they are compared with.

    Raises:
        ValueError: they did not draw orders of the same lengths from the same seeds.
    """
    records = _same(records, plain, ("digits", "seed"))
    n = min(record["settings"]["n"] for record in (*records, plain))
    return paired_interval(np.mean([exact(record, n) for record in records], 0), exact(plain, n))


def distance_gain(records: Mapping | Sequence[Mapping], plain: Mapping) -> Interval:
    """How much smaller the Frechet distance of whole canvases is: above 0 where `records` is better.

    Arguments as for :func:`gain`; but all must have drawn as many pictures.
    """
    records = _same(records, plain, ("n", "digits", "seed"))
    mean = FrechetEstimate(
        float(np.mean([record["summary"]["canvas_distance"][0] for record in records])),
        np.mean([record["canvas_distance_resampled"] for record in records], 0),
    )
    other = FrechetEstimate(plain["summary"]["canvas_distance"][0], np.array(plain["canvas_distance_resampled"]))
    return other.minus(mean)


def _same(records: Mapping | Sequence[Mapping], plain: Mapping, settings: Sequence[str]) -> list[Mapping]:
    records = [records] if isinstance(records, Mapping) else list(records)
    wanted = {key: plain["settings"][key] for key in settings}
    for record in records:
        if (found := {key: record["settings"][key] for key in wanted}) != wanted:
            raise ValueError(f"scores of the same orders and seeds can be paired; got {found} and {wanted}")
    return records
