"""Write canvases of real handwritten digits with captions: data for trying `linattn distill` without a network.

    python examples/write_canvases.py --out canvases
    linattn distill linfusion_tiny_sd --set data.path=canvases --set output.folder=run

It is the data of the bundled tiny model (linattn.bundled.canvases): scans that it was trained on, in orders that it was
trained on.
"""

import argparse
import pathlib

from linattn.bundled import canvases


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Write canvases of handwritten digits as a folder of captioned pictures."
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("canvases"))
    parser.add_argument("--count", type=int, default=2000, help="how many [2000]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    canvases.write_folder(args.out, args.count, seed=args.seed)
    print(f"wrote {args.count} pictures to {args.out}")


if __name__ == "__main__":
    main()
