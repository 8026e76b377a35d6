"""Pictures beyond the size that a model was trained for: one at its own size, then SDEdit at larger ones.

A model that is asked for four times its size at once repeats the scene, since it composes a picture at the very first
steps. SDEdit leaves the composition to a small picture and lets the model draw the detail: with z the latents of the
enlarged small picture and noise e,

    x = (1 - s) z + s e        flow matching (FLUX, SD3)
    x = sqrt(a) z + sqrt(1 - a) e        others

at the noise level that a share `strength` of the steps starts from, and these steps are denoised as ever. Several
stages in a row enlarge by and by.

The work of the last stages is nearly all attention, and there the attention is exchanged: the first picture is drawn
with the model's own, the stages with an adapter such as CLEAR and its settings for high resolution.

Sources: Meng et al., *SDEdit* (arXiv 2108.01073); Liu et al., *CLEAR* (arXiv 2412.16112).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: What the authors of CLEAR draw with. The shift is also that of FLUX.1-dev and SD3.
SHIFT, NTK_FACTOR = 3.0, 10.0

# Options that are arguments here, or come from the stages.
_RESERVED = {"image", "strength", "latents", "height", "width", "generator", "output_type", "num_inference_steps"}
_RESERVED |= {"return_dict"}


@dataclass(frozen=True)
class Stage:
    """One enlargement.

    Args:
        height, width: of its pictures, in pixels.
        strength: how much is drawn anew, above 0 to 1: the share of the steps that is done, from noise of that level.
        num_inference_steps: of which this share is done; None: those of the first picture.
        guidance_scale: None: that of the first picture.
        shift: static shift of the noise levels, sigma -> shift sigma / (1 + (shift - 1) sigma), instead of one that
            depends on the size. "auto": 3 where the scheduler has one, else nothing is changed; None: the pipeline's
            scheduler as it is.
        ntk_factor, proportional_attention: handed to ``attention.high_resolution``. ntk_factor stretches rotary
            positions; None: 10 where the model has them, else nothing. Without an attention, or where it has no such
            method, neither does anything.
        seed: noise of a generator of its own; None: that of the call is drawn on from.
        options: for the pipeline's call of this stage, over those of all calls: another `prompt`, `true_cfg_scale` ...
    """

    height: int
    width: int
    strength: float = 0.7
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | str | None = "auto"
    ntk_factor: float | None = None
    proportional_attention: bool = True
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class HighResolution:
    """What :func:`high_resolution` gives: `images` as the pipeline's output has them, and for every stage the pictures
    (PIL, of the size before) that it was given; latents for the first, if that is what the call was given.
    """

    images: Any
    before: list


def high_resolution(
    pipe,
    prompt: str | list[str] | None = None,
    *,
    stages: Sequence[Stage],
    height: int | None = None,
    width: int | None = None,
    image=None,
    attention=None,
    attention_in_base: bool = False,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    vae_tiling: bool = True,
    output_type: str = "pil",
    base_options: dict[str, Any] | None = None,
    **options,
) -> HighResolution:
    """Draw a picture and enlarge it by stages of SDEdit.

    Every stage resizes the pictures (bicubic), encodes them, adds noise of its strength and denoises, by the
    image-to-image pipeline of the same family made of the same modules: nothing is loaded or copied.

    Args:
        pipe: a text-to-image pipeline of diffusers that has an image-to-image sibling (FLUX, SD3, Stable Diffusion, XL
            and others), or that sibling itself.
        prompt: as the pipeline takes it; or leave it out and give embeddings among the options.
        stages: the enlargements in their order, none smaller than what comes before it.
        height, width: of the first picture, in pixels [what the pipeline draws unasked].
        image: start from this instead of a first picture: a PIL image, a list of them, or latents of the first stage's
            size (scaled as the pipeline scales them).
        attention: an adapter for the stages, mounted or not: ``mount_to(model)``, ``unmount()``, ``mounted``, and where
            it has them ``high_resolution(...)``, a context manager, and ``set_grid(height, width)``. Afterwards it is
            as mounted as it was before, and its grid is found from each call.
        attention_in_base: draw the first picture with it, too (without its settings for high resolution).
        num_inference_steps, guidance_scale: of the first picture, and of stages that have none of their own [the
            pipeline's].
        generator: of all noise, in the order of the stages. One generator and its seed decide the whole result.
        vae_tiling: larger pictures than the VAE was trained for go through it in tiles. Put back afterwards.
        output_type: of the last stage, as the pipeline knows it.
        base_options: for the call of the first picture only, over those of all calls.
        options: for every call of a pipeline: `negative_prompt`, `prompt_embeds`, `max_sequence_length`,
            `callback_on_step_end` ...

    Raises:
        ValueError: a pipeline without an image-to-image sibling, a size that it cannot draw, a stage that is smaller
            than what comes before, a strength that leaves no step, an option that the stages decide. Before anything
            is drawn.
    """
    from PIL import Image

    stages = _checked_stages(stages)
    sibling = _sibling(pipe)
    base_options = base_options or {}
    for given in (options, base_options, *(stage.options for stage in stages)):
        if wrong := sorted(_RESERVED & set(given)):
            raise ValueError(f"{', '.join(wrong)}: given by arguments of their own or by the stages, not as options")
    if image is None:
        height, width = _checked_base(pipe, height, width)
        base = _text2image(pipe)
        _check_sizes(sibling, stages, (height, width), "the first picture")
        images = None
    else:
        if height is not None or width is not None or base_options:
            raise ValueError("height, width and base_options are those of a first picture, and image= replaces it")
        images = [image] if isinstance(image, Image.Image) else image
        _check_sizes(sibling, stages, _checked_image(sibling, images, stages[0]), "image")
    # Said in every call: text to image and image to image differ in what they do unasked.
    unasked = inspect.signature(type(base if image is None else pipe).__call__).parameters
    common = {"prompt": prompt, **options}
    for name, given in (("num_inference_steps", num_inference_steps), ("guidance_scale", guidance_scale)):
        common[name] = unasked[name].default if given is None else given
    for index, stage in enumerate(stages):
        _check_schedule(sibling, f"stages[{index}]", stage, common["num_inference_steps"])

    denoiser = _denoiser(pipe)
    before = []
    with _mounting_restored(attention, denoiser):
        if images is None:
            _set_mounted(attention, denoiser, attention_in_base)
            first = {"height": height, "width": width, "output_type": "pil", "generator": generator}
            with _grid_said(attention if attention_in_base else None, base, height, width):
                images = base(**{**common, **first, **base_options}).images
        _set_mounted(attention, denoiser, True)
        for index, stage in enumerate(stages):
            before.append(images)
            options = {**common, "output_type": output_type if index == len(stages) - 1 else "pil"}
            images = _draw_stage(sibling, stage, images, attention, generator, vae_tiling, options)
            pipe.maybe_free_model_hooks()  # under offloading the owner of the hooks must say when a picture is done
    return HighResolution(images, before)


def _draw_stage(pipe, stage: Stage, images, attention, generator, vae_tiling: bool, options: dict):
    """Resize, encode, add noise, denoise: one call of an image-to-image pipeline."""
    import torch

    if stage.seed is not None:
        generator = torch.Generator().manual_seed(stage.seed)
    options = {
        **options,
        **stage.options,
        "image": _resized(images, stage),
        "strength": stage.strength,
        "generator": generator,
    }
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(stage, name) is not None:
            options[name] = getattr(stage, name)
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        options |= {"height": stage.height, "width": stage.width}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_scheduler(pipe, stage))
        if vae_tiling:
            stack.enter_context(_tiling(getattr(pipe, "vae", None)))
        stack.enter_context(_grid_said(attention, pipe, stage.height, stage.width))
        if hasattr(attention, "high_resolution"):
            stack.enter_context(attention.high_resolution(**_settings(stage, _denoiser(pipe))))
        return pipe(**options).images


def _settings(stage: Stage, model) -> dict[str, float | bool]:
    """The stage's settings of the attention for this model."""
    ntk_factor = stage.ntk_factor
    if ntk_factor is None:
        ntk_factor = NTK_FACTOR if hasattr(getattr(model, "pos_embed", None), "theta") else 1.0
    return {"ntk_factor": ntk_factor, "proportional_attention": stage.proportional_attention}


def _resized(images, stage: Stage):
    """Pictures at the size of the stage, bicubic as by PIL; latents as they are."""
    from PIL import Image

    if not isinstance(images, list):
        return images
    size = (stage.width, stage.height)
    return [one if one.size == size else one.resize(size, Image.Resampling.BICUBIC) for one in images]


# ------------------------------------------------------------------------------------------- pipelines and their rules


def _sibling(pipe):
    """The image-to-image pipeline of the same modules, with a scheduler that is still the pipeline's own."""
    from diffusers import AutoPipelineForImage2Image

    name = type(pipe).__name__
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"pipe: {name} has no image-to-image pipeline in diffusers, which the stages need") from error
    if "strength" not in inspect.signature(type(sibling).__call__).parameters:
        raise ValueError(f"pipe: {type(sibling).__name__} has no strength: it edits pictures, it does not redraw them")
    sibling.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return sibling


