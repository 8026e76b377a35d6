"""What parts of the demo share: a table in text, and a sheet of labelled pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with the first column to the left and the others to the right, two spaces apart."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


class Column(NamedTuple):
    """What stands above one column of a sheet."""

    title: str
    notes: Sequence[str]


INK, GREY, PAPER, PANEL = (24, 28, 36), (96, 102, 112), (255, 255, 255), (236, 239, 244)
MARGIN, GAP, LABEL_WIDTH = 28, 6, 230
LEADING = 1.35  # line height in units of the font size


def sheet(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
    footer: str = "",
    *,
    zoom: int = 2,
) -> Image.Image:
    """Draw a labelled comparison. Text is wrapped to the room there is; the sheet grows with it.

    Args:
        title: the headline.
        columns: what is compared.
        rows: (label, one list of pictures per column); every list of equal length, every picture of equal size.
        footer: what stands below.
        zoom: how many times larger than life pictures are drawn (whole pixels, nothing is smoothed).
    """
    from PIL import Image, ImageDraw

    width, height = (zoom * side for side in rows[0][1][0][0].size)
    per_cell = len(rows[0][1][0])
    cell_width, cell_height = per_cell * (width + GAP) + GAP, height + 2 * GAP
    lefts = [MARGIN + LABEL_WIDTH + i * (cell_width + MARGIN) for i in range(len(columns))]
    full_width = lefts[-1] + cell_width - MARGIN

    headline = _Text([title], 28, INK, full_width)
    titles = [_Text([column.title], 22, INK, cell_width) for column in columns]
    notes = [_Text(column.notes, 17, GREY, cell_width) for column in columns]
    labels = [_Text([label], 19, INK, LABEL_WIDTH - MARGIN) for label, _ in rows]
    below = _Text([footer], 17, GREY, full_width)
    row_heights = [max(cell_height, label.height) + 10 for label in labels]
    titles_top = MARGIN + headline.height
    notes_top = titles_top + max(text.height for text in titles)
    rows_top = notes_top + max(text.height for text in notes) + 12
    total = rows_top + sum(row_heights) + below.height + MARGIN

    canvas = Image.new("RGB", (full_width + 2 * MARGIN, total), PAPER)
    draw = ImageDraw.Draw(canvas)
    headline.draw(draw, MARGIN, MARGIN - 8)
    for left, column_title, column_notes in zip(lefts, titles, notes, strict=True):
        column_title.draw(draw, left, titles_top)
        column_notes.draw(draw, left, notes_top)
    top = rows_top
    for label, row_height, (_, cells) in zip(labels, row_heights, rows, strict=True):
        label.draw(draw, MARGIN, top + (cell_height - label.height) // 2)
        for left, pictures in zip(lefts, cells, strict=True):
            draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), PANEL)
            for i, picture in enumerate(pictures):
                enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(enlarged, (left + GAP + i * (width + GAP), top + GAP))
        top += row_height
    below.draw(draw, MARGIN, top + 4)
    return canvas


class _Text:
    """Paragraphs, wrapped to a width in pixels."""

    def __init__(self, paragraphs: Sequence[str], size: int, colour: tuple[int, int, int], width: int):
        from PIL import ImageFont

        self.font, self.colour, self.leading = ImageFont.load_default(size), colour, round(LEADING * size)
        self.lines: list[str] = []
        for paragraph in paragraphs:
            line = ""
            for word in paragraph.split():
                if line and self.font.getlength(f"{line} {word}") > width:
                    self.lines.append(line)
                    line = word
                else:
                    line = f"{line} {word}".lstrip()
            self.lines.append(line)
        self.height = self.leading * len(self.lines)

    def draw(self, draw, left: int, top: int) -> None:
        for i, line in enumerate(self.lines):
            draw.text((left, top + i * self.leading), line, self.colour, self.font)
