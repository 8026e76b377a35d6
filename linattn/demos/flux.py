"""The bundled FLUX with its own attention and with CLEAR's windows, distilled and not: pictures, times, scores.

It draws what the bundled Stable Diffusion draws (linattn.bundled.canvases): cells must agree, over distances that a
window does not reach in one layer. All pictures are drawn from the same prompts and seeds.
"""

from __future__ import annotations

from pathlib import Path

from linattn.demos import _comparison

NAME = "flux"
SUMMARY = "a small FLUX with stock attention and with CLEAR's windows, same prompts and seeds"
REQUIRES = ("diffusers", "transformers", "sklearn", "PIL")

MODEL, STUDENT = "tiny_flux", "tiny_flux_clear"

REAL_WEIGHTS = """\
import torch
from diffusers import FluxPipeline
from linattn.adapters import CLEAR

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
CLEAR.construct_for(
    pipe, pretrained_model_name_or_path="Huage001/CLEAR", weight_name="clear_local_16_down_4.safetensors"
)
pipe("an astronaut riding a horse on Mars", height=2048, width=2048).images[0].save("astronaut.png")"""


def run(out: Path, *, quick: bool, report) -> list[Path]:
    """See `linattn.demos`."""
    from linattn import bundled
    from linattn.cli._variants import TITLES, variants

    comparison = _comparison.Comparison(
        name=NAME,
        model=MODEL,
        variants=variants(bundled.path(STUDENT)),
        titles=TITLES,
        columns={
            "teacher": "Stock attention (softmax)",
            "before": "Windows, not distilled",
            "after": "Windows, distilled (linattn)",
        },
        stock="teacher",
        ours="after",
        op="window_attention",
        denoiser="transformer",
        layers=lambda name: name.endswith(".attn"),
        evaluate=_evaluate_transformer,
        steps=15,
        guidance_scale=5.0,
        headline="Bundled FLUX: same prompts, same seeds",
        footer="Flow matching, Euler",
        slower="a window leaves little out; windows are for many tokens.",
        real_weights=REAL_WEIGHTS,
    )
    return _comparison.run(comparison, out, quick=quick, report=report)


def _evaluate_transformer(pipe, side: int):
    import torch

    transformer, size = pipe.transformer, side // (2 * pipe.vae_scale_factor)
    config, rng = transformer.config, torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    arguments = {
        "hidden_states": torch.randn(2, size * size, config.in_channels, generator=rng),
        "encoder_hidden_states": torch.randn(2, 16, config.joint_attention_dim, generator=rng),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=rng),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(16, 3),
    }
    return lambda: transformer(**arguments)
