"""Train the tiny Inf-DiT that linattn ships, from scratch, on a CPU (under 20 minutes of one core).

    python examples/train_tiny_infdit.py --out build/tiny --threads 1     (then copy its folder into linattn/bundled)

A network that makes photographs four times larger, trained on patches of ten photographs that ship inside scikit-image
and scikit-learn (linattn.bundled.photographs; two more are held out for the scores).

1. network    by the loss of EDM, see train_network; before that, the ends of the network are set by least squares, see
              prepare;
2. pipeline   written in float16 beside its scheduler, as a user loads it;
3. scores     PSNR and SSIM of the held-out photographs beside those of bicubic and Lanczos filters; they go into the
              card.json.

A run that was killed goes on where it was, see tiny_training.py.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import random
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing is to be looked up

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from tiny_training import (
    CHECKPOINT_EVERY,
    Delivery,
    Progress,
    Stages,
    clean_configs,
    edit_json,
    generators,
    load_checkpoint,
    run_script,
    save_checkpoint,
)

from linattn.adapters import InfDiTTransformer2DModel, InfDiTUpscalePipeline
from linattn.bundled import photographs
from linattn.schedulers import EDMScheduler
from linattn.schedulers.edm import preconditioning

MODEL = "tiny_infdit"
PATCH = 4  # pixels along the side of a token: one low-resolution pixel, and 48 numbers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults made the bundled model; SMOKE only shows that it runs."""

    seed: int = 0
    steps: int = 1200
    batch: int = 8
    crop: int = 64  # pixels along the side of a training patch
    width: int = 96
    layers: int = 4
    heads: int = 3
    block: int = 8
    sigma_max: float = 0.03
    sigma_min: float = 0.012
    top_share: float = 0.25  # of the patches that have the highest noise, which every sampling begins with
    rate: float = 4e-3
    weight_decay: float = 0.1  # there are ten photographs to learn from, and 700 thousand weights
    last_rate: float = 0.3  # of the last layer, relative to the others
    ema_decay: float = 0.998
    sizes: tuple[float, ...] = (1.0, 0.7, 0.5)  # at which photographs are seen; reduced, they are sharper
    tint: float = 0.5  # share of patches whose colours are changed
    kept: int = 32  # directions of the enlarged picture's patches that tokens start with
    constant: float = 8.0
    sampler: str = "heun"
    score_steps: tuple[int, ...] = (2, 4, 20)


SMOKE = Recipe(steps=2, batch=2, crop=64, layers=1, score_steps=(2,))


# --- 1. network -------------------------------------------------------------------------------------------------------


