"""Table few-steps: students of the bundled Stable Diffusion that draw in a few steps, beside its DDIM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.harness.runner import RESULTS
from linattn import few_steps

from . import _format as f

#: Rows of the teacher first, then students, as examples/few_steps.py names them.
ORDER = ("ddim_25", "ddim_4", "ddim_4_unguided", "ddim_2", "ddim_2_unguided")
FOLDER = "few_steps"
#: What students are compared with -> its row, by the student's steps.
BESIDE = {
    "DDIM, guided, as many steps": lambda steps: f"ddim_{steps}",
    "DDIM, guided, as many calls": lambda steps: f"ddim_{steps // 2}",
    "DDIM, not guided, as many of both": lambda steps: f"ddim_{steps}_unguided",
}


def render(results, folder: Path = RESULTS) -> str:
    parts = []
    for device in results.devices:
        if records := load(folder / device / FOLDER):
            parts += [_table(records), _words(records, device)]
    return "\n\n".join(parts) or "No results are recorded yet: `python examples/few_steps.py --list`."


def load(folder: Path) -> dict[str, list[dict]]:
    """Row -> its records, one per training seed."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if record.get("format") == few_steps.FORMAT and record["row"]:
            found.setdefault(record["row"], []).append(record)
    known = [name for name in ORDER if name in found]
    students = sorted(set(found) - set(known), key=lambda name: (found[name][0]["title"].count("+"), name))
    return {name: found[name] for name in known + students}


def _table(records: dict[str, list[dict]]) -> str:
    gains = [f"above {words}" for words in BESIDE]
    columns = ["", "steps", "calls", "pictures", "exact", *gains]
    columns += ["Frechet distance", "CPU s a picture", "training, CPU min"]
    lines = []
    for rows in records.values():
        first = rows[0]
        student = first["training"] is not None
        title = f"**{first['title']}**" if student else first["title"]
        lines.append([title, *_line(rows, records)])
        if len(rows) > 1:
            lines += [[f"seed {row['training']['seed']}", *_line([row], records)] for row in rows]
    return f.table(columns, lines)


def _line(rows: list[dict], records: dict[str, list[dict]]) -> list[str]:
    first = rows[0]
    beside = [records.get(name(first["steps"])) for name in BESIDE.values()]
    right = np.mean([few_steps.exact(row) for row in rows], 0)
    exact = few_steps.interval(right) if len(rows) > 1 else first["summary"]["exact"][few_steps.HELD_OUT]
    distances = [row["summary"]["canvas_distance"] for row in rows]
    resampled = np.mean([row["canvas_distance_resampled"] for row in rows], 0)
    mean = few_steps.FrechetEstimate(float(np.mean([value for value, *_ in distances])), resampled).interval()
    minutes = [row["training"]["cpu_seconds"] / 60 for row in rows if row["training"]]
    return [
        str(first["steps"]),
        str(first["network_calls"]),
        str(len(right)),
        _interval(exact, 3),
        *(_interval(few_steps.gain(rows, one[0]), 3, "+") if one and first["training"] else "—" for one in beside),
        _interval(mean if len(rows) > 1 else distances[0], 4),
        _interval(np.mean([row["cpu_seconds"] for row in rows], 0), 3),
        f"{np.mean(minutes):.1f}" if minutes else "—",
    ]


def _interval(figure, places: int, sign: str = "") -> str:
    return "{:{s}.{p}f} [{:{s}.{p}f}, {:{s}.{p}f}]".format(*figure, s=sign, p=places)


def _words(records: dict[str, list[dict]], device: str) -> str:
    every = [row for rows in records.values() for row in rows]
    first = every[0]
    lengths = [str(length) for length in first["settings"]["digits"]]
    guidance = sorted({row["guidance"] for row in every if row["guidance"] > 1})
    dates = ", ".join(sorted({row["date"] for row in every}))
    return (
        "`python examples/few_steps.py ROW --seed SEED` trains a student, draws and scores it; `--list` names the "
        f"rows. Exact: share of the pictures (a third each of {', '.join(lengths[:-1])} and {lengths[-1]} digits, "
        "orders never trained on) that read exactly as asked. Above DDIM: the difference to the teacher, paired, same "
        "prompts and seeds. Frechet distance: of the ink of whole canvases, to canvases of "
        "held-out scans; it falls with the number of pictures. In brackets 95 % intervals over pictures; where a row "
        "has several training seeds, its first line is their mean. The guided teacher "
        f"({' and '.join(f'{g:g}' for g in guidance)}) takes two calls of the network a step; students have the "
        "guidance in them and take one. CPU time of a picture is whole: text, network, decoder. "
        f"{first['device']}, one thread, busy machine; torch {first['versions']['torch']}; {dates} "
        f"([all numbers](benchmarks/results/{device}/{FOLDER}/))."
    )
