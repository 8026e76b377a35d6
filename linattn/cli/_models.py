"""Where pipelines and weights of an attention come from, for the commands that draw: bundled, a folder, or the hub.

Everything that can be said without reading weights is said here, from names and configs alone; what is wrong comes out
as a :class:`Problem`, one line for the user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from linattn._quiet import quiet_diffusers
from linattn.paths import instead_of


class Kind(NamedTuple):
    """A class of pipelines that can be drawn with."""

    img2img: str  # the class that starts from a picture
    model: str  # class of its UNet or transformer
    patch: int  # a token or latent pixel of the model is patch x patch latents of the VAE
    channels: int  # of the model for one of the VAE's


#: Class in `model_index.json` -> what it is.
PIPELINES = {
    "StableDiffusionPipeline": Kind("StableDiffusionImg2ImgPipeline", "UNet2DConditionModel", 1, 1),
    "StableDiffusionXLPipeline": Kind("StableDiffusionXLImg2ImgPipeline", "UNet2DConditionModel", 1, 1),
    "FluxPipeline": Kind("FluxImg2ImgPipeline", "FluxTransformer2DModel", 2, 4),
    "StableDiffusion3Pipeline": Kind("StableDiffusion3Img2ImgPipeline", "SD3Transformer2DModel", 2, 1),
}
USUAL_GUIDANCE = 2.5  # of models that draw canvases, where nothing says another
USUAL_STEPS = 20  # of upscalers


class Problem(Exception):
    """Something that the user can put right; its message is the one line they see."""


@dataclasses.dataclass
class Source:
    """Where a model comes from: a bundled name, a folder, a repository of the hub, or one file.

    `weight_name` is the one file that is read of a folder of many weights; None: all of them.
    """

    option: str
    name: str
    kind: str
    path: Path | None
    revision: str | None = None
    weight_name: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """One digest for all files, names included; one file has its own."""
        if self.kind == "file":
            return next(iter(self.files.values()))
        return hashlib.sha256("".join(f"{k} {v}\n" for k, v in sorted(self.files.items())).encode()).hexdigest()

    def to_record(self) -> dict:
        facts = {"kind": self.kind, "name": self.name, "revision": self.revision, "sha256": self.sha256}
        return facts | {"files": self.files}


@dataclasses.dataclass
class Layout:
    """What the configs of a pipeline say, before any weights are read."""

    class_name: str
    components: tuple[str, ...]
    denoiser: dict  # the config of its UNet or transformer
    multiple: int  # of which width and height must be, pixels
    largest: int | None  # that width and height may be, pixels; None: any
    width: int  # of the pictures it was trained for, pixels
    height: int
    train_steps: int
    can_shift: bool  # whether the scheduler shifts its noise levels

    @property
    def kind(self) -> Kind:
        return PIPELINES[self.class_name]

    @property
    def has_unet(self) -> bool:
        return self.kind.model == "UNet2DConditionModel"

    @property
    def reads_guidance(self) -> bool:
        """Whether guidance is a number that the model reads (FLUX.1-dev), not a second call without the prompt."""
        return bool(self.class_name == "FluxPipeline" and self.denoiser.get("guidance_embeds"))


def line(error: BaseException) -> str:
    """An error of a library in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."


def raise_if_memory(error: Exception) -> None:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        raise Problem(f"out of memory; a smaller --size or 16-bit --dtype needs less: {line(error)}") from error


