"""Face swapping: an example of a kind of one's own, which a recipe names.

model:
  pretrained: FOLDER
  kind: linattn.distill.pipelines.face_swap:FaceSwap
  options: {identity: openai/clip-vit-large-patch14}
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.masks import ellipse_mask
from .kind import move
from .picture_conditioned import StableDiffusionInpainting, streams


class FaceSwap(StableDiffusionInpainting):
    """A UNet that paints a face into a picture from which it is taken, whose it is told by a vector.

        input channels    the noisy latents, a mask, and latents of the picture without what is masked (as inpainting)
        class_labels      (B, V), the vector of a frozen identity encoder; `class_embed_type` of the UNet is
                          "projection" or "simple_projection"

    A Stable Diffusion folder with such a UNet. In training vector and picture are of one photograph, of which the
    encoder sees every other mirrored; an ellipse about the middle is masked, as portraits are cut.

    Args:
        identity: what maps pictures (B, 3, H, W) in -1..1 to vectors (B, V), a Module; or the name or folder of a
            CLIPVisionModelWithProjection, which then is the pipeline's image encoder and is saved with it; None: that.

    Raises:
        ValueError: a UNet with other inputs; no identity encoder, or one whose vectors have another length.
    """

    unused = tuple(name for name in StableDiffusionInpainting.unused if name != "image_encoder")

    def __init__(self, pipeline, *, identity: str | nn.Module | None = None):
        super().__init__(pipeline)
        if isinstance(identity, str):
            from transformers import CLIPVisionModelWithProjection

            pipeline.register_modules(
                image_encoder=CLIPVisionModelWithProjection.from_pretrained(identity, use_safetensors=True)
            )
            identity = None
        encoder = pipeline.components.get("image_encoder")
        if identity is None and encoder is None:
            raise ValueError(
                "model.options.identity: expected the name or folder of a CLIPVisionModelWithProjection (the pipeline "
                "has no image_encoder), got null"
            )
        self.identity = (ClipVector(encoder) if identity is None else identity).requires_grad_(False).eval()
        config = self.model.config
        if config.class_embed_type not in ("projection", "simple_projection"):
            raise ValueError(
                "model.pretrained: expected a UNet whose class_embed_type is projection or simple_projection, got "
                f"{config.class_embed_type!r}"
            )
        wanted, made = config.projection_class_embeddings_input_dim, getattr(self.identity, "dim", None)
        if made is not None and made != wanted:
            raise ValueError(
                f"model.options.identity: expected vectors of {wanted} numbers (the UNet's "
                f"projection_class_embeddings_input_dim), got {made}"
            )

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        super().place(device, dtype)
        move(self.identity, device, torch.float32)

    def policies(self) -> dict[str, str]:
        return super().policies() | {"class_labels": "zero"}

    def mask(self, size: tuple[int, int], stream: np.random.Generator) -> np.ndarray:
        return ellipse_mask(size, stream)

    @torch.no_grad()
    def picture_condition(self, pixels: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        own = streams(numbers, seed)
        mirrored = torch.tensor([bool(stream.random() < 0.5) for stream in own], device=pixels.device)
        seen = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        masks = [self.mask(pixels.shape[2:], stream) for stream in own]
        return {"concat": self.masked(pixels, masks, own), "class_labels": self.vectors(seen)}

    @torch.no_grad()
    def shown_condition(self, pixels: Tensor, before: Tensor, seed: int) -> dict[str, Tensor]:
        """The face of the picture before in the place of this one's."""
        own = streams([0], seed)
        return {
            "concat": self.masked(pixels, [self.mask(pixels.shape[2:], own[0])], own),
            "class_labels": self.vectors(before),
        }

    def vectors(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, V), float32."""
        with torch.autocast(self._device.type, enabled=False):
            return self.identity(pixels.to(self._device, torch.float32))


class ClipVector(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 to the vectors (B, V) of a CLIPVisionModelWithProjection."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.config.projection_dim

    def forward(self, pixels: Tensor) -> Tensor:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        side = self.encoder.config.image_size
        pictures = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return self.encoder((pictures - mean) / std).image_embeds
