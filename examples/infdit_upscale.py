"""Enlarge a picture with Inf-DiT, to any size in the memory that there is.

    python examples/infdit_upscale.py small.png                                 # offline: the tiny model of the package
    python examples/infdit_upscale.py small.png --scale 8 --model ./infdit --max-memory 12GiB

A folder for --model with the published weights comes from `linattn.adapters.convert_infdit_checkpoint(FILE, FOLDER)`.
For many pictures there is a command that goes on after a stop: `linattn upscale FOLDER --out DIR`.
"""

import argparse

import torch
from PIL import Image

from linattn import bundled
from linattn.adapters import InfDiTUpscalePipeline


def main(argv=None):
    parser = argparse.ArgumentParser(description="Enlarge a picture with Inf-DiT.")
    parser.add_argument("image")
    parser.add_argument("--model", default="tiny_infdit", help="folder of a pipeline, or name of a bundled one")
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-memory", default="auto", help="beside the weights, like 12GiB [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="infdit_upscale.png")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = InfDiTUpscalePipeline.from_pretrained(bundled.resolve(args.model), dtype=dtype).to(device)
    large = pipe(
        Image.open(args.image),
        scale=args.scale,
        num_inference_steps=args.steps,
        max_memory=args.max_memory,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    large.save(args.out)
    print(f"wrote {args.out}, {large.width} x {large.height} pixels")


if __name__ == "__main__":
    main()
