"""Text to image with ControlNet in four steps.

    python examples/perflow_controlnet.py                                # offline: the tiny model of the package
    python examples/perflow_controlnet.py --preset depth --image depth.png --prompt "a husky in the snow"
    python examples/perflow_controlnet.py --preset openpose --image pose.png --prompt "a knight"      # from the hub

A ControlNet was trained beside the model before it was made one of few steps, and works with it unchanged. The control
picture is what the ControlNet reads: a depth map or a skeleton, not a photograph. None comes with this package: the
offline run takes one without training, which changes nothing.
"""

import perflow_common as common
from diffusers import AutoPipelineForText2Image, ControlNetModel
from PIL import Image

PRESETS = {
    "tiny": common.TINY,
    "depth": {
        **common.SD15,
        "controlnet": "lllyasviel/control_v11f1p_sd15_depth",
        "shorter": 1024,
        "prompt": "masterpiece, best quality, a husky in the snow",
    },
    "openpose": {
        **common.SD15,
        "controlnet": "lllyasviel/control_v11p_sd15_openpose",
        "shorter": 1024,
        "prompt": "masterpiece, best quality, a knight in the forest",
    },
}


def parse(argv=None):
    parser = common.parser(__doc__, out="perflow_controlnet.png")
    parser.add_argument("--controlnet", help="hub name or folder [one without training, made of the model]")
    parser.add_argument("--controlnet-scale", type=float, default=1.0, help="weight of the control [%(default)s]")
    parser.add_argument("--image", help="the control picture; the result has its proportions")
    parser.add_argument("--shorter", type=int, help="shorter side of the result [as the control picture]")
    args = common.parse(parser, PRESETS, argv)
    if args.controlnet and not args.image:
        parser.error("--image: which control picture? It must be what the ControlNet reads, a depth map for example")
    return args


def main(argv=None):
    args = parse(argv)
    if args.controlnet:
        _, dtype = common.device_and_dtype()
        controlnet = ControlNetModel.from_pretrained(args.controlnet, torch_dtype=dtype)
        pipe = common.load(AutoPipelineForText2Image, args, controlnet=controlnet)
    else:
        plain = common.load(AutoPipelineForText2Image, args)
        pipe = AutoPipelineForText2Image.from_pipe(plain, controlnet=common.untrained_controlnet(plain))
    common.few_steps(pipe, args)

    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    control = Image.open(args.image).convert("RGB") if args.image else Image.new("RGB", (side, side), "gray")
    scale = args.shorter / min(control.size) if args.shorter else 1.0
    control = common.resized(control, scale, common.size_step(pipe))
    images = pipe(
        image=control,
        height=control.height,
        width=control.width,
        controlnet_conditioning_scale=args.controlnet_scale,
        **common.settings(args),
    ).images
    common.save(images, args.out)


if __name__ == "__main__":
    main()
