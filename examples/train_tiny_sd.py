"""Train the models that linattn ships, from scratch, on a CPU (half an hour on two free cores).

    python examples/train_tiny_sd.py --out build/tiny         (then copy its two folders over those of linattn/bundled)

A Stable Diffusion of stock diffusers and transformers classes that draws several handwritten digits in the order that
the prompt names (linattn.bundled.canvases), and its LinFusion student, distilled by `linattn distill`:

1. vae        an autoencoder for canvases, 8 x 8 pixels per latent as in Stable Diffusion;
2. cells      every training scan, written with several pens, as the latents of one cell: canvases are pasted together
              from them, so that the next stage sees a new canvas every time without running the autoencoder;
3. diffusion  a CLIP tokenizer, a CLIP text encoder and a UNet, trained together: first on single cells, where words get
              their meaning in minutes, then on whole canvases;
4. pipeline   written in float16, as a user loads it;
5. student    linear attention for it: `linattn distill linfusion_tiny_sd`;
6. scores     both, and the controls, as `linattn eval` gives them; they go into the card.json of both.

Each stage ends in one folder under --work that appears at once (written aside, then renamed): a run that was killed
starts again with the stage that it did not finish, and the long ones inside it where their last checkpoint stands.
Numbers of steps are fixed, not times, so that the same command trains the same model on a slow machine; the last bits
still depend on the machine.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing is to be looked up

import diffusers
import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from linattn import evaluate
from linattn.adapters import LinFusion
from linattn.bundled import canvases, digits
from linattn.cli.eval import load_pipeline, tables, variants

START, END = "<|startoftext|>", "<|endoftext|>"
MODEL, STUDENT = "tiny_sd", "tiny_sd_linfusion"
CHECKPOINT_EVERY = 200


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults made the bundled models; SMOKE only shows that it runs."""

    seed: int = 0
    vae_steps: int = 260
    cell_steps: int = 500
    canvas_steps: int = 2500
    student_steps: int = 450
    vae_batch: int = 8
    cell_batch: int = 64
    batch: int = 32
    vae_channels: tuple[int, ...] = (16, 32, 32, 64)  # four levels: f = 8
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
    train_scans=120,
    student_canvases=4,
    score_count=2,
    score_steps=2,
)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def training_scans(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Real digits that training may see, and what they are."""
    split = digits.load()
    count = recipe.train_scans or len(split.train)
    return split.train[:count], split.train_labels[:count]


def generators(seed: int) -> tuple[torch.Generator, random.Random]:
    """The two sources of chance of a stage: tensors, and everything else."""
    torch.manual_seed(seed)  # of the weights
    return torch.Generator().manual_seed(seed), random.Random(seed)


class Progress:
    """Prints the mean loss and the time that is left, about twenty times per stage."""

    def __init__(self, name: str, steps: int, done: int = 0):
        self.name, self.steps, self.every, self.before = name, steps, max(1, steps // 20), done
        self.start, self.losses = time.perf_counter(), []

    def step(self, done: int, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        if done % self.every == 0 or done == self.steps:
            passed = time.perf_counter() - self.start
            mean, left = torch.stack(self.losses).mean(), passed / (done - self.before) * (self.steps - done)
            say(f"{self.name}: step {done}/{self.steps}  loss {mean:.4f}  {passed:.0f} s, {left:.0f} s left")
            self.losses.clear()


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
    vae.register_to_config(scaling_factor=1 / latents.std().item())
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
    """cells.safetensors: the latents of every scan with every pen, and of empty cells beside written ones."""
    rng, words = generators(recipe.seed + 1)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    scans, labels = training_scans(recipe)
    pens = canvases.make_pens(recipe.pens, rng)
    whole = len(scans) // canvases.CELLS * canvases.CELLS  # the scans that fill canvases without a rest

    def encode(cells: torch.Tensor) -> torch.Tensor:
        pictures = canvases.join(cells).contiguous(memory_format=torch.channels_last) * 2 - 1
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
        return canvases.cut(latents * vae.config.scaling_factor)

    written, empty = [], []
    for pen in range(recipe.pens):
        order = torch.randperm(len(scans), generator=rng)[:whole]
        cells = canvases.draw_cells(scans[order], pens, torch.full((whole,), pen), rng)
        latents = encode(cells.unflatten(0, (-1, canvases.CELLS))).flatten(0, 1)
        in_place = torch.zeros(len(scans), *latents.shape[1:])
        in_place[order] = latents
        written.append(in_place)
        # A latent knows a little of its neighbours, so empty cells are taken from between written ones.
        sparse = torch.ones(16, canvases.CELLS, *cells.shape[1:])
        used = torch.zeros(sparse.shape[:2], dtype=torch.bool)
        for row in used:
            row[list(words.choice(canvases.LAYOUTS[canvases.LONGEST]))] = True
        sparse[used] = cells[torch.randint(whole, (int(used.sum()),), generator=rng)]
        empty.append(encode(sparse)[~used])
    complete = torch.stack(written).flatten(2).abs().sum(-1).gt(0).all(0)  # scans that no pen left out
    safetensors.torch.save_file(
        {
            "written": torch.stack(written)[:, complete].contiguous(),
            "empty": torch.stack(empty),
            "labels": torch.as_tensor(labels)[complete],
        },
        out / "cells.safetensors",
    )
    return {"scans": int(complete.sum()), "pens": recipe.pens}


class Cells:
    """Latents of canvases, pasted together from those of cells: a new canvas for every sample of the training."""

    def __init__(self, folder: pathlib.Path):
        tensors = safetensors.torch.load_file(folder / "cells.safetensors")
        self.written, self.empty = tensors["written"], tensors["empty"]
        self.scans_of = [torch.where(tensors["labels"] == digit)[0].tolist() for digit in range(10)]

    def single(self, orders: list[canvases.Order], words: random.Random) -> torch.Tensor:
        """One cell for each order of one digit: (n, 4, cell height, cell width)."""
        pens = len(self.written)
        return torch.stack([self.written[words.randrange(pens), words.choice(self.scans_of[d])] for (d,) in orders])

    def paste(self, orders: list[canvases.Order], words: random.Random) -> torch.Tensor:
        """Whole canvases: one pen each, any layout, any scans of the digits: (n, 4, height, width)."""
        pens, blanks = self.empty.shape[:2]
        pen = [words.randrange(pens) for _ in orders]
        cells = torch.stack([self.empty[p, [words.randrange(blanks) for _ in range(canvases.CELLS)]] for p in pen])
        for i, order in enumerate(orders):
            for digit, cell in zip(order, words.choice(canvases.LAYOUTS[len(order)]), strict=True):
                cells[i, cell] = self.written[pen[i], words.choice(self.scans_of[digit])]
        return canvases.join(cells)


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
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
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


def save_checkpoint(
    path: pathlib.Path, recipe: Recipe, kept: dict, rng: torch.Generator, words: random.Random, step: int
) -> None:
    """Everything that the next step depends on, in one file that is whole or absent."""
    state = {name: thing.state_dict() for name, thing in kept.items()}
    state |= {"recipe": repr(recipe), "step": step, "rng": rng.get_state(), "words": words.getstate()}
    fresh = path.with_name(path.name + ".fresh")
    torch.save(state, fresh)
    os.replace(fresh, path)


def load_checkpoint(path: pathlib.Path, recipe: Recipe, kept: dict, rng: torch.Generator, words: random.Random) -> int:
    """Go on where a run of the same recipe was stopped; the number of steps that it had done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != repr(recipe):
        return 0
    for name, thing in kept.items():
        thing.load_state_dict(state[name])
    rng.set_state(state["rng"])
    words.setstate(state["words"])
    say(f"diffusion: going on after step {state['step']}")
    return state["step"]


def save_pipeline(pipe: StableDiffusionPipeline, out: pathlib.Path) -> None:
    pipe.save_pretrained(out)
    save_tokenizer(pipe.tokenizer, out / "tokenizer")


# --- 4. results -------------------------------------------------------------------------------------------------------


def write_half(pipe: StableDiffusionPipeline, out: pathlib.Path) -> None:
    """The pipeline as float16 files, which load as float32 unless a torch_dtype is asked for."""
    save_pipeline(pipe.to(torch.float16), out)
    # transformers 5 takes the precision of the weights from this entry; diffusers' parts are float32 by default. Half a
    # pipeline in each would not run.
    config = out / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n")
    # transformers 5 drops the prefix that every published text encoder has, and reads both; older versions insist on
    # it (without it they draw from random weights, with a warning).
    weights = out / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    clean_configs(out)


def clean_configs(folder: pathlib.Path) -> None:
    """How and from where this process had loaded the parts says nothing to a user."""
    for config in [*folder.glob("model_index.json"), *folder.rglob("*config.json")]:
        settings = json.loads(config.read_text())
        kept = {k: v for k, v in settings.items() if k not in ("_name_or_path", "is_local", "local_files_only")}
        if kept != settings:
            config.write_text(json.dumps(kept, indent=2) + "\n")


def train_student(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path) -> dict:
    """Linear attention for the pipeline, by the trainer that users have; its run is kept beside the stages."""
    from linattn.distill import Trainer
    from linattn.distill import recipe as recipes

    run = out.parent / "student.run"
    pictures = run / "canvases"
    canvases.write_folder(pictures, recipe.student_canvases, seed=recipe.seed, train_scans=recipe.train_scans)
    settings = {
        "model.pretrained": pipeline_folder,
        "data.path": pictures,
        "training.steps": recipe.student_steps,
        "training.warmup_steps": min(50, recipe.student_steps // 4),
        "training.seed": recipe.seed,
        "output.folder": run / "run",
    }
    overrides = [f"{key}={json.dumps(str(v)) if isinstance(v, pathlib.Path) else v}" for key, v in settings.items()]
    trainer = Trainer(recipes.load("linfusion_tiny_sd", overrides), LinFusion, say=say)
    final = trainer.run()
    student = LinFusion.from_pretrained(final, torch_dtype=torch.float16)
    student.save_pretrained(out)
    clean_configs(out)
    return {"parameters": sum(p.numel() for p in student.parameters())}


def score(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path, student_folder: pathlib.Path) -> dict:
    """Teacher, controls and student, as `linattn eval` scores them: scores.json has all, the report a summary."""
    result = evaluate.evaluate_canvases(
        load_pipeline(pipeline_folder),
        variants(student_folder),
        n=recipe.score_count,
        steps=recipe.score_steps,
        guidance_scale=recipe.score_guidance,
        progress=lambda name, done, total: say(f"scores: {name}, picture {done} of {total}"),
    )
    print(tables(result))
    scores = result.to_json()
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return {
        "settings": scores["settings"],
        "judge_accuracy": scores["judge_accuracy"],
        "real digits": scores["real"]["summary"],
        **{name: variant["summary"] for name, variant in scores["variants"].items()},
    }


# What each stage depends on, besides everything that the stages before it depend on.
FIELDS = {
    "vae": ("seed", "train_scans", "vae_steps", "vae_batch", "vae_channels"),
    "cells": ("pens",),
    "diffusion": (
        *("cell_steps", "canvas_steps", "cell_batch", "batch", "unet_channels", "heads", "text_width", "text_layers"),
        *("prompt_tokens", "rate", "ema_decay", "caption_drop", "lengths"),
    ),
    "pipeline": (),
    "student": ("student_steps", "student_canvases"),
    "scores": ("score_count", "score_steps", "score_guidance"),
}


def part_of(recipe: Recipe, stage: str) -> dict:
    """What decides the outcome of a stage, as JSON knows it."""
    names = list(FIELDS)
    relevant = [field for name in names[: names.index(stage) + 1] for field in FIELDS[name]]
    return json.loads(json.dumps({field: getattr(recipe, field) for field in relevant}))


def finished_stage(folder: pathlib.Path, recipe: Recipe) -> dict | None:
    """What the stage in this folder reported, if it was finished with the same recipe."""
    try:
        stage = json.loads((folder / "stage.json").read_text())
    except FileNotFoundError:
        return None
    return stage["report"] if stage["recipe"] == part_of(recipe, folder.name) else None


def publish(fresh: pathlib.Path, final: pathlib.Path) -> None:
    """Put a complete folder in the place of an older one."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old)
    else:
        fresh.rename(final)


def run_stage(name: str, recipe: Recipe, work: pathlib.Path, train, *inputs: pathlib.Path) -> dict:
    folder = work / name
    report = finished_stage(folder, recipe)
    if report is not None:
        say(f"{name}: done already ({folder})")
        return report
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=work))
    start = time.perf_counter()
    report = train(recipe, fresh, *inputs)
    report = {"seconds": round(time.perf_counter() - start, 1), **report}
    stage = {"recipe": part_of(recipe, name), "report": report}
    (fresh / "stage.json").write_text(json.dumps(stage, indent=2) + "\n")
    publish(fresh, folder)
    say(f"{name}: done in {report['seconds']:.0f} s")
    return report


def write_pipeline(recipe: Recipe, out: pathlib.Path, diffusion_folder: pathlib.Path) -> dict:
    write_half(load_pipeline(diffusion_folder), out)
    return {}


def deliver(stage: pathlib.Path, out: pathlib.Path, card: dict) -> None:
    """A finished stage as a folder to use: its files and a card, and nothing of this machine."""
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    shutil.copytree(stage, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json"))
    (fresh / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    for path in (fresh, *fresh.rglob("*")):  # mkdtemp's folders and the writers of weights are private
        path.chmod(0o755 if path.is_dir() else 0o644)
    publish(fresh, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"wrote {out}: {size / 1e6:.2f} MB")


def command_line(args: argparse.Namespace, changed: dict) -> str:
    """The command that makes these models again: everything that matters to them, and no folder of this machine."""
    words = [f"python examples/train_tiny_sd.py --out DIR --seed {args.seed} --threads {args.threads}"]
    words += [f"--set {name}={value}" for name, value in changed.items()]
    return " ".join(words + ["--smoke"] * args.smoke)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the two folders are written (replaced)")
    parser.add_argument("--work", type=pathlib.Path, help="where stages are kept (default: OUT.stages beside it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of Recipe, in JSON"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--until", choices=list(FIELDS), help="stop after this stage")
    parser.add_argument("--note", default="", help="words for card.json, for example that the machine was busy")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two steps per stage: shows that it runs")
    args = parser.parse_args(arguments)

    if int(transformers.__version__.split(".")[0]) < 5:
        parser.error(
            f"training needs transformers 5 or newer, this is {transformers.__version__} (the result does not)"
        )
    known = {field.name for field in dataclasses.fields(Recipe)}
    changed = {}
    for setting in args.set:
        name, _, value = setting.partition("=")
        if name not in known:
            parser.error(f"--set {setting}: there is no {name!r}; fields: {', '.join(sorted(known))}")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            parser.error(f"--set {setting}: expected a value in JSON, got {value!r}")
        changed[name] = tuple(value) if isinstance(value, list) else value
    recipe = dataclasses.replace(SMOKE if args.smoke else Recipe(), seed=args.seed, **changed)
    out = args.out.resolve()
    work = (args.work or out.with_name(out.name + ".stages")).resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    for unfinished in [*work.glob(".*-*"), *out.glob(".*-*")]:
        shutil.rmtree(unfinished)  # of a run that was killed
    torch.set_num_threads(args.threads)

    plan = {
        "vae": (train_vae,),
        "cells": (encode_cells, work / "vae"),
        "diffusion": (train_diffusion, work / "vae", work / "cells"),
        "pipeline": (write_pipeline, work / "diffusion"),
        "student": (train_student, work / "pipeline"),
        "scores": (score, work / "pipeline", work / "student"),
    }
    stages = {}
    for name, (train, *inputs) in plan.items():
        stages[name] = run_stage(name, recipe, work, train, *inputs)
        if name == "diffusion":
            (work / "diffusion.checkpoint").unlink(missing_ok=True)
        if name == args.until:
            return 0

    scores = stages.pop("scores")
    scores.pop("seconds")
    common = {
        "data": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998, "
        f"CC BY 4.0): {len(digits.load().train)} scans for training, {digits.HELD_OUT} held out",
        "command": command_line(args, changed),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "recipe": dataclasses.asdict(recipe),
        "threads": args.threads,
        "note": args.note,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    of_student = {"student": stages.pop("student")}
    described = {
        MODEL: (
            "pipeline",
            stages,
            "Stable Diffusion of stock diffusers classes, trained from scratch on canvases of handwritten digits "
            "(linattn.bundled.canvases)",
        ),
        STUDENT: ("student", of_student, f"LinFusion for {MODEL}, distilled by linattn distill linfusion_tiny_sd"),
    }
    for name, (stage, made_by, what) in described.items():
        seconds = round(sum(report["seconds"] for report in made_by.values()), 1)
        card = {"what": what, **common, "stages": made_by, "seconds": seconds, "scores": scores}
        deliver(work / stage, out / name, card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
