"""What commands that draw ask of the machine: packages, the device, and the settings that the last bits depend on."""

from __future__ import annotations

import contextlib
import importlib.util
import os

from linattn.cli._models import Problem


def check_installed(*more: str) -> None:
    """diffusers and what belongs to it, and `more`; before any of them is imported.

    Raises:
        Problem: some are missing; the message names them.
    """
    needed = ["diffusers", "transformers", "accelerate", "PIL", "safetensors", *more]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(f"{', '.join(missing)} missing: pip install 'linattn[diffusers]'")
    # Before they are imported: remarks about the libraries' own optional parts would bury what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Bit for bit on CUDA needs it, and it must stand before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_device(request) -> None:
    """Settle `request.device` where it is "auto", and hold `request.dtype` against it.

    Raises:
        Problem: the device is not there, or does not have the type.
    """
    import torch

    if request.device == "auto":
        request.device = "cuda" if torch.cuda.is_available() else "cpu"
    if request.device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda: torch finds no CUDA device here; use --device cpu")
    if request.device == "cpu" and request.dtype == "float16":
        raise Problem("--dtype float16 is for CUDA devices; on a CPU use float32 or bfloat16")
    if request.device == "cuda" and request.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise Problem(f"--dtype bfloat16: {torch.cuda.get_device_name()} has no bfloat16; use float16 or float32")


@contextlib.contextmanager
def arithmetic(request, record: dict | None):
    """The settings that the last bits depend on: the recorded number of threads, deterministic convolutions."""
    import torch

    threads = torch.get_num_threads()
    wanted = (record or {"machine": {}})["machine"].get("threads")
    with contextlib.ExitStack() as stack:
        if isinstance(wanted, int) and 0 < wanted != threads:
            torch.set_num_threads(wanted)
            stack.callback(torch.set_num_threads, threads)
        if request.device == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        yield
