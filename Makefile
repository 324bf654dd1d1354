# What people, .ci/run and the README call. `make` alone lists the targets.
# On a machine without network or pip, `make gpu-check` uses python3 as it is; everything else works in .venv.

PYTHON ?= python3
OUT ?= runs/gpu-check
PARTS ?=
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
# where there is a C++ compiler, a missing extension is a failure, not a reason to skip its tests
REQUIRE := $(if $(shell command -v $${CXX:-g++}),--require-backend cpu)
# what the API reference documents: packages and modules that the guides import from
API := subnets subnets.clustering subnets.methods subnets.protocols subnets.report.protocols subnet_kernels subnets.training.member_training subnets.training.stacked_module subnets.report.stability subnets.trainer subnets.distributed
IS_LINUX := $(filter Linux,$(shell uname))  # there is no Triton elsewhere
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/* csrc/*/*/*)

.PHONY: help setup demo test test-triton36 lint bench docs cutlass cutlass-headers gpu-check clean

help:
	@echo "make setup      create .venv, install pinned versions, build the extension"
	@echo "make demo       the arithmetic experiment, small, to a table and a figure (about 5 minutes on 2 cores)"
	@echo "make test       all tests"
	@echo "make test-triton36  the Triton kernels with Triton 3.6 (PyTorch 2.11's), in .venv36"
	@echo "make lint       ruff"
	@echo "make bench      the benchmarks, against eager PyTorch, torch.compile, nn.Linear and NeuroSurgeon"
	@echo "make docs       check the docs (their code runs, links lead somewhere) and build the API reference"
	@echo "make cutlass    build the products on CUTLASS too, where there is nvcc (make test does)"
	@echo "make cutlass-headers  copy CUTLASS's headers to build/cutlass, for a GPU machine without network"
	@echo "make gpu-check  build, test and measure on a GPU machine; results in OUT=folder, PARTS=some,parts"

setup: .venv/.done

.venv/.done: $(SOURCES)
	@echo "== 1/4 Python environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== 2/4 PyTorch (the largest download)"
	@$(PIP) install -q -c constraints.txt torch
	@echo "== 3/4 libraries and tools"
	@$(PIP) install -q -c constraints.txt setuptools wheel ninja numpy
	@echo "== 4/4 this package, with its C++ extension (a minute; two where nvcc is installed)"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@$(BIN)/subnets doctor
	@touch .venv/.done

# The products on CUTLASS take minutes to compile, and no GPU's table asks for them yet: only for tests and on request.
cutlass: .venv/.cutlass

.venv/.cutlass: .venv/.done
	@if command -v nvcc > /dev/null || test -n "$$CUDA_HOME"; then \
		echo "== the products on CUTLASS (5 minutes on 2 cores)" && \
		$(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass && \
		$(BIN)/python setup.py -q build_ext --inplace; fi
	@touch .venv/.cutlass

demo: setup
	@$(BIN)/subnets run arithmetic --preset quick --out runs/demo

test: cutlass
	@$(BIN)/python -m pytest -n 2 $(REQUIRE) tests subnet_kernels python_api
	$(if $(IS_LINUX),@TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels/test_triton.py tests/kernels/test_triton_sampled.py)

# the PyTorch 2.11 generation's Triton, in an environment of its own; not part of CI
test-triton36:
	@test -x .venv36/bin/python || $(PYTHON) -m venv .venv36
	@.venv36/bin/pip --disable-pip-version-check install -q torch==2.13.0 triton==3.6.0 "numpy<2.4" pytest safetensors tqdm
	@PYTHONPATH=.:python_api .venv36/bin/python -m pytest -q tests/kernels/test_triton_ahead.py
	@TRITON_INTERPRET=1 PYTHONPATH=.:python_api .venv36/bin/python -m pytest -q tests/kernels/test_triton.py tests/kernels/test_triton_sampled.py

lint: setup
	@$(BIN)/ruff check .

bench: setup
	@$(BIN)/python -m benchmarks

docs: setup
	@$(BIN)/python -m pytest -q tests/packaging/test_docs.py tests/packaging/test_docstrings.py tests/packaging/test_troubleshooting.py
	@$(PIP) install -q -c constraints.txt pdoc
	@$(BIN)/python -W error -m pdoc --docformat google --no-show-source -o build/api $(API)
	@echo "API reference: build/api/index.html"

# copies CUTLASS's headers to where a build looks that has no package: for machines without network
cutlass-headers: setup
	@$(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass
	@rm -rf build/cutlass && mkdir -p build/cutlass
	@cp -r "$$($(BIN)/python -c 'from importlib.util import find_spec; from pathlib import Path; \
		print(Path(find_spec("cutlass_library").origin).parent / "source")')/include" build/cutlass/include

gpu-check:
	@$(PYTHON) -m benchmarks.gpu_check --out "$(OUT)" --parts "$(PARTS)"

clean:
	rm -rf build dist *.egg-info subnet_kernels/_C.abi3.so .venv/.done .venv/.cutlass
