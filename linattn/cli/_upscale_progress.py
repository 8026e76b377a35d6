"""How far `linattn upscale` is, on stderr: a bar with the time left for all pictures, or lines without a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from tqdm.auto import tqdm

INTERVAL = 60.0  # seconds between lines about one picture where there is no bar


def readable(text: str) -> str:
    """Text that every stream takes; names of files may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()


class Progress:
    """Progress over pictures, counted in pixels of their results: the work on a picture takes time by them.

    Args:
        areas: of the results, pixels.
        quiet: say nothing.
    """

    def __init__(self, areas: Sequence[int], quiet: bool):
        self._areas = list(areas)
        self._quiet = quiet
        self._number = -1
        self._done = 0  # of the picture in work, pixels
        self._name = ""
        self._bar = tqdm(
            total=sum(self._areas),
            disable=True if quiet else None,
            file=sys.stderr,
            unit_scale=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}px [{elapsed}<{remaining}]",
        )
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    @property
    def left(self) -> int:
        """Pictures that are not through, the one in work included."""
        return len(self._areas) - self._number

    def start(self, name: str) -> None:
        self._number += 1
        self._done, self._name = 0, readable(name)
        self._bar.set_description(self._title())

    def advance(self, done: int, total: int) -> None:
        """Say how much of the work on the picture is through."""
        self._update(done * self._areas[self._number] // total - self._done)
        if time.monotonic() - self._last > INTERVAL:
            self._line(f"{done / total:.0%}, {self._remaining()} left")

    def finish(self, path: str, facts: str) -> None:
        """Say that the picture is through; its path goes to stdout."""
        self._update(self._areas[self._number] - self._done)
        try:
            tqdm.write(path, file=sys.stdout)
        except UnicodeEncodeError:  # a name that is no text: its bytes, for the program that reads them
            sys.stdout.buffer.write(os.fsencode(path) + b"\n")
        sys.stdout.flush()
        more = f", {self._remaining()} left" if self.left > 1 else ""
        self._line(f"{facts}{more}")

    def skip(self, why: str) -> None:
        """Say that no more is done for the picture, as if its pixels had never been asked for."""
        self._bar.total -= self._areas[self._number]
        self._update(-self._done)
        self._areas[self._number] = 0
        if not self._quiet:
            self.note(why)

    def note(self, text: str) -> None:
        """Say something about the picture in work."""
        tqdm.write(f"{self._title()}: {readable(text)}", file=sys.stderr)

    def _title(self) -> str:
        return f"{self._number + 1}/{len(self._areas)} {self._name}"

    def _update(self, area: int) -> None:
        self._done += area
        self._bar.update(area)

    def _remaining(self) -> str:
        done = sum(self._areas[: self._number]) + self._done
        seconds = (time.monotonic() - self._began) * (sum(self._areas) - done) / done if done > 0 else 0.0
        return tqdm.format_interval(seconds)

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        if self._bar.disable and not self._quiet:
            print(f"{self._title()}: {text}", file=sys.stderr, flush=True)
