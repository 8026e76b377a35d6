"""A discriminator for adversarial distillation: small heads on what a frozen network makes of a noised sample.

The network is the teacher, which knows pictures already; so the heads are small, and nothing else is trained. Each head
gives logits for parts of a picture, and none depends on its size.

Sources: Sauer et al. 2023, Adversarial Diffusion Distillation (arXiv 2311.17042), section 3 (heads on the features of a
frozen network); Chadebec et al. 2025, Flash Diffusion (arXiv 2406.02347), section 3.3 (those of the teacher itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, recorded_outputs

#: What stands in the place of a module's name for the teacher's prediction.
PREDICTION = "prediction"

_GROUPS = 4


class Discriminator(nn.Module):
    """Heads on features, one for each.

    Args:
        shapes: of the features by name, without the batch: (C, h, w) of pictures, (N, C) of tokens.
        width: channels of a head's first layer; each further one has twice as many, at a quarter of the pixels.
        levels: layers that reduce the sides of a picture by 2; fewer where the feature is smaller.

    Raises:
        ValueError: no feature; one that is neither; width that GroupNorm cannot divide.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, width: int = 64, levels: int = 2):
        super().__init__()
        if not shapes:
            raise ValueError("expected at least one feature, got none")
        if width < 1 or width % _GROUPS:
            raise ValueError(f"width must be a multiple of {_GROUPS}, got {width}")
        if levels < 0:
            raise ValueError(f"levels must be at least 0, got {levels}")
        self.names = tuple(shapes)
        self.heads = nn.ModuleList(_head(name, shape, width, levels) for name, shape in shapes.items())

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, L) of all heads: high where the features look like those of data.

        Args:
            features: by name, (B, C, h, w) or (B, N, C).
        """
        dtype = next(self.parameters()).dtype
        logits = [head(features[name].to(dtype)) for name, head in zip(self.names, self.heads, strict=True)]
        return torch.cat([part.flatten(1) for part in logits], dim=1)

    def judge(self, features: Mapping[str, Tensor]) -> Tensor:
        """`forward` whose gradient reaches the features and not the heads: for the model that is judged."""
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, fixed, (features,))


def _head(name: str, shape: Sequence[int], width: int, levels: int) -> nn.Module:
    if len(shape) == 2:
        return nn.Sequential(
            nn.Linear(shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
    if len(shape) != 3:
        raise ValueError(f"expected {name} to be (C, h, w) or (N, C), got {tuple(shape)}")
    channels, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
    for _ in range(levels):
        if side < 4:
            break
        layers += [
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, 2 * width),
            nn.SiLU(),
        ]
        width, side = 2 * width, side // 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))


def features_of(
    denoiser: Denoiser,
    names: Sequence[str],
    noisy: Tensor,
    timesteps: Tensor,
    condition: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What modules of a denoiser's network make of a noisy sample, by full name; no further than the last of them.

    Args:
        names: as those of `recorded_outputs`. None at all: the prediction itself, called `PREDICTION`.
        noisy, timesteps, condition: of the denoiser.
    """
    if not names:
        return {PREDICTION: denoiser(noisy, timesteps, condition)}
    # A checkpointed block is run again in the backward pass, which must then see all of it.
    checkpointed = getattr(denoiser.model, "is_gradient_checkpointing", False)
    with recorded_outputs(denoiser.model, names, stop=not checkpointed) as outputs:
        denoiser(noisy, timesteps, condition)
    return outputs
