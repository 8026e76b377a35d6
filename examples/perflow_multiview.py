"""An object seen from several sides, from one picture of it: a multiview diffusion model made one of four steps.

    python examples/perflow_multiview.py --preset published --image owl.png                            # from the hub
    python examples/perflow_multiview.py --model my_multiview --delta my_delta --image owl.png         # from folders

The model is Stable Diffusion's UNet, changed as Wonder3D (arXiv 2310.15008) changes it: the picture's latents are
further input channels, its CLIP embedding stands where the text was, cameras are class labels, and the views of an
object, which lie in one batch, see each other in self-attention. PeRFlow's delta weights were made for the UNet without
all of that: they are merged where keys are the same; conv_in, whose input differs, is left alone (--extra-channels).

The object should fill most of a square picture, on transparent or white ground (the package rembg cuts objects out).
Writes one picture: normals to the left of colours, where the model draws both. None comes with this package.
"""

import inspect
import math
from copy import deepcopy
from types import SimpleNamespace

import perflow_common as common
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from linattn.schedulers import PeRFlowScheduler

PRESETS = {
    "tiny": {"steps": 4, "guidance": 1.0},
    "published": {
        **{key: common.SD15[key] for key in ("delta", "delta_variant", "prediction_type", "steps")},
        "model": "flamehaze1115/wonder3d-v1.0",
        "guidance": 1.0,
        "size": 256,
    },
}

# Wonder3D's six: elevation and azimuth in radians, relative to the camera of the input.
CAMERAS = [(0.0, 0.0), (-0.2362, 0.8125), (-0.1686, 1.6934), (0.5220, 3.1406), (0.6904, 4.8359), (0.3733, 5.5859)]


class MultiviewBlock(nn.Module):
    """A transformer block whose self-attention spans views, and that may attend across two domains after it.

    In a batch of O objects with V views (and, first normals, then colours) the rows are in the order domain, object,
    view. Children keep the names of the block that it is made of, so that weights, deltas and LinFusion find them.
    """

    def __init__(self, block: BasicTransformerBlock, views: int, domains: int):
        super().__init__()
        self.views, self.domains = views, domains
        for name in ("norm1", "attn1", "norm2", "attn2", "norm3", "ff"):
            self.add_module(name, getattr(block, name))
        if domains > 1:
            self.norm_joint_mid = deepcopy(block.norm1)
            self.attn_joint_mid = deepcopy(block.attn1)
            nn.init.zeros_(self.attn_joint_mid.to_out[0].weight)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        x, tokens = hidden_states, hidden_states.shape[1]
        # Attention across views is self-attention over the tokens of all of them: no op is needed but the usual one.
        together = self.norm1(x).unflatten(0, (-1, self.views)).flatten(1, 2)
        x = x + self.attn1(together).unflatten(1, (self.views, tokens)).flatten(0, 1)
        if self.domains > 1:
            together = self.norm_joint_mid(x).unflatten(0, (self.domains, -1)).transpose(0, 1).flatten(1, 2)
            apart = self.attn_joint_mid(together).unflatten(1, (self.domains, tokens))
            x = x + apart.transpose(0, 1).flatten(0, 1)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        return x + self.ff(self.norm3(x))


class MultiviewUNet(UNet2DConditionModel):
    """Loads the UNet of Wonder3D, whose config names classes of its own, or a stock one (`views` says how many)."""

    @classmethod
    def from_config(cls, config, views: int | None = None, **kwargs):
        known = inspect.signature(UNet2DConditionModel.__init__).parameters
        stock = {key: _stock_names(value) for key, value in config.items() if key in known}
        unet = super().from_config(stock, **kwargs)
        unet.views = views or config.get("num_views") or len(CAMERAS)
        unet.domains = 2 if config.get("cd_attention_mid") else 1
        for name, block in list(unet.named_modules()):
            if isinstance(block, BasicTransformerBlock):
                parent, _, child = name.rpartition(".")
                setattr(unet.get_submodule(parent), child, MultiviewBlock(block, unet.views, unet.domains))
        return unet


def _stock_names(value):
    if isinstance(value, (list, tuple)):
        return [_stock_names(entry) for entry in value]
    return value.replace("MV2D", "2D") if isinstance(value, str) else value


