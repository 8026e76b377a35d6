"""Train the Stable Diffusion that linattn ships, from scratch, on a CPU (a quarter of an hour on two free cores).

    python examples/train_tiny_sd.py --out build/tiny_sd      (then put the folder in place of linattn/bundled/tiny_sd)

Stock diffusers and transformers classes throughout, so that the result loads like any other Stable Diffusion:

1. vae        an autoencoder for 64 x 64 pictures of handwritten digits, 8 x 8 x 4 latents (Stable Diffusion's f = 8);
2. diffusion  a CLIP tokenizer, a CLIP text encoder and a UNet, trained together on plain captions ("the digit four");
3. prompts    the same with free captions (filler words, letters, numerals), so that unusual prompts work;
4. the pipeline is written in float16, loaded again as a user would, scored, and described in card.json.

Each stage ends in one folder under --work that appears at once (written aside, then renamed): a run that was killed
starts again with the stage that it did not finish. Numbers of steps are fixed, not times, so that the same command
trains the same model on a slow machine; the last bits still depend on the machine.
"""

import argparse
import dataclasses
import datetime
import json
import math
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
from linattn.bundled import digits

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults made the bundled model; SMOKE only shows that it runs."""

    seed: int = 0
    vae_steps: int = 200
    diffusion_steps: int = 2600
    prompt_steps: int = 650
    vae_batch: int = 32
    batch: int = 64
    vae_channels: tuple[int, ...] = (16, 32, 32, 64)  # four levels: f = 8
    unet_channels: tuple[int, ...] = (48, 96)
    text_width: int = 64
    text_layers: int = 2
    prompt_tokens: int = 32
    caption_drop: float = 0.1  # share of empty captions: classifier-free guidance needs them
    encoded_copies: int = 4  # latents are encoded once: the scans and this many less one distorted versions
    train_scans: int | None = None  # None: all
    score_per_digit: int = 20
    score_steps: int = 25
    score_guidance: float = 3.0


SMOKE = Recipe(
    vae_steps=2,
    diffusion_steps=2,
    prompt_steps=2,
    vae_batch=4,
    batch=4,
    vae_channels=(8, 8, 8, 8),
    unet_channels=(16, 32),
    text_width=16,
    text_layers=1,
    encoded_copies=2,
    train_scans=40,
    score_per_digit=1,
    score_steps=2,
)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def distort(pictures: torch.Tensor, rng: torch.Generator, degrees: float, shift: float, zoom: float) -> torch.Tensor:
    """Rotate, move and scale each picture by random amounts up to the given ones (shift: share of half the side)."""

    def uniform() -> torch.Tensor:
        return torch.rand(len(pictures), generator=rng) * 2 - 1

    angle, scale = uniform() * math.radians(degrees), 1 + uniform() * zoom
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([cos, -sin, uniform() * shift, sin, cos, uniform() * shift], 1).view(-1, 2, 3)
    where = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, where, mode="bilinear", padding_mode="border", align_corners=False)


def training_pictures(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in -1..1, as the autoencoder sees them, and their digits."""
    split = digits.load()
    count = recipe.train_scans or len(split.train)
    return digits.render(split.train[:count]) * 2 - 1, torch.as_tensor(split.train_labels[:count])


