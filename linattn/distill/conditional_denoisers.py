"""`Denoiser`s of models that see more than a caption: pictures beside the noise, vectors, an adapter's features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ConditionalUNetDenoiser(nn.Module):
    """diffusers' UNet2DConditionModel with everything that its conditions may be, as a `Denoiser`.

    condition, of which only the first is needed:

        encoder_hidden_states            (B, L, C)
        concat                           (B, k, h, w): channels behind those of the noisy sample
        class_labels                     (B,) whole numbers or (B, V), as the UNet's class_embed_type wants them
        text_embeds, time_ids, image_embeds   (B, ...): the UNet's added_cond_kwargs
        residual_0, residual_1, ...      (B, c_i, h_i, w_i): a T2I-Adapter's features, added inside the down blocks
    """

    ADDED = ("text_embeds", "time_ids", "image_embeds")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        noisy = noisy.to(text.dtype)  # the UNet computes in the type of its input
        if "concat" in condition:
            noisy = _joined(noisy, condition["concat"])
        labels = condition.get("class_labels")
        if labels is not None and labels.is_floating_point():
            labels = labels.to(text.dtype)
        return self.model(
            noisy,
            timesteps,
            text,
            class_labels=labels,
            added_cond_kwargs={name: condition[name] for name in self.ADDED if name in condition} or None,
            down_intrablock_additional_residuals=_residuals(condition, text) or None,
            return_dict=False,
        )[0]


def _joined(noisy: Tensor, concat: Tensor) -> Tensor:
    if concat.shape[2:] != noisy.shape[2:]:
        raise ValueError(
            f"concat must have the sides of the noisy sample, {tuple(noisy.shape[2:])}, got {tuple(concat.shape)}"
        )
    return torch.cat([noisy, concat.to(noisy)], dim=1)


def _residuals(condition: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
    """A new list for each call: the UNet empties it."""
    count = sum(name.startswith("residual_") for name in condition)
    return [condition[f"residual_{i}"].to(like) for i in range(count)]


class PixArtDenoiser(nn.Module):
    """diffusers' PixArtTransformer2DModel as a `Denoiser`: of what it says the noise, not the variance beside it.

    condition: "encoder_hidden_states" (B, L, C) of T5 and "encoder_attention_mask" (B, L), 1 where there is text; where
    the model is told the size "resolution" (B, 2), height and width in pixels, and "aspect_ratio" (B, 1), the one by
    the other.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        said = self.model(
            noisy.to(text.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=condition["encoder_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={name: condition.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return said[:, : noisy.shape[1]]
