"""What the examples of PeRFlow share: their options, and how a pipeline becomes one of few steps.

Written out, `few_steps` is three lines of a script:

    LinFusion.construct_for(pipe)                                                            # only with --linfusion
    delta_weights.merge(pipe.unet, delta_weights.load("hansyan/perflow-sd15-delta-weights", variant="v0-1"))
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")

Options have their defaults from a preset, which is a table of them: "tiny", the models of this package, unless --preset
names another. Presets with published weights are the settings of docs/perflow.md, "Settings for the published weights".
"""

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel
from PIL import Image

from linattn import bundled, delta_weights
from linattn.adapters import LinFusion
from linattn.schedulers import PeRFlowScheduler, piecewise

# The bundled model, and what makes it one of four steps; it has its teacher's guidance in it.
TINY = dict(model="tiny_sd", delta="tiny_sd_perflow", steps=4, guidance=1.0, prompt="a seven, a two and a four")

SD15 = dict(
    model="Lykon/dreamshaper-8",
    delta="hansyan/perflow-sd15-delta-weights",
    delta_variant="v0-1",
    prediction_type="diff_eps",
    steps=4,
    guidance=4.5,
    negative_prompt="distorted, blur, low-quality, haze, out of focus",
)
SDXL = dict(
    model="hansyan/perflow-sdxl-base",  # the student itself: no delta
    variant="v0-fix",
    prediction_type="ddim_eps",
    steps=6,
    guidance=2.0,
    negative_prompt="distorted, blur, low-quality, haze, out of focus",
)


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """The options of all examples; doc is that of the script, whose first line and examples the help shows."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--preset", help="where options that are not given come from [tiny]")
    made.add_argument("--model", help="hub name or folder of a pipeline, or name of a bundled one")
    made.add_argument("--variant", help="of the model's files, e.g. fp16")
    made.add_argument("--delta", help="hub name or folder of delta weights, of a run of `linattn distill` too")
    made.add_argument("--delta-variant", help="of the file of delta weights, e.g. v0-1")
    made.add_argument("--delta-scale", type=float, default=1.0)
    made.add_argument(
        "--prediction-type",
        choices=piecewise.PREDICTIONS,
        help="what the student was trained with [what a PeRFlowScheduler beside the delta or in the model says]",
    )
    made.add_argument("--windows", type=int, default=4, help="of the training, with --prediction-type [%(default)s]")
    made.add_argument(
        "--linfusion",
        nargs="?",
        const="published",
        metavar="WEIGHTS",
        help="linear self-attention as well: hub name or folder of LinFusion weights; without one those that belong to "
        "the model; 'base' for the model's own projections, undistilled",
    )
    made.add_argument("--prompt")
    made.add_argument("--negative-prompt")
    made.add_argument("--steps", type=int)
    made.add_argument("--guidance", type=float)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", default=out)
    return made


def parse(made: argparse.ArgumentParser, presets: dict[str, dict], argv=None) -> argparse.Namespace:
    """The options of a call: those given, others from the preset. Presets are listed in the help.

    Without --preset it is "tiny"; another --model does not get the tiny one's delta weights.
    """
    shown = [
        f"  {name}:\n" + "".join(f"    --{key.replace('_', '-')} {value!r}\n" for key, value in preset.items())
        for name, preset in presets.items()
    ]
    made.epilog = "presets:\n" + "".join(shown)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--model")
    given, _ = first.parse_known_args(argv)
    preset = given.preset or "tiny"
    if preset not in presets:
        made.error(f"--preset must be one of {', '.join(presets)}, got {preset}")
    defaults = dict(presets[preset])
    if given.model and not given.preset:
        defaults.pop("delta", None)
    made.set_defaults(**defaults)
    return made.parse_args(argv)


def device_and_dtype() -> tuple[str, torch.dtype]:
    return ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


def load(cls, args, **components):
    """cls.from_pretrained(model), on the accelerator if there is one."""
    device, dtype = device_and_dtype()
    variant = {"variant": args.variant} if args.variant else {}
    return cls.from_pretrained(bundled.resolve(args.model), dtype=dtype, **variant, **components).to(device)


def few_steps(pipe, args, extra_channels: str = "raise"):
    """Mount linear attention if asked for, merge the delta weights, and set PeRFlow's scheduler. Returns the merge.

    Linear attention first: a delta is then merged into its projections too, and its branches, which no delta has, stay.
    """
    if args.linfusion:
        own = "tiny_sd_linfusion" if args.model == "tiny_sd" else None
        path = own if args.linfusion == "published" else args.linfusion
        LinFusion.construct_for(
            pipe,
            pretrained_model_name_or_path=None if path in (None, "base") else bundled.resolve(path),
            load_pretrained=path != "base",
        )
    merge, source = None, bundled.resolve(args.delta) if args.delta else None
    if source:
        merge = delta_weights.merge(
            pipe.unet,
            delta_weights.load(source, variant=args.delta_variant),
            args.delta_scale,
            missing="skip" if args.linfusion or extra_channels != "raise" else "raise",
            extra_channels=extra_channels,
            exact=False,  # it stays
        )
        if merge.skipped:
            print(f"without delta weights: {', '.join(merge.skipped)}")
    pipe.scheduler = _scheduler(pipe, source, args)
    return merge


def _scheduler(pipe, delta: str | None, args) -> PeRFlowScheduler:
    if args.prediction_type:
        return PeRFlowScheduler.from_config(
            pipe.scheduler.config, prediction_type=args.prediction_type, num_time_windows=args.windows
        )
    if delta and (Path(delta) / "scheduler").is_dir():
        return PeRFlowScheduler.from_pretrained(delta, subfolder="scheduler")
    if isinstance(pipe.scheduler, PeRFlowScheduler):
        return pipe.scheduler
    raise SystemExit("--prediction-type: what was the student trained with? Neither the delta nor the model says")


def untrained_controlnet(pipe) -> ControlNetModel:
    """A ControlNet as its training would begin: the layers at its ends are zero, so it changes nothing."""
    torch.manual_seed(0)
    channels = [16 * 2**level for level in range(pipe.vae_scale_factor.bit_length())]  # one level for each halving
    made = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=channels).eval()
    return made.to(pipe.unet.device) if made.dtype == pipe.unet.dtype else made.to(pipe.unet.device, pipe.unet.dtype)


def settings(args) -> dict:
    """What every call of a pipeline gets."""
    return dict(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
    )


def size_step(pipe) -> int:
    """Pixels that the sides of a picture should be a multiple of, for the UNet to halve it as often as it does."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def resized(image: Image.Image, scale: float, multiple: int) -> Image.Image:
    """Scaled by Lanczos' filter, both sides rounded to the next multiple."""
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in image.size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def save(images: list[Image.Image], out: str) -> None:
    """One file, pictures side by side."""
    canvas = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width
    canvas.save(out)
    print(f"wrote {out}, {canvas.width} x {canvas.height} pixels")
