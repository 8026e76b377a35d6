"""The helpers that start training runs as processes."""

import os
import signal
import time

import pytest

pytest.importorskip("accelerate", reason='distillation needs the extra: pip install "linattn[train]"')

from helpers import runs
from tqdm import tqdm


def hold_the_bars_lock(file):
    tqdm.get_lock().acquire()
    file.touch()
    time.sleep(60)


def test_a_killed_run_takes_no_lock_of_the_progress_bars_with_it(tmp_path):
    with open(os.devnull, "w") as quiet:
        tqdm(total=1, file=quiet).close()  # makes the lock, if nobody has
        child = runs.in_child(hold_the_bars_lock, tmp_path / "held")
        while not (tmp_path / "held").exists():
            assert child.is_alive()
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join(timeout=30)
        acquired = [lock.acquire(timeout=10) for lock in _locks(tqdm.get_lock())]
        assert all(acquired), "the bars of this process still work"
        for lock in _locks(tqdm.get_lock()):
            lock.release()


def _locks(lock):
    return getattr(lock, "locks", [lock])
