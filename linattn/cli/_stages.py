"""The stages of `linattn generate --high-resolution`: options, entries of a record, calls of the helper."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re

from linattn.cli._models import Layout, Problem

#: Options with one value for all stages, or one for each.
OPTIONS = ("stage_strength", "stage_steps", "stage_guidance", "stage_shift", "ntk_factor")
STRENGTH = 0.7


@dataclasses.dataclass
class StageRequest:
    """One enlargement, as it stands in the record; None where the model has no such thing."""

    width: int
    height: int
    strength: float | int
    steps: int
    guidance: float | int | None
    shift: float | int | None
    ntk_factor: float | int | None
    proportional_attention: bool | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "high resolution",
        "Enlarge the picture by stages: resized, noised by their strength, and drawn anew from there. Options with "
        "values V,V take one for all stages or one for each.",
    )
    group.add_argument(
        "--high-resolution",
        metavar="WxH[,WxH]",
        help="sizes of the stages in pixels, none smaller than what comes before it; with --image that picture is "
        "enlarged instead of a new one",
    )
    group.add_argument("--stage-strength", metavar="S[,S]", help=f"above 0 to 1, how much to draw anew [{STRENGTH:g}]")
    group.add_argument("--stage-steps", metavar="N[,N]", help="of which that share is done [as --steps]")
    group.add_argument("--stage-guidance", metavar="SCALE[,SCALE]", help="[as --guidance]")
    group.add_argument(
        "--stage-shift", metavar="F[,F]", help="constant shift of the noise levels, for FLUX and Stable Diffusion 3 [3]"
    )
    group.add_argument(
        "--ntk-factor", metavar="F[,F]", help="CLEAR's stretching of FLUX's positions in the stages, 1 for none [10]"
    )
    group.add_argument(
        "--no-proportional-attention",
        action="store_true",
        default=None,
        help="without CLEAR's sharper attention for more tokens in the stages",
    )
    group.add_argument(
        "--base-attention",
        choices=("stock", "same"),
        help="draw the picture before the stages with stock attention, or with the --attention of the stages [stock "
        "with clear, same with linfusion]",
    )


def given(args: argparse.Namespace) -> list[str]:
    """Names of the options of stages that were given."""
    names = ("high_resolution", *OPTIONS, "no_proportional_attention", "base_attention")
    return [name for name in names if getattr(args, name) is not None]


def read(args: argparse.Namespace, steps: int) -> list[StageRequest] | None:
    """The stages as the options say them; what the model decides is still None."""
    if args.high_resolution is None:
        if given(args):
            raise Problem(f"{_option(given(args)[0])} goes with --high-resolution, which is not given")
        return None
    sizes = []
    for text in args.high_resolution.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
        if match is None:
            raise Problem(
                "--high-resolution: expected sizes in pixels as WIDTHxHEIGHT, for example 2048x1024,4096x2048, got "
                f"{text!r}"
            )
        sizes.append((int(match[1]), int(match[2])))
    values = {name: _values(name, getattr(args, name), len(sizes)) for name in OPTIONS}
    return [
        StageRequest(
            width=width,
            height=height,
            strength=STRENGTH if strength is None else strength,
            steps=steps if own is None else int(own),
            guidance=guidance,
            shift=shift,
            ntk_factor=ntk_factor,
            proportional_attention=False if args.no_proportional_attention else None,
        )
        for (width, height), strength, own, guidance, shift, ntk_factor in zip(sizes, *values.values(), strict=True)
    ]


def _values(name: str, text: str | None, count: int) -> list[float | None]:
    if text is None:
        return [None] * count
    parts, whole = text.split(","), name == "stage_steps"
    try:
        values = [int(part) if whole else float(part) for part in parts]
    except ValueError:
        what = "whole numbers" if whole else "numbers"
        raise Problem(f"{_option(name)}: expected {what} with commas between them, got {text!r}") from None
    if len(values) not in (1, count):
        raise Problem(f"{_option(name)}: expected one value, or one for each of {count} stages, got {len(values)}")
    return values * (count // len(values))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_values(stages: list[StageRequest]) -> None:
    for stage in stages:
        if not 0 < stage.strength <= 1:
            raise Problem(f"--stage-strength: expected above 0 and at most 1, got {stage.strength:g}")
        if stage.steps < 1:
            raise Problem(f"--stage-steps: expected 1 or more, got {stage.steps}")
        if int(stage.steps * stage.strength) < 1:
            raise Problem(
                f"--stage-strength {stage.strength:g} of {stage.steps} steps is less than one step: use --stage-steps "
                f"{math.ceil(1 / stage.strength)} or more"
            )
        if stage.guidance is not None and not 0 <= stage.guidance < math.inf:
            raise Problem(f"--stage-guidance: expected 0 or more, got {stage.guidance:g}")
        for name, value in (("--stage-shift", stage.shift), ("--ntk-factor", stage.ntk_factor)):
            if value is not None and not 0 < value < math.inf:
                raise Problem(f"{name}: expected a number above 0, got {value:g}")


def settle(stages: list[StageRequest], layout: Layout, attention: str, before: tuple[int, int], name: str) -> None:
    """Check the stages against the model, and fill in what it decides.

    Args:
        before: (width, height) of what the first stage is given.
        name: what that is.
    """
    rotary = layout.class_name == "FluxPipeline"
    for stage in stages:
        size = (stage.width, stage.height)
        check_size("--high-resolution", size, layout)
        if size[0] < before[0] or size[1] < before[1]:
            raise Problem(
                f"--high-resolution: {size[0]}x{size[1]} is smaller than {name}, {before[0]}x{before[1]}; stages "
                "enlarge"
            )
        before, name = size, "the stage before it"
        if stage.steps > layout.train_steps:
            raise Problem(f"--stage-steps: expected at most the {layout.train_steps} of this model, got {stage.steps}")
        if stage.shift is not None and not layout.can_shift:
            raise Problem(f"--stage-shift: the scheduler of this {layout.class_name} shifts nothing")
        if stage.shift is None and layout.can_shift:
            stage.shift = 3.0
        for option, value in (
            ("--ntk-factor", stage.ntk_factor),
            ("--no-proportional-attention", stage.proportional_attention),
        ):
            if value is not None and attention != "clear":
                raise Problem(f"{option} goes with --attention clear, not with {attention}")
        if attention == "clear":
            if stage.ntk_factor not in (None, 1) and not rotary:
                raise Problem("--ntk-factor is about rotary positions, which Stable Diffusion 3 does not have")
            if stage.ntk_factor is None:
                stage.ntk_factor = 10.0 if rotary else 1.0
            if stage.proportional_attention is None:
                stage.proportional_attention = True


def check_size(option: str, size: tuple[int, int], layout: Layout) -> None:
    """Raise where the model cannot draw this (width, height)."""
    multiple = layout.multiple
    near = [sorted({max(multiple, s // multiple * multiple), max(1, -(-s // multiple)) * multiple}) for s in size]
    if [size[0]] != near[0] or [size[1]] != near[1]:
        sizes = dict.fromkeys(f"{near[0][i]}x{near[1][i]}" for i in (0, -1))
        raise Problem(
            f"{option}: width and height must be multiples of {multiple} pixels for this model, got "
            f"{size[0]}x{size[1]}; the nearest are {' and '.join(sizes)}"
        )
    if layout.largest is not None and max(size) > layout.largest:
        raise Problem(f"{option}: this model knows positions up to {layout.largest} pixels, got {size[0]}x{size[1]}")


def for_helper(stage: StageRequest, **options):
    """The stage as :func:`linattn.pipelines.high_resolution` takes it; `options` for its call."""
    from linattn.pipelines import Stage

    settings = {name: getattr(stage, name) for name in ("ntk_factor", "proportional_attention")}
    return Stage(
        stage.height,
        stage.width,
        strength=stage.strength,
        num_inference_steps=stage.steps,
        shift=stage.shift,
        options=options,
        **{name: value for name, value in settings.items() if value is not None},
    )
