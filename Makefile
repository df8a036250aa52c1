# make train | test | test-peers | build | bench | wheel | gpu | clean
#
# The virtual environment sees the system's packages, so an installed torch >= 2.11 is used; otherwise
# this release is installed. Any other: make TORCH="torch==2.12.0", or TORCH="torch --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PEERS := .venv-peers
PY := $(VENV)/bin/python
TOOLS := "setuptools>=77" "wheel" "cmake>=3.25" ninja build
TOOLS += numpy pytest pytest-benchmark pytest-xdist hypothesis tqdm matplotlib torch-abi-audit abi3audit pybind11
# Read the machine code of kernels. They exist for Linux alone, and the tests do without them.
GPU_TOOLS := nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

# A torch that is named on the command line is installed whatever is there.
TORCH_GIVEN := $(findstring command,$(origin TORCH))

.PHONY: build train test test-peers bench wheel gpu clean always

BUILD = @PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) setup.py --quiet build_ext --inplace

build: $(VENV)/.ready
	$(BUILD)

train: build
	$(PY) -m pykern train $(ARGS)

# The kernels' emulator serves the tests alone. Files of tests are shared out to processes, whose threads must not spin
# while they wait for one another. They go in the order of collection (tests/conftest.py), longest first: that of xdist
# goes by the number of tests, and would end with files of few tests that take minutes.
TEST_PROCESSES ?= 2
PARALLEL = --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
test: export PYKERN_EMULATOR ?= checked;address
test: export OMP_WAIT_POLICY ?= passive
# Every call of nvcc goes through the launcher, for what the tests want to know of the kernels; the first build of a
# folder settles it.
test: export CMAKE_CUDA_COMPILER_LAUNCHER ?= $(CURDIR)/$(PY);$(CURDIR)/tests/packaging/nvcc_launcher.py
test: $(VENV)/.ready
	$(BUILD)
	$(PY) -m pytest $(PARALLEL) $(ARGS)

# The peers live in an environment of their own, which sees the packages of the first one.
test-peers: export OMP_WAIT_POLICY ?= passive
test-peers: build $(PEERS)/.ready
	$(PEERS)/bin/python -m pytest tests/peers $(PARALLEL) $(ARGS)

bench: build
	$(PY) -m pykern bench $(ARGS)

NVCC = $(firstword $(shell command -v $${CUDACXX:-nvcc}) $(wildcard /usr/local/cuda/bin/nvcc))
# One without CUDA kernels, and where there is an nvcc, one with them for every architecture.
MAKE_WHEEL = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYKERN_LOCAL_VERSION=1 PYKERN_BUILD_FOLDER=build/wheel $(PY) -m pip wheel
MAKE_WHEEL += --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheel: $(VENV)/.ready
	PYKERN_CUDA=0 $(MAKE_WHEEL)
	$(if $(NVCC),PYKERN_CUDA=1 PYKERN_CUDA_ARCHS=$${PYKERN_CUDA_ARCHS:-release} $(MAKE_WHEEL),@echo "pykern: no CUDA compiler (nvcc) was found; the CPU wheel alone is made")

# One run on a machine with a GPU, with the Python, torch and tools that are there: nothing is installed from a network.
gpu:
	@test -n "$(OUT)" || { echo "pykern: make gpu needs a folder for its results: make gpu OUT=folder" >&2; exit 2; }
	$(PYTHON) -m bench.gpu --out "$(OUT)" $(if $(WHEEL),--wheel "$(WHEEL)")

clean:
	rm -rf build dist *.egg-info pykern/*.so

# --- environments ---------------------------------------------------------------------------------

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("pykern: Python 3.10 or newer is needed, this is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("pykern: this Python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)")
endef

define CHECK_TORCH
import sys
try:
    import torch
    sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
except ImportError:
    sys.exit(1)
endef

# The packages of the virtual environment that a Python belongs to, if it belongs to one.
define PACKAGES
import sys, sysconfig
print(sysconfig.get_path("purelib") if sys.prefix != sys.base_prefix else "")
endef

# Makes these folders seen in the environment whose Python runs this.
define SHARE
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "pykern-shared.pth").write_text("\n".join(sys.argv[1:]) + "\n")
endef
export CHECK_PYTHON CHECK_TORCH PACKAGES SHARE

$(VENV)/.ready: Makefile pyproject.toml $(if $(TORCH_GIVEN),always)
	@command -v $(PYTHON) >/dev/null || { echo "pykern: no $(PYTHON) was found; install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "pykern: no C++ compiler was found; install g++ or clang++, or name one in CXX" >&2; exit 1; }
	@command -v nvcc >/dev/null || echo "pykern: no CUDA compiler (nvcc) was found; the CPU part alone is built"
	$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(PY) -c "$$SHARE" "$(CURDIR)" $$($(PYTHON) -c "$$PACKAGES")
	@$(if $(TORCH_GIVEN),false,$(PY) -c "$$CHECK_TORCH" 2>/dev/null) || { echo "pykern: installing $(TORCH) into $(VENV)"; $(PY) -m pip install --quiet $(TORCH); }
	$(PY) -m pip install --quiet $(TOOLS)
	@$(PY) -m pip install --quiet --only-binary :all: $(GPU_TOOLS) 2>/dev/null || echo "pykern: no $(GPU_TOOLS) for this machine; tests of machine code are skipped"
	@touch $@

# Without dependencies: the list is complete, and pip must not bring another torch.
$(PEERS)/.ready: $(VENV)/.ready tests/peers/requirements.txt
	$(PYTHON) -m venv --system-site-packages $(PEERS)
	@$(PEERS)/bin/python -c "$$SHARE" "$(CURDIR)" $$($(PY) -c "$$PACKAGES") $$($(PYTHON) -c "$$PACKAGES")
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r tests/peers/requirements.txt
	@touch $@
