"""Choosing a backend: forced or not, by context or environment, at run time inside compiled graphs, and its report."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import linattn
from linattn import _library
from linattn import backend as backends

PACKAGE = Path(linattn.__file__).resolve().parent
OPS = ("linear_attention", "linear_attention_state", "linear_attention_apply")
CPU = torch.device("cpu")

needs_cpu_library = pytest.mark.skipif(not _library.loaded("cpu"), reason=f"{_library.reason('cpu')}")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("LINATTN_BACKEND", raising=False)


def qkv(dtype=torch.float32, device="cpu"):
    return [torch.rand(1, 2, 6, 16, device=device).to(dtype) for _ in range(3)]


def kernels_of(function):
    """Backends whose kernel ops ran inside function()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.key for event in profile.key_averages() if event.key.startswith("linattn::_")]
    return {name.rsplit("_", 1)[1] for name in names} & set(backends.BACKENDS)


def python(code, **environment):
    """Standard output of a fresh interpreter that runs the code; its environment is this one's without our settings."""
    env = {key: x for key, x in os.environ.items() if not key.startswith(("LINATTN_", "TRITON_", "PYTHONPATH"))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env=env | environment, cwd=environment.get("PYTHONPATH"), text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------- forcing


def test_use_backend_nests_and_restores_even_after_an_error():
    assert backends.forced() is None
    with linattn.use_backend("reference"):
        with linattn.use_backend("cpu"):
            assert backends.forced() == "cpu"
        assert backends.forced() == "reference"
        with pytest.raises(KeyError), linattn.use_backend("cuda"):
            raise KeyError
        assert backends.forced() == "reference"
        with linattn.use_backend("auto"):
            assert backends.forced() is None
    assert backends.forced() is None


def test_an_unknown_backend_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(ValueError, match=r"use_backend.*reference.*'numpy'"), linattn.use_backend("numpy"):
        pytest.fail("the block must not run")
    assert backends.forced() is None


@pytest.mark.parametrize("which", ["reference", pytest.param("cpu", marks=needs_cpu_library)])
def test_a_forced_backend_is_the_one_that_runs(which):
    with linattn.use_backend(which):
        assert kernels_of(lambda: linattn.linear_attention(*qkv())) == {which}


@pytest.mark.parametrize("which", ["reference", pytest.param("cpu", marks=needs_cpu_library)])
def test_the_environment_forces_a_backend(which, monkeypatch):
    monkeypatch.setenv("LINATTN_BACKEND", which)
    assert kernels_of(lambda: linattn.linear_attention(*qkv())) == {which}


def test_use_backend_takes_precedence_over_the_environment(monkeypatch):
    monkeypatch.setenv("LINATTN_BACKEND", "cuda")
    with linattn.use_backend("reference"):
        assert kernels_of(lambda: linattn.linear_attention(*qkv())) == {"reference"}


def test_auto_in_a_context_takes_precedence_over_the_environment(monkeypatch):
    monkeypatch.setenv("LINATTN_BACKEND", "cuda")
    with linattn.use_backend("auto"):
        linattn.linear_attention(*qkv())


def test_an_unknown_backend_in_the_environment_is_refused_by_the_op(monkeypatch):
    monkeypatch.setenv("LINATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"LINATTN_BACKEND.*'fast'"):
        linattn.linear_attention(*qkv())


@pytest.mark.parametrize("op", OPS)
def test_a_forced_backend_that_cannot_run_raises_and_nothing_runs_in_its_place(op):
    q, k, v = qkv()
    kv, k_sum = linattn.reference.linear_attention_state(k, v)
    call = {
        "linear_attention": lambda: linattn.linear_attention(q, k, v),
        "linear_attention_state": lambda: linattn.linear_attention_state(k, v),
        "linear_attention_apply": lambda: linattn.linear_attention_apply(q, kv, k_sum, 6),
    }[op]

    def refused():
        with linattn.use_backend("cuda"), pytest.raises(ValueError, match=rf"{op}.*'cuda'.*cuda tensors.*cpu"):
            call()

    assert kernels_of(refused) == set()


@pytest.mark.parametrize("which", ["cpu", "triton", "cuda"])
def test_float64_runs_as_reference_and_a_forced_kernel_refuses_it(which):
    tensors = qkv(torch.float64)
    assert kernels_of(lambda: linattn.linear_attention(*tensors)) == {"reference"}
    with linattn.use_backend(which), pytest.raises(ValueError, match=f"'{which}'.*float64"):
        linattn.linear_attention(*tensors)


def test_the_interpreter_is_never_chosen_unasked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" not in kernels_of(lambda: linattn.linear_attention(*qkv()))


def test_backward_runs_on_the_backend_that_is_forced_then():
    q, k, v = (x.requires_grad_() for x in qkv())
    out = linattn.linear_attention(q, k, v).sum()

    def backward():
        with linattn.use_backend("reference"):
            out.backward()

    assert kernels_of(backward) == {"reference"}


# ------------------------------------------------------------------------------------- run-time choice


@needs_cpu_library
def test_a_compiled_graph_chooses_its_backend_at_each_run():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linattn.linear_attention, backend=counter, fullgraph=True)
    tensors = qkv()
    compiled(*tensors)
    for which in ("reference", "cpu", "reference"):
        with linattn.use_backend(which):
            assert kernels_of(lambda: compiled(*tensors)) == {which}
    with linattn.use_backend("cuda"), pytest.raises(Exception, match="cuda tensors"):
        compiled(*tensors)
    assert counter.frame_count == 1


@needs_cpu_library
def test_raw_ops_follow_the_same_choice():
    for which in ("reference", "cpu"):
        with linattn.use_backend(which):
            assert kernels_of(lambda: torch.ops.linattn.linear_attention(*qkv())) == {which}


# ------------------------------------------------------------------------------------- report


def test_the_report_has_a_row_for_every_op_device_and_dtype():
    rows = backends.report()
    devices = {"cpu"} | {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    ops = (*OPS, "window_attention", "pool_tokens")
    expected = {(op, device, d) for op in ops for device in devices for d in ("float32", "float16", "bfloat16")}
    found = [(row["op"], row["device"], row["dtype"]) for row in rows]
    assert len(found) == len(set(found))
    assert expected <= set(found)


def test_every_backend_of_a_row_runs_or_says_why_not():
    for row in backends.report():
        assert row["backend"] not in row["why_not"]
        for name in backends.BACKENDS:
            reason = backends.why_not(row["op"], name, torch.device(row["device"]), getattr(torch, row["dtype"]))
            assert row["why_not"].get(name) == reason
            assert reason is None or len(reason) > 10
        assert "reference" not in row["why_not"]


def test_the_report_names_the_backend_that_really_runs():
    for row in backends.report():
        if row["op"] == "linear_attention":
            tensors = qkv(getattr(torch, row["dtype"]), row["device"])
            assert kernels_of(lambda tensors=tensors: linattn.linear_attention(*tensors)) == {row["backend"]}


def test_the_report_shows_the_error_of_a_forced_backend():
    with linattn.use_backend("cuda"):
        rows = [row for row in backends.report() if row["device"] == "cpu"]
    assert rows
    for row in rows:
        assert row["backend"] is None
        assert "cuda tensors" in row["error"]


# ------------------------------------------------------------------------------------- what is there


def test_importing_linattn_imports_neither_triton_nor_diffusers():
    code = """
    import sys, torch
    before = set(sys.modules)
    import linattn
    heavy = {"triton", "linattn.triton_kernels", "linattn.adapters", "diffusers", "transformers", "numpy", "peft"}
    print(sorted(heavy & (set(sys.modules) - before)))
    """
    assert python(code) == "[]"


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory):
    """A folder that holds the package without its compiled libraries, as LINATTN_BUILD=0 installs it."""
    root = tmp_path_factory.mktemp("pure")
    ignored = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "_build_info.json", "__pycache__", "bundled")
    shutil.copytree(PACKAGE, root / "linattn", ignore=ignored)
    return str(root)


