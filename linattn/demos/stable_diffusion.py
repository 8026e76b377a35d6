"""The bundled Stable Diffusion with its own self-attention and with ours, distilled and not: pictures, times, scores.

The model draws several digits in the order of the prompt, in cells of its own choice, so that the cells must agree:
what self-attention is for (linattn.bundled.canvases). All pictures are drawn from the same prompts and seeds.
"""

from __future__ import annotations

from pathlib import Path

from linattn.demos import _comparison

NAME = "stable_diffusion"
SUMMARY = "a small Stable Diffusion with stock attention and with linear attention, same prompts and seeds"
REQUIRES = ("diffusers", "transformers", "sklearn", "PIL")

MODEL, STUDENT = "tiny_sd", "tiny_sd_linfusion"

REAL_WEIGHTS = """\
from diffusers import StableDiffusionPipeline
from linattn.adapters import LinFusion

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
LinFusion.construct_for(pipe)  # fetches the published weights that belong to this model
pipe("an astronaut riding a horse on Mars").images[0].save("astronaut.png")"""


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
            "before": "Linear attention, not distilled",
            "after": "Linear attention, distilled (linattn)",
        },
        stock="teacher",
        ours="after",
        op="linear_attention",
        denoiser="unet",
        layers=lambda name: name.endswith(".attn1"),
        evaluate=_evaluate_unet,
        steps=15,
        guidance_scale=2.5,
        headline="Bundled Stable Diffusion: same prompts, same seeds",
        footer="DDIM",
        slower="the branches that LinFusion adds to a layer cost more than its attention saves; linear attention is "
        "for many tokens.",
        real_weights=REAL_WEIGHTS,
    )
    return _comparison.run(comparison, out, quick=quick, report=report)


def _evaluate_unet(pipe, side: int):
    import torch

    unet, size = pipe.unet, side // pipe.vae_scale_factor
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=rng)
    text = torch.randn(2, 8, unet.config.cross_attention_dim, generator=rng)
    return lambda: unet(latents, 500, text)
