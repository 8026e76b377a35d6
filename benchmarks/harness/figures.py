"""What all figures of recorded results have in common."""

from __future__ import annotations

from pathlib import Path


def write(panels, path: Path, title: str, row: dict[str, str]) -> None:
    """Write a matplotlib figure, headed by `title` and by the machine and versions of one of its recorded rows."""
    import matplotlib.pyplot as plt

    threads = ""
    if row["provider"].startswith("linattn-cpu"):
        threads = f"; threads: {row['threads']}" + (", CPU time" if row["timing"] == "cpu-time" else "")
    panels.suptitle(
        f"{title}linattn {row['linattn']}: {row['device']} ({row['isa']}{threads})\n"
        f"torch {row['torch']}, {row['commit']}, {row['date']}",
        fontsize=8,
    )
    panels.tight_layout()
    panels.savefig(path, dpi=130)
    plt.close(panels)
