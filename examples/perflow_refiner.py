"""Enlarge a picture and draw its detail anew in four steps: ControlNet-tile in image to image.

    python examples/perflow_refiner.py                                   # offline: the tiny model of the package
    python examples/perflow_refiner.py --preset published --image small.png --prompt "a tiger"         # from the hub
    python examples/perflow_refiner.py --preset published --image small.png --scale 6 --tiled-vae --linfusion

The enlarged picture is both the picture that noise is added to and the control. A ControlNet of the tile kind keeps to
what it sees at low resolution, so all steps are redone (--strength 1). Without one, as in the offline run, the strength
has to be less for the picture to stay; a run begins at the nearest start of a window (docs/perflow.md). For large
pictures self-attention and autoencoder are what needs memory: --linfusion and --tiled-vae.
"""

import perflow_common as common
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, ControlNetModel
from PIL import Image

PRESETS = {
    "tiny": {**common.TINY, "shorter": 288, "strength": 0.25},
    "published": {
        **common.SD15,
        "controlnet": "lllyasviel/control_v11f1e_sd15_tile",
        "shorter": 1024,
        "strength": 1.0,
        "prompt": "masterpiece, best quality, highres",
    },
}


def parse(argv=None):
    parser = common.parser(__doc__, out="perflow_refiner.png")
    parser.add_argument("--controlnet", help="hub name or folder of a tile ControlNet [none]")
    parser.add_argument("--controlnet-scale", type=float, default=1.0, help="weight of the control [%(default)s]")
    parser.add_argument("--image", help="the picture to enlarge [one that the model draws for the prompt]")
    parser.add_argument("--scale", type=float, help="of both sides [what --shorter says]")
    parser.add_argument("--shorter", type=int, help="shorter side of the result in pixels, without --scale")
    parser.add_argument("--strength", type=float, help="share of the noise that is added and of the steps")
    parser.add_argument("--tiled-vae", action="store_true", help="encode and decode in tiles")
    return common.parse(parser, PRESETS, argv)


def main(argv=None):
    args = parse(argv)
    if args.controlnet:
        _, dtype = common.device_and_dtype()
        controlnet = ControlNetModel.from_pretrained(args.controlnet, torch_dtype=dtype)
        pipe = common.load(AutoPipelineForImage2Image, args, controlnet=controlnet)
    else:
        pipe = common.load(AutoPipelineForImage2Image, args)
    common.few_steps(pipe, args)
    if args.tiled_vae:
        pipe.vae.enable_tiling()

    if args.image:
        small = Image.open(args.image).convert("RGB")
    else:
        # Made of the same modules, so it takes few steps as well.
        small = AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)(**common.settings(args)).images[0]
    large = common.resized(small, args.scale or args.shorter / min(small.size), common.size_step(pipe))
    control = {"control_image": large, "controlnet_conditioning_scale": args.controlnet_scale}
    images = pipe(
        image=large,
        strength=args.strength,
        **(control if args.controlnet else {}),
        **common.settings(args),
    ).images
    common.save(images, args.out)


if __name__ == "__main__":
    main()
