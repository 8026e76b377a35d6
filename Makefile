# One command per job; `make help` lists them. Everything is installed into .venv; nothing outside the checkout changes.
#   make test TORCH_INDEX=URL    take torch from that package index (default: see tools/install_torch.py)
#   make test CONSTRAINTS=       newest versions instead of the pinned ones
#   make test PYTHON=python3.12  the interpreter that .venv is made from

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
OUT ?= gpu_out
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SOURCES := $(wildcard csrc/*/* CMakeLists.txt cmake/* setup.py)
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
# One pytest process per core (4 at most), each with its share of the threads: most of the suite is Python and
# Triton's interpreter, which use one core; tests that are about threads set their number themselves. A file stays in
# one process, since the tests of some share one compilation (loadgroup would say that better, but pytest-xdist 3.8's
# does nothing under pytest 9.2).
WORKERS ?= $(shell n=$(CORES); [ $$n -gt 4 ] && n=4; echo $$n)
TEST_THREADS ?= $(shell n=$$(( $(CORES) / $(WORKERS) )); [ $$n -lt 1 ] && n=1; echo $$n)

.PHONY: help test lint format demo gpu docs-tables install clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make test         environment, build, all tests (PYTEST_ARGS='-k name' to choose)"
	@echo "make lint         ruff and clang-format, as CI runs them"
	@echo "make format       the same tools, writing"
	@echo "make demo         environment, build, and pictures from the bundled model in demo_out/"
	@echo "make gpu OUT=dir  on a CUDA machine without network: build, GPU tests, all benchmarks"
	@echo "make docs-tables  the tables of README and docs again from the recorded results"
	@echo "make clean        remove builds and results; distclean: the environment as well"

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created $(CONSTRAINTS) tools/install_torch.py
	@echo "== installing into $(VENV): a minute or two, and what is not cached is downloaded"
	$(BIN)/python tools/install_torch.py $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS)) $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	$(PIP) setuptools wheel cmake ninja
	@touch $@

# -qq: pip's warnings about the machine's own configuration are of no use here; errors are shown.
# Without build isolation: cmake, ninja and setuptools of .venv are used, and nothing is downloaded twice.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/.created $(CONSTRAINTS)
	$(PIP) ruff clang-format
	@touch $@

install: $(VENV)/.test

test: $(VENV)/.test
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=8 $(PYTEST_ARGS)

CXX_FILES = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/cuda_emulation/*.cpp \
	tests/cuda_emulation/*.h tests/cuda_emulation/*.cu)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

demo: $(VENV)/.demo
	$(BIN)/python -m linattn demo --out demo_out

# The interpreter of that machine as it is, with its torch, triton and nvcc: no environment, no network. The install only
# makes the packages importable (seconds); the libraries are built by the first stage of benchmarks.gpu, on its clock.
gpu: export LINATTN_BUILD = 0
gpu: GPU_INSTALL = $(PYTHON) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps
gpu:
	$(GPU_INSTALL) -e . || $(GPU_INSTALL) --break-system-packages -e .
	env -u LINATTN_BUILD $(PYTHON) -m benchmarks.gpu --out $(OUT)

docs-tables: $(VENV)/.test
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf build dist demo_out gpu_out *.egg-info linattn/_C_*.so linattn/_C_*.dylib linattn/_C_*.dll linattn/_build_info.json
	rm -f $(VENV)/.demo $(VENV)/.test
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
