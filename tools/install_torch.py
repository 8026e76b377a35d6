"""Install PyTorch into this interpreter's environment, without CUDA packages where there is no CUDA device.

    python tools/install_torch.py [--constraints constraints.txt] [--index URL]

pip's default torch on Linux brings several GB of CUDA libraries. On a machine without an NVIDIA GPU pip is first asked
what it would install; if that has CUDA packages in it, the CPU build is taken from PyTorch's own index instead.
--index names the index to use and skips the question.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str, quiet: bool = False) -> int:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode


def brings_cuda(requirement: list[str]) -> bool:
    """Whether pip, left to itself, would install CUDA packages (it resolves; it installs nothing)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if pip("-qq", "--dry-run", "--report", str(report), *requirement, quiet=True) != 0:
            return False
        names = [entry["metadata"]["name"].lower() for entry in json.loads(report.read_text())["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", default="", help="pip constraints file that pins torch")
    parser.add_argument("--index", default="", help="package index to take torch from")
    args = parser.parse_args()

    requirement = ["torch>=2.11", *(["-c", args.constraints] if args.constraints else [])]
    index = args.index
    if not index and sys.platform == "linux" and shutil.which("nvidia-smi") is None and brings_cuda(requirement):
        print(f"no NVIDIA GPU here: taking the CPU build of torch from {CPU_INDEX}", flush=True)
        index = CPU_INDEX
    if not index:
        return pip("-qq", *requirement)
    # torch alone comes from that index, which need not have what torch depends on.
    return pip("-qq", "--no-deps", "--index-url", index, *requirement) or pip("-qq", *requirement)


if __name__ == "__main__":
    sys.exit(main())
