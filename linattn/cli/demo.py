"""Show what linattn does, with pictures: offline, without a GPU, in a minute or two.

Each part writes a labelled picture and its figures into the folder given by --out and prints what they say.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

NAME = "demo"
HELP = "pictures with stock attention and with linattn's, side by side, with times and scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from linattn import demos

    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results (default: demo_out)")
    parser.add_argument(
        "--part", action="append", choices=list(demos.parts()), help="only this part; may be given again (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures and steps: some seconds per part")
    parser.epilog = "parts:\n" + "\n".join(f"  {name:18} {part.SUMMARY}" for name, part in demos.parts().items())


def _say(text: str = "") -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> int:
    # Before anything imports huggingface_hub, which reads these once: everything that is needed is in the package, and
    # a library's remark about its own optional parts would only hide the results.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

    from linattn import demos

    known = demos.parts()
    chosen = {name: known[name] for name in dict.fromkeys(args.part or known)}
    for name, part in chosen.items():
        absent = demos.missing(part)
        if absent:
            print(f"linattn demo: {name} needs {', '.join(absent)}: pip install 'linattn[demo]'", file=sys.stderr)
            return 1
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"linattn demo: cannot write to {args.out}: {error.strerror}; choose a folder by --out", file=sys.stderr)
        return 1
    for name, part in chosen.items():
        start = time.perf_counter()
        _say(f"== {name}: {part.SUMMARY}")
        files = part.run(args.out, quick=args.quick, report=_say)
        _say(f"\n{name} took {time.perf_counter() - start:.0f} s and wrote")
        for file in files:
            _say(f"  {file}")
    return 0