class Patches:
    """Random patches of the training photographs and what the network sees of them."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.pictures, self.weights = recipe, [], []
        for name, weight in photographs.TRAINING.items():
            photograph = Image.fromarray(photographs.load(name))
            for size in recipe.sizes:
                sides = [round(side * size) for side in photograph.size]
                if min(sides) < recipe.crop:
                    continue
                reduced = photograph if size == 1 else photograph.resize(sides, Image.Resampling.BICUBIC)
                self.pictures.append(torch.from_numpy(np.array(reduced)).permute(2, 0, 1))
                self.weights.append(weight * sides[0] * sides[1])

    def draw(self, count: int, words: random.Random) -> torch.Tensor:
        """(count, 3, crop, crop) in [-1, 1], turned and mirrored in all eight ways, some with other colours."""
        side, patches = self.recipe.crop, []
        for _ in range(count):
            (picture,) = words.choices(self.pictures, self.weights)
            top, left = (words.randrange(length - side + 1) for length in picture.shape[1:])
            patch = torch.rot90(picture[:, top : top + side, left : left + side], words.randrange(4), (1, 2))
            patch = (patch.flip(2) if words.random() < 0.5 else patch) / 127.5 - 1
            if words.random() < self.recipe.tint:
                channels = words.sample(range(3), 3)
                contrast, brightness = words.uniform(0.8, 1.2), words.uniform(-0.1, 0.1)
                patch = (patch[channels] * contrast + brightness).clamp(-1, 1)
            patches.append(patch)
        return torch.stack(patches)


@dataclasses.dataclass
class Batch:
    """Inputs of the network, and F that it should give."""

    seen: torch.Tensor  # (n, 6, crop, crop), c_in [noisy | enlarged]
    c_noise: torch.Tensor  # (n,)
    lr: torch.Tensor  # (n, 3, crop / 4, crop / 4)
    target: torch.Tensor  # (n, 3, crop, crop)
    c_out: torch.Tensor  # (n, 1, 1, 1)


def corrupt(recipe: Recipe, clean: torch.Tensor, sigma: torch.Tensor, rng: torch.Generator) -> Batch:
    r"""What the sampler meets at noise level sigma (n,), and F that it should be given.

        x = lr_up + sigma N(0, 1)

    That is what the pipeline starts from. EDM trains on clean + sigma N(0, 1), which is the same once sigma hides what
    lr_up lacks; a network of this size would need most of its strength to carry so much noise through. With as little
    noise as here it is not the same, and x must not tell what the sampler cannot know. So D is the mean of all pictures
    that lr_up can stand for, at every level, and that is what the sampler arrives at, with any number of steps.
    """
    lr = F.interpolate(clean, scale_factor=1 / photographs.SCALE, mode="bicubic", antialias=True).clamp(-1, 1)
    lr = ((lr + 1) * 127.5).round() / 127.5 - 1  # files have 8 bits
    lr_up = F.interpolate(lr, scale_factor=photographs.SCALE, mode="bicubic", antialias=True).clamp(-1, 1)
    sigma = sigma.view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=rng)
    noisy = lr_up + sigma * noise
    c = preconditioning(sigma)
    seen = torch.cat([noisy, lr_up], 1) * c.c_in
    return Batch(seen, c.c_noise.flatten(), lr, (clean - c.c_skip * noisy) / c.c_out, c.c_out)


def draw_sigmas(recipe: Recipe, count: int, rng: torch.Generator) -> torch.Tensor:
    """Some at sigma_max, the others with logarithms that are spread evenly down to sigma_min, one per equal part."""
    share = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    share = ((share - recipe.top_share) / (1 - recipe.top_share)).clamp(min=0)
    return recipe.sigma_max * (recipe.sigma_min / recipe.sigma_max) ** share


def tokens(pixels: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) -> (n h w / 16, c * 16), channels outermost, as the weights of the patch embedding have them."""
    return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)


def whitening(values: torch.Tensor, count: int) -> torch.Tensor:
    """(count, d): directions of values (n, d) with the largest variance, scaled so that it is 1."""
    variance, directions = torch.linalg.eigh(values.T @ values / len(values))
    return (directions[:, -count:] / (variance[-count:] + 1e-4).sqrt()).T


def solve(features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | float = 1.0, ridge: float = 1e-5):
    """Least squares in float64: (d, e) of features (n, d) and target (n, e)."""
    a, b = (features * weight).double(), (target * weight).double()
    gram = a.T @ a
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, a.T @ b).float()


