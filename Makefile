# What people, .ci/run and the README call. `make` alone lists the targets.
# On a machine without network or pip, `make gpu-check` uses python3 as it is; everything else works in .venv.

PYTHON ?= python3
OUT ?= runs/gpu-check
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
# where there is a C++ compiler, a missing extension is a failure, not a reason to skip its tests
REQUIRE := $(if $(shell command -v $${CXX:-g++}),--require-backend cpu)
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: help setup demo test lint bench docs gpu-check clean

help:
	@echo "make setup      create .venv, install pinned versions, build the extension"
	@echo "make demo       the arithmetic experiment, small, to a table and a figure (about 5 minutes on 2 cores)"
	@echo "make test       all tests"
	@echo "make lint       ruff"
	@echo "make bench      the benchmarks, against eager PyTorch, torch.compile, nn.Linear and NeuroSurgeon"
	@echo "make docs       check that the code in the docs runs and that their links lead somewhere"
	@echo "make gpu-check  build, test and measure on a GPU machine; results in OUT=folder"

setup: .venv/.done

.venv/.done: $(SOURCES)
	@echo "== 1/4 Python environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== 2/4 PyTorch (the largest download)"
	@$(PIP) install -q -c constraints.txt torch
	@echo "== 3/4 libraries and tools"
	@$(PIP) install -q -c constraints.txt setuptools wheel ninja numpy
	@echo "== 4/4 this package, with its C++ extension (a minute; more where nvcc is installed)"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@$(BIN)/subnets doctor
	@touch .venv/.done

demo: setup
	@$(BIN)/subnets run arithmetic --preset quick --out runs/demo

test: setup
	@$(BIN)/python -m pytest -n 2 $(REQUIRE) tests subnet_kernels python_api

lint: setup
	@$(BIN)/ruff check .

bench: setup
	@$(BIN)/python -m benchmarks

docs: setup
	@$(BIN)/python -m pytest -q tests/packaging/test_docs.py

gpu-check:
	@$(PYTHON) -m benchmarks.gpu_check --out "$(OUT)"

clean:
	rm -rf build dist *.egg-info subnet_kernels/_C.abi3.so .venv/.done