def _text2image(pipe):
    from diffusers import AutoPipelineForText2Image

    if "strength" not in inspect.signature(type(pipe).__call__).parameters:
        return pipe
    base = AutoPipelineForText2Image.from_pipe(pipe)
    base.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return base


def _denoiser(pipe):
    return pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet


def size_rule(pipe) -> tuple[int, int | None]:
    """(multiple, largest): of what height and width of a pipeline's pictures must be multiples, and the largest that
    they may be (None: any), in pixels.

    One latent is `vae_scale_factor` pixels, and a token of a transformer 2 x 2 latents; pipelines with a UNet insist on
    multiples of 8 even where the VAE's factor is less. SD3 has a table of positions, and it ends somewhere.
    """
    factor = pipe.vae_scale_factor
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return math.lcm(8, factor), None
    multiple = max(pipe.image_processor.config.vae_scale_factor, factor * getattr(pipe, "patch_size", 1))
    tokens = transformer.config.get("pos_embed_max_size")
    return multiple, None if tokens is None else tokens * multiple


def _default_size(pipe) -> tuple[int, int]:
    sample = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


# --------------------------------------------------------------------------------------------------------------- checks


def _checked_stages(stages) -> list[Stage]:
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"stages: expected a list of one Stage or more, got {stages!r}")
    for index, stage in enumerate(stages):
        where = f"stages[{index}]"
        if not 0 < stage.strength <= 1:
            raise ValueError(f"{where}: strength must be above 0 and at most 1, got strength={stage.strength}")
        if stage.num_inference_steps is not None and stage.num_inference_steps < 1:
            raise ValueError(
                f"{where}: num_inference_steps must be 1 or more, got num_inference_steps={stage.num_inference_steps}"
            )
        if isinstance(stage.shift, str) and stage.shift != "auto":
            raise ValueError(f'{where}: shift must be a positive number, "auto" or None, got shift={stage.shift!r}')
        if isinstance(stage.shift, (int, float)) and not 0 < stage.shift < math.inf:
            raise ValueError(f"{where}: shift must be a positive number, got shift={stage.shift}")
    return list(stages)


