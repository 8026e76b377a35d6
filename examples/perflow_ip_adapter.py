"""A picture as the prompt, beside the words: IP-Adapter in few steps.

    python examples/perflow_ip_adapter.py --preset published --image girl.png --prompt "on the beach"  # from the hub
    python examples/perflow_ip_adapter.py --model my_model --delta my_delta --ip-adapter my_adapter \
        --weight-name ip-adapter.safetensors --image girl.png            # offline, from folders

An IP-Adapter adds keys and values of its own to the cross-attention; the weights that make the model one of few steps
are others, so both work together. None comes with this package: there is no offline run without one.
"""

import perflow_common as common
from diffusers import DiffusionPipeline
from PIL import Image

PRESETS = {
    "tiny": common.TINY,
    "published": {
        **common.SDXL,
        "guidance": 1.5,
        "ip_adapter": "h94/IP-Adapter",
        "subfolder": "sdxl_models",
        "weight_name": "ip-adapter_sdxl.safetensors",
        "prompt": "best quality, high quality, on the beach",
    },
}


def parse(argv=None):
    parser = common.parser(__doc__, out="perflow_ip_adapter.png")
    parser.add_argument("--ip-adapter", help="hub name or folder of an IP-Adapter for the model")
    parser.add_argument("--subfolder", default="", help="in it; with a folder image_encoder")
    parser.add_argument("--weight-name", help="file of the adapter")
    parser.add_argument(
        "--ip-scale", type=float, default=0.6, help="weight of the picture; 0: words alone [%(default)s]"
    )
    parser.add_argument("--image", help="the picture that is a prompt")
    args = common.parse(parser, PRESETS, argv)
    if not (args.ip_adapter and args.weight_name):
        parser.error(
            "which IP-Adapter? Pass --ip-adapter and --weight-name with --model, or --preset published. None comes "
            "with this package"
        )
    if not args.image:
        parser.error("--image: which picture?")
    return args


def main(argv=None):
    args = parse(argv)
    pipe = common.load(DiffusionPipeline, args)
    common.few_steps(pipe, args)
    pipe.load_ip_adapter(args.ip_adapter, subfolder=args.subfolder, weight_name=args.weight_name)
    pipe.set_ip_adapter_scale(args.ip_scale)
    images = pipe(ip_adapter_image=Image.open(args.image).convert("RGB"), **common.settings(args)).images
    common.save(images, args.out)


if __name__ == "__main__":
    main()
