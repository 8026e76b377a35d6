"""Train the models that linattn ships, from scratch, on a CPU (half an hour on two free cores).

    python examples/train_tiny_sd.py --out build/tiny         (then copy its two folders over those of linattn/bundled)

A Stable Diffusion of stock diffusers and transformers classes that draws several handwritten digits in the order that
the prompt names (linattn.bundled.canvases), and its LinFusion student, distilled by `linattn distill`:

1. vae        an autoencoder for canvases, 8 x 8 pixels per latent as in Stable Diffusion;
2. cells      training scans, written with several pens, as the latents of one cell: canvases are pasted together from
              them, so that the next stage sees a new canvas every time without running the autoencoder;
3. diffusion  a CLIP tokenizer, a CLIP text encoder and a UNet, trained together: first on single cells, where words get
              their meaning in minutes, then on whole canvases;
4. pipeline   written in float16, as a user loads it;
5. student    linear attention for it: `linattn distill linfusion_tiny_sd`;
6. scores     both, and the controls, as `linattn eval` gives them; they go into the card.json of both.

A run that was killed goes on where it was, see tiny_training.py.
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing is to be looked up

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tiny_training import (
    CHECKPOINT_EVERY,
    Delivery,
    Progress,
    Stages,
    clean_configs,
    generators,
    load_checkpoint,
    run_script,
    save_checkpoint,
    say,
    use_everywhere,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from linattn import evaluate
from linattn.adapters import LinFusion
from linattn.bundled import canvases, digits
from linattn.cli._variants import TITLES, variants
from linattn.cli.eval import load_pipeline, tables

START, END = "<|startoftext|>", "<|endoftext|>"
MODEL, STUDENT = "tiny_sd", "tiny_sd_linfusion"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults made the bundled models; SMOKE only shows that it runs."""

    seed: int = 0
    vae_steps: int = 260
    cell_steps: int = 400
    canvas_steps: int = 2050
    student_steps: int = 450
    vae_batch: int = 8
    cell_batch: int = 64
    batch: int = 32
    vae_channels: tuple[int, ...] = (16, 32, 32, 64)  # four levels: f = 8
    latent_std: float = 0.6
    unet_channels: tuple[int, ...] = (32, 96)
    heads: int = 2
    text_width: int = 64
    text_layers: int = 2
    prompt_tokens: int = 32
    rate: float = 2e-3
    ema_decay: float = 0.998
    caption_drop: float = 0.1  # share of empty captions: classifier-free guidance needs them
    lengths: tuple[int, ...] = (1, 2, 2, 3, 3, 4)  # digits on a canvas: one of these, drawn evenly
    pens: int = 16
    written: int = 360  # cells that each pen writes for canvases of one digit, of two, and so on
    train_scans: int | None = None  # None: all
    student_canvases: int = 2000
    score_count: int = 100  # pictures per set of orders
    score_steps: int = 15
    score_guidance: float = 2.5


SMOKE = Recipe(
    vae_steps=2,
    cell_steps=1,
    canvas_steps=2,
    student_steps=2,
    vae_batch=2,
    cell_batch=4,
    batch=4,
    vae_channels=(8, 8, 8, 8),
    unet_channels=(16, 32),
    text_width=16,
    text_layers=1,
    pens=2,
    written=120,
    train_scans=120,
    student_canvases=4,
    score_count=2,
    score_steps=2,
)


