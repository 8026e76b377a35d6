"""Pictures from a file of captions, seed i for caption i, each the same as `linattn generate` draws of the two."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from linattn.cli import _attention, _record, generate
from linattn.cli._machine import arithmetic, check_device, check_installed
from linattn.cli._models import (
    Layout,
    Problem,
    Source,
    check_file,
    check_safetensors,
    digests,
    fetch,
    fetch_pipeline,
    line,
    locate,
    raise_if_memory,
    read_layout,
)

#: Options of `linattn generate` that `linattn eval` hands on as they are.
OPTIONS = (
    "model",
    "attention",
    "weights",
    "window_size",
    "down_factor",
    "negative_prompt",
    "steps",
    "guidance",
    "size",
    "lora",
    "lora_scale",
    "device",
    "dtype",
)
KEY = "linattn eval"  # of the text in a PNG that says what it was drawn from


@dataclasses.dataclass
class Drawing:
    """Everything that decides what is drawn, but for caption and seed."""

    request: _record.Request  # with the first caption and seed
    layout: Layout
    sources: dict[str, Source | None]
    pipe: object = None

    @classmethod
    def prepare(cls, args: argparse.Namespace, caption: str) -> Drawing:
        """Read options, configs and digests; nothing is loaded yet.

        Raises:
            Problem: what `linattn generate` would not draw either.
        """
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        words = [f"--seed={args.seed}"]
        for name in OPTIONS:
            if (value := getattr(args, name)) is not None:
                words.append(f"--{name.replace('_', '-')}={value}")
        request = generate._request_from(parser.parse_args([*words, "--", caption]))
        generate._check_values(request)
        check_file("--lora", request.lora)
        check_installed(*["peft"] * (request.lora is not None))
        model = locate("--model", request.model)
        if model.path is None:
            model.path = fetch(model, None, ["*.json"])
        layout = read_layout(model)
        generate._settle(request, layout, model, None)
        check_device(request)
        generate._settle_dtype(request, layout)
        weights = _attention.find(request, model, layout, None)
        if model.kind == "hub":
            fetch_pipeline(model)
        check_safetensors(model, layout)
        sources = digests(model, layout, weights, lora=request.lora, image=None)
        for key, source in sources.items():
            if source is not None:
                setattr(request, key, source.name)
        generate._settle_guidance(request, layout, model)
        return cls(request, layout, sources)

    @contextlib.contextmanager
    def loaded(self):
        """Inside, :meth:`draw` may be called."""
        with arithmetic(self.request, None):
            self.pipe, _ = generate._load(self.request, self.layout, self.sources)
            try:
                yield
            finally:
                self.pipe = None

    def request_of(self, number: int, caption: str) -> _record.Request:
        return dataclasses.replace(self.request, prompt=caption, seed=self.request.seed + number)

    def key(self, number: int, caption: str) -> str:
        """A digest of all that a picture is drawn from: two pictures with one key are the same."""
        files = {name: source and source.sha256 for name, source in self.sources.items()}
        facts = [dataclasses.asdict(self.request_of(number, caption)), files]
        for name in ("model", "weights", "lora"):  # where the files lie does not matter
            facts[0].pop(name)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def is_drawn(self, path: Path, number: int, caption: str) -> bool:
        """Whether the picture is there.

        Raises:
            Problem: another picture is in its place; it is left alone.
        """
        from PIL import Image

        if not path.exists():
            return False
        try:
            with Image.open(path) as picture:
                found = picture.info.get(KEY)
        except OSError:
            found = None
        if found != self.key(number, caption):
            raise Problem(
                f"{path} was not drawn from this caption, seed, model and options: choose another folder for the "
                "pictures (--pictures, --cache), or remove those that are there"
            )
        return True

    def draw(self, path: Path, number: int, caption: str) -> None:
        """Draw one picture into a PNG, which is there whole or not at all.

        Raises:
            Problem: it has values that are not finite, it cannot be written, or memory is short.
        """
        import numpy as np
        import torch
        from PIL.PngImagePlugin import PngInfo

        request = self.request_of(number, caption)
        draw = generate._drawing(self.pipe, None, request, None)
        try:
            drawn = draw(torch.Generator().manual_seed(request.seed), lambda pipe, step, timestep, tensors: tensors)
        except (RuntimeError, ValueError) as error:
            raise_if_memory(error)
            raise
        if not np.isfinite(drawn.images[0]).all():
            raise Problem(f"picture {number}, {caption!r}: some of its values are not finite; --dtype float32 may help")
        picture, _ = generate._to_picture(drawn, path)
        note = PngInfo()
        note.add_text(KEY, self.key(number, caption))
        part = path.with_name(f"{path.name}.part")
        try:
            picture.save(part, format="PNG", pnginfo=note)
            os.replace(part, path)
        except OSError as error:
            raise Problem(f"cannot write {path}: {line(error)}") from error
        finally:
            part.unlink(missing_ok=True)