@torch.no_grad()
def prepare(net: InfDiTTransformer2DModel, recipe: Recipe, patches: Patches, words: random.Random, rng) -> None:
    """First values of the weights, from which so small a network gets somewhere in so short a time.

    - Tokens start as whitened differences between the noisy and the enlarged patch, whitened directions of the enlarged
      patch, and constants that keep LayerNorm from hiding how strong these are.
    - Every layer starts as the identity, and its heads look at their own or a neighbouring token, each at another one.
    - The last layer is the best linear one for these tokens. F is what D lacks, divided by c_out; the last modulation
      starts with 1 / c_out, so that the layers before it need not know sigma.
    """
    width, heads = recipe.width, recipe.heads
    size = width // heads
    for layer in net.transformer_blocks:
        for module in (layer.attn, layer.cross_attn):
            if module is not None:
                for linear in (module.to_q, module.to_k, module.to_v):
                    torch.nn.init.normal_(linear.weight, std=width**-0.5)
        torch.nn.init.normal_(layer.ff.net[0].proj.weight, std=width**-0.5)
        for linear in (layer.attn.to_out[0], layer.ff.net[2]):
            linear.weight.zero_()
    cross = net.transformer_blocks[0].cross_attn
    cross.to_out[0].weight.zero_()
    # Attention that depends on the distance only: a constant query, and a constant key that is turned as far as the
    # rotation turns over the distance. Two frequencies for the row and two for the column.
    neighbours = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    for i in range(recipe.layers * heads):
        attn, head = net.transformer_blocks[i // heads].attn, slice(i % heads * size, (i % heads + 1) * size)
        query, key = torch.zeros(size), torch.zeros(size)
        for axis, distance in enumerate(neighbours[i % len(neighbours)]):
            for pair in (0, 1):
                angle = distance * 10000 ** (-2 * pair / (size // 2))
                first = axis * size // 2 + 2 * pair
                query[first] = 1.0
                key[first], key[first + 1] = math.cos(angle), -math.sin(angle)
        attn.to_q.bias[head], attn.to_k.bias[head] = (1.5 * (size / 4) ** 0.5 * x for x in (query, key))
        attn.norm_qk.weight.fill_(1.5)
    # The same in cross-attention, with learnt positions.
    side = cross.lr_side

    def waves(rows: int, step: float, start: tuple[float, float]) -> torch.Tensor:
        at = step * torch.arange(rows)
        angles = (torch.cartesian_prod(at, at) + torch.tensor(start))[..., None] / 2.0 ** torch.arange(4)
        return 1.5 * F.pad(torch.cat([angles.cos(), angles.sin()], -1).flatten(1), (0, size - 16))

    for head in range(heads):
        step = side / recipe.block
        start = tuple(side + (step - 1) / 2 + distance for distance in neighbours[head % len(neighbours)])
        cross.query_position[:, head] = waves(recipe.block, step, start)
        cross.key_position[:, head] = waves(3 * side, 1.0, (0.0, 0.0))

    def batch(sigma: torch.Tensor) -> Batch:
        return corrupt(recipe, patches.draw(len(sigma), words), sigma, rng)

    batches = [batch(draw_sigmas(recipe, 8, rng)) for _ in range(12)]
    noisy, enlarged = torch.cat([tokens(b.seen) for b in batches]).chunk(2, 1)
    differences = whitening(noisy - enlarged, noisy.shape[1])
    embed, one = torch.zeros(width, 2 * noisy.shape[1]), noisy.shape[1]
    known = one + recipe.kept
    embed[:one] = torch.cat([differences, -differences], 1)
    embed[one:known, one:] = whitening(enlarged, recipe.kept)
    net.patch_embed.weight.copy_(embed.view_as(net.patch_embed.weight))
    net.patch_embed.bias[known:] = recipe.constant * (-1.0) ** torch.arange(width - known)
    low = torch.cat([F.unfold(b.lr, 2, stride=2).transpose(1, 2).flatten(0, 1) for b in batches])
    turn = torch.linalg.qr(torch.randn(width, low.shape[1]))[0]
    net.lr_embed.weight.copy_((turn @ whitening(low, low.shape[1])).view_as(net.lr_embed.weight))

    def features(b: Batch) -> torch.Tensor:
        caught = []
        hook = net.proj_out.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        with torch.enable_grad():  # without, the network runs in strips
            net(b.seen, b.c_noise, b.lr)
        hook.remove()
        x = caught[0].detach().flatten(0, 1)
        return torch.cat([x, torch.ones(len(x), 1)], 1)

    def outputs(b: Batch) -> torch.Tensor:
        return tokens(b.target).unflatten(1, (3, -1)).transpose(1, 2).flatten(1)  # channels innermost

    sigmas = torch.linspace(math.log(recipe.sigma_max), math.log(recipe.sigma_min), 16).exp()
    c = preconditioning(sigmas)
    condition = torch.cat([net._condition(c.c_noise, None, len(sigmas)), torch.ones(len(sigmas), 1)], 1)
    weights = solve(condition, (c.c_out[0] / c.c_out - 1)[:, None], ridge=1e-7)[:, 0]
    # The second half of the modulation is the scale.
    net.modulation_out.weight[width:], net.modulation_out.bias[width:] = weights[:-1], weights[-1]

    for parameter in (p for part in fixed(net) for p in part.parameters()):
        parameter.copy_(parameter.half())  # the precision that they are shipped in
    c_out = torch.cat([b.c_out.flatten().repeat_interleave((recipe.crop // PATCH) ** 2) for b in batches])
    weights = solve(torch.cat([features(b) for b in batches]), torch.cat([outputs(b) for b in batches]), c_out[:, None])
    net.proj_out.weight.copy_(weights[:-1].T)
    net.proj_out.bias.copy_(weights[-1])


def new_network(recipe: Recipe) -> InfDiTTransformer2DModel:
    return InfDiTTransformer2DModel(
        hidden_size=recipe.width,
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        patch_size=PATCH,
        block_size=recipe.block,
        vector_dim=0,
    )


def fixed(net: InfDiTTransformer2DModel) -> list[torch.nn.Module]:
    """The parts that stay as they were prepared: Adam's steps, equally large for all weights, would blur them."""
    return [net.patch_embed, net.lr_embed, net.time_embed, net.modulation_out]


def train_network(recipe: Recipe, out: pathlib.Path) -> dict:
    """The loss is the squared error of D, the estimate of the clean picture (EDM's with weight c_out^2)."""
    rng, words = generators(recipe.seed)
    patches, net = Patches(recipe), new_network(recipe).train()
    started = time.process_time()
    prepare(net, recipe, patches, words, rng)
    for part in fixed(net):
        part.requires_grad_(False)
    last = list(net.proj_out.parameters())
    others = [p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("proj_out")]
    parameters = [*others, *last]
    groups = [{"params": others}, {"params": last, "lr": recipe.rate * recipe.last_rate}]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, recipe.steps // 4), recipe.steps)
    average = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    kept = {"network": net, "optimizer": optimizer, "schedule": schedule, "average": average}
    checkpoint = out.parent / "network.checkpoint"
    done = load_checkpoint(checkpoint, recipe, kept, rng, words)
    progress = Progress("network", recipe.steps, done)
    unit = preconditioning(torch.tensor(recipe.sigma_max)).c_out
    for step in range(done + 1, recipe.steps + 1):
        batch = corrupt(recipe, patches.draw(recipe.batch, words), draw_sigmas(recipe, recipe.batch, rng), rng)
        given = net(batch.seen, batch.c_noise, batch.lr, return_dict=False)[0]
        loss = (batch.c_out / unit * (given - batch.target)).square().mean()
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
    net.eval().save_pretrained(out)
    return {"parameters": net.num_parameters(), "cpu_seconds": round(time.process_time() - started, 1)}


# --- 2. results -------------------------------------------------------------------------------------------------------


def write_pipeline(recipe: Recipe, out: pathlib.Path, network_folder: pathlib.Path) -> dict:
    """float16 files, which load as float32 unless a torch_dtype is asked for."""
    net = InfDiTTransformer2DModel.from_pretrained(network_folder).to(torch.float16)
    scheduler = EDMScheduler(sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max, sampler=recipe.sampler, eta=0.0)
    InfDiTUpscalePipeline(transformer=net, scheduler=scheduler).save_pretrained(out)
    clean_configs(out)
    return {"bytes": sum(file.stat().st_size for file in out.rglob("*.safetensors"))}


def score(recipe: Recipe, out: pathlib.Path, pipeline_folder: pathlib.Path) -> dict:
    """Both held-out photographs by both filters and by the model with several numbers of steps."""
    pipe = InfDiTUpscalePipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    scores = {"border": photographs.BORDER, "steps": recipe.score_steps}
    for name in photographs.HELD_OUT:
        photograph = photographs.original(name)
        small = photographs.small(photograph)
        pictures = {filter: photographs.enlarged(small, filter) for filter in ("bicubic", "lanczos")}
        for steps in recipe.score_steps:
            rng = torch.Generator().manual_seed(recipe.seed)
            pictures[f"{steps} steps"] = pipe(small, num_inference_steps=steps, generator=rng).images[0]
        figures = photographs.Score(photograph, pictures)
        scores[name] = {"tiles": figures.tiles, **figures.to_json()}
    return scores


STAGES = Stages(
    {
        "network": (
            *("seed", "steps", "batch", "crop", "width", "layers", "heads", "block", "sigma_max", "sigma_min"),
            *("top_share", "rate", "weight_decay", "last_rate", "ema_decay", "sizes", "tint", "kept", "constant"),
        ),
        "pipeline": ("sampler",),
        "scores": ("score_steps",),
    }
)
PLAN = {
    "network": (train_network,),
    "pipeline": (write_pipeline, "network"),
    "scores": (score, "pipeline"),
}
DELIVERIES = {
    MODEL: Delivery(
        "pipeline",
        ("network", "pipeline"),
        "Inf-DiT for 4 times larger photographs, trained from scratch on patches of ten photographs",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    code = run_script(pathlib.Path(__file__).name, __doc__, (Recipe(), SMOKE), STAGES, PLAN, DELIVERIES, arguments)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=pathlib.Path)
    card = parser.parse_known_args(arguments)[0].out / MODEL / "card.json"
    if card.exists():  # run_script speaks of the data of the other scripts
        data = {
            "trained on": {name: photographs.SOURCES[name] for name in photographs.TRAINING},
            "held out": {name: photographs.SOURCES[name] for name in photographs.HELD_OUT},
        }
        edit_json(card, lambda settings: settings | {"data": data})
    return code


if __name__ == "__main__":
    sys.exit(main())
