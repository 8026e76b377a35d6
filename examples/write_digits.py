"""Write real handwritten digits as a folder of captioned pictures: data for trying `linattn distill` without a network.

    python examples/write_digits.py --out digits
    linattn distill linfusion_sd15 --set data.path=digits ...        # the whole command: docs/distillation.md

The pictures are the training part of what the bundled tiny model was trained on (scikit-learn's load_digits).
"""

import argparse
import json
import pathlib

from diffusers.image_processor import VaeImageProcessor

from linattn.bundled import digits


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write handwritten digits as a folder of captioned pictures.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("digits"))
    parser.add_argument("--count", type=int, help="only so many [all, 1297]")
    args = parser.parse_args(argv)

    split = digits.load()
    scans, labels = split.train[: args.count], split.train_labels[: args.count]
    pictures = VaeImageProcessor.numpy_to_pil(digits.render(scans).permute(0, 2, 3, 1).numpy())
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "metadata.jsonl", "w", encoding="utf-8") as captions:
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            name = f"{number:04}.png"
            picture.save(args.out / name)
            captions.write(json.dumps({"file_name": name, "text": digits.prompt(int(label))}) + "\n")
    print(f"wrote {len(pictures)} pictures to {args.out}")


if __name__ == "__main__":
    main()
