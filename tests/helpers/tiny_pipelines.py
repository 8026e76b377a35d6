"""Stable Diffusion, FLUX and SD3 pipelines of the real classes, with random weights, small enough to draw in a blink.

    pipe = tiny_pipeline("sdxl")                       # StableDiffusionXLPipeline
    pipe.save_pretrained(folder)                       # loads again with DiffusionPipeline.from_pretrained(folder)
    inpaint = StableDiffusionInpaintPipeline(**tiny_pipeline("sd15", in_channels=9).components)

    pipe = tiny_pipeline("flux")                       # FluxPipeline; also "flux-schnell", "flux-fill", "sd3", "sd35"
    pipe("a fox", height=32, width=48, max_sequence_length=16)      # 8 x 12 image tokens of 4 x 4 pixels
    net = tiny_controlnet("flux")                      # FluxControlNetModel whose residuals are not zero
    tensors, encoder = tiny_ip_adapter("flux")         # for pipe.load_ip_adapter(tensors, weight_name=None)

Each family keeps what makes it different from the others: the order of its blocks, how it counts heads, linear or
convolutional projections, upcast_attention, the prediction type, its text encoders and micro-conditioning; whether
guidance is embedded, which layers attend twice, whether queries and keys are normalised. Nothing is fetched: the CLIP
tokenizer is that of the package's bundled model, T5's reads bytes.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

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

LATENTS = 16  # channels, as published (SD3 inpaints no other); an image token is 2 x 2 latents
_FLUX = {
    "in_channels": 4 * LATENTS,
    # Two and three: of the five layers, those that CLEAR's distillation captures (every fourth, if single) are one.
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
_SD3 = {
    "sample_size": 16,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 2 * TEXT_DIM,  # T5's width; both CLIP encoders side by side
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * TEXT_DIM,
    "pos_embed_max_size": 24,  # tokens a side, from which a smaller grid is cropped
}
TRANSFORMERS = {
    "flux": _FLUX,
    "flux-schnell": {**_FLUX, "guidance_embeds": False},
    # Latents, the latents of the masked picture, and a mask of 2 x 2 pixels for each of its 2 x 2 latents.
    "flux-fill": {**_FLUX, "in_channels": 4 * (LATENTS + LATENTS + 4), "out_channels": 4 * LATENTS},
    "sd3": _SD3,
    # The first layers attend a second time, image to image alone.
    "sd35": {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}
TRANSFORMER_FAMILIES = tuple(TRANSFORMERS)


def tiny_pipeline(family: str, **overrides):
    """A text-to-image pipeline ("flux-fill": inpainting), float32, eval, the same weights every time.

    Args:
        family: one of `FAMILIES`, whose pipelines have a UNet, or of `TRANSFORMER_FAMILIES`.
        overrides: entries of the UNet's or transformer's config, e.g. in_channels=9 for inpainting.
    """
    if family in TRANSFORMERS:
        return _transformer_pipeline(family, overrides)
    if family not in UNETS:
        raise ValueError(f"family must be one of {', '.join(FAMILIES + TRANSFORMER_FAMILIES)}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{**UNETS[family], **overrides}).eval()
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


def tiny_transformer(family: str, **overrides):
    """The transformer of `tiny_pipeline(family)` alone: a FluxTransformer2DModel or SD3Transformer2DModel."""
    cls = FluxTransformer2DModel if family.startswith("flux") else SD3Transformer2DModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = cls(**{**TRANSFORMERS[family], **overrides}).eval()
        # As they are drawn, gates near zero hide each block and small queries and keys make each attention a mean.
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if "attn" in name and parameter.ndim == 2:
                    parameter.mul_(2)
                elif "norm" in name and name.endswith("linear.bias"):
                    parameter.add_(0.5)
    return transformer


def _transformer_pipeline(family, overrides):
    flux = family.startswith("flux")
    transformer = tiny_transformer(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = _vae(latent_channels=LATENTS, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False)
        tokenizer = CLIPTokenizer.from_pretrained(linattn.bundled.path("tiny_sd") / "tokenizer")
        components = {
            "transformer": transformer,
            "vae": vae.eval(),
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(CLIPTextModel if flux else CLIPTextModelWithProjection, tokenizer),
        }
        t5 = {
            f"tokenizer_{2 if flux else 3}": ByT5Tokenizer(),
            f"text_encoder_{2 if flux else 3}": _t5(transformer.config.joint_attention_dim),
        }
        if not flux:
            t5["tokenizer_2"] = CLIPTokenizer.from_pretrained(linattn.bundled.path("tiny_sd") / "tokenizer")
            t5["text_encoder_2"] = _text_encoder(CLIPTextModelWithProjection, tokenizer)
    if family in ("flux-schnell", "sd3", "sd35"):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if flux else 3.0)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    cls = {"flux-fill": FluxFillPipeline}.get(family, FluxPipeline if flux else StableDiffusion3Pipeline)
    pipe = cls(**components, **t5, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(family: str):
    """A ControlNet from the transformer's own weights, whose zero layers have been trained away from zero."""
    transformer = tiny_transformer(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if family.startswith("flux"):
            heads = {key: TRANSFORMERS[family][key] for key in ("attention_head_dim", "num_attention_heads")}
            net = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)
        else:
            net = SD3ControlNetModel.from_transformer(transformer, num_layers=2, num_extra_conditioning_channels=0)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith(("controlnet_", "pos_embed_input")):
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
    return net.eval()


def tiny_ip_adapter(family: str = "flux"):
    """An IP-Adapter for FLUX: its state dict {"image_proj": ..., "ip_adapter": ...}, and the image encoder that a
    pipeline must have to load it, for pictures of `IMAGE_SIZE`.
    """
    config, tokens = {**_FLUX, **TRANSFORMERS[family]}, 4
    text, channels = config["joint_attention_dim"], config["attention_head_dim"] * config["num_attention_heads"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=IMAGE_SIZE,
                patch_size=8,
                projection_dim=TEXT_DIM,
            )
        ).eval()
        projection = {
            "proj.weight": torch.randn(tokens * text, TEXT_DIM),
            "proj.bias": torch.zeros(tokens * text),
            "norm.weight": torch.ones(text),
            "norm.bias": torch.zeros(text),
        }
        layers = {}
        for i in range(config["num_layers"]):
            for slot in ("to_k_ip", "to_v_ip"):
                layers[f"{i}.{slot}.weight"] = torch.randn(channels, text) / text**0.5
                layers[f"{i}.{slot}.bias"] = torch.zeros(channels)
    return {"image_proj": projection, "ip_adapter": layers}, encoder


def _t5(width) -> T5EncoderModel:
    config = T5Config(
        vocab_size=384,  # of ByT5Tokenizer: bytes and special tokens
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def _vae(**overrides) -> AutoencoderKL:
    config = {
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "sample_size": IMAGE_SIZE,
    }
    return AutoencoderKL(**{**config, **overrides})


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
