"""Draw who sees whom in window_attention, by asking the op itself: docs/images/window_pattern.png.

    python examples/window_pattern.py --height 12 --width 18 --radius 4 --text 24 --pool 4 --out pattern.png

Nothing here knows the pattern. With all scores equal, a query spreads its weight evenly over the keys that it sees; the
gradient of its output with respect to the values is that weight, and the picture shows it. Needs matplotlib.
"""

import argparse

import matplotlib
import torch

import linattn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS_OF_TEXT = 3


def weights(query, height, width, radius, text, factor, **where):
    """What one query gives to (text, image, pooled) keys, each as numbers that sum to 1 together."""
    pooled = -(-height // factor) * -(-width // factor)
    where = {"text_length": text, **where}
    rows = where.pop("rows", height - where.get("q_row", 0))
    queries = where.get("q_text_length", text) + rows * width
    v = torch.zeros(1, 1, text + height * width, 8, requires_grad=True)
    pooled_v = torch.zeros(1, 1, pooled, 8, requires_grad=True)
    q, k, pooled_k = torch.zeros(1, 1, queries, 8), torch.zeros_like(v), torch.zeros_like(pooled_v)
    out = linattn.window_attention(q, k, v, height, width, radius, pooled_k=pooled_k, pooled_v=pooled_v, **where)
    own, coarse = torch.autograd.grad(out[0, 0, query, 0], (v, pooled_v))
    own, coarse = own[0, 0, :, 0], coarse[0, 0, :, 0]
    return own[:text], own[text:].reshape(height, width), coarse.reshape(-(-height // factor), -1)


def draw(axes, parts, title, token=None):
    """Three grids side by side: text in a few columns, image, pooled tokens; filled where the weight is not zero."""
    text, image, pooled = parts
    left = 0
    text = torch.nn.functional.pad(text, (0, -len(text) % COLUMNS_OF_TEXT), value=float("nan"))
    for name, grid in (("text", text.reshape(-1, COLUMNS_OF_TEXT)), ("image", image), ("pooled", pooled)):
        for y, row in enumerate(grid.tolist()):
            for x, weight in enumerate(row):
                if weight == weight:  # not the padding of the text
                    color = "#2f6f9f" if weight > 0 else "#eceff1"
                    axes.add_patch(plt.Rectangle((left + x, y), 0.88, 0.88, color=color, linewidth=0))
        axes.text(left, -0.6, name, fontsize=7, color="#555555")
        if name == "image" and token is not None:
            axes.add_patch(plt.Rectangle((left + token[1], token[0]), 0.88, 0.88, color="#e07b39", linewidth=0))
        left += grid.shape[1] + 1.5
    axes.set_xlim(-0.5, left - 1)
    axes.set_ylim(max(image.shape[0], len(text) // COLUMNS_OF_TEXT) + 0.3, -1.8)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=9, loc="left")


def figure(height, width, radius, text, factor):
    """Four queries: inside the image, in its corner, in a strip that holds some of the rows, and of the text."""
    shape = height, width, radius, text, factor
    middle, strip = (height // 2, width // 2), (height // 3, height // 3)
    row = strip[0] + strip[1] - 1
    panels = [
        ("an image query sees its disk, all text, all pooled keys", text + middle[0] * width + middle[1], {}, middle),
        ("at the border the disk is cut, not shifted", text, {}, (0, 0)),
        (
            f"the same of a strip: q holds rows {strip[0]} to {row} (q_row={strip[0]})",
            (strip[1] - 1) * width + width // 4,
            {"q_row": strip[0], "rows": strip[1], "q_text_length": 0},
            (row, width // 4),
        ),
        ("a text query sees all text and image keys, no pooled ones", 0, {}, None),
    ]
    result, grid = plt.subplots(2, 2, figsize=(10, 5.2), layout="constrained")
    for axes, (title, query, where, token) in zip(grid.flat, panels, strict=True):
        draw(axes, weights(query, *shape, **where), title, token)
    return result


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=12, help="rows of the grid, in tokens")
    parser.add_argument("--width", type=int, default=18, help="columns of the grid")
    parser.add_argument("--radius", type=int, default=4, help="radius of the window")
    parser.add_argument("--text", type=int, default=24, help="text tokens")
    parser.add_argument("--pool", type=int, default=4, help="side of the patches of pooled tokens")
    parser.add_argument("--out", default="docs/images/window_pattern.png", help="where the picture goes")
    given = parser.parse_args(arguments)
    figure(given.height, given.width, given.radius, given.text, given.pool).savefig(given.out, dpi=110)
    print(given.out)


if __name__ == "__main__":
    main()
