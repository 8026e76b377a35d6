"""Image to image with linear self-attention: stock diffusers code but for two lines, marked (1) and (2).

    python examples/linfusion_img2img.py                                 # offline: the tiny model of the package
    python examples/linfusion_img2img.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --image sketch.png --prompt "a castle on a hill, oil painting"   # published weights, fetched from the hub

Without --image the model first draws one for --first-prompt. Time and memory of the attention grow with the number of
pixels, not with its square: redrawing an enlarged picture (--scale 2 --strength 0.4) is how large ones are made.
"""

import argparse

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image

from linattn import bundled
from linattn.adapters import LinFusion  # (1)


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Image to image with linear self-attention.")
    parser.add_argument("--model", help="hub name or folder of a Stable Diffusion (XL) pipeline [the bundled one]")
    parser.add_argument(
        "--weights",
        help="hub name or folder of LinFusion weights; 'published' to look them up for the model; 'base' to take the "
        "model's own projections, undistilled [the bundled ones for the bundled model, else published]",
    )
    parser.add_argument("--image", help="the picture to start from [one drawn for --first-prompt]")
    parser.add_argument("--first-prompt", default="a one and a seven")
    parser.add_argument("--prompt", default="a two and a three")
    parser.add_argument("--strength", type=float, default=0.7, help="share of the steps that are redone [%(default)s]")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="enlarge the picture before redrawing it [%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="linfusion_img2img.png")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = args.model or bundled.path("tiny_sd")
    pipe = AutoPipelineForImage2Image.from_pretrained(model, dtype=dtype).to(device)

    weights = args.weights or ("published" if args.model else str(bundled.path("tiny_sd_linfusion")))
    path = None if weights in ("published", "base") else weights
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=path, load_pretrained=weights != "base")  # (2)

    common = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    generator = torch.Generator().manual_seed(args.seed)
    if args.image:
        image = Image.open(args.image).convert("RGB")
    else:
        # Made of the same modules, so it is linear as well.
        text2image = AutoPipelineForText2Image.from_pipe(pipe)
        image = text2image(args.first_prompt, generator=generator, **common).images[0]
    image = image.resize([round(side * args.scale / 8) * 8 for side in image.size])
    image = pipe(args.prompt, image=image, strength=args.strength, generator=generator, **common).images[0]
    image.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