def _checked_base(pipe, height: int | None, width: int | None) -> tuple[int, int]:
    default = _default_size(pipe)
    height, width = (own if given is None else given for given, own in zip((height, width), default, strict=True))
    _check_size(pipe, "the first picture", height, width)
    return height, width


def _checked_image(sibling, images, first: Stage) -> tuple[int, int]:
    """(height, width) of what the first stage is given."""
    import torch
    from PIL import Image

    if isinstance(images, torch.Tensor):
        channels, factor = sibling.vae.config.latent_channels, sibling.vae_scale_factor
        expected = (channels, first.height // factor, first.width // factor)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"image: a tensor must be latents of the first stage's size, (B, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}"
            )
        return first.height, first.width
    if not isinstance(images, list) or not images or not all(isinstance(one, Image.Image) for one in images):
        raise ValueError(f"image: expected a PIL image, a list of them, or latents, got {type(images).__name__}")
    sizes = sorted({one.size for one in images})
    if len(sizes) > 1:
        raise ValueError(f"image: expected pictures of one size, got {sizes}")
    return images[0].height, images[0].width


def _check_sizes(pipe, stages: list[Stage], before: tuple[int, int], name: str) -> None:
    for index, stage in enumerate(stages):
        where = f"stages[{index}]"
        _check_size(pipe, where, stage.height, stage.width)
        if stage.height < before[0] or stage.width < before[1]:
            raise ValueError(
                f"{where}: must not be smaller than {name}, which is height={before[0]}, width={before[1]}; got "
                f"height={stage.height}, width={stage.width}"
            )
        before, name = (stage.height, stage.width), where


