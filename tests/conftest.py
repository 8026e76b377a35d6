"""What every test may rely on: where it runs, its seed, poisoned memory, and a table of goldens by backend at the end.

This file must not import triton kernels: whether they are interpreted is decided here, before anything imports them.
"""

import os
import random
import sys
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, on CPU tensors. "auto" never chooses them there, so all other
# tests see the backends that they would see without this. With a GPU the real thing runs.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import goldens, triton_interpreter

_PASSED, _FAILED, _SKIPPED = "pass", "FAIL", "skip"
_PROPERTY = "backend x golden"


def pytest_configure(config):
    triton_interpreter.install()
    if torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items):
    """Note in each test which golden it checks on which backend: a parameter that is the name of a golden file, beside
    one called `backend`. Properties travel with the reports, so this works under xdist as well."""
    families = {file.stem: file.parent.name for file in goldens.ROOT.glob("*/*.safetensors")}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "backend" not in parameters:
            continue
        for value in parameters.values():
            if isinstance(value, str) and value in families:
                column = f"{parameters['backend']}-{parameters.get('device', 'cpu')}"
                item.user_properties.append((_PROPERTY, (f"{families[value]}/{value}", column)))


def pytest_terminal_summary(terminalreporter):
    cells = {}
    for outcome, word in (("skipped", _SKIPPED), ("passed", _PASSED), ("failed", _FAILED), ("error", _FAILED)):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", ()):
                if key == _PROPERTY:
                    cells.setdefault(tuple(value), []).append(word)
    if not cells:
        return
    rows, columns = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    width = max(map(len, rows))
    terminalreporter.section("backend x golden (number of tests)")
    terminalreporter.write_line("  ".join([" " * width, *columns]))
    for row in rows:
        words = []
        for column in columns:
            results = cells.get((row, column), [])
            worst = next((w for w in (_FAILED, _PASSED, _SKIPPED) if w in results), "-")
            text = f"{worst} {results.count(worst)}" if results else worst
            words.append(text.ljust(len(column)))
        terminalreporter.write_line("  ".join([row.ljust(width), *words]).rstrip())


@pytest.fixture(autouse=True)
def seed(request):
    """The same random numbers for a test in whatever order and company it runs."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def golden_root():
    """Folder of the golden data; skips where there is none."""
    return goldens.path("")


@pytest.fixture
def poison():
    """Fill uninitialised memory with NaN, so that an output or a workspace that a kernel left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


def _one_thread():
    """Small tensors: waking a second thread costs more than it saves, most of all on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(_one_thread, name="one_thread")
# The same for a whole file: pytestmark = pytest.mark.usefixtures("one_thread_in_module")
one_thread_in_module = pytest.fixture(_one_thread, name="one_thread_in_module", scope="module")


@pytest.fixture
def diffusers_attention_backend():
    """diffusers' set_attention_backend changes a setting of the whole process: put back after the test."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before
