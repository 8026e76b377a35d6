"""Pipelines that draw from captions: they are teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...evaluate import call_arguments
from ...schedulers import few_step_arguments
from ..conditional_denoisers import PixArtDenoiser
from ..denoiser import Denoiser, FluxDenoiser, SD3Denoiser, UNetDenoiser, unpack
from ..noise import DiscreteSchedule, FlowSchedule, NoiseSchedule
from ..noise_process import NoiseProcess
from .kind import Kind, move


class StableDiffusion(Kind):
    """Stable Diffusion 1.x and 2.x: UNet, one CLIP text encoder, VAE."""

    component = "unet"
    objectives = ("attention", "perflow", "flash")
    multiple = 8
    unused = ("safety_checker", "feature_extractor", "image_encoder")

    def schedule(self) -> NoiseSchedule:
        return DiscreteSchedule(self.pipeline.scheduler)

    def process(self, shift: float | None = None) -> NoiseProcess:
        """The process that the model was trained on.

        Args:
            shift: of flow matching; None: as the pipeline's scheduler shifts.

        Raises:
            ValueError: as `NoiseProcess.from_scheduler`; so without a shift where that depends on the picture's size.
        """
        return NoiseProcess.from_scheduler(self.pipeline.scheduler, shift=shift)

    def denoiser(self, model: nn.Module) -> Denoiser:
        return UNetDenoiser(model)

    def few_step_arguments(self, steps: int, grid_steps: int) -> dict[str, object]:
        """`arguments` of `draw` for a student of few steps, by `linattn.schedulers.few_step_arguments`."""
        return few_step_arguments(self.pipeline, steps, grid_steps=grid_steps)

    def feature_modules(self) -> tuple[str, ...]:
        """Modules of the network whose outputs a discriminator looks at; none: it looks at the prediction."""
        return ("mid_block",)

    def policies(self) -> dict[str, str]:
        """What takes the place of each entry of the condition where there is none.

        "empty": that entry of the encoded empty caption. "zero". "keep": the entry itself, which is no prompt.
        """
        return {"encoder_hidden_states": "empty"}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything frozen to the device, in the type that it computes in.

        The VAE stays in float32 unless its config says that 16 bits are enough (`force_upcast: false`).
        """
        vae = self.pipeline.vae
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                wide = part is vae and vae.config.get("force_upcast", False)
                move(part, device, torch.float32 if wide else dtype)

    @property
    def _device(self) -> torch.device:
        return self.pipeline.vae.device

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The part of a denoiser's condition that comes from the captions, one row each."""
        embeds = self.pipeline.encode_prompt(list(captions), self._device, 1, do_classifier_free_guidance=False)[0]
        return {"encoder_hidden_states": embeds}

    def encode_sizes(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The part that says where the pixels come from; each argument (B, 2), (height, width) or (top, left)."""
        return {}

    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        """The part that is made of the pictures themselves (`needs_pixels`).

        Args:
            pixels: (B, 3, H, W) in -1..1.
            numbers: the samples' running numbers. What is random about the result depends on them and the seed alone.
        """
        return {}

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior: (B, 3, H, W) in -1..1 -> twice (B, c, h, w), float32."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(device=self._device, dtype=vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, at the scale of the diffusion model."""
        return (mean + std * noise - self._shift) * self.pipeline.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents at the scale of the diffusion model -> pictures (B, 3, H, W), about -1..1, with gradients."""
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + self._shift).sample.float()

    @property
    def _shift(self) -> float:
        return self.pipeline.vae.config.get("shift_factor", None) or 0.0

    @torch.no_grad()
    def draw(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        *,
        steps,
        guidance,
        height,
        width,
        seed,
        autocast,
        scheduler=None,
        arguments: Mapping[str, object] | None = None,
    ) -> list:
        """One picture (PIL) per prompt by `model` in the place of the pipeline's own, each from the same seed.

        Args:
            scheduler: in the place of the pipeline's own; None: that.
            autocast: function that returns the context in which the model runs; the VAE decodes outside of it.
            arguments: more of the pipeline's call, such as timesteps; where it has one already, in its place.
        """
        pictures = []
        with self._with(model, scheduler):
            for prompt in prompts:
                options = {
                    "num_inference_steps": steps,
                    "height": height,
                    "width": width,
                    "generator": torch.Generator().manual_seed(seed),
                    **self._call_arguments(guidance),
                    **(arguments or {}),
                }
                with autocast():
                    latents = self._sample(prompt, **options)
                pictures += self.pipeline.image_processor.postprocess(self.decode(latents))
        return pictures

    def _sample(self, prompt: str, **options) -> Tensor:
        """Latents (1, c, h, w) of a picture that the pipeline draws."""
        return self.pipeline([prompt], output_type="latent", **options).images

    def _call_arguments(self, guidance: float) -> dict:
        lengths = {} if self.text_length is None else {"max_sequence_length": self.text_length}
        return call_arguments(self.pipeline, 1, guidance) | lengths

    def save_lora(self, folder, layers: dict[str, Tensor], settings: dict) -> None:
        """Write LoRA weights in the layout that `pipeline.load_lora_weights` reads.

        Args:
            settings: of the LoraConfig, kept in the file's metadata.
        """
        parts = {f"{self.component}_lora_layers": layers, f"{self.component}_lora_adapter_metadata": settings}
        type(self.pipeline).save_lora_weights(folder, **parts)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and the sizes as a condition."""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self._device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def encode_sizes(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"time_ids": torch.cat([original, crop, target], dim=1).to(self._device, self.model.dtype)}

    def policies(self) -> dict[str, str]:
        # As the pipeline guides without a negative prompt; sizes are no prompt.
        text = "zero" if self.pipeline.config.get("force_zeros_for_empty_prompt", True) else "empty"
        return {"encoder_hidden_states": text, "text_embeds": text, "time_ids": "keep"}


class _FlowTransformer(StableDiffusion):
    """What FLUX and Stable Diffusion 3 have in common: a transformer, flow matching, T5 beside CLIP."""

    component = "transformer"
    objectives = ("flow_attention", "perflow", "flash")
    chooses_text_length = True

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.text_length = call_arguments(pipeline, 1, 1.0)["max_sequence_length"]

    def schedule(self, **options) -> NoiseSchedule:
        """The flow matching schedule; options: see `FlowSchedule`."""
        return FlowSchedule(self.pipeline.scheduler, **options)

    def feature_modules(self) -> tuple[str, ...]:
        return ()

    def policies(self) -> dict[str, str]:
        return {"encoder_hidden_states": "empty", "pooled_projections": "empty"}

    def compared_modules(self, interval: int) -> tuple[str, ...]:
        """Names of the attention modules whose outputs student and teacher are compared by.

        Args:
            interval: every how many blocks.

        Raises:
            ValueError: there is no such module.
        """
        names = tuple(self._compared_modules(interval))
        if not names:
            raise ValueError(
                f"objective.feature_interval: {interval} leaves no attention module of this model to compare; choose a "
                "smaller one, or set objective.weights.feature to 0"
            )
        return names

    def _compared_modules(self, interval: int) -> Iterator[str]:
        raise NotImplementedError


class Flux(_FlowTransformer):
    """FLUX.1 (dev, schnell): double and single blocks, CLIP's pooled embedding, T5's tokens, latents packed 2 x 2."""

    @property
    def multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def denoiser(self, model: nn.Module, guidance: float = 3.5) -> Denoiser:
        return FluxDenoiser(model, guidance=guidance, num_timesteps=self.pipeline.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self._device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _compared_modules(self, interval: int) -> Iterator[str]:
        # As CLEAR's training has it: counted over all blocks, the double ones first, and of the single ones only (whose
        # attention has no output projection, so these are raw outputs of text and image together).
        double = len(self.model.transformer_blocks)
        for place in range(len(self.model.single_transformer_blocks)):
            if (double + place) % interval == 0:
                yield f"single_transformer_blocks.{place}.attn"

    def _sample(self, prompt: str, *, height, width, **options) -> Tensor:
        pipeline = self.pipeline
        height, width = (side or pipeline.default_sample_size * pipeline.vae_scale_factor for side in (height, width))
        tokens = super()._sample(prompt, height=height, width=width, **options)
        return unpack(tokens, height // self.multiple, width // self.multiple)


class StableDiffusion3(_FlowTransformer):
    """Stable Diffusion 3 and 3.5: joint blocks, two CLIP encoders, and T5 where it is loaded."""

    @property
    def multiple(self) -> int:
        return self.model.config.patch_size * self.pipeline.vae_scale_factor

    def denoiser(self, model: nn.Module, guidance: float | None = None) -> Denoiser:
        """Guidance is ignored: no Stable Diffusion 3 is told one."""
        return SD3Denoiser(model)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _compared_modules(self, interval: int) -> Iterator[str]:
        # The authors of CLEAR have not published how they train SD3; this is ours. All blocks are joint ones, so all
        # count, with every attention that is replaced in them; but for the last, whose text output nobody reads.
        for place, block in enumerate(self.model.transformer_blocks):
            if place % interval == 0 and not block.context_pre_only:
                yield f"transformer_blocks.{place}.attn"
                if block.attn2 is not None:
                    yield f"transformer_blocks.{place}.attn2"


class PixArt(StableDiffusion):
    """PixArt-alpha and PixArt-Sigma: a transformer that predicts noise, T5 alone with its attention mask, and in the
    larger alpha models the size of the picture.

    Captions go to T5 in lower case, as the pipelines have them; not cleaned of links and markup, which the pipelines do
    where two more packages are installed. LoRA weights are written for peft's `PeftModel.from_pretrained`: the
    pipelines read none.
    """

    component = "transformer"
    objectives = ("perflow", "flash")
    chooses_text_length = True

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.text_length = call_arguments(pipeline, 1, 1.0)["max_sequence_length"]

    @property
    def multiple(self) -> int:
        return self.model.config.patch_size * self.pipeline.vae_scale_factor

    @property
    def _told_sizes(self) -> bool:
        return self.model.use_additional_conditions

    def denoiser(self, model: nn.Module) -> Denoiser:
        return PixArtDenoiser(model)

    def feature_modules(self) -> tuple[str, ...]:
        return ()

    def policies(self) -> dict[str, str]:
        sizes = {"resolution": "keep", "aspect_ratio": "keep"} if self._told_sizes else {}
        return {"encoder_hidden_states": "empty", "encoder_attention_mask": "empty"} | sizes

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=self._device,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def encode_sizes(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not self._told_sizes:
            return {}
        target = target.to(self._device, torch.float32)
        return {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}

    def _call_arguments(self, guidance: float) -> dict:
        # The sizes that were asked for, whether or not they are among those that the model was trained at.
        return super()._call_arguments(guidance) | {"use_resolution_binning": False, "clean_caption": False}

    def save_lora(self, folder, layers: dict[str, Tensor], settings: dict) -> None:
        from peft import LoraConfig
        from safetensors.torch import save_file

        LoraConfig(**settings).save_pretrained(folder)
        layers = {f"base_model.model.{name}": value.contiguous() for name, value in layers.items()}
        save_file(layers, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
