"""Tensors out of a file of torch.save, without running anything that the file says.

A pickle is a program: it names functions of any module and calls them. Checkpoints of DeepSpeed hold objects of its
own beside the tensors, so `torch.load(weights_only=True)` refuses them. Here nothing is imported and nothing is called
but the classes below, which write down what a tensor is made of; every other name becomes a class of objects that take
whatever is done to them and do nothing. Tensors are made when the program has ended.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _ignore(*args, **kwargs):
    return None


class Inert:
    """Stands for an object of a class that is not known here. Anything may be done to it, and nothing comes of it.

    The methods take what the opcodes BUILD, APPEND, APPENDS, SETITEM(S) and ADDITEMS do to an object, or to the class
    itself; REDUCE, NEWOBJ and their like make one of it.
    """

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made._args = args
        return made

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *args, **kwargs):
        return self

    def __repr__(self):
        return f"an object of {type(self).__name__}"


class _Dict(dict):
    """OrderedDict, without the attributes that torch gives to it."""

    __init__ = __setstate__ = _ignore


class _Strided(Inert):
    """`torch._utils._rebuild_tensor` and `_v2`: (storage, offset, size, stride, ...)."""


class _Parameter(Inert):
    """`torch._utils._rebuild_parameter`: (tensor, ...)."""


#: Globals that a file may name, and what they mean here. Everything else is `Inert`.
_KNOWN = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Strided,
    ("torch._utils", "_rebuild_tensor_v2"): _Strided,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        return type(f"{module}.{name}", (Inert,), {}) if known is None else known

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as it was referred to: ("storage", type, key, device, numbers)."""
        return Inert(*pid) if isinstance(pid, tuple) else Inert(pid)


def load(path: Path, entry: str) -> dict[str, Any]:
    """The state dict that torch.save wrote, on its own or as an entry of a dict.

    Tensors lie in the file and are read when they are used; changes do not reach it. Values that are no tensors come as
    they are, objects as `Inert`.

    Raises:
        ValueError: not such a file, of the format before torch 1.6, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise ValueError(f"{path} is no file of torch.save: it has {len(pickles)} data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ValueError(f"{path} was written by a machine of another byte order")
            try:
                found = _run(archive.read(pickles[0]))
            except ValueError as error:  # opcodes that are none
                raise pickle.UnpicklingError(str(error)) from error
            if isinstance(found, dict) and isinstance(found.get(entry), dict):
                found = found[entry]
            if not isinstance(found, dict):
                raise ValueError(f"{path} holds {found!r}, expected a dict of tensors")
            storages: dict[str, Tensor] = {}
            return {key: _tensor(value, path, archive, root, storages) for key, value in found.items()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no file of torch.save as written since torch 1.6: {error}") from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # a program may fail in any way
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _run(program: bytes) -> Any:
    """What a pickle describes, with `Inert` objects and `_Strided` in it."""
    for opcode, _, _ in pickletools.genops(program):
        # Objects that this process has registered under a number, of which find_class need not hear.
        if opcode.name.startswith("EXT"):
            raise pickle.UnpicklingError(f"{opcode.name}, which torch.save does not write")
    return _Unpickler(io.BytesIO(program)).load()


def _tensor(value: Any, path: Path, archive: zipfile.ZipFile, root: str, storages: dict[str, Tensor]) -> Any:
    """The tensor that a `_Strided` describes; other values as they are."""
    if isinstance(value, _Parameter):
        value = value._args[0]
    if not isinstance(value, _Strided):
        return value
    storage, offset, size, stride = value._args[:4]
    kind, dtype, key, _, count = storage._args
    if kind != "storage" or not isinstance(dtype, torch.dtype):
        return value
    if key not in storages:
        storages[key] = _mapped(path, archive.getinfo(f"{root}data/{key}"))
    numbers = storages[key].view(dtype)
    if len(numbers) < count:
        raise ValueError(f"{path} is damaged: storage {key} holds {len(numbers)} numbers instead of {count}")
    return numbers.as_strided(size, stride, offset)  # which checks that all of it lies within the storage


def _mapped(path: Path, entry: zipfile.ZipInfo) -> Tensor:
    """An entry of the archive as bytes, mapped into memory: copied on writing."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {entry.filename} is compressed, which torch.save does not do")
    if entry.file_size == 0:
        return torch.empty(0, dtype=torch.uint8)
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is damaged at {entry.filename}")
    # The extra field may differ from that of the directory at the end: it pads the data to a multiple of 64 bytes.
    start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return torch.from_numpy(np.memmap(path, np.uint8, "c", start, (entry.file_size,)))
