"""Convert published weights to a folder that the other commands and `from_pretrained` load.

infdit: the authors' checkpoint of Inf-DiT, mp_rank_00_model_states.pt (a file of torch.save, of which nothing but
tensors is read: what else a pickle asks for is not run) or a safetensors file of the same keys, or a folder that holds
one. Its image encoder comes along where the file has it, else name a folder with the CLIP model that the network was
trained with (laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K).

The folder is written whole or not at all. Its path goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys

from linattn._quiet import quiet_diffusers
from linattn.cli._models import line

HELP = "convert published weights (Inf-DiT) to a folder in safetensors"

DTYPES = ("fp32", "fp16", "bf16", "float32", "float16", "bfloat16")

EXAMPLES = """\
example:
  linattn convert infdit ckpt/mp_rank_00_model_states.pt infdit --dtype bf16 \\
      --image-encoder CLIP-ViT-L-14-DataComp.XL-s13B-b90K
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("infdit",), help="whose weights they are")
    parser.add_argument("source", metavar="SRC", help="checkpoint: a file, or a folder that holds one")
    parser.add_argument("folder", metavar="DST", help="folder to write, which must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the saved weights [as they are]")
    parser.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        help="a CLIP model of transformers [the one of the checkpoint; without either, calls need image vectors]",
    )
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    with quiet_diffusers():
        from linattn.adapters import convert_infdit_checkpoint

        try:
            done = convert_infdit_checkpoint(
                args.source, args.folder, image_encoder=args.image_encoder, dtype=args.dtype
            )
        except (ValueError, OSError) as error:
            print(f"linattn convert: {line(error)}", file=sys.stderr)
            return 1
    print(done, file=sys.stderr)
    print(done.folder)
    return 0
