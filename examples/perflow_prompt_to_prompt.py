"""Edit a picture by editing its prompt, in four steps: the layout stays, because the attention to the words does.

    python examples/perflow_prompt_to_prompt.py                          # offline: the tiny model of the package
    python examples/perflow_prompt_to_prompt.py --preset published --prompt "a cat on a bench in the park" \
        --edit "a dog on a bench in the park" "a cat on a bench in the snow" --blend cat dog       # from the hub
    python examples/perflow_prompt_to_prompt.py --preset published --prompt "a castle under a stormy sky" \
        --edit "a castle under a stormy sky" --weight stormy=3           # more of a word

Writes the picture of --prompt and, to its right, that of each --edit. Of four steps three take the maps of the first
picture (--cross-steps 0.8), one its self-attention (--self-steps 0.4); see linattn.prompt_to_prompt. With --linfusion
the self-attention is linear, and is shared all the same.
"""

import perflow_common as common
from diffusers import DiffusionPipeline

from linattn.prompt_to_prompt import PromptToPrompt

PRESETS = {
    "tiny": {**common.TINY, "edit": ["a seven, an eight and a four"]},
    "published": {
        **common.SD15,
        "prompt": "a photo of a cat on a bench in the park",
        "edit": ["a photo of a dog on a bench in the park"],
    },
}


def weight(text: str) -> tuple[str, float]:
    word, _, factor = text.rpartition("=")
    if not word:
        raise ValueError
    return word, float(factor)


def parse(argv=None):
    parser = common.parser(__doc__, out="perflow_prompt_to_prompt.png")
    parser.add_argument("--edit", nargs="+", metavar="PROMPT", help="what becomes of --prompt")
    parser.add_argument("--cross-steps", type=float, default=0.8, help="share of the steps [%(default)s]")
    parser.add_argument("--self-steps", type=float, default=0.4, help="share of the steps [%(default)s]")
    parser.add_argument("--weight", nargs="+", type=weight, default=[], metavar="WORD=FACTOR", help="of the edits")
    parser.add_argument(
        "--blend",
        nargs="+",
        metavar="WORD",
        help="change nothing but where these words are drawn, e.g. the old and new",
    )
    return common.parse(parser, PRESETS, argv)


def main(argv=None):
    args = parse(argv)
    pipe = common.load(DiffusionPipeline, args)
    common.few_steps(pipe, args)
    call = common.settings(args)
    edit = PromptToPrompt(
        pipe,
        call.pop("prompt"),
        args.edit,
        cross_steps=args.cross_steps,
        self_steps=args.self_steps,
        weights=dict(args.weight),
        blend=args.blend,
    )
    common.save(edit(**call).images, args.out)


if __name__ == "__main__":
    main()
