# One command each. VENV and PYTHON may be overridden: make demo PYTHON=python3.12
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# torch first and bounded: an open range can pull several GB of CUDA packages
TORCH  ?= torch>=2.11,<2.14
# processes of the tests: one a core
WORKERS ?= --numprocesses=auto --maxprocesses=8 --dist=worksteal

.PHONY: env demo test test-all bench gpu sanitize frontier clean

env: $(BIN)/.ready

$(BIN)/.ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.inc csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/*/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja numpy "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[test,triton]"
	@touch $@

demo: env
	$(BIN)/entangle-fast demo

test: env
	$(BIN)/python -m pytest tests -m "not slow" $(WORKERS)

test-all: env
	$(BIN)/python -m pytest tests $(WORKERS)

frontier: env
	$(BIN)/python bench/frontier.py

clean:
	rm -rf $(VENV) build *.egg-info entangle_fast/*.so runs

-include bench/Makefile.inc
