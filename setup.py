"""Builds linattn's shared libraries by CMake + Ninja; everything that can be said declaratively is in pyproject.toml.

The libraries hold no CPython symbols and use only torch's stable ABI, so one build serves every Python and every
torch >= 2.11. torch is found by asking the target interpreter in a clean subprocess, never imported here: that is what
makes plain `pip install .` work in pip's isolated build, where torch does not exist. Variables: docs/building.md.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks [build-system] only when it isolates the build
    raise SystemExit(
        f"linattn: needs setuptools >= 77, and this is {setuptools.__version__}; run `pip install -U setuptools`, "
        "or build with isolation (pip's default)"
    )

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
BUILD_LIBRARIES = os.environ.get("LINATTN_BUILD", "1") != "0"
LIBRARY_SUFFIX = ".dll" if sys.platform == "win32" else ".dylib" if sys.platform == "darwin" else ".so"
LIBRARIES = [f"_C_cpu{LIBRARY_SUFFIX}", f"_C_cuda{LIBRARY_SUFFIX}"]
PURE_PYTHON_HINT = "or set LINATTN_BUILD=0 for the pure Python package"


def fail(message):
    """One line instead of a traceback (SystemExit passes through setuptools and pip unadorned)."""
    raise SystemExit(f"linattn: {message}")


def probe_torch():
    """Facts about the torch of the interpreter that will import linattn: version, cuda, include, lib."""
    interpreter = os.environ.get("LINATTN_PYTHON") or sys.executable
    # These two are how pip points its isolated build at other packages; without them the interpreter is itself again.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [interpreter, str(ROOT / "cmake" / "torch_probe.py")]
    try:
        done = subprocess.run(command, env=env, cwd=os.path.abspath(os.sep), capture_output=True, text=True)
    except OSError as error:
        fail(f"cannot run {interpreter} (LINATTN_PYTHON): {error.strerror}")
    if done.returncode == 3:
        fail(
            f"builds against an installed PyTorch (>= 2.11), and {interpreter} has none; install torch, then run this "
            f"again (builds that run another interpreter: set LINATTN_PYTHON), {PURE_PYTHON_HINT}"
        )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        fail(f"`import torch` fails in {interpreter}: {reason}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    if tuple(int(part) for part in facts["version"].split(".")[:2]) < OLDEST_TORCH:
        fail(f"needs PyTorch >= 2.11, and {interpreter} has {facts['version']}; upgrade torch, then run this again")
    return facts


def find_compiler():
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "clang-cl"]
    for name in candidates:
        if shutil.which(name):
            return name
    fail(
        f"no C++ compiler found (looked for {', '.join(candidates)}); install one (Debian/Ubuntu: apt-get install g++, "
        f"Fedora: dnf install gcc-c++, macOS: xcode-select --install), {PURE_PYTHON_HINT}"
    )


def find_tool(name, package):
    """cmake or ninja: of the build environment (where pip put the build requirements), else of PATH."""
    with contextlib.suppress(ImportError, AttributeError):
        module = __import__(package)
        found = shutil.which(name, path=module.CMAKE_BIN_DIR if package == "cmake" else module.BIN_DIR)
        if found:
            return found
    found = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    return found or fail(f"{name} not found; run `pip install {package}`, or build with isolation (pip's default)")


def parallel_jobs():
    """Compilers at once: what the user said, else one per core and per 3 GiB of free memory (nvcc needs that much)."""
    for variable in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        if os.environ.get(variable):
            return int(os.environ[variable])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        free = 3 * cores
    return max(1, min(cores, int(free / 3)))


@contextlib.contextmanager
def locked(folder):
    """Two installs from one checkout at a time would write the same build folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class CMakeExtension(Extension):
    """Stands for all libraries; makes setuptools treat the package as one with compiled parts."""

    def __init__(self):
        super().__init__("linattn._C", sources=[])


class CMakeBuild(build_ext):
    """Configures, builds and copies the libraries beside linattn/__init__.py (of the wheel, or of the checkout)."""

    def run(self):
        target = ROOT / "linattn" if self.inplace else Path(self.build_lib) / "linattn"
        # One build folder for every kind of install: the second one compiles nothing.
        build_dir = Path(os.environ.get("LINATTN_BUILD_DIR") or ROOT / "build" / "cmake")
        with locked(build_dir):
            self.cmake(build_dir)
            target.mkdir(parents=True, exist_ok=True)
            for name in [*LIBRARIES, "_build_info.json"]:
                built, wanted = build_dir / "lib" / name, target / name
                if built.exists():
                    # A new inode, so that a process that has the old library mapped keeps it.
                    shutil.copy2(built, f"{wanted}.new")
                    os.replace(f"{wanted}.new", wanted)
                else:
                    wanted.unlink(missing_ok=True)

    def cmake(self, build_dir):
        torch = probe_torch()
        find_compiler()
        cmake, ninja = find_tool("cmake", "cmake"), find_tool("ninja", "ninja")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "LINATTN_TORCH_VERSION": torch["version"],
            "LINATTN_TORCH_CUDA": torch["cuda"],
            "LINATTN_TORCH_INCLUDE": Path(torch["include"]).as_posix(),
            "LINATTN_TORCH_LIB": Path(torch["lib"]).as_posix(),
            "LINATTN_CUDA": os.environ.get("LINATTN_CUDA", "auto"),
            "LINATTN_CUDA_ARCHS": os.environ.get("LINATTN_CUDA_ARCHS", ""),
        }
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        build = [cmake, "--build", str(build_dir), "--parallel", str(parallel_jobs())]
        for command, what in ((configure, "CMake's configuration"), (build, "the C++ build")):
            if subprocess.run(command).returncode != 0:
                fail(f"{what} failed (its message is above); fix it, {PURE_PYTHON_HINT}")

    def get_outputs(self):
        folder = Path(self.build_lib) / "linattn"
        return [str(folder / name) for name in [*LIBRARIES, "_build_info.json"] if (folder / name).exists()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class BuildPy(build_py):
    """Starts from an empty folder, so that a module that was deleted in the checkout is not in the next wheel."""

    def run(self):
        if not getattr(self, "editable_mode", False) and Path(self.build_lib).name.startswith("lib"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class DistInfo(dist_info):
    """The first step of pip: a missing torch or compiler is said here, before pip downloads anything for us."""

    def run(self):
        if BUILD_LIBRARIES:
            probe_torch()
            find_compiler()
        super().run()


class Wheel(bdist_wheel):
    """py3-none-<platform>: the libraries know nothing of CPython."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if BUILD_LIBRARIES else (python, abi, platform)


# Folders of the checkout that are installed inside linattn: their own names belong to other packages on PyPI.
MAPPED = {"linattn.adapters": "adapters", "linattn.triton_kernels": "triton_kernels"}
packages = ["linattn"] + [f"linattn.{child}" for child in find_packages("linattn")]
package_dir = {}
for name, folder in MAPPED.items():
    if (ROOT / folder).is_dir():
        packages += [name] + [f"{name}.{child}" for child in find_packages(folder)]
        package_dir[name] = folder

if not BUILD_LIBRARIES and "editable_wheel" in sys.argv:
    for name in [*LIBRARIES, "_build_info.json"]:
        (ROOT / "linattn" / name).unlink(missing_ok=True)

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"linattn": ["bundled/**/*", "distill/recipes/*.yaml"]},
    ext_modules=[CMakeExtension()] if BUILD_LIBRARIES else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "dist_info": DistInfo, "bdist_wheel": Wheel},
)