class Progress:
    """Prints the mean loss and the time that is left, about twenty times per stage."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.every = name, steps, max(1, steps // 20)
        self.start, self.losses = time.perf_counter(), []

    def step(self, done: int, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        if done % self.every == 0 or done == self.steps:
            passed = time.perf_counter() - self.start
            mean, left = torch.stack(self.losses).mean(), passed / done * (self.steps - done)
            say(f"{self.name}: step {done}/{self.steps}  loss {mean:.4f}  {passed:.0f} s, {left:.0f} s left")
            self.losses.clear()


# --- 1. autoencoder ---------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, out: pathlib.Path) -> dict:
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    levels = len(recipe.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=digits.RESOLUTION,
    ).to(memory_format=torch.channels_last)
    pictures, _ = training_pictures(recipe)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, recipe.vae_steps // 4), recipe.vae_steps)
    progress = Progress("vae", recipe.vae_steps)
    for step in range(1, recipe.vae_steps + 1):
        chosen = pictures[torch.randint(len(pictures), (recipe.vae_batch,), generator=rng)]
        x = distort(chosen, rng, degrees=8, shift=0.08, zoom=0.1).contiguous(memory_format=torch.channels_last)
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
    split = digits.load()
    held_out = digits.render(split.test)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(100)])
        seen = torch.cat([vae.decode(vae.encode(p * 2 - 1).latent_dist.mode()).sample for p in held_out.split(100)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(out)
    seen = (seen / 2 + 0.5).clamp(0, 1)
    return {
        "parameters": vae.num_parameters(),
        "held_out_reconstruction_mse": evaluate.image_mse(seen, held_out),
        "held_out_reconstruction_accuracy": evaluate.accuracy(seen, split.test_labels),
    }


# --- 2. text and diffusion --------------------------------------------------------------------------------------------


def make_tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges learnt from our own captions: every word of theirs becomes one token.

    The vocabulary has CLIP's layout (bytes, bytes that end a word, merges, start and end), so that any text at all can
    be spelled.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    empty = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    captions = [digits.prompt(d, t) for t in digits.TEMPLATES for d in range(10)] + list(digits.FILLERS)
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


def encode(vae: AutoencoderKL, pictures: torch.Tensor, copies: int, rng: torch.Generator) -> torch.Tensor:
    """Latents (copies, n, 4, h, w) at unit scale: the pictures as they are, then slightly distorted ones."""
    with torch.no_grad():
        out = []
        for copy in range(copies):
            x = pictures if copy == 0 else distort(pictures, rng, degrees=5, shift=0.03, zoom=0.05)
            out.append(torch.cat([vae.encode(part).latent_dist.sample(rng) for part in x.split(100)]))
        return torch.stack(out) * vae.config.scaling_factor


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
        sample_size=digits.RESOLUTION // 2 ** (len(recipe.vae_channels) - 1),
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,  # diffusers' old name for the number of heads
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(  # Stable Diffusion 1.5's own numbers
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
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


def fit(
    name: str, recipe: Recipe, pipe: StableDiffusionPipeline, caption, *, steps, rates, warmup, ema_decay, seed
) -> None:
    """Train UNet and text encoder to predict the noise; they end as the moving average of their weights.

    Args:
        caption: function of (digit, random.Random) that words a training caption.
        rates: learning rates of the UNet and of the text encoder.
    """
    torch.manual_seed(seed)
    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    pictures, labels = training_pictures(recipe)
    latents = encode(pipe.vae, pictures, recipe.encoded_copies, rng)
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    text = pipe.text_encoder.train()
    parameters = [*unet.parameters(), *text.parameters()]
    groups = [{"params": list(m.parameters()), "lr": lr} for m, lr in zip((unet, text), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps // 4), steps)
    average = EMAModel(parameters, decay=ema_decay, foreach=True)
    times = pipe.scheduler.config.num_train_timesteps
    progress = Progress(name, steps)
    for step in range(1, steps + 1):
        index = torch.randint(len(labels), (recipe.batch,), generator=rng)
        clean = latents[torch.randint(len(latents), (recipe.batch,), generator=rng), index]
        captions = [
            "" if words.random() < recipe.caption_drop else caption(int(digit), words) for digit in labels[index]
        ]
        # One time from each of `batch` equal intervals: the loss then varies less from step to step.
        t = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=rng)) * times / recipe.batch
        t = t.long().clamp(max=times - 1)
        noise = torch.randn(clean.shape, generator=rng)
        noisy = pipe.scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, t, text(token_ids(pipe.tokenizer, captions)).last_hidden_state).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress.step(step, loss)
    average.copy_to(parameters)
    unet.eval()
    text.eval()


def save_pipeline(pipe: StableDiffusionPipeline, out: pathlib.Path) -> None:
    pipe.save_pretrained(out)
    save_tokenizer(pipe.tokenizer, out / "tokenizer")


def load_pipeline(folder: pathlib.Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_diffusion(recipe: Recipe, out: pathlib.Path, vae_folder: pathlib.Path) -> dict:
    torch.manual_seed(recipe.seed + 1)
    pipe = new_pipeline(recipe, AutoencoderKL.from_pretrained(vae_folder).eval())
    fit(
        "diffusion",
        recipe,
        pipe,
        lambda digit, words: digits.prompt(digit, words.choice(digits.TEMPLATES)),
        steps=recipe.diffusion_steps,
        rates=(1e-3, 1e-3),
        warmup=100,
        ema_decay=0.999,
        seed=recipe.seed + 1,
    )
    save_pipeline(pipe, out)
    return {
        "unet_parameters": pipe.unet.num_parameters(),
        "text_encoder_parameters": pipe.text_encoder.num_parameters(),
        "vocabulary": len(pipe.tokenizer),
    }


def train_prompts(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path) -> dict:
    pipe = load_pipeline(pipeline_folder)

    def caption(digit: int, words: random.Random) -> str:
        if words.random() < 0.5:
            return digits.prompt(digit, words.choice(digits.TEMPLATES))
        return digits.free_caption(digit, words)

    # A small step for the UNet, which draws well already; a large one for the text encoder, which has to learn.
    fit(
        "prompts",
        recipe,
        pipe,
        caption,
        steps=recipe.prompt_steps,
        rates=(2e-4, 1e-3),
        warmup=30,
        ema_decay=0.995,
        seed=recipe.seed + 2,
    )
    save_pipeline(pipe, out)
    return {}


# --- 3. result --------------------------------------------------------------------------------------------------------


def score(pipe: StableDiffusionPipeline, recipe: Recipe) -> dict:
    """Accuracy for three ways to ask, Frechet distance for the plain one, and the figures of real digits beside it."""
    labels = np.repeat(np.arange(10), recipe.score_per_digit)
    ways = {
        "accuracy": digits.prompt,
        "free_prompt_accuracy": lambda digit: digits.prompt(digit, "my cat wrote the number {} yesterday"),
        "numeral_accuracy": str,
    }
    split = digits.load()
    real = evaluate.pixel_features(digits.render(split.test))
    # The distance that as many real digits have, other ones than those of the comparison: no model needs to be nearer.
    others = np.random.default_rng(0).permutation(split.train)[: len(labels)]
    scores = {
        "samples": len(labels),
        "steps": recipe.score_steps,
        "guidance_scale": recipe.score_guidance,
        "real_accuracy": evaluate.digit_classifier().held_out_accuracy,
        "real_frechet_distance": evaluate.frechet_distance(evaluate.pixel_features(digits.render(others)), real),
    }
    for name, caption in ways.items():
        drawn = evaluate.draw(
            pipe,
            [caption(int(digit)) for digit in labels],
            seeds=range(len(labels)),
            steps=recipe.score_steps,
            guidance_scale=recipe.score_guidance,
        )
        scores[name] = evaluate.accuracy(drawn, labels)
        if name == "accuracy":
            scores["frechet_distance"] = evaluate.frechet_distance(evaluate.pixel_features(drawn), real)
    return scores


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
    # How and from where this process had loaded the parts says nothing to a user.
    for config in [out / "model_index.json", *out.rglob("*config.json")]:
        settings = json.loads(config.read_text())
        kept = {k: v for k, v in settings.items() if k not in ("_name_or_path", "is_local", "local_files_only")}
        if kept != settings:
            config.write_text(json.dumps(kept, indent=2) + "\n")


def finished_stage(folder: pathlib.Path, recipe: Recipe) -> dict | None:
    """What the stage in this folder reported, if it was finished with the same recipe."""
    try:
        stage = json.loads((folder / "stage.json").read_text())
    except FileNotFoundError:
        return None
    return stage["report"] if stage["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe))) else None


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
    stage = {"recipe": dataclasses.asdict(recipe), "report": report}
    (fresh / "stage.json").write_text(json.dumps(stage, indent=2) + "\n")
    publish(fresh, folder)
    say(f"{name}: {report}")
    return report


def command_line(args: argparse.Namespace, steps: dict) -> str:
    """The command that makes this model again: everything that matters to it, and no folder of this machine."""
    words = [f"python examples/train_tiny_sd.py --out DIR --seed {args.seed} --threads {args.threads}"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in steps.items() if value is not None]
    return " ".join(words + ["--smoke"] * args.smoke)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the pipeline folder to write (replaced)")
    parser.add_argument("--work", type=pathlib.Path, help="where stages are kept (default: OUT.stages beside it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--diffusion-steps", type=int)
    parser.add_argument("--prompt-steps", type=int)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--note", default="", help="words for card.json, for example that the machine was busy")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two steps per stage: shows that it runs")
    args = parser.parse_args(arguments)

    if int(transformers.__version__.split(".")[0]) < 5:
        parser.error(
            f"training needs transformers 5 or newer, this is {transformers.__version__} (the result does not)"
        )
    steps = {name: getattr(args, name) for name in ("vae_steps", "diffusion_steps", "prompt_steps")}
    base = SMOKE if args.smoke else Recipe()
    recipe = dataclasses.replace(base, seed=args.seed, **{k: v for k, v in steps.items() if v is not None})
    out = args.out.resolve()
    work = (args.work or out.with_name(out.name + ".stages")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in [*work.glob(".*-*"), *out.parent.glob(f".{out.name}-*")]:
        shutil.rmtree(unfinished)  # of a run that was killed
    torch.set_num_threads(args.threads)

    stages = {"vae": run_stage("vae", recipe, work, train_vae)}
    stages["diffusion"] = run_stage("diffusion", recipe, work, train_diffusion, work / "vae")
    stages["prompts"] = run_stage("prompts", recipe, work, train_prompts, work / "diffusion")

    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    write_half(load_pipeline(work / "prompts"), fresh)
    say(f"scoring {3 * 10 * recipe.score_per_digit} pictures")
    start = time.perf_counter()
    scores = score(load_pipeline(fresh), recipe)
    say(f"scores ({time.perf_counter() - start:.0f} s): {scores}")
    card = {
        "what": "Stable Diffusion of stock diffusers classes, trained from scratch on handwritten digits",
        "data": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998, "
        f"CC BY 4.0): {len(digits.load().train)} scans for training, {digits.HELD_OUT} held out",
        "command": command_line(args, steps),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "recipe": dataclasses.asdict(recipe),
        "stages": stages,
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "threads": args.threads,
        "note": args.note,
        "scores": scores,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (fresh / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    for path in (fresh, *fresh.rglob("*")):  # mkdtemp's folders and the writers of weights are private
        path.chmod(0o755 if path.is_dir() else 0o644)
    publish(fresh, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"wrote {out}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
