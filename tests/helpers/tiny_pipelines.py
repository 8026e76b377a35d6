"""Stable Diffusion pipelines of the real classes, with random weights, small enough to draw in a blink.

    pipe = tiny_pipeline("sdxl")                       # StableDiffusionXLPipeline
    pipe.save_pretrained(folder)                       # loads again with DiffusionPipeline.from_pretrained(folder)
    inpaint = StableDiffusionInpaintPipeline(**tiny_pipeline("sd15", in_channels=9).components)

Each family keeps what makes it different from the others: the order of its blocks, how it counts heads, linear or
convolutional projections, upcast_attention, the prediction type, its text encoders and micro-conditioning. Nothing is
fetched: the tokenizer is that of the package's bundled model.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import linattn.bundled

TEXT_DIM = 16  # of each text encoder; SDXL's UNet sees both, side by side
IMAGE_SIZE = 32  # what the pipelines draw: sample_size 16, VAE factor 2

_COMMON = {
    "sample_size": 16,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32, 32),
    "cross_attention_dim": TEXT_DIM,
}
_ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    # One number of heads for all levels.
    "sd15": {**_COMMON, **_ATTENTION_FIRST, "attention_head_dim": 2},
    # One head dim for all levels, so a number of heads for each.
    "sd21": {
        **_COMMON,
        **_ATTENTION_FIRST,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # The first level has no attention, the deeper ones several transformer blocks; time and text are added together.
    "sdxl": {
        **_COMMON,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_DIM,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_DIM,
    },
}
FAMILIES = tuple(UNETS)


def tiny_pipeline(family: str, **unet_overrides):
    """A text-to-image pipeline of "sd15", "sd21" or "sdxl": float32, eval, the same weights every time.

    Args:
        family: one of `FAMILIES`.
        unet_overrides: entries of the UNet's config, e.g. in_channels=9 for inpainting.
    """
    if family not in UNETS:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{**UNETS[family], **unet_overrides}).eval()
        vae = _vae().eval()
        tokenizer = CLIPTokenizer.from_pretrained(linattn.bundled.path("tiny_sd") / "tokenizer")
        text_encoder = _text_encoder(CLIPTextModel, tokenizer)
        if family == "sdxl":
            pipe = StableDiffusionXLPipeline(
                vae=vae,
                text_encoder=text_encoder,
                text_encoder_2=_text_encoder(CLIPTextModelWithProjection, tokenizer),
                tokenizer=tokenizer,
                tokenizer_2=CLIPTokenizer.from_pretrained(linattn.bundled.path("tiny_sd") / "tokenizer"),
                unet=unet,
                scheduler=EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading", interpolation_type="linear"),
                add_watermarker=False,
            )
        else:
            pipe = StableDiffusionPipeline(
                vae=vae,
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                unet=unet,
                scheduler=DDIMScheduler(
                    **_NOISE,
                    clip_sample=False,
                    set_alpha_to_one=False,
                    prediction_type="v_prediction" if family == "sd21" else "epsilon",
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )


def _text_encoder(cls, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=TEXT_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()