def test_without_the_library_everything_runs_as_reference_and_says_why(pure_python):
    code = """
    import torch, linattn
    from linattn import _library, backend
    print(linattn.__file__)
    q = torch.rand(1, 2, 6, 16, requires_grad=True)
    linattn.linear_attention(q, q, q).sum().backward()
    print(bool(q.grad.isfinite().all()), {row["backend"] for row in backend.report() if row["device"] == "cpu"})
    print(_library.loaded("cpu"), _library.path("cpu"), _library.reason("cpu"))
    with linattn.use_backend("cpu"):
        try:
            linattn.linear_attention(q, q, q)
        except ValueError as error:
            print(error)
    """
    file, ran, why, error = python(code, PYTHONPATH=pure_python).splitlines()
    assert file.startswith(pure_python)
    assert ran == "True {'reference'}"
    assert why.startswith("False None _C_cpu was not built")
    assert "'cpu'" in error
    assert "not built" in error


def test_a_broken_library_is_a_reason_and_not_an_error(pure_python):
    broken = Path(pure_python) / "linattn" / "_C_cpu.so"
    broken.write_bytes(b"not a library")
    try:
        code = "import linattn; from linattn import _library; print(_library.reason('cpu'))"
        assert "_C_cpu.so could not be loaded" in python(code, PYTHONPATH=pure_python)
    finally:
        broken.unlink()
