"""Small pipelines of real classes that are shown more than a caption, or have PixArt's transformer.

    pipe = tiny_kind("inpainting")      # also "pixart", "pixart-sigma", "upscaler", "adapter", "faceswap"

As those of `tiny_pipelines`, they save and load again, and fetch nothing.
"""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from transformers import ByT5Tokenizer

from .tiny_pipelines import TEXT_DIM, _t5, _vae, tiny_ip_adapter, tiny_pipeline

#: Those of diffusers, and one whose class is no other's: `linattn.distill.pipelines.face_swap.FaceSwap`.
KINDS, OWN = ("pixart", "pixart-sigma", "inpainting", "upscaler", "adapter"), "faceswap"


def tiny_kind(name: str):
    """A pipeline, float32, eval, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pipe = _MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pixart(sigma: bool):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # thirds of all heads together: height, width, aspect ratio
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=16 if sigma else 128,  # of which the pipeline concludes that the model is told sizes
        caption_channels=TEXT_DIM,
    ).eval()
    with torch.no_grad():  # as they are drawn, sizes and text are lost in the size of the rest
        for parameter in transformer.parameters():
            parameter.mul_(2)
    cls = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return cls(
        tokenizer=ByT5Tokenizer(),
        text_encoder=_t5(TEXT_DIM),
        vae=_vae(scaling_factor=0.13025 if sigma else 0.18215).eval(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def _inpainting():
    parts = dict(tiny_pipeline("sd15", in_channels=9).components)
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def _upscaler():
    base = tiny_pipeline("sd21", in_channels=7, num_class_embeds=1000)
    return StableDiffusionUpscalePipeline(
        vae=_vae(
            scaling_factor=0.08333,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
        ).eval(),
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
    )


def tiny_adapter() -> T2IAdapter:
    """For the UNet of `tiny_pipeline("sdxl")`: its first features are of half the latents' sides, as SDXL's are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return T2IAdapter(
            in_channels=3,
            channels=[16, 32, 32, 32],
            num_res_blocks=1,
            downscale_factor=4,
            adapter_type="full_adapter_xl",
        ).eval()


def _adapter():
    parts = dict(tiny_pipeline("sdxl").components)
    return StableDiffusionXLAdapterPipeline(**parts, adapter=tiny_adapter())


def _faceswap():
    """A Stable Diffusion with a UNet that is told a vector, and a CLIP that makes such."""
    unet = {"in_channels": 9, "class_embed_type": "projection", "projection_class_embeddings_input_dim": TEXT_DIM}
    parts = dict(tiny_pipeline("sd15", **unet).components)
    parts["image_encoder"] = tiny_ip_adapter()[1]
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


_MAKERS = {
    "pixart": lambda: _pixart(sigma=False),
    "pixart-sigma": lambda: _pixart(sigma=True),
    "inpainting": _inpainting,
    "upscaler": _upscaler,
    "adapter": _adapter,
    OWN: _faceswap,
}