def _check_size(pipe, where: str, height: int, width: int) -> None:
    multiple, largest = size_rule(pipe)
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % multiple:
            raise ValueError(
                f"{where}: {name} must be a multiple of {multiple} pixels with {type(pipe).__name__}, got {name}={side}"
            )
        if largest is not None and side > largest:
            raise ValueError(
                f"{where}: {name} must be at most {largest} pixels, where the model's table of positions ends, got "
                f"{name}={side}"
            )


def _check_schedule(sibling, where: str, stage: Stage, steps: int) -> None:
    steps = stage.num_inference_steps or steps
    if int(steps * stage.strength) < 1:
        raise ValueError(
            f"{where}: strength={stage.strength} of {steps} steps is less than one step: give "
            f"num_inference_steps={math.ceil(1 / stage.strength)} or more"
        )
    if isinstance(stage.shift, (int, float)) and "shift" not in sibling.scheduler.config:
        raise ValueError(f"{where}: {type(sibling.scheduler).__name__} has no shift to set, got shift={stage.shift}")


# --------------------------------------------------------------------------------------------- what is put back again


@contextlib.contextmanager
def _mounting_restored(attention, model) -> Iterator[None]:
    mounted = attention is not None and attention.mounted
    try:
        yield
    finally:
        _set_mounted(attention, model, mounted)


def _set_mounted(attention, model, wanted: bool) -> None:
    if attention is None or attention.mounted == wanted:
        return
    if wanted:
        attention.mount_to(model)
    else:
        attention.unmount()


@contextlib.contextmanager
def _grid_said(attention, pipe, height: int, width: int) -> Iterator[None]:
    """The size in tokens, said ahead to an attention that takes it: a compiled transformer cannot look for it."""
    if not hasattr(attention, "set_grid"):
        yield
        return
    multiple, _ = size_rule(pipe)
    attention.set_grid(height // multiple, width // multiple)
    try:
        yield
    finally:
        attention.set_grid()


@contextlib.contextmanager
def _scheduler(pipe, stage: Stage) -> Iterator[None]:
    """A scheduler with the stage's static shift; the one before is neither changed nor lost."""
    before, shift = pipe.scheduler, stage.shift
    if shift == "auto":
        shift = SHIFT if "shift" in before.config else None
    if shift is not None:
        pipe.scheduler = type(before).from_config(before.config, shift=shift, use_dynamic_shifting=False)
    try:
        yield
    finally:
        pipe.scheduler = before


@contextlib.contextmanager
def _tiling(vae) -> Iterator[None]:
    if getattr(vae, "use_tiling", None) is not False:  # on already, or nothing that has tiles
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
