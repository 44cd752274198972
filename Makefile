# make demo   sets up .venv, trains DreamBooth and PALP on one subject, and writes the comparison picture
# make test   sets up .venv and runs all tests
# make gpu    on a machine with an NVIDIA card and nvcc: GPU tests, compute-sanitizer, benchmark rows
#
# On Linux the default torch brings its CUDA libraries (some gigabytes). On a machine without an NVIDIA card, name the
# index of CPU builds that pytorch.org's "Get started" shows:
#   make demo TORCH="torch==2.13.0 --index-url ..."
# A torch that is already in .venv is kept, whatever its version.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test gpu
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(PY) -m palp_fast.zoo.demo

test: $(VENV)/installed
	$(PY) -m pytest tests
	TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreter

GPU_TESTS := $(addprefix tests/test_,optim_cuda add_noise sampler renoise score_residual group_norm layer_norm triton_cuda).py
gpu: export PALP_FAST_CUDA := 1
gpu: export PALP_FAST_NEED_GPU := 1
gpu: $(VENV)/installed
	$(PIP) install --no-build-isolation -e ".[test]"
	$(PY) -m pytest tests
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest -x $(GPU_TESTS) -k cuda || exit 1; done
	for name in score_residual renoise add_noise sampler optim; do \
	  $(PY) -m bench.bench_$$name --device cuda --record || exit 1; done

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