def parse(argv=None):
    parser = common.parser(__doc__, out="perflow_multiview.png")
    parser.add_argument("--image", help="picture of an object on transparent or white ground")
    parser.add_argument("--size", type=int, help="side of each view in pixels [what the UNet was trained with]")
    parser.add_argument("--views", type=int, help="views of an object [what the UNet's config says, else 6]")
    parser.add_argument(
        "--extra-channels",
        choices=("skip", "pad"),
        default="skip",
        help="the delta of conv_in, which has fewer input channels: none of it, or to the first ones [%(default)s]",
    )
    args = common.parse(parser, PRESETS, argv)
    if not args.model:
        parser.error("which model? Pass --model, or --preset published. None comes with this package")
    if not args.image:
        parser.error("--image: which picture?")
    return args


def load(args) -> SimpleNamespace:
    """The parts of a multiview model, each from its own folder."""
    device, dtype = common.device_and_dtype()
    own = {"views": args.views} if args.views else {}
    config = DDIMScheduler.load_config(args.model, subfolder="scheduler")
    scheduler = PeRFlowScheduler if config.get("_class_name") == "PeRFlowScheduler" else DDIMScheduler
    return SimpleNamespace(
        unet=MultiviewUNet.from_pretrained(args.model, subfolder="unet", torch_dtype=dtype, **own).to(device),
        vae=AutoencoderKL.from_pretrained(args.model, subfolder="vae", torch_dtype=dtype).to(device),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(
            args.model, subfolder="image_encoder", dtype=dtype
        ).to(device),
        feature_extractor=CLIPImageProcessor.from_pretrained(args.model, subfolder="feature_extractor"),
        scheduler=scheduler.from_config(config),
    )


def class_labels(unet) -> Tensor | None:
    """For each row sines and cosines of where the camera is, and of which domain it draws; None for UNets without."""
    numbers = unet.config.projection_class_embeddings_input_dim
    if numbers is None:
        return None
    cameras = CAMERAS if unet.views == len(CAMERAS) else [(0.0, i * math.tau / unet.views) for i in range(unet.views)]
    domains = [[1.0, 0.0], [0.0, 1.0]][-unet.domains :]  # one domain is colour
    rows = torch.tensor([[0.0, *camera, *domain] for domain in domains for camera in cameras])[:, : numbers // 2]
    return torch.cat([rows.sin(), rows.cos()], dim=-1).to(unet.device, unet.dtype)


@torch.no_grad()
def draw(parts, image: Image.Image, size: int, steps: int, guidance: float, generator) -> list[Image.Image]:
    """All views, domain after domain. Without the picture, for guidance, embedding and latents are zero."""
    unet, vae, processor = parts.unet, parts.vae, VaeImageProcessor()
    rows = unet.views * unet.domains
    pixels = parts.feature_extractor(images=image, return_tensors="pt").pixel_values.to(unet.device, unet.dtype)
    embedding = parts.image_encoder(pixels).image_embeds[:, None].repeat(rows, 1, 1)
    pixels = processor.preprocess(image, height=size, width=size).to(unet.device, unet.dtype)
    seen = (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).repeat(rows, 1, 1, 1)
    labels = class_labels(unet)

    parts.scheduler.set_timesteps(steps, device=unet.device)
    latents = torch.randn((rows, unet.config.out_channels, *seen.shape[2:]), generator=generator).to(seen)
    for t in parts.scheduler.timesteps:

        def predicted(seen, embedding, latents=latents, t=t):
            return unet(torch.cat([latents, seen], 1), t, embedding, class_labels=labels).sample

        output = predicted(seen, embedding)
        if guidance != 1:
            without = predicted(torch.zeros_like(seen), torch.zeros_like(embedding))
            output = without + guidance * (output - without)
        latents = parts.scheduler.step(output, t, latents).prev_sample
    return processor.postprocess(vae.decode(latents / vae.config.scaling_factor).sample)


def on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def main(argv=None):
    args = parse(argv)
    parts = load(args)
    common.few_steps(parts, args, extra_channels=args.extra_channels)
    size = args.size or parts.unet.config.sample_size * 2 ** (len(parts.vae.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(args.seed)
    images = draw(parts, on_white(Image.open(args.image)), size, args.steps, args.guidance, generator)
    common.save(images, args.out)


if __name__ == "__main__":
    main()
