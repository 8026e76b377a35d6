"""Tensors that are computed once and kept on disk: text embeddings and latents.

One safetensors file per entry. Its name is a hash of the key and of the fingerprint (model, resolution and whatever
else the value depends on), so an entry made under other settings is never found, and any number of processes and runs
may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


class CacheError(ValueError):
    """An entry cannot be read; the message names its file."""


class Cache:
    """A folder of named sets of tensors.

    Args:
        folder: made when the first entry is written; `~` is resolved.
        fingerprint: what all values depend on, apart from their key. Must be JSON.

    Raises:
        TypeError: a fingerprint that is no JSON.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: dict):
        self.folder = Path(folder).expanduser()
        try:
            self.fingerprint = json.dumps(fingerprint, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"Cache needs a fingerprint of plain values (JSON), got {fingerprint!r}: {error}") from None

    def path(self, key: str) -> Path:
        """The file of an entry, whether it is there or not."""
        name = hashlib.sha256(json.dumps([self.fingerprint, key]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no entry, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self]

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry, on the CPU; None where there is none.

        Raises:
            CacheError: the file is not whole.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return load(content)
        except (SafetensorError, ValueError) as error:
            raise CacheError(
                f"{path}: expected a whole safetensors file (the entry {key!r}), got {len(content)} bytes: {error}; "
                "delete it, and it will be made again"
            ) from None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write an entry. It appears as a whole or not at all; of two writers the last one wins.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors refuses tensors that share memory.
        content = save(
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        )
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
