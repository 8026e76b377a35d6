"""Installing: every way pip has, from the sdist, into environments that hold nothing but PyTorch; and its refusals.

The libraries are compiled once, in a tree unpacked from the sdist; the installs after the first find them built.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TOY_CUDA = """
#include <torch/csrc/stable/tensor.h>
__global__ void twice(long n, const float* x, float* y) {
  long i = blockIdx.x * long(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}
void launch_twice(const torch::stable::Tensor& x, torch::stable::Tensor& y) {
  twice<<<(x.numel() + 255) / 256, 256>>>(x.numel(), x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
}
"""

pytestmark = [
    pytest.mark.slow_install,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout with setup.py"),
]


def run(*command, cwd=None, timeout=600, **environment):
    """The finished process; its environment is this one's without what would lead a build elsewhere."""
    ours = ("LINATTN_", "TRITON_", "PYTHONPATH", "PIP_CONSTRAINT", "PIP_REQUIRE", "CUDAARCHS", "TORCH_CUDA", "COV_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    # The same cmake and ninja for all: another version of ninja compiles everything again.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    env |= {key: str(value) for key, value in environment.items()}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd or os.path.abspath(os.sep),
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )


def succeed(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


def line_of(done):
    """The one line in which setup.py says why it refuses."""
    assert done.returncode != 0, done.stdout
    lines = re.findall(r"^ *(linattn: .*)$", done.stdout, re.MULTILINE)
    assert len(lines) == 1, done.stdout
    assert "Traceback" not in done.stdout
    return lines[0]


# ---------------------------------------------------------------------------------------------------- environments


def distributions(*names):
    """Those distributions and everything they require here, by name."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


class Environment:
    """A fresh virtual environment that sees the named distributions of this one, and nothing else."""

    def __init__(self, folder, *names):
        venv.create(folder, symlinks=os.name != "nt")
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(succeed(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        for distribution in distributions(*names).values():
            base = Path(distribution.locate_file("")).resolve()
            for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                if (base / top).exists() and not (self.site / top).exists():
                    (self.site / top).symlink_to(base / top)

    def pip(self, *arguments, **options):
        # The pip of this test run, working on that environment: nothing of pip's is inside it.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, *arguments]
        return run(*command, **options)

    def install(self, *arguments, **options):
        done = self.pip("install", *arguments, **options)
        assert done.returncode == 0, done.stdout[-6000:]

    def __call__(self, *arguments, **options):
        return succeed(self.python, *arguments, **options)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "venv", "torch", "numpy")


@pytest.fixture(scope="session")
def registry():
    """Skips where no package registry answers: build isolation has to download its tools."""
    done = run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", os.devnull + "x", "ninja", timeout=120)
    if done.returncode != 0 and re.search("No matching distribution|Connection|Temporary failure", done.stdout):
        pytest.skip("no package registry can be reached, and build isolation downloads cmake and ninja")


# ------------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("linattn-*.tar.gz"))


@pytest.fixture(scope="session")
def tree(sdist, tmp_path_factory):
    """The unpacked sdist: what the installs below start from, so nothing of the checkout can help them."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree]
    succeed(*command)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def library(wheel, tmp_path_factory):
    """_C_cpu as the wheel has it."""
    folder = tmp_path_factory.mktemp("library")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if "/_C_cpu." in name)
        return Path(archive.extract(name, folder))


def tracked(*patterns):
    """Files of the repository, without those that a release leaves out."""
    done = run("git", "ls-files", "-z", "--", *patterns, cwd=ROOT)
    if done.returncode != 0:
        pytest.skip("not a git checkout: there is no list of files to compare with")
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def test_sdist_holds_every_source_and_no_build_product(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked(
        "csrc", "cmake", "tools", "linattn", "adapters", "triton_kernels", "tests", "examples", "*.txt", "setup.py"
    )
    assert wanted - names == set()
    assert [name for name in names if re.search(r"\.(so|dylib|dll|pyc)$|_build_info\.json$", name)] == []


def test_wheel_serves_every_python_of_this_platform(wheel):
    assert re.fullmatch(r"linattn-[^-]+-py3-none-(?!any)[^-]+\.whl", wheel.name), wheel.name


def test_wheel_holds_one_package_with_libraries_and_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {
        "linattn",
        next(iter(n.split("/")[0] for n in names if ".dist-info" in n)),
    }
    assert any(name.startswith("linattn/_C_cpu.") for name in names) and "linattn/_build_info.json" in names
    for folder, inside in {
        "linattn": "linattn",
        "adapters": "linattn/adapters",
        "triton_kernels": "linattn/triton_kernels",
    }.items():
        wanted = {inside + name.removeprefix(folder) for name in tracked(f"{folder}/*.py")}
        assert wanted - names == set()
    assert tracked("linattn/bundled") - names == set()


def test_library_needs_torchs_stable_abi_and_nothing_else_of_torch(library):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    flags = ["-gu"] if sys.platform == "darwin" else ["-D", "--undefined-only"]
    needed = {line.split()[-1].partition("@")[0] for line in succeed("nm", *flags, library).splitlines() if line}
    symbols = {name.lstrip("_") if sys.platform == "darwin" else name for name in needed}
    assert any(name.startswith("aoti_torch_") for name in symbols)
    # C++ names of the torch and c10 namespaces carry "5torch", "3c10", "2at"; CPython's all begin with Py or _Py.
    assert [name for name in symbols if re.match(r"_?Z\w*?(5torch|3c10|2at)\w", name)] == []
    assert [name for name in symbols if re.match(r"_?Py[A-Z_]", name)] == []


def test_library_remembers_no_folder_of_the_build_machine(library, tree):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = succeed("readelf", "-d", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    torch_libraries = re.findall(r"NEEDED.*\[(lib(?:torch|c10)\w*\.so)\]", dynamic)
    assert set(torch_libraries) <= {"libtorch_cpu.so", "libc10.so"}
    assert os.fsencode(os.path.dirname(torch.__file__)) not in library.read_bytes()


# -------------------------------------------------------------------------------------------------------- installs

USE_IT = """
import linattn, linattn.adapters, linattn.triton_kernels, torch
from linattn import _library, backend
assert _library.loaded("cpu"), _library.reason("cpu")
q, k, v = torch.randn(3, 1, 2, 100, 40).unbind()
assert backend.choose("linear_attention", q.device, q.dtype) == "cpu"
with linattn.use_backend("cpu"):
    out = torch.ops.linattn.linear_attention(q, k, v)
assert torch.allclose(out, linattn.reference.linear_attention(q, k, v), atol=1e-5)
print(linattn.__path__[0])
print(linattn.adapters.__path__[0])
"""


USE_REFERENCE = """
import linattn, torch
from linattn import backend
q = torch.randn(1, 2, 64, 40)
print(backend.choose("linear_attention", q.device, q.dtype), tuple(torch.ops.linattn.linear_attention(q, q, q).shape))
"""


@pytest.mark.parametrize("isolation", [False, True], ids=["no-build-isolation", "build-isolation"])
def test_pip_install_from_the_unpacked_sdist(isolation, wheel, tree, environment, request):
    if isolation:
        request.getfixturevalue("registry")
        environment.install(tree)
    else:
        environment.install("--no-build-isolation", tree)
    package, adapters = environment("-c", USE_IT).split()
    assert Path(package) == environment.site / "linattn"
    assert Path(adapters) == environment.site / "linattn" / "adapters"


def test_editable_install_uses_the_files_of_the_tree(wheel, tree, environment):
    environment.install("--no-build-isolation", "-e", tree)
    package, adapters = environment("-c", USE_IT).split()
    assert Path(package) == tree / "linattn" and Path(adapters) == tree / "adapters"
    # An edit is seen without another install, also in the folders that have another name when installed.
    (tree / "triton_kernels" / "written_later.py").write_text("answer = 42\n")
    try:
        assert environment("-c", "import linattn.triton_kernels.written_later as m; print(m.answer)").strip() == "42"
    finally:
        (tree / "triton_kernels" / "written_later.py").unlink()


def test_outside_project_runs_from_the_wheel_alone(wheel, environment, tmp_path):
    environment.install("--no-deps", wheel)
    project = shutil.copytree(ROOT / "examples" / "outside_project", tmp_path / "project")
    output = environment("model.py", cwd=project, TORCHINDUCTOR_CACHE_DIR=tmp_path / "inductor")
    assert "compiled 1 time(s) for 4 sizes" in output
    assert f"from {environment.site / 'linattn'}: ok" in output


def test_console_script_reports_the_installed_libraries(wheel, environment):
    environment.install("--no-deps", wheel)
    output = succeed(environment.python.parent / "linattn", "doctor")
    assert str(environment.site / "linattn") in output and "built: compiler" in output


def test_pure_python_install_runs_on_the_reference(tree, tmp_path):
    environment = Environment(tmp_path / "venv", "torch", "numpy")
    # No compiler, no cmake: nothing but Python is looked for.
    environment.install("--no-build-isolation", "--no-deps", tree, LINATTN_BUILD=0, PATH="", CXX="no-such-compiler")
    output = environment("-c", USE_REFERENCE)
    assert output.strip() == "reference (1, 2, 64, 40)"


# -------------------------------------------------------------------------------------------------------- refusals


def fake_torch(folder, source):
    """An interpreter whose torch is this source; empty source: no torch."""
    environment = Environment(folder)
    if source:
        (environment.site / "torch").mkdir()
        (environment.site / "torch" / "__init__.py").write_text(source)
    return environment.python


@pytest.mark.parametrize(
    "source, expected",
    [
        ("", r"PyTorch \(>= 2\.11\), and \S+ has none; install torch"),
        (
            "class version: cuda = None\n__version__ = '2.10.1+cpu'",
            r"needs PyTorch >= 2\.11, and \S+ has 2\.10\.1\+cpu",
        ),
        (
            "raise OSError('libtorch_cpu.so is damaged')",
            r"`import torch` fails in \S+ OSError: libtorch_cpu\.so is damaged",
        ),
        ("import no_such_module", r"`import torch` fails in \S+ ModuleNotFoundError: .*no_such_module"),
    ],
    ids=["no torch", "torch too old", "torch does not load", "torch lacks a module"],
)
def test_an_unusable_torch_is_one_line(source, expected, tree, tmp_path):
    python = fake_torch(tmp_path / "venv", source)
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, LINATTN_PYTHON=python)
    assert re.search(expected, line_of(done)), done.stdout


def test_pip_refuses_without_torch_before_it_downloads_one(tree, tmp_path):
    environment = Environment(tmp_path / "venv", "setuptools")
    done = environment.pip("install", "--no-build-isolation", tree)
    assert re.search(r"install torch, then run this again", line_of(done))
    assert "Collecting torch" not in done.stdout and "Downloading" not in done.stdout


def test_no_compiler_is_one_line_that_names_the_package(tree, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, PATH=empty, CXX="")
    line = line_of(done)
    assert "no C++ compiler" in line and "apt-get install g++" in line and "LINATTN_BUILD=0" in line
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, CXX="no-such-compiler -O1")
    assert "no-such-compiler" in line_of(done)


def test_a_wrong_interpreter_is_one_line(tree):
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, LINATTN_PYTHON="/no/such/python")
    assert "/no/such/python" in line_of(done) and "LINATTN_PYTHON" in line_of(done)


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.fixture
def cuda_tree(tree, tmp_path):
    """A tree whose only kernels are two small CUDA files: one for every architecture, one for Hopper."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "csrc", "tests", "*.egg-info"))
    (copy / "csrc" / "cuda").mkdir(parents=True)
    (copy / "csrc" / "cuda" / "library.cu").write_text(TOY_CUDA)
    (copy / "csrc" / "cuda" / "toy_sm90.cu").write_text(
        "#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)\n#error not compiled for 90a\n#endif\n"
        "__global__ void hopper(float* x) { x[threadIdx.x] = 1; }\n"
        "#ifndef LINATTN_CUDA_SM90\n#error the family is not announced\n#endif\n"
    )
    return copy


def build_cuda(tree, **environment):
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **environment)


def test_cuda_files_are_checked_without_a_cuda_torch(cuda_tree):
    if not (shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")):
        pytest.skip("nvcc is not installed: CUDA files cannot be compiled here")
    done = build_cuda(cuda_tree, LINATTN_CUDA="check", LINATTN_CUDA_ARCHS="8.0 9.0a+PTX")
    assert done.returncode == 0, done.stdout
    assert "checked, not built: 80-real, 90-real, 90-virtual, 90a-real" in done.stdout
    log = (cuda_tree / "build" / "cmake" / "ptxas.log").read_text()
    assert {"sm_80", "sm_90", "sm_90a"} == set(re.findall(r"for '(sm_\w+)'", log))
    assert re.search(r"hopper\S+' for 'sm_90a'", log) and "spill" in log
    assert list((cuda_tree / "linattn").glob("_C_cuda*")) == []

    # A mistake in a .cu file is found, and said.
    (cuda_tree / "csrc" / "cuda" / "library.cu").write_text("__global__ void broken() { no_such_function(); }\n")
    done = build_cuda(cuda_tree, LINATTN_CUDA="check", LINATTN_CUDA_ARCHS="80")
    assert done.returncode != 0 and "no_such_function" in done.stdout


def test_cuda_is_left_out_with_a_reason_or_refused_when_demanded(cuda_tree, tmp_path):
    if torch.version.cuda:
        pytest.skip("this torch has CUDA: the refusals for a CPU torch cannot be seen")
    assert re.search(
        r"CUDA kernels: not built: (torch \S+ has no CUDA|nvcc was not found)", build_cuda(cuda_tree).stdout
    )
    assert "not built: LINATTN_CUDA=0" in build_cuda(cuda_tree, LINATTN_CUDA="0").stdout
    done = build_cuda(cuda_tree, LINATTN_CUDA="1")
    assert done.returncode != 0 and "LINATTN_CUDA=1, but" in done.stdout
    done = build_cuda(cuda_tree, LINATTN_CUDA="yes")
    assert done.returncode != 0 and "LINATTN_CUDA is auto, 0, 1 or check, not 'yes'" in done.stdout


# ---------------------------------------------------------------------------------------------- tools/install_torch.py


@pytest.mark.parametrize(
    "gpu, resolved, index, expected",
    [
        (None, ["torch", "nvidia-cublas", "cuda-bindings"], "", "https://download.pytorch.org/whl/cpu"),
        (None, ["torch", "numpy"], "", None),
        ("/usr/bin/nvidia-smi", ["torch", "nvidia-cublas"], "", None),
        (None, ["torch", "nvidia-cublas"], "https://mirror.example/cpu", "https://mirror.example/cpu"),
    ],
    ids=["no GPU, CUDA packages", "no GPU, CPU build", "GPU", "index is named"],
)
def test_torch_comes_without_cuda_packages_where_there_is_no_gpu(gpu, resolved, index, expected, monkeypatch):
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "tools" / "install_torch.py")
    install_torch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install_torch)
    calls = []

    def pip(*arguments, quiet=False):
        if "--report" in arguments:
            report = {"install": [{"metadata": {"name": name}} for name in resolved]}
            Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps(report))
        else:
            calls.append(arguments)
        return 0

    monkeypatch.setattr(install_torch, "pip", pip)
    monkeypatch.setattr(install_torch.shutil, "which", lambda name: gpu)
    monkeypatch.setattr(install_torch.sys, "platform", "linux")
    monkeypatch.setattr(install_torch.sys, "argv", ["install_torch.py", *(["--index", index] if index else [])])
    assert install_torch.main() == 0
    used = [call[call.index("--index-url") + 1] for call in calls if "--index-url" in call]
    assert used == ([expected] if expected else [])
    assert "torch>=2.11" in calls[-1]
