"""A diffusers pipeline as the source of everything but pictures: teacher, encoders, noise schedule, validation images.

One class per kind of pipeline, found by the class name in `model_index.json`. All are used in the same way:

    models = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    models.place(device, torch.bfloat16)
    condition = models.encode_text(captions) | models.encode_sizes(original, crop, target)
    latents = models.latents(*models.encode_image(pixels), noise)
    prediction = models.denoiser(models.model)(noisy, timesteps, condition)

What a kind asks of a recipe it says by `objectives` (the kinds of objective that fit its noise schedule), `multiple`
(of how many pixels the sides of a picture are multiples) and `needs_pixels` (whether the picture itself is part of the
condition, beside its caption).

Pipelines that draw from captions (`StableDiffusion` and the others that encode text), alone or beside a picture
(`PictureConditioned`), are teachers. `InfDiT`, which enlarges pictures, is trained itself.

A kind of one's own is a subclass of one of these. `load` is given it, with what else it is made with.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping

from ... import bundled
from ..._quiet import quiet_diffusers
from .infdit import InfDiT
from .kind import Kind
from .picture_conditioned import (
    PictureConditioned,
    StableDiffusionInpainting,
    StableDiffusionUpscaler,
    StableDiffusionXLAdapter,
)
from .text_to_image import Flux, PixArt, StableDiffusion, StableDiffusion3, StableDiffusionXL

__all__ = [
    "FOREIGN",
    "KINDS",
    "Flux",
    "InfDiT",
    "Kind",
    "PictureConditioned",
    "PixArt",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionInpainting",
    "StableDiffusionUpscaler",
    "StableDiffusionXL",
    "StableDiffusionXLAdapter",
    "fresh",
    "load",
]

#: Class names of pipelines in `model_index.json` -> how to use them.
KINDS: dict[str, type[Kind]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "FluxPipeline": Flux,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusionInpaintPipeline": StableDiffusionInpainting,
    "StableDiffusionUpscalePipeline": StableDiffusionUpscaler,
    "StableDiffusionXLAdapterPipeline": StableDiffusionXLAdapter,
    "InfDiTUpscalePipeline": InfDiT,
}
#: Kinds that diffusers does not know, so that somebody has to hand in the class of the pipeline.
FOREIGN = ("InfDiTUpscalePipeline",)


def load(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    text_length: int | None = None,
    pipeline_class: type | None = None,
    image_encoder: str | None = None,
    kind: type[Kind] | None = None,
    options: Mapping[str, object] | None = None,
) -> Kind:
    """Load a pipeline in float32, safetensors only, without the parts that training has no use for.

    Args:
        text_length: tokens that T5 sees of a caption; None: as many as its tokenizer says, at most the pipeline's
            default (FLUX: 512, Stable Diffusion 3: 256).
        pipeline_class: of pipelines that diffusers does not know (`FOREIGN`, or those of a `kind` of one's own).
        image_encoder: name or folder of one, in the place of the pipeline's own.
        kind: in the place of the one that `KINDS` has for the pipeline's class.
        options: what the kind is made with beside the pipeline.

    Raises:
        ValueError: not a pipeline that can be trained; the message lists those that can. Or an option that it has no
            use for, or one that it lacks.
        OSError: nothing is there, only pickles are, or no network; diffusers' message says what was looked for.
    """
    from diffusers import DiffusionPipeline

    name_or_path = bundled.resolve(name_or_path)
    found = {key: value for key, value in {"revision": revision, "variant": variant}.items() if value is not None}
    config = DiffusionPipeline.load_config(name_or_path, **{k: v for k, v in found.items() if k == "revision"})
    name = config.get("_class_name")
    custom = kind is not None
    if custom and not (isinstance(kind, type) and issubclass(kind, Kind)):
        raise ValueError(f"model.kind: expected a subclass of linattn.distill.pipelines.Kind, got {kind!r}")
    kind = kind or KINDS.get(name)
    if kind is None:
        raise ValueError(
            f"model.pretrained: expected a pipeline of one of {', '.join(KINDS)}; {name_or_path!r} is a {name} "
            "(model.kind names a class of your own)"
        )
    if name in FOREIGN and (pipeline_class is None or pipeline_class.__name__ != name):
        given = "null" if pipeline_class is None else repr(pipeline_class.__name__)
        raise ValueError(f"model.pipeline: expected the import path of {name} for {name_or_path!r}, got {given}")
    if text_length is not None and not kind.chooses_text_length:
        raise ValueError(
            f"model.text_length: expected null for a {name}, whose text encoder has one length; got {text_length}"
        )
    without = {part: None for part in kind.unused if part in config}
    if "safety_checker" in config:
        without["requires_safety_checker"] = False
    loader = pipeline_class if name in FOREIGN or (custom and pipeline_class) else DiffusionPipeline
    from ...schedulers import PeRFlowScheduler  # noqa: F401 (pipelines saved with it: diffusers imports nothing)

    with quiet_diffusers():  # it warns that the safety checker is off, which matters where pictures are served
        pipeline = loader.from_pretrained(name_or_path, use_safetensors=True, **without, **found)
    if image_encoder is not None:
        _give_image_encoder(pipeline, kind, image_encoder)
    models = _made(kind, pipeline, options or {})
    models.text_length = text_length or models.text_length
    return models


def _made(kind: type[Kind], pipeline, options: Mapping[str, object]) -> Kind:
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in parameters]
        for name in options:
            if name not in known:
                expected = ", ".join(known) or "none"
                raise ValueError(f"model.options: expected options of {kind.__name__} ({expected}), got {name!r}")
    return kind(pipeline, **options)


def fresh(pipeline_class: type, config: Mapping[str, object], *, image_encoder: str | None = None) -> Kind:
    """A pipeline whose network has the weights that training starts from: random ones, of torch's own generator.

    Args:
        pipeline_class: of one of the `FOREIGN` kinds; its annotations say of which classes its parts are.
        config: what the class of the network is called with.
        image_encoder: name or folder of one.

    Raises:
        ValueError: another class, or a config that the class of the network refuses.
    """
    kind = KINDS.get(pipeline_class.__name__)
    if pipeline_class.__name__ not in FOREIGN or kind is None:
        raise ValueError(
            f"model.config: expected model.pipeline to be one of {', '.join(FOREIGN)} beside it, got "
            f"{pipeline_class.__name__!r}"
        )
    parts = typing.get_type_hints(pipeline_class.__init__)
    try:
        network = parts[kind.component](**config)
    except (TypeError, ValueError) as error:  # an option that it does not know, or sizes that do not fit together
        raise ValueError(f"model.config: {error}") from error
    pipeline = pipeline_class(**{kind.component: network, "scheduler": parts["scheduler"]()})
    if image_encoder is not None:
        _give_image_encoder(pipeline, kind, image_encoder)
    return kind(pipeline)


def _give_image_encoder(pipeline, kind: type[Kind], name_or_path: str) -> None:
    if "image_encoder" in kind.unused or "image_encoder" not in pipeline.components:
        raise ValueError(f"model.image_encoder: expected null for a {type(pipeline).__name__}, got {name_or_path!r}")
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(name_or_path, use_safetensors=True)
    pipeline.register_modules(image_encoder=encoder)
