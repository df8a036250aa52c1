# make train | test | test-peers | build | bench | wheel | clean
#
# The virtual environment sees the system's packages, so an installed torch is used; otherwise this
# release is installed. Any other: make TORCH="torch==2.12.0", or TORCH="torch --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: build train test test-peers bench wheel clean

$(VENV)/.ready: Makefile pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet "setuptools>=77" "cmake>=3.25" ninja numpy pybind11 pytest pytest-benchmark tqdm matplotlib
	@touch $@

build: $(VENV)/.ready
	@command -v nvcc >/dev/null || echo "no CUDA compiler (nvcc) found: building the CPU part alone"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) setup.py --quiet build_ext --inplace
	@test -e $(VENV)/.installed || { $(PY) -c "import site, pathlib; pathlib.Path(site.getsitepackages()[0], 'pykern-source.pth').write_text('$(CURDIR)\n')" && touch $(VENV)/.installed; }

train: build
	$(PY) -m pykern train $(ARGS)

test: build
	$(PY) -m pytest $(ARGS)

clean:
	rm -rf build dist *.egg-info pykern/*.so
