"""Text to image with linear self-attention: stock diffusers code but for two lines, marked (1) and (2).

    python examples/linfusion_text2image.py                              # offline: the tiny model of the package
    python examples/linfusion_text2image.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompt "an astronaut riding a horse on Mars"                   # published weights, fetched from the hub

Time and memory of the attention grow with the number of pixels, not with its square: try --height and --width.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from linattn import bundled
from linattn.adapters import LinFusion  # (1)


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Text to image with linear self-attention.")
    parser.add_argument("--model", help="hub name or folder of a Stable Diffusion (XL) pipeline [the bundled one]")
    parser.add_argument(
        "--weights",
        help="hub name or folder of LinFusion weights; 'published' to look them up for the model; 'base' to take the "
        "model's own projections, undistilled [the bundled ones for the bundled model, else published]",
    )
    parser.add_argument("--prompt", default="a seven, a two and a four")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="linfusion.png")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.model or bundled.path("tiny_sd"), dtype=dtype).to(device)

    weights = args.weights or ("published" if args.model else str(bundled.path("tiny_sd_linfusion")))
    path = None if weights in ("published", "base") else weights
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=path, load_pretrained=weights != "base")  # (2)

    image = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    image.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
