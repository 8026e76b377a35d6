"""Pipelines that are shown a picture beside the caption: inpainting, upscaling, edges. They are teachers.

In training the picture is the one that the sample is of, with something taken from it: a part, its details, or all but
its edges.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditional_denoisers import ConditionalUNetDenoiser
from ..data.edges import canny
from ..data.masks import WHOLE, random_mask
from ..data.pictures import prepare_image
from ..denoiser import Denoiser
from ..noise import _stream
from ..noise_process import NoiseProcess
from ..objectives.flash import sampling_timesteps, unconditional
from .text_to_image import StableDiffusion, StableDiffusionXL

#: Which part of a sample's random numbers its picture condition is made of.
PART = 4


def streams(numbers: Sequence[int], seed: int) -> list[np.random.Generator]:
    """The random numbers of each sample that its picture condition may use."""
    return [_stream(seed, number, part=PART) for number in numbers]


def normal(own: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, standard normal, each row of its sample's own."""
    return torch.stack([torch.from_numpy(stream.standard_normal(tuple(shape), np.float32)) for stream in own])


class PictureConditioned(StableDiffusion):
    """What kinds that are shown a picture have in common; a base for one's own.

    `picture_condition` has to be written, and `policies` where it adds entries that have none yet; the entries are
    those of `ConditionalUNetDenoiser`, or of another that `denoiser` returns. Beside `StableDiffusionXL` it is named
    first: `class Mine(PictureConditioned, StableDiffusionXL)`.
    """

    objectives = ("perflow", "flash")
    needs_pixels = True

    def denoiser(self, model: nn.Module) -> Denoiser:
        return ConditionalUNetDenoiser(model)

    def shown_condition(self, pixels: Tensor, before: Tensor, seed: int) -> dict[str, Tensor]:
        """The `picture_condition` where a picture is drawn and not trained on.

        Args:
            pixels: (1, 3, H, W) in -1..1.
            before: the picture that stands before it in the list, (1, 3, H, W), for kinds that are shown two; itself,
                where it is alone.
        """
        return self.picture_condition(pixels, [0], seed)

    def few_step_arguments(self, steps: int, grid_steps: int) -> dict[str, object]:
        """As `linattn.schedulers.few_step_arguments` for the pipeline, whose call may take no timesteps; `draw` does.

        Raises:
            ValueError: steps out of range.
        """
        return {"timesteps": sampling_timesteps(self.process().grid(grid_steps), steps).tolist()}

    @torch.no_grad()
    def draw(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        height: int | None,
        width: int | None,
        seed: int,
        autocast: Callable,
        scheduler=None,
        arguments: Mapping[str, object] | None = None,
        pictures: Sequence = (),
    ) -> list:
        """One picture (PIL) per prompt, each from the same seed, by the scheduler's steps.

        Args:
            pictures: (PIL) that the model is shown: of the first prompt, of the second, ... and again from the first.
            scheduler: in the place of the pipeline's own; None: that.
            arguments: of a pipeline's call, those that a sampler has: timesteps, sigmas, num_inference_steps,
                guidance_scale.
            autocast: function that returns the context in which the model runs; the VAE decodes outside of it.

        Raises:
            ValueError: no pictures; another argument.
        """
        if not pictures:
            raise ValueError(
                f"output.validation.images: expected pictures to show to a {type(self).__name__} beside the prompts, "
                "got none"
            )
        arguments = {"num_inference_steps": steps, "guidance_scale": guidance, **(arguments or {})}
        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        size = height or side, width or side
        shown = [prepare_image(picture, size, resize="crop")[0][None] for picture in pictures]
        sizes = torch.tensor([size])
        drawn = []
        for place, prompt in enumerate(prompts):
            pixels, before = (shown[(place + back) % len(shown)] for back in (0, -1))
            condition = self.encode_text([prompt]) | self.encode_sizes(sizes, torch.zeros_like(sizes), sizes)
            condition |= self.shown_condition(pixels, before, seed)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(self._latent_shape(size), generator=generator).to(self._device)
            with autocast():
                latents = self._walk(
                    model, noise, condition, scheduler or self.pipeline.scheduler, generator, arguments
                )
            drawn += self.pipeline.image_processor.postprocess(self.decode(latents))
        return drawn

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return 1, self.pipeline.vae.config.latent_channels, size[0] // factor, size[1] // factor

    def _absent(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What takes the condition's place where the model is guided away from nothing."""
        empty = self.encode_text([""])
        policies = self.policies()
        return unconditional(
            condition, {name: empty[name] if policy == "empty" else policy for name, policy in policies.items()}
        )

    def _walk(self, model, noise: Tensor, condition, scheduler, generator, arguments: Mapping[str, object]) -> Tensor:
        """From noise to latents by the steps of a diffusers scheduler."""
        known = ("num_inference_steps", "guidance_scale", "timesteps", "sigmas")
        if other := sorted(set(arguments) - set(known)):
            raise ValueError(f"arguments must be among {', '.join(known)}, got {', '.join(other)}")
        denoiser, guidance = self.denoiser(model), arguments["guidance_scale"]
        absent = self._absent(condition) if guidance > 1 else None
        given = {name: arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None}
        scheduler.set_timesteps(**(given or {"num_inference_steps": arguments["num_inference_steps"]}))
        draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        sample = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(sample, t)
            timesteps = t.to(noise.device).expand(len(noise))
            said = denoiser(noisy, timesteps, condition).to(sample.dtype)
            if absent is not None:
                without = denoiser(noisy, timesteps, absent).to(sample.dtype)
                said = without + guidance * (said - without)
            sample = scheduler.step(said, t, sample, **draws).prev_sample
        return sample


class StableDiffusionInpainting(PictureConditioned):
    """Stable Diffusion's inpainting models: a UNet that sees a mask, 1 where something is to be painted, and the
    latents of the picture without that.

    In training the mask is `linattn.distill.data.masks.random_mask`.

    Args:
        whole: share of masks that cover the picture.

    Raises:
        ValueError: a UNet with another number of input channels.
    """

    def __init__(self, pipeline, *, whole: float = WHOLE):
        super().__init__(pipeline)
        if not 0 <= whole <= 1:
            raise ValueError(f"model.options.whole: expected a number from 0 to 1, got {whole}")
        self.whole = whole
        expect_channels(self, 1 + pipeline.vae.config.latent_channels, "a mask and the latents of the masked picture")

    def policies(self) -> dict[str, str]:
        return super().policies() | {"concat": "keep"}

    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        own = streams(numbers, seed)
        return {"concat": self.masked(pixels, [self.mask(pixels.shape[2:], stream) for stream in own], own)}

    def mask(self, size: tuple[int, int], stream: np.random.Generator) -> np.ndarray:
        """(1, H, W) float32, by the random numbers of a sample."""
        return random_mask(size, stream, whole=self.whole)

    def shown_condition(self, pixels: Tensor, before: Tensor, seed: int) -> dict[str, Tensor]:
        # Without the middle of the picture, half as high and half as wide.
        height, width = pixels.shape[2:]
        mask = np.zeros((1, height, width), np.float32)
        mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
        return {"concat": self.masked(pixels, [mask], streams([0], seed))}

    @torch.no_grad()
    def masked(self, pixels: Tensor, masks: Sequence[np.ndarray], own: Sequence[np.random.Generator]) -> Tensor:
        """(B, 1 + c, h, w): masks (each (1, H, W)) at the size of the latents, and latents of what they leave.

        The sample of the VAE's posterior is by the samples' own random numbers.
        """
        mask = torch.stack([torch.from_numpy(one) for one in masks]).to(pixels.device)
        mean, std = self.encode_image(pixels * (mask < 0.5))
        kept = self.latents(mean, std, normal(own, mean.shape[1:]).to(mean.device))
        return torch.cat([F.interpolate(mask, mean.shape[2:]).to(kept), kept], dim=1)


class StableDiffusionUpscaler(PictureConditioned):
    """Stable Diffusion's x4 upscaler: a UNet that sees the small picture, noised, beside latents of its size, and is
    told how much noise that has.

    In training the picture is reduced (bicubic, smoothed) and noised to a level of 0 to `noise_level`, each equally
    often.

    Args:
        noise_level: the highest; None: as high as the pipeline allows.

    Raises:
        ValueError: a UNet with another number of input channels; a noise level that the pipeline does not have.
    """

    #: Of validation pictures: the default of the pipeline.
    SHOWN_LEVEL = 20
    unused = (*StableDiffusion.unused, "watermarker")

    def __init__(self, pipeline, *, noise_level: int | None = None):
        super().__init__(pipeline)
        most = pipeline.config.max_noise_level
        self.noise_level = most if noise_level is None else noise_level
        if not 0 <= self.noise_level <= most:
            raise ValueError(f"model.options.noise_level: expected a number from 0 to {most}, got {noise_level}")
        self._low = NoiseProcess.from_scheduler(pipeline.low_res_scheduler)
        expect_channels(self, 3, "the small picture")

    @property
    def multiple(self) -> int:
        return 4 * self.pipeline.vae_scale_factor  # the pipeline wants small pictures of multiples of 4 pixels

    def policies(self) -> dict[str, str]:
        return super().policies() | {"concat": "keep", "class_labels": "keep"}

    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        own = streams(numbers, seed)
        return self.noised(pixels, [int(s.integers(0, self.noise_level, endpoint=True)) for s in own], own)

    def shown_condition(self, pixels: Tensor, before: Tensor, seed: int) -> dict[str, Tensor]:
        return self.noised(pixels, [min(self.SHOWN_LEVEL, self.noise_level)], streams([0], seed))

    def noised(self, pixels: Tensor, levels: Sequence[int], own: Sequence[np.random.Generator]) -> dict[str, Tensor]:
        """The condition of pictures (B, 3, H, W) that are reduced to their latents' size and noised to these levels."""
        factor = self.pipeline.vae_scale_factor
        size = [side // factor for side in pixels.shape[2:]]
        small = F.interpolate(pixels.to(self._device), size, mode="bicubic", antialias=True).clamp(-1, 1)
        levels = torch.tensor(levels, device=small.device)
        noise = normal(own, small.shape[1:]).to(small.device)
        return {"concat": self._low.add_noise(small, noise, levels), "class_labels": levels}


class StableDiffusionXLAdapter(PictureConditioned, StableDiffusionXL):
    """SDXL with a T2I-Adapter for edges: a small network sees the edges of the picture, once, and the UNet's down
    blocks add its features to theirs at every step.

    The adapter is frozen, and the same for teacher and student.

    Args:
        adapter: name or folder of a T2IAdapter; None: the pipeline's own.
        scale: factor of the features (`adapter_conditioning_scale` of the pipeline's call).
        low, high: thresholds of `linattn.distill.data.edges.canny`.

    Raises:
        ValueError: no adapter, or several in one; low above high.
    """

    def __init__(
        self, pipeline, *, adapter: str | None = None, scale: float = 0.8, low: float = 100.0, high: float = 200.0
    ):
        from diffusers import MultiAdapter, StableDiffusionXLAdapterPipeline, T2IAdapter

        if adapter is not None:
            own = T2IAdapter.from_pretrained(adapter, use_safetensors=True)
            pipeline = StableDiffusionXLAdapterPipeline.from_pipe(pipeline, adapter=own)
        found = getattr(pipeline, "adapter", None)
        if found is None:
            raise ValueError(
                "model.options.adapter: expected the name or folder of a T2IAdapter beside a "
                f"{type(pipeline).__name__}, got null"
            )
        if isinstance(found, MultiAdapter):
            raise ValueError("model.pretrained: expected a pipeline with one T2IAdapter, got a MultiAdapter")
        if not 0 <= low <= high:
            raise ValueError(f"model.options: expected 0 <= low <= high, got {low=}, {high=}")
        super().__init__(pipeline)
        self.scale, self.low, self.high = scale, low, high

    @property
    def multiple(self) -> int:
        return math.lcm(8, self.pipeline.adapter.total_downscale_factor)

    def policies(self) -> dict[str, str]:
        features = len(self.pipeline.adapter.adapter.body)
        return super().policies() | {f"residual_{i}": "keep" for i in range(features)}

    def edges(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, 1, H, W), 1 on edges."""
        pictures = ((pixels.cpu() + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        return torch.stack([torch.from_numpy(canny(picture, self.low, self.high))[None] for picture in pictures])

    @torch.no_grad()
    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        adapter = self.pipeline.adapter
        edges = self.edges(pixels).expand(-1, adapter.config.in_channels, -1, -1)
        features = adapter(edges.to(self._device, adapter.dtype))
        return {f"residual_{i}": self.scale * feature for i, feature in enumerate(features)}


def expect_channels(models: StableDiffusion, extra: int, what: str) -> None:
    """Refuse a UNet that does not see so many channels beside the latents.

    Raises:
        ValueError: it sees more, or fewer.
    """
    latents, config = models.pipeline.vae.config.latent_channels, models.model.config
    if config.in_channels != latents + extra:
        raise ValueError(
            f"model.pretrained: expected a UNet with {latents + extra} input channels (latents, {what}) for "
            f"{type(models).__name__}, got {config.in_channels}"
        )
