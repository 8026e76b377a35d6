"""What the objectives see of a diffusion model: a function of (noisy sample, timesteps, condition).

An objective is written once for every model that can be wrapped like this: UNets here, transformers beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn


class Denoiser(Protocol):
    """A diffusion model as a function.

    Shapes:
        noisy (B, C, h, w), timesteps (B,), every entry of condition (B, ...); returns the prediction (B, C, h, w), of
        whatever the model predicts (noise, velocity): the noise schedule knows the matching target.
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


@contextlib.contextmanager
def recorded_outputs(model: nn.Module, last_names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of all submodules whose name ends in one of `last_names`, by full name, in execution order.

    Args:
        last_names: last parts of qualified names, for example ("attn1",).

    The hooks exist only inside the `with`. So what gradient checkpointing runs again in the backward pass is not
    recorded a second time, and the model carries no mark afterwards. Outputs of checkpointed blocks (the non-reentrant
    kind that diffusers uses) are part of the graph like any other.

    Raises:
        ValueError: no submodule has such a name.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in last_names}
    if not found:
        raise ValueError(f"{type(model).__name__} has no module whose name ends in {' or '.join(last_names)}")
    outputs: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(_module, _inputs, output):
            outputs[name] = output

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in found.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