def training_scans(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Real digits that training may see, and what they are."""
    split = digits.load()
    count = recipe.train_scans or len(split.train)
    return split.train[:count], split.train_labels[:count]


# --- 1. autoencoder ---------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, out: pathlib.Path) -> dict:
    rng, words = generators(recipe.seed)
    levels = len(recipe.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=canvases.RESOLUTION,
        # Without attention latents depend on what is near them, so that cells can be pasted together (stage 2).
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    scans, labels = training_scans(recipe)
    pens = canvases.make_pens(256, rng)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, recipe.vae_steps // 4), recipe.vae_steps)
    progress = Progress("vae", recipe.vae_steps)
    for step in range(1, recipe.vae_steps + 1):
        orders = [canvases.draw_order(words, canvases.LONGEST) for _ in range(recipe.vae_batch)]
        x = canvases.draw(orders, scans, labels, pens, rng=rng, words=words) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(rng)).sample
        # Sharp strokes from L1, faithful greys from MSE, and just enough KL for latents that a Gaussian can reach.
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.step(step, loss)
    vae.eval()
    # Held-out scans through the autoencoder and back: what it costs to go through latents at all.
    split = digits.load()
    lengths = range(1, canvases.LONGEST + 1)
    orders = [canvases.draw_order(words, words.choice(lengths)) for _ in range(100)]
    real = canvases.draw(orders, split.test, split.test_labels, pens, rng=rng, words=words)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in real.split(10)])
        back = torch.cat([vae.decode(part).sample for part in latents.split(10)]) / 2 + 0.5
    # Less than the usual 1: the scheduler's noise then covers more of a picture for longer, and it is there that layout
    # and words are decided.
    vae.register_to_config(scaling_factor=recipe.latent_std / latents.std().item())
    settle(vae)
    vae.save_pretrained(out)
    return {
        "parameters": vae.num_parameters(),
        "held_out_reconstruction_mse": evaluate.image_mse(back.clamp(0, 1), real),
    }


@torch.no_grad()
def settle(vae: AutoencoderKL) -> None:
    """Make the encoder certain: a sample of its posterior is the mean from here on.

    The diffusion model learns from means. Whoever encodes a picture (distillation, image to image) draws samples, as
    with any Stable Diffusion, and would hand it latents with a noise that it has never seen.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -30  # log variance; the least that diffusers lets through


# --- 2. cells ---------------------------------------------------------------------------------------------------------


def encode_cells(recipe: Recipe, out: pathlib.Path, vae_folder: pathlib.Path) -> dict:
    """cells.safetensors: latents of written and of empty cells, by pen and by how many digits their canvas had.

    The encoder normalises over the whole canvas: the latents of a digit are weaker the more there are beside it. What
    is pasted together again must therefore come from canvases with as many.
    """
    rng, words = generators(recipe.seed + 1)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    scans, labels = training_scans(recipe)
    labels = torch.as_tensor(labels)
    pens = canvases.make_pens(recipe.pens, rng)

    def encode(cells: torch.Tensor) -> torch.Tensor:
        pictures = canvases.join(cells).contiguous(memory_format=torch.channels_last) * 2 - 1
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
        return canvases.cut(latents * vae.config.scaling_factor)

    tensors = {}
    for count in range(1, canvases.LONGEST + 1):
        written, empty, of = [], [], []
        per_pen = math.ceil(recipe.written / count)  # canvases
        for pen in range(recipe.pens):
            used = torch.zeros(per_pen, canvases.CELLS, dtype=torch.bool)
            for row in used:
                row[list(words.choice(canvases.LAYOUTS[count]))] = True
            choice = torch.randint(len(scans), (per_pen * count,), generator=rng)
            cells = torch.ones(per_pen, canvases.CELLS, 3, canvases.CELL, canvases.CELL)
            cells[used] = canvases.draw_cells(scans[choice], pens, torch.full_like(choice, pen), rng)
            latents = encode(cells)
            written.append(latents[used])
            empty.append(latents[~used][: recipe.written])
            of.append(labels[choice])
        tensors |= {f"{count}.written": torch.stack(written), f"{count}.empty": torch.stack(empty)}
        tensors[f"{count}.labels"] = torch.stack(of)
    safetensors.torch.save_file(tensors, out / "cells.safetensors")
    return {"written": sum(len(of.flatten()) for name, of in tensors.items() if name.endswith("labels"))}


class Cells:
    """Latents of canvases, pasted together from those of cells: a new canvas for every sample of the training."""

    def __init__(self, folder: pathlib.Path):
        tensors = safetensors.torch.load_file(folder / "cells.safetensors")
        counts = range(1, canvases.LONGEST + 1)
        self.written = {n: tensors[f"{n}.written"] for n in counts}  # (pen, cell, 4, height, width)
        self.empty = {n: tensors[f"{n}.empty"] for n in counts}
        self.cells_of = {  # [digits on the canvas][pen][digit]: numbers of cells
            n: [[torch.where(of == digit)[0].tolist() for digit in range(10)] for of in tensors[f"{n}.labels"]]
            for n in counts
        }

    def digit(self, digit: int, count: int, pen: int, words: random.Random) -> torch.Tensor:
        """A cell with this digit, from a canvas of ``count`` digits: (4, cell height, cell width)."""
        return self.written[count][pen, words.choice(self.cells_of[count][pen][digit])]

    def single(self, orders: list[canvases.Order], words: random.Random) -> torch.Tensor:
        """One cell for each order of one digit, as on any canvas: (n, 4, cell height, cell width)."""
        pens = len(self.written[1])
        counts = list(self.written)
        return torch.stack([self.digit(d, words.choice(counts), words.randrange(pens), words) for (d,) in orders])

    def paste(self, orders: list[canvases.Order], words: random.Random) -> torch.Tensor:
        """The canvases of :meth:`compose` alone."""
        return self.compose(orders, words)[0]

    def compose(self, orders: list[canvases.Order], words: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole canvases: one pen each, any layout, any scans of the digits: (n, 4, height, width).

        Besides, which digit of its order each cell shows: (n, CELLS), 0 is the first, -1 none.
        """
        canvas, places = [], torch.full((len(orders), canvases.CELLS), -1)
        for order, place in zip(orders, places, strict=True):
            count = len(order)
            pens, blanks = self.empty[count].shape[:2]
            pen = words.randrange(pens)
            cells = self.empty[count][pen, [words.randrange(blanks) for _ in range(canvases.CELLS)]]
            for number, cell in enumerate(words.choice(canvases.LAYOUTS[count])):
                cells[cell] = self.digit(order[number], count, pen, words)
                place[cell] = number
            canvas.append(cells)
        return canvases.join(torch.stack(canvas)), places


# --- 3. text and diffusion --------------------------------------------------------------------------------------------


def make_tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges learnt from our own captions: every word of theirs becomes one token.

    The vocabulary has CLIP's layout (bytes, bytes that end a word, merges, start and end), so that any text at all can
    be spelled.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    empty = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    captions = [canvases.caption(tuple(range(10)))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = alphabet + [byte + "</w>" for byte in alphabet] + [left + right for left, right in merges] + [START, END]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=recipe.prompt_tokens)


def save_tokenizer(tokenizer: CLIPTokenizer, out: pathlib.Path) -> None:
    """Both layouts: tokenizer.json for transformers 5, vocab.json and merges.txt for everything before it."""
    tokenizer.save_pretrained(out)
    tokenizer.backend_tokenizer.model.save(str(out))


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def new_pipeline(recipe: Recipe, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """An untrained UNet and text encoder around the trained autoencoder."""
    tokenizer = make_tokenizer(recipe)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=2,
            max_position_embeddings=recipe.prompt_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    levels = len(recipe.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=canvases.RESOLUTION // 2 ** (len(recipe.vae_channels) - 1),
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.heads,  # diffusers' old name for the number of heads
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(  # Stable Diffusion 1.5's own numbers
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        # Predicting the noise, a model learns words last: where they matter, at high noise, its loss is tiny.
        prediction_type="v_prediction",
    )
    return assemble(vae, text_encoder, tokenizer, unet, scheduler)


def assemble(vae, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_diffusion(recipe: Recipe, out: pathlib.Path, vae_folder: pathlib.Path, cells_folder: pathlib.Path) -> dict:
    rng, words = generators(recipe.seed + 2)
    pipe = new_pipeline(recipe, AutoencoderKL.from_pretrained(vae_folder).eval())
    cells = Cells(cells_folder)
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    text = pipe.text_encoder.train()
    parameters = [*unet.parameters(), *text.parameters()]
    steps = recipe.cell_steps + recipe.canvas_steps
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 4), steps)
    average = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    times = pipe.scheduler.config.num_train_timesteps
    kept = {"unet": unet, "text": text, "optimizer": optimizer, "schedule": schedule, "average": average}
    checkpoint = out.parent / "diffusion.checkpoint"
    done = load_checkpoint(checkpoint, recipe, kept, rng, words)
    progress = Progress("diffusion", steps, done)
    for step in range(done + 1, steps + 1):
        single = step <= recipe.cell_steps
        batch = recipe.cell_batch if single else recipe.batch
        lengths = (1,) if single else recipe.lengths
        orders = [canvases.draw_order(words, words.choice(lengths)) for _ in range(batch)]
        clean = (cells.single if single else cells.paste)(orders, words)
        captions = ["" if words.random() < recipe.caption_drop else canvases.caption(order) for order in orders]
        # One time from each of `batch` equal intervals: the loss then varies less from step to step.
        t = (torch.arange(batch) + torch.rand(batch, generator=rng)) * times / batch
        t = t.long().clamp(max=times - 1)
        noise = torch.randn(clean.shape, generator=rng)
        noisy = pipe.scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, t, text(token_ids(pipe.tokenizer, captions)).last_hidden_state).sample
        loss = F.mse_loss(prediction, pipe.scheduler.get_velocity(clean, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress.step(step, loss)
        if step % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, recipe, kept, rng, words, step)
    average.copy_to(parameters)
    unet.eval()
    text.eval()
    save_pipeline(pipe, out)
    return {
        "unet_parameters": unet.num_parameters(),
        "text_encoder_parameters": text.num_parameters(),
        "vocabulary": len(pipe.tokenizer),
    }


def save_pipeline(pipe: StableDiffusionPipeline, out: pathlib.Path) -> None:
    pipe.save_pretrained(out)
    save_tokenizer(pipe.tokenizer, out / "tokenizer")


# --- 4. results -------------------------------------------------------------------------------------------------------


def write_half(pipe: StableDiffusionPipeline, out: pathlib.Path) -> None:
    """The pipeline as float16 files, which load as float32 unless a torch_dtype is asked for."""
    save_pipeline(pipe.to(torch.float16), out)
    use_everywhere(out, ["text_encoder"])


def distill(name: str, adapter: type, recipe, out: pathlib.Path, pipeline_folder: pathlib.Path, **options) -> dict:
    """A student of the pipeline, by a recipe of the trainer that users have; its run is kept beside the stages."""
    from linattn.distill import Trainer
    from linattn.distill import recipe as recipes

    run = out.parent / f"{out.name.strip('.').partition('-')[0]}.run"
    pictures = run / "canvases"
    canvases.write_folder(pictures, recipe.student_canvases, seed=recipe.seed, train_scans=recipe.train_scans)
    settings = {
        "model.pretrained": pipeline_folder,
        "data.path": pictures,
        "training.steps": recipe.student_steps,
        "training.warmup_steps": min(50, recipe.student_steps // 4),
        "training.seed": recipe.seed,
        "output.folder": run / "run",
        **options,
    }
    overrides = [f"{key}={json.dumps(str(v)) if isinstance(v, pathlib.Path) else v}" for key, v in settings.items()]
    trainer = Trainer(recipes.load(name, overrides), adapter, say=say)
    final = trainer.run()
    student = adapter.from_pretrained(final, torch_dtype=torch.float16)
    student.save_pretrained(out)
    clean_configs(out)
    return {"parameters": sum(p.numel() for p in student.parameters())}


def train_student(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path) -> dict:
    return distill("linfusion_tiny_sd", LinFusion, recipe, out, pipeline_folder)


def score(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path, student_folder: pathlib.Path) -> dict:
    """Teacher, controls and student."""
    return score_variants(recipe, out, pipeline_folder, variants(student_folder), TITLES)


def score_variants(recipe, out: pathlib.Path, pipeline_folder: pathlib.Path, ways: dict, titles: dict) -> dict:
    """What `linattn eval` says of these variants: scores.json has all, the report a summary."""
    result = evaluate.evaluate_canvases(
        load_pipeline(pipeline_folder),
        ways,
        n=recipe.score_count,
        steps=recipe.score_steps,
        guidance_scale=recipe.score_guidance,
        progress=lambda name, done, total: say(f"scores: {name}, picture {done} of {total}"),
    )
    print(tables(result, titles))
    scores = result.to_json()
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return {
        "settings": scores["settings"],
        "judge_accuracy": scores["judge_accuracy"],
        "real digits": scores["real"]["summary"],
        **{name: variant["summary"] for name, variant in scores["variants"].items()},
    }


# What each stage depends on, besides everything that the stages before it depend on.
STAGES = Stages(
    {
        "vae": ("seed", "train_scans", "vae_steps", "vae_batch", "vae_channels", "latent_std"),
        "cells": ("pens", "written"),
        "diffusion": (
            *("cell_steps", "canvas_steps", "cell_batch", "batch", "unet_channels", "heads", "text_width"),
            *("text_layers", "prompt_tokens", "rate", "ema_decay", "caption_drop", "lengths"),
        ),
        "pipeline": (),
        "student": ("student_steps", "student_canvases"),
        "scores": ("score_count", "score_steps", "score_guidance"),
    }
)


def write_pipeline(recipe: Recipe, out: pathlib.Path, diffusion_folder: pathlib.Path) -> dict:
    write_half(load_pipeline(diffusion_folder), out)
    return {}


PLAN = {
    "vae": (train_vae,),
    "cells": (encode_cells, "vae"),
    "diffusion": (train_diffusion, "vae", "cells"),
    "pipeline": (write_pipeline, "diffusion"),
    "student": (train_student, "pipeline"),
    "scores": (score, "pipeline", "student"),
}
DELIVERIES = {
    MODEL: Delivery(
        "pipeline",
        ("vae", "cells", "diffusion", "pipeline"),
        "Stable Diffusion of stock diffusers classes, trained from scratch on canvases of handwritten digits "
        "(linattn.bundled.canvases)",
    ),
    STUDENT: Delivery(
        "student", ("student",), f"LinFusion for {MODEL}, distilled by linattn distill linfusion_tiny_sd"
    ),
}


def main(arguments: list[str] | None = None) -> int:
    return run_script(pathlib.Path(__file__).name, __doc__, (Recipe(), SMOKE), STAGES, PLAN, DELIVERIES, arguments)


if __name__ == "__main__":
    sys.exit(main())
