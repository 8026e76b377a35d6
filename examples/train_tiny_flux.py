"""Train the tiny FLUX that linattn ships, from scratch, on a CPU (half an hour on two free cores).

    python examples/train_tiny_flux.py --out build/tiny       (then copy its folder over that of linattn/bundled)

A FLUX of stock diffusers and transformers classes that draws what the tiny Stable Diffusion of train_tiny_sd.py draws:
several handwritten digits in the order that the prompt names (linattn.bundled.canvases).

1. vae        as in train_tiny_sd.py, with fewer channels;
2. cells      the same;
3. text       a T5 encoder and a CLIP text encoder, which learn to read captions: at its word, T5 has to tell a digit,
              its place and how many there are; CLIP's pooled vector has to tell the whole order. They stay as they are
              from here on, as in FLUX;
4. diffusion  a FLUX transformer, by flow matching: first on single cells, where words get their meaning, then on whole
              canvases. Beside it, readers that are thrown away afterwards have to tell from the tokens of the picture
              which digit of the order their cell shows, and what that digit is: without them the model draws digits of
              the prompt in any order for a long time, because the loss of flow matching hardly sees the difference;
5. pipeline   written in float16, as a user loads it;
6. student    windows for it: `linattn distill clear_tiny_flux`;
7. pooled     the same with pooled keys (f = 4) beside the window;
8. scores     all of them, and the controls, as `linattn eval` gives them; they go into the card.json of all.

Its pictures are 144 x 144 and its prompts 16 tokens long, which is for the caller to say, because FluxPipeline has
other defaults: pipe(prompt, height=144, width=144, max_sequence_length=16).

A run that was killed goes on where it was, see tiny_training.py.
"""

import dataclasses
import os
import pathlib
import random
import string
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing is to be looked up

