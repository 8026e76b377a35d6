"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, every instruction set.

In a file of its own: it is the longest part of the suite, and each pytest process takes whole files.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.native import COMPILER, FLAGS, ISAS, ROOT, SOURCES, compile_all, needs_compiler


def sanitizer_works(name, folder):
    """Some compilers come without the run-time libraries of the sanitizers."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run(
        [COMPILER, f"-fsanitize={name}", str(probe), "-o", str(folder / "probe")], capture_output=True
    )
    return made.returncode == 0 and subprocess.run([str(folder / "probe")], capture_output=True).returncode == 0


FAMILIES = ["linear_attention", "window_attention", "block_causal_attention"]


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_native_driver_is_clean_under_address_and_undefined_sanitizers(family, tmp_path):
    if not sanitizer_works("address,undefined", tmp_path):
        pytest.skip(f"{COMPILER} has no working AddressSanitizer")
    kernel = SOURCES / f"{family}.cpp"
    units = [(kernel, [*FLAGS[isa], f"-DLINATTN_ISA={isa}"]) for isa in ISAS]
    units += [(SOURCES / "isa.cpp", []), (ROOT / f"tests/native/check_{family}.cpp", [])]
    options = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DLINATTN_POISON"]
    if "g++" in Path(COMPILER).name:  # checks as calls: half the compile time
        options += ["--param", "asan-instrumentation-with-call-threshold=0"]
    program = compile_all(tmp_path, units, options, "check")
    with ThreadPoolExecutor(2) as pool:  # one instruction set per process
        runs = list(pool.map(lambda isa: subprocess.run([str(program), isa], capture_output=True, text=True), ISAS))
    for isa, done in zip(ISAS, runs, strict=True):
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        assert f"{isa}: ok" in done.stdout or f"{isa}: not supported" in done.stdout


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_native_driver_is_clean_under_thread_sanitizer(family, tmp_path):
    if not sanitizer_works("thread", tmp_path):
        pytest.skip(f"{COMPILER} has no working ThreadSanitizer")
    units = [
        (SOURCES / f"{family}.cpp", ["-DLINATTN_ISA=baseline"]),
        (SOURCES / "isa.cpp", []),
        (ROOT / f"tests/native/check_{family}.cpp", []),
    ]
    program = compile_all(tmp_path, units, ["-O1", "-g1", "-fsanitize=thread", "-DLINATTN_ONLY_BASELINE"], "check")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
