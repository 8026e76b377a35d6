"""A picture larger than FLUX was trained for: drawn small with its own attention, enlarged with CLEAR's.

    python examples/clear_high_resolution.py                             # offline: the tiny model of the package
    python examples/clear_high_resolution.py --model black-forest-labs/FLUX.1-dev \
        --weights Huage001/CLEAR --weight-name clear_local_8_down_4 --height 512 --width 1024 --scale 4 \
        --steps 20 --guidance 3.5 --stage-guidance 7.5 --prompt "a tiger in a forest"      # what CLEAR's authors draw

Each stage resizes the picture, adds noise and redraws it (SDEdit): the composition stays, the detail is new. At these
sizes nearly all time of stock FLUX goes into attention, and CLEAR's grows with the number of pixels, not its square.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from linattn import bundled
from linattn.adapters import CLEAR
from linattn.evaluate import call_arguments
from linattn.pipelines import Stage, high_resolution


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Text to image in high resolution with window attention.")
    parser.add_argument("--model", help="hub name or folder of a FLUX or SD3 pipeline [the bundled FLUX]")
    parser.add_argument(
        "--weights",
        help="file, folder or hub name of CLEAR weights; 'base' to take the model's own, undistilled (then "
        "--window-size) [the bundled ones for the bundled model]",
    )
    parser.add_argument("--weight-name", help="the file in a folder or on the hub")
    parser.add_argument("--window-size", type=int, help="radius of the window in tokens [what the weights say]")
    parser.add_argument("--down-factor", type=int, help="pooling of far keys [what the weights say]")
    parser.add_argument("--prompt", default="a seven, a two and a four")
    parser.add_argument("--height", type=int, default=144, help="of the small picture [%(default)s]")
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--scale", type=int, nargs="+", default=[2], help="of each stage, over the small picture [2]")
    parser.add_argument("--strength", type=float, default=0.7, help="share of the steps that a stage redoes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--stage-guidance", type=float, help="[as --guidance]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="clear_high_resolution.png")
    args = parser.parse_args(argv)
    if args.model and not args.weights:
        parser.error("--weights: which? Only the bundled model has its own; 'base' takes the model's, undistilled")
    return args


def main(argv=None):
    args = parse(argv)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.model or bundled.path("tiny_flux"), dtype=dtype).to(device)

    weights = args.weights or bundled.path("tiny_flux_clear")
    clear = CLEAR.construct_for(
        pipe,
        args.window_size,
        args.down_factor,
        pretrained_model_name_or_path=None if weights == "base" else weights,
        weight_name=args.weight_name,
        load_pretrained=weights != "base",
    )

    stage_options = call_arguments(pipe, 1, args.guidance if args.stage_guidance is None else args.stage_guidance)
    result = high_resolution(
        pipe,
        args.prompt,
        height=args.height,
        width=args.width,
        stages=[
            Stage(args.height * scale, args.width * scale, strength=args.strength, options=stage_options)
            for scale in args.scale
        ],
        attention=clear,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        **call_arguments(pipe, 1, args.guidance),
    )
    result.images[0].save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