import torch
import torch.nn.functional as F
import train_tiny_sd as sd
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tiny_training import (
    CHECKPOINT_EVERY,
    Delivery,
    Progress,
    Stages,
    edit_json,
    generators,
    load_checkpoint,
    run_script,
    save_checkpoint,
    say,
    use_everywhere,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from linattn.adapters import CLEAR
from linattn.bundled import canvases, digits
from linattn.cli._variants import TITLES, variants

MODEL, STUDENT, POOLED = "tiny_flux", "tiny_flux_clear", "tiny_flux_clear_down_4"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults made the bundled model; SMOKE only shows that it runs."""

    seed: int = 0
    vae_steps: int = 260
    text_steps: int = 400
    cell_steps: int = 400
    canvas_steps: int = 3200
    vae_batch: int = 8
    text_batch: int = 64
    cell_batch: int = 64
    batch: int = 32
    vae_channels: tuple[int, ...] = (16, 32, 32, 32)  # four levels: f = 8
    latent_std: float = 1.0  # in the stages vae and cells; diffusion measures and scales anew
    double_blocks: int = 1
    single_blocks: int = 4
    heads: int = 3
    rope: tuple[int, ...] = (4, 14, 14)  # of each head's channels: those that turn with the image, the row, the column
    t5_width: int = 64
    t5_layers: int = 3
    clip_width: int = 32
    clip_layers: int = 2
    prompt_tokens: int = 16
    rate: float = 2e-3
    ema_decay: float = 0.998
    caption_drop: float = 0.1  # share of empty captions: classifier-free guidance needs them
    lengths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 4)  # digits on a canvas: one of these, drawn evenly
    read_after: tuple[int, int] = (1, 2)  # single blocks after which places, and digits, are read off the tokens
    read_weight: float = 0.2  # of these two losses, beside that of flow matching
    noise_mean: float = 1.0  # of the logit of the noise level in training
    shift: float = 2.5  # of the noise levels that the sampler visits: the higher, the more of them are high
    pens: int = 16
    written: int = 360  # cells that each pen writes for canvases of one digit, of two, and so on
    train_scans: int | None = None  # None: all
    student_steps: int = 1500
    student_canvases: int = 2000
    window_size: int = 3
    down_factor: int = 4
    score_count: int = 100  # pictures per set of orders
    score_steps: int = 15
    score_guidance: float = 5.0


SMOKE = Recipe(
    vae_steps=2,
    text_steps=2,
    cell_steps=1,
    canvas_steps=2,
    vae_batch=2,
    text_batch=4,
    cell_batch=4,
    batch=4,
    vae_channels=(8, 8, 8, 8),
    single_blocks=2,
    read_after=(0, 1),
    heads=2,
    rope=(4, 6, 6),
    t5_width=16,
    t5_layers=1,
    clip_width=16,
    clip_layers=1,
    pens=2,
    written=120,
    train_scans=120,
    student_steps=2,
    student_canvases=4,
    score_count=2,
    score_steps=2,
)


# --- 3. text ----------------------------------------------------------------------------------------------------------


def make_t5_tokenizer(recipe: Recipe) -> T5TokenizerFast:
    """The words of our captions, and single characters, so that any other English text can be spelled."""
    words = [("▁" + word, -1.0) for word in ("a", "an", "and", *digits.WORDS)] + [(",", -1.0)]
    spelled = [(sign, -10.0) for sign in ("▁", *string.ascii_letters, *string.digits, *string.punctuation)]
    known = {word for word, _ in words}
    vocab = [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0), *words, *(sign for sign in spelled if sign[0] not in known)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=recipe.prompt_tokens)


def new_text_encoders(recipe: Recipe) -> tuple[T5TokenizerFast, T5EncoderModel, CLIPTokenizer, CLIPTextModel]:
    t5_tokenizer, clip_tokenizer = make_t5_tokenizer(recipe), sd.make_tokenizer(recipe)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=recipe.t5_width,
            d_kv=recipe.t5_width // 4,
            num_heads=4,
            d_ff=2 * recipe.t5_width,
            num_layers=recipe.t5_layers,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=recipe.clip_width,
            intermediate_size=2 * recipe.clip_width,
            projection_dim=recipe.clip_width,
            num_hidden_layers=recipe.clip_layers,
            num_attention_heads=2,
            max_position_embeddings=recipe.prompt_tokens,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return t5_tokenizer, t5, clip_tokenizer, clip


def train_text(recipe: Recipe, out: pathlib.Path) -> dict:
    """Both text encoders, each with linear readers that are thrown away afterwards."""
    _, words = generators(recipe.seed + 2)
    t5_tokenizer, t5, clip_tokenizer, clip = new_text_encoders(recipe)
    t5.train()
    clip.train()
    longest = canvases.LONGEST
    word_reader = torch.nn.Linear(recipe.t5_width, 10 + 2 * longest)  # which digit; its place; how many there are
    order_reader = torch.nn.Linear(recipe.clip_width, longest * 11)  # the digit at each place, or none
    parameters = [p for module in (t5, clip, word_reader, order_reader) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.text_steps // 10, recipe.text_steps)
    digit_words = torch.tensor(t5_tokenizer.convert_tokens_to_ids(["▁" + word for word in digits.WORDS]))
    progress, right = Progress("text", recipe.text_steps), []
    for step in range(1, recipe.text_steps + 1):
        orders = [canvases.draw_order(words, words.randint(1, longest)) for _ in range(recipe.text_batch)]
        captions = [canvases.caption(order) for order in orders]
        ids = sd.token_ids(t5_tokenizer, captions)
        canvas, token = torch.isin(ids, digit_words).nonzero(as_tuple=True)  # in the order of the caption
        which = torch.tensor([digit for order in orders for digit in order])
        place = torch.tensor([place for order in orders for place in range(len(order))])
        count = torch.tensor([len(order) - 1 for order in orders])[canvas]
        read = word_reader(t5(ids)[0][canvas, token]).split((10, longest, longest), dim=1)
        whole = torch.tensor([[*order, *[10] * (longest - len(order))] for order in orders])
        read_order = order_reader(clip(sd.token_ids(clip_tokenizer, captions)).pooler_output).view(-1, longest, 11)
        loss = F.cross_entropy(read_order.flatten(0, 1), whole.flatten())
        loss = loss + sum(F.cross_entropy(*pair) for pair in zip(read, (which, place, count), strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.step(step, loss)
        right.append((read_order.argmax(2) == whole).all(1).float().mean())
    t5.eval().save_pretrained(out / "text_encoder_2")
    t5_tokenizer.save_pretrained(out / "tokenizer_2")
    clip.eval().save_pretrained(out / "text_encoder")
    sd.save_tokenizer(clip_tokenizer, out / "tokenizer")
    return {
        "t5_parameters": t5.num_parameters(),
        "clip_parameters": clip.num_parameters(),
        "orders_read_from_the_pooled_vector": torch.stack(right[-20:]).mean().item(),
    }


# --- 4. diffusion -----------------------------------------------------------------------------------------------------


class Latents(sd.Cells):
    """Cells as FLUX scales latents, (z - shift) * scale, and in its tokens of 2 x 2."""

    def __init__(self, folder: pathlib.Path, vae: AutoencoderKL, rng: random.Random):
        super().__init__(folder)
        self._map(lambda x: x / vae.config.scaling_factor)
        orders = [canvases.draw_order(rng, rng.randint(1, canvases.LONGEST)) for _ in range(400)]
        z = self.paste(orders, rng)
        self.shift, self.scale = z.mean().item(), 1 / z.std().item()
        self._map(lambda x: (x - self.shift) * self.scale)

    def _map(self, change) -> None:
        for tensors in (self.written, self.empty):
            for count in tensors:
                tensors[count] = change(tensors[count])


def pack(x: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) -> (n, h w / 4, 4 c), as FluxPipeline does."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def position_ids(height: int, width: int, row: int = 0, column: int = 0) -> torch.Tensor:
    """(height * width, 3): image, row and column of every token, in raster order, the first at (row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height) + row, torch.arange(width) + column, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], 2).reshape(-1, 3).float()


