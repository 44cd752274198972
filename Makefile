# make demo   sets up .venv, trains DreamBooth and PALP on one subject, and writes the comparison picture
# make test   sets up .venv and runs all tests, in WORKERS processes
# make gpu    on a machine with an NVIDIA card and nvcc: benchmark rows, GPU tests, compute-sanitizer (8 minutes)
#
# On Linux the default torch brings its CUDA libraries (some gigabytes). On a machine without an NVIDIA card, name the
# index of CPU builds that pytorch.org's "Get started" shows:
#   make demo TORCH="torch==2.13.0 --index-url ..."
# A torch that is already in .venv is kept, whatever its version.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test gpu
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(PY) -m palp_fast.zoo.demo

test: $(VENV)/installed
	$(PY) -m pytest -n $(WORKERS) --dist worksteal tests
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/interpreter

# Needs a card and nvcc; results in runs/gpu, rows in bench/results/.
gpu: $(VENV)/installed
	PYTHON="$(abspath $(PY))" bench/gpu_all.sh

$(VENV)/torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

# Editable: edits of Python count at once, a change of C++ or of the dependencies installs anew. The build must see the
# torch that is installed, hence no isolation.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) install "setuptools>=77" wheel ninja numpy
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@
