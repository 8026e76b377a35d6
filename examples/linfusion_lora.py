"""Text to image with a LoRA and linear self-attention: stock diffusers code but for two lines, marked (1) and (2).

    python examples/linfusion_lora.py --lora my_lora.safetensors         # offline: a LoRA of the package's tiny model
    python examples/linfusion_lora.py --model stabilityai/stable-diffusion-xl-base-1.0 \
        --lora nerijs/pixel-art-xl --prompt "pixel art of a castle"      # published weights, fetched from the hub

The LoRA acts on the linear attention that is mounted, and stays with the pipeline when it is unmounted; it does not
matter which of the two comes first.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from linattn import bundled
from linattn.adapters import LinFusion  # (1)


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Text to image with a LoRA and linear self-attention.")
    parser.add_argument("--lora", help="a .safetensors file, a folder, or a hub name")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how strongly the LoRA acts [%(default)s]")
    parser.add_argument("--model", help="hub name or folder of a Stable Diffusion (XL) pipeline [the bundled one]")
    parser.add_argument(
        "--weights",
        help="hub name or folder of LinFusion weights; 'published' to look them up for the model; 'base' to take the "
        "model's own projections, undistilled [the bundled ones for the bundled model, else published]",
    )
    parser.add_argument("--prompt", default="a seven, a two and a four")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="linfusion_lora.png")
    args = parser.parse_args(argv)
    if not args.lora:
        parser.error(
            "which LoRA? Pass --lora with a file (my_lora.safetensors, of diffusers or kohya), a folder, or a hub name "
            "(nerijs/pixel-art-xl), and --model with the model it was trained for. None comes with this package"
        )
    return args


def main(argv=None):
    args = parse(argv)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(args.model or bundled.path("tiny_sd"), dtype=dtype).to(device)
    pipe.load_lora_weights(args.lora, adapter_name="lora")
    pipe.set_adapters("lora", args.lora_scale)

    weights = args.weights or ("published" if args.model else str(bundled.path("tiny_sd_linfusion")))
    path = None if weights in ("published", "base") else weights
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=path, load_pretrained=weights != "base")  # (2)

    image = pipe(
        args.prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    image.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
