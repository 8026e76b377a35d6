"""What the objectives see of a diffusion model: a function of (noisy sample, timesteps, condition).

An objective is written once for every model that can be wrapped like this: UNets here, transformers beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..schedulers.edm import preconditioning


class Denoiser(Protocol):
    """A diffusion model as a function.

    Shapes:
        noisy (B, C, h, w), timesteps (B,), every entry of condition (B, ...); returns the prediction (B, C, h, w), of
        whatever the model predicts (noise, velocity): the noise schedule knows the matching target. timesteps are those
        of the noise schedule.
    """

    model: nn.Module

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor: ...


class UNetDenoiser(nn.Module):
    """diffusers' UNet2DConditionModel as a `Denoiser`.

    condition: "encoder_hidden_states" (B, L, C), and for SDXL "text_embeds" (B, P) and "time_ids" (B, 6).
    """

    ADDED = ("text_embeds", "time_ids")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        added = {name: condition[name] for name in self.ADDED if name in condition}
        text = condition["encoder_hidden_states"]
        # The UNet computes in the type of its input, and the text encoder has the type that was chosen for the run.
        noisy = noisy.to(text.dtype)
        return self.model(noisy, timesteps, text, added_cond_kwargs=added or None, return_dict=False)[0]


class FluxDenoiser(nn.Module):
    """diffusers' FluxTransformer2DModel as a `Denoiser`: latents are packed, 2 x 2 pixels to a token in raster order.

    condition: "encoder_hidden_states" (B, T, C) of T5, "pooled_projections" (B, P) of CLIP.

    Position ids are float32 whatever the model computes in: bfloat16 counts no further than 256.

    Args:
        guidance: the guidance that the model is told, where it was distilled to be told one (FLUX.1-dev).
        num_timesteps: of the noise schedule; the model wants sigma.
    """

    def __init__(self, model: nn.Module, *, guidance: float = 3.5, num_timesteps: int = 1000):
        super().__init__()
        self.model = model
        self.guidance, self.num_timesteps = guidance, num_timesteps

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.guidance, device=noisy.device, dtype=torch.float32)
        prediction = self.model(
            pack(noisy).to(text.dtype),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled_projections"],
            timestep=timesteps / self.num_timesteps,
            img_ids=raster_ids(height, width, noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)


def pack(latents: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) to tokens (B, h w, 4 C): each is a square of 2 x 2, its channels outermost.

    Raises:
        ValueError: an odd number of rows or columns.
    """
    if latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(f"FLUX packs 2 x 2 latent pixels: height and width must be even, got {tuple(latents.shape)}")
    squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B, C, h, 2, w, 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, h w, 4 C) to (B, C, 2 h, 2 w)."""
    squares = tokens.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))  # B, h, w, C, 2, 2
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def raster_ids(height: int, width: int, device: torch.device) -> Tensor:
    """FLUX's position ids (0, row, column) of a grid in raster order: (height * width, 3), float32."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


class SD3Denoiser(nn.Module):
    """diffusers' SD3Transformer2DModel as a `Denoiser`.

    condition: "encoder_hidden_states" (B, T, C) of all text encoders, "pooled_projections" (B, P) of the CLIP ones.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        return self.model(
            noisy.to(text.dtype),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled_projections"],
            timestep=timesteps,
            return_dict=False,
        )[0]


class InfDiTDenoiser(nn.Module):
    """Inf-DiT as a `Denoiser`: its estimate of the clean picture, D = c_skip x + c_out F(c_in [x | lr_up], c_noise).

    condition: "lr_up" (B, 3, H, W), the enlarged low resolution picture; "lr_image" (B, 3, H / 4, W / 4), itself; and
    where the model has a `vector_dim` "image_embeds" (B, V) of it. Timesteps are noise levels sigma (`EDMSchedule`).

    Args:
        sigma_data: standard deviation of the data that the model is preconditioned for.
    """

    def __init__(self, model: nn.Module, *, sigma_data: float = 0.5):
        super().__init__()
        self.model = model
        self.sigma_data = sigma_data

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Mapping[str, Tensor],
        *,
        position_offset: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """position_offset: (row, column) that the first token is told; only training has others than (0, 0)."""
        c_skip, c_out, c_in, c_noise = preconditioning(timesteps, self.sigma_data)
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
        prediction = self.model(
            c_in * torch.cat([noisy, condition["lr_up"].to(noisy)], dim=1),
            c_noise,
            image_embeds=condition.get("image_embeds"),
            # Not kept: so the first block projects it in its own forward, where FSDP has put its weights together.
            lr_context=self.model.prepare_lr(condition["lr_image"], keep=False),
            position_offset=position_offset,
            return_dict=False,
        )[0]
        return c_skip * noisy + c_out * prediction


@contextlib.contextmanager
def recorded_outputs(model: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules, by full name, in execution order.

    Args:
        names: qualified names of modules, or last parts of such: ("attn1",) is every module whose name ends in attn1.
        stop: leave the block as soon as all of them have run: the rest of the network is not computed.

    Of joint attention, which returns its image and text tokens apart, both, concatenated along the tokens.

    The hooks exist only inside the `with`. So what gradient checkpointing runs again in the backward pass is not
    recorded a second time, and the model carries no mark afterwards. Outputs of checkpointed blocks (the non-reentrant
    kind that diffusers uses) are part of the graph like any other.

    Raises:
        ValueError: a name that no submodule has.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for wanted in names:
        matches = {name: m for name, m in modules.items() if wanted in (name, name.rpartition(".")[2])}
        if not matches:
            raise ValueError(f"{type(model).__name__} has no module whose name ends in {wanted}")
        found |= matches
    outputs: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(_module, _inputs, output):
            outputs[name] = output if isinstance(output, Tensor) else torch.cat(output, dim=1)
            if stop and len(outputs) == len(found):
                raise _Enough

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in found.items()]
    try:
        yield outputs
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Everything that was to be recorded has been."""