def locate(option: str, name: str) -> Source:
    """Say what a name means, without asking the hub: a source from there has no path yet."""
    from linattn import bundled

    if name in bundled.names():
        return Source(option, name, "bundled", bundled.path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(option, str(path.absolute()), "folder", path.absolute())
    if path.exists():
        raise Problem(f"{option}: expected a folder or a hub name, {name!r} is a file")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Source(option, name, "hub", None)
    raise Problem(f"{option}: the folder {name!r} does not exist; {instead_of(name)}")


def guidance_of(source: Source) -> float:
    """The guidance that a model which draws canvases was scored with, from the card that its training wrote."""
    try:
        return float(json.loads((source.path / "card.json").read_text())["scores"]["settings"]["guidance_scale"])
    except (FileNotFoundError, KeyError):
        return USUAL_GUIDANCE


def steps_of(source: Source) -> int:
    """The steps that an upscaler was scored with first, from the card that its training wrote."""
    try:
        return int(json.loads((source.path / "card.json").read_text())["scores"]["steps"][0])
    except (FileNotFoundError, KeyError, IndexError):
        return USUAL_STEPS


def fetch(source: Source, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache with these files of a repository, fetched where they are missing."""
    from huggingface_hub import snapshot_download

    source.revision = revision
    with _hub_errors(source):
        path = Path(snapshot_download(source.name, revision=revision, allow_patterns=patterns))
    source.revision = path.name
    return path


def fetch_pipeline(source: Source) -> None:
    from diffusers import DiffusionPipeline

    with _hub_errors(source), quiet_diffusers():
        source.path = Path(DiffusionPipeline.download(source.name, revision=source.revision, use_safetensors=True))


@contextlib.contextmanager
def _hub_errors(source: Source):
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{source.option}: {source.name!r} is no folder here"
    if Path(source.name).parent.is_dir():
        what += f" ({instead_of(source.name)})"
    try:
        yield
    except GatedRepoError as error:
        raise Problem(f"{what}, and on the hub its terms must be accepted first, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise Problem(f"{what}, and the hub has no such repository (or a private one: `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise Problem(f"{what}, and the hub no longer has its revision {source.revision}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, so the hub was not asked: unset it, or give a folder"
        else:
            why = "the hub could not be reached: check the network, or give a folder"
        raise Problem(f"{what} and not (completely) in the cache {constants.HF_HUB_CACHE}; {why}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise Problem(f"{what}, and the hub could not give it: {line(error)}") from error


def check_file(option: str, path: str | None) -> None:
    """Raise unless this is a file of the kind the option takes."""
    if path is None:
        return
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else f"does not exist; {instead_of(path)}"
        raise Problem(f"{option}: expected a file, {path!r} {what}")
    if option == "--lora" and Path(path).suffix != ".safetensors":
        raise Problem(
            f"--lora: expected a .safetensors file (nothing else is read: a pickle can run code), got {path!r}"
        )


def read_config(source: Source, name: str) -> dict:
    path = source.path / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{source.option}: {source.name} is incomplete, it has no {name}") from None
    except (OSError, ValueError) as error:
        raise Problem(f"{source.option}: cannot read {path}: {line(error)}") from error
    if not isinstance(found, dict):
        raise Problem(f"{source.option}: {path} holds no JSON object")
    return found


def read_layout(source: Source) -> Layout:
    """Read the configs of a pipeline; raises for what cannot be drawn with, before weights are touched."""
    where = f"{source.option}: {source.name}"
    if not (source.path / "model_index.json").is_file():
        hint = ""
        if (source.path / "config.json").is_file():
            hint = f"; it holds a single {read_config(source, 'config.json').get('_class_name', 'model')}"
        raise Problem(f"{where} is no diffusers pipeline, it has no model_index.json{hint}")
    index = read_config(source, "model_index.json")
    class_name = index.get("_class_name")
    components = tuple(
        name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1] is not None
    )
    if class_name not in PIPELINES:
        raise Problem(f"{where} is a {class_name}; this draws with {' or '.join(PIPELINES)}")
    kind = PIPELINES[class_name]
    part = "unet" if kind.model == "UNet2DConditionModel" else "transformer"
    if part not in components:
        name = {"unet": "UNet", "transformer": "transformer"}[part]
        raise Problem(f"{where} is a {class_name}, which has no {name} here: nothing could draw")
    absent = [name for name in ("vae", "text_encoder", "tokenizer", "scheduler") if name not in components]
    absent += [name for name in components if not (source.path / name).is_dir()]
    if absent:
        raise Problem(f"{where} is incomplete, it has no {', '.join(absent)}")

    denoiser, vae = read_config(source, f"{part}/config.json"), read_config(source, "vae/config.json")
    scheduler = read_config(source, "scheduler/scheduler_config.json")
    made = kind.channels * vae.get("latent_channels", 4)
    taken = denoiser.get("in_channels", made)
    if taken != made:
        raise Problem(
            f"{where}: its {part} takes {taken} channels and its VAE makes {made}: it is for inpainting or editing, "
            "not for drawing from a text alone"
        )
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    multiple = kind.patch * factor
    if part == "unet":
        multiple = math.lcm(8, factor)  # the pipelines of diffusers insist on 8 even where the VAE's factor is less
    sample = denoiser.get("sample_size")
    if class_name == "FluxPipeline":  # its transformer knows no size; the VAE does
        sample = vae.get("sample_size", 1024) // factor
    height, width = sample if isinstance(sample, (list, tuple)) else (sample or 64, sample or 64)
    positions = denoiser.get("pos_embed_max_size")
    return Layout(
        class_name=class_name,
        components=components,
        denoiser=denoiser,
        multiple=multiple,
        largest=None if positions is None else positions * multiple,
        width=width * factor,
        height=height * factor,
        train_steps=scheduler.get("num_train_timesteps", 1000),
        can_shift="shift" in scheduler,
    )


def check_safetensors(source: Source, layout: Layout) -> None:
    """Raise where a component has weights in another form only: they are not read, whatever they are."""
    for name in layout.components:
        folder = source.path / name
        if (folder / "config.json").is_file() and not any(_is_weights(file) for file in folder.iterdir()):
            found = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".ckpt", ".pt", ".safetensors"))
            if not found and source.kind == "hub":
                found = [f"none in the cache {folder}: fetch them with a network"]
            raise Problem(
                f"{source.option}: {name} of {source.name} has no weights as safetensors (pickled ones are not read): "
                f"expected model.safetensors or diffusion_pytorch_model.safetensors, found {', '.join(found) or 'none'}"
            )


def _is_weights(file: Path) -> bool:
    # Files with a variant in their names (model.fp16.safetensors) are not what from_pretrained reads.
    return re.fullmatch(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors", file.name) is not None


def digests(model: Source, layout: Layout, weights: Source | None, **files: str | None) -> dict[str, Source | None]:
    """Everything that is read from disk, with the digests of its files.

    Args:
        model, layout: the pipeline; only what `from_pretrained` reads of its folder counts.
        weights: those of the attention; None where there are none.
        files: single files by the names of their options, None for those that were not given.
    """
    parts = [model.path / "model_index.json"]
    for name in layout.components:
        parts += [f for f in (model.path / name).iterdir() if f.suffix in (".json", ".txt", ".model") or _is_weights(f)]
    sources = {"model": model, "weights": weights}
    wanted = {"model": parts}
    if weights is not None:
        wanted["weights"] = _weight_files(weights)
    for key, name in files.items():
        sources[key] = None
        if name is not None:
            path = Path(name).absolute()
            sources[key] = Source(f"--{key}", str(path), "file", path)
            wanted[key] = [path]
    try:
        with ThreadPoolExecutor(4) as pool:  # reading and hashing both let other threads run
            for key, files in wanted.items():
                source = sources[key]
                top = source.path.parent if source.kind == "file" else source.path
                names = sorted(file.relative_to(top).as_posix() for file in files)
                source.files = dict(zip(names, pool.map(_sha256, [top / name for name in names]), strict=True))
    except OSError as error:
        raise Problem(f"cannot read {error.filename}: {error.strerror}") from error
    return sources


def _weight_files(source: Source) -> list[Path]:
    if source.kind == "file":
        return [source.path]
    config = source.path / "config.json"
    if source.weight_name is None:
        return [config, *source.path.glob("*.safetensors")]
    return [source.path / source.weight_name, *[config] * config.is_file()]


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()