class Readers(torch.nn.Module):
    """What the tokens of the picture know in the middle of the transformer: the place of their cell, and its digit."""

    def __init__(self, transformer: FluxTransformer2DModel, blocks: tuple[int, int]):
        super().__init__()
        self.width, self.seen = transformer.inner_dim, {}
        self.place = torch.nn.Linear(self.width, 1 + canvases.LONGEST)  # none, first, second, ...
        self.digit = torch.nn.Linear(self.width, 11)
        for name, block in zip(("place", "digit"), blocks, strict=True):
            transformer.single_transformer_blocks[block].register_forward_hook(
                lambda block, inputs, output, name=name: self.seen.__setitem__(name, output[1])
            )

    def loss(self, **targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against the classes of every token, (n, tokens) each, summed over what is read."""
        total = 0.0
        for name, target in targets.items():
            tokens = F.layer_norm(self.seen.pop(name), (self.width,))
            total = total + F.cross_entropy(getattr(self, name)(tokens).flatten(0, 1), target.flatten())
        return total


def token_targets(orders: list[canvases.Order], places: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """The classes that readers have to find, of every token of a picture with ``tokens`` on a side of a cell."""
    digits_of = torch.tensor([[*order, *[10] * (1 + canvases.LONGEST - len(order))] for order in orders])
    digit = digits_of.gather(1, places % digits_of.shape[1])  # -1 is the last column, which is 10: no digit

    def spread(cells: torch.Tensor) -> torch.Tensor:
        cells = cells[:, :, None, None, None].expand(-1, -1, 1, tokens, tokens)
        return (canvases.join(cells) if cells.shape[1] == canvases.CELLS else cells).flatten(1)

    return {"place": spread(places + 1), "digit": spread(digit)}


def new_transformer(recipe: Recipe, latent_channels: int) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=recipe.double_blocks,
        num_single_layers=recipe.single_blocks,
        attention_head_dim=sum(recipe.rope),
        num_attention_heads=recipe.heads,
        joint_attention_dim=recipe.t5_width,
        pooled_projection_dim=recipe.clip_width,
        axes_dims_rope=recipe.rope,
    )
    # Every block starts as the identity, and the model as zero (Peebles and Xie, "Scalable diffusion models with
    # transformers", 2023, section 3.2, adaLN-Zero).
    modulations = [module.linear for name, module in transformer.named_modules() if hasattr(module, "linear")]
    for layer in (*modulations, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def train_diffusion(
    recipe: Recipe, out: pathlib.Path, vae_folder: pathlib.Path, cells_folder: pathlib.Path, text_folder: pathlib.Path
) -> dict:
    rng, words = generators(recipe.seed + 3)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    latents = Latents(cells_folder, vae, random.Random(recipe.seed))
    vae.register_to_config(shift_factor=latents.shift, scaling_factor=latents.scale)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(text_folder / "text_encoder").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(text_folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text_folder / "text_encoder_2").eval(),
        tokenizer_2=T5TokenizerFast.from_pretrained(text_folder / "tokenizer_2"),
        transformer=new_transformer(recipe, vae.config.latent_channels),
    )
    transformer = pipe.transformer.train()
    readers = Readers(transformer, recipe.read_after)
    parameters = [*transformer.parameters(), *readers.parameters()]
    steps = recipe.cell_steps + recipe.canvas_steps
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 4), steps)
    average = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    kept = {
        "transformer": transformer,
        "readers": readers,
        "optimizer": optimizer,
        "schedule": schedule,
        "average": average,
    }
    checkpoint = out.parent / "diffusion.checkpoint"
    done = load_checkpoint(checkpoint, recipe, kept, rng, words)
    progress, reading = Progress("diffusion", steps, done), []
    for step in range(done + 1, steps + 1):
        single = step <= recipe.cell_steps
        batch = recipe.cell_batch if single else recipe.batch
        lengths = (1,) if single else recipe.lengths
        orders = [canvases.draw_order(words, words.choice(lengths)) for _ in range(batch)]
        if single:
            clean, places = latents.single(orders, words), torch.zeros(batch, 1, dtype=torch.long)
        else:
            clean, places = latents.compose(orders, words)
        height, width = (side // 2 for side in clean.shape[2:])
        # A cell by itself stands anywhere on the canvas.
        corner = (height * words.randrange(canvases.SIDE), width * words.randrange(canvases.SIDE)) if single else (0, 0)
        captions = ["" if words.random() < recipe.caption_drop else canvases.caption(order) for order in orders]
        with torch.no_grad():
            text, pooled, text_ids = pipe.encode_prompt(captions, max_sequence_length=recipe.prompt_tokens)
        # One noise level from each of `batch` equally likely intervals: the loss then varies less from step to step.
        # Layout and words are decided at high noise, so that is where most of them are.
        share = ((torch.arange(batch) + torch.rand(batch, generator=rng)) / batch).clamp(1e-4, 1 - 1e-4)
        sigma = torch.sigmoid(recipe.noise_mean + torch.special.ndtri(share))
        noise = torch.randn(clean.shape, generator=rng)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        prediction = transformer(
            hidden_states=pack(noisy),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=position_ids(height, width, *corner),
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(prediction, pack(noise - clean))
        tokens = width if single else width // canvases.SIDE
        read = readers.loss(**token_targets(orders, places, tokens))
        optimizer.zero_grad()
        (loss + recipe.read_weight * read).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress.step(step, loss)
        reading.append(read.detach())
        if step % progress.every == 0:
            say(f"diffusion: readers {torch.stack(reading).mean():.4f}")
            reading.clear()
        if step % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, recipe, kept, rng, words, step)
    average.copy_to(parameters)
    transformer.eval()
    save_pipeline(pipe, out)
    return {"transformer_parameters": transformer.num_parameters(), "shift": latents.shift, "scale": latents.scale}


def save_pipeline(pipe: FluxPipeline, out: pathlib.Path) -> None:
    pipe.save_pretrained(out)
    sd.save_tokenizer(pipe.tokenizer, out / "tokenizer")


# --- 5. results -------------------------------------------------------------------------------------------------------


def load_pipeline(folder: pathlib.Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline(recipe: Recipe, out: pathlib.Path, diffusion_folder: pathlib.Path) -> dict:
    """The pipeline as float16 files, which load as float32 unless a torch_dtype is asked for, and everywhere."""
    pipe = load_pipeline(diffusion_folder).to(torch.float16)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.shift)
    save_pipeline(pipe, out)
    # In transformers 5 both names are one class; before, the other one needs a SentencePiece file, and we have none.
    edit_json(
        out / "model_index.json", lambda settings: settings | {"tokenizer_2": ["transformers", "T5TokenizerFast"]}
    )
    use_everywhere(out, ["text_encoder", "text_encoder_2"])
    return {"bytes": sum(file.stat().st_size for file in out.rglob("*.safetensors"))}


def train_student(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path, down_factor: int = 1) -> dict:
    """Windows for the pipeline, by the trainer that users have; its run is kept beside the stages."""
    return sd.distill(
        "clear_tiny_flux",
        CLEAR,
        recipe,
        out,
        pipeline_folder,
        **{"student.options.window_size": recipe.window_size, "student.options.down_factor": down_factor},
    )


def train_pooled_student(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path) -> dict:
    return train_student(recipe, out, pipeline_folder, recipe.down_factor)


def score(
    recipe: Recipe,
    out: pathlib.Path,
    pipeline_folder: pathlib.Path,
    student_folder: pathlib.Path,
    pooled_folder: pathlib.Path,
) -> dict:
    """Teacher, control and both students, before and after."""
    ways = variants(student_folder)
    pooled = variants(pooled_folder, ["before", "after"])
    return sd.score_variants(
        recipe, out, pipeline_folder, ways | {f"{name}, pooled": way for name, way in pooled.items()}, TITLES
    )


# What each stage depends on, besides everything that the stages before it depend on.
STAGES = Stages(
    {
        "vae": ("seed", "train_scans", "vae_steps", "vae_batch", "vae_channels", "latent_std"),
        "cells": ("pens", "written"),
        "text": ("text_steps", "text_batch", "t5_width", "t5_layers", "clip_width", "clip_layers", "prompt_tokens"),
        "diffusion": (
            *("cell_steps", "canvas_steps", "cell_batch", "batch", "double_blocks", "single_blocks", "heads", "rope"),
            *("rate", "ema_decay", "caption_drop", "lengths", "noise_mean", "read_after", "read_weight"),
        ),
        "pipeline": ("shift",),
        "student": ("student_steps", "student_canvases", "window_size"),
        "pooled": ("down_factor",),
        "scores": ("score_count", "score_steps", "score_guidance"),
    }
)
PLAN = {
    "vae": (sd.train_vae,),
    "cells": (sd.encode_cells, "vae"),
    "text": (train_text,),
    "diffusion": (train_diffusion, "vae", "cells", "text"),
    "pipeline": (write_pipeline, "diffusion"),
    "student": (train_student, "pipeline"),
    "pooled": (train_pooled_student, "pipeline"),
    "scores": (score, "pipeline", "student", "pooled"),
}
DELIVERIES = {
    MODEL: Delivery(
        "pipeline",
        ("vae", "cells", "text", "diffusion", "pipeline"),
        "FLUX of stock diffusers classes, trained from scratch on canvases of handwritten digits "
        "(linattn.bundled.canvases)",
    ),
    STUDENT: Delivery("student", ("student",), f"CLEAR for {MODEL}, distilled by linattn distill clear_tiny_flux"),
    POOLED: Delivery(
        "pooled", ("pooled",), f"CLEAR with pooled keys for {MODEL}, distilled by linattn distill clear_tiny_flux"
    ),
}


def main(arguments: list[str] | None = None) -> int:
    return run_script(pathlib.Path(__file__).name, __doc__, (Recipe(), SMOKE), STAGES, PLAN, DELIVERIES, arguments)


if __name__ == "__main__":
    sys.exit(main())
