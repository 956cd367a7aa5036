# `make demo` and `make test` need nothing but Python 3.10+ and make: they set up the rest.

PYTHON ?= python3
# Further options for pip, such as --index-url.
PIP_OPTIONS ?=

# What is watched and changed by hand, then the main job: a network that changes itself.
MAIN_JOBS := demos/training_tracker_demo.py demos/self_modification_demo.py
BENCHMARK := benchmarks/tracking_overhead.py
COVERAGE := benchmarks/coverage.py
# All models: make coverage COVERAGE_OPTIONS='--resume --write' after pip install '.[zoo]'; hours.
COVERAGE_OPTIONS ?= --subset

VENV := .venv
RUN := $(VENV)/bin/python
# Tests are many small steps: one thread each is faster, and steady on a busy machine.
TEST_RUN := OMP_NUM_THREADS=1 $(RUN)
# Two at a time; whoever has nothing left to do takes over from the other.
PYTEST := $(TEST_RUN) -m pytest -q -n 2 --dist worksteal
PIP := $(RUN) -m pip --quiet --disable-pip-version-check install $(PIP_OPTIONS)

# Where tests lie that need transformers, Lightning, ONNX Runtime or GGUF; without these, they are skipped.
FRAMEWORK_TESTS := tests/integrations tests/export tests/journal/test_state_dict_hooks.py tests/surgery/test_copies.py \
  tests/surgery/test_batches.py tests/test_docs.py tests/test_examples.py tests/test_journeys.py \
  tests/test_specialise_demo.py tests/test_peers.py

.PHONY: help demo test quick frameworks slm long kills asan gguf check lint api bench coverage clean

help:
	@echo "make demo    networks on Fashion-MNIST: watched, changed, and changing themselves"
	@echo "make test    all tests: pytest (with the demos and their validations), test_tracker.py"
	@echo "make quick   those that are not slow; with another Python: make quick PYTHON=python3.13 VENV=.venv-3.13"
	@echo "make frameworks  tests with transformers, Lightning, ONNX Runtime and GGUF, which it installs"
	@echo "make slm     SmolLM2-135M, specialised on a text, made smaller, exported; SLM_OPTIONS='--text notes --keep 0.8'"
	@echo "make long    10,000 removals, and a fault at every line of eight kinds of change; half an hour"
	@echo "make kills   500 kills in the middle of saves; some minutes"
	@echo "make asan    the compiled code under an address sanitizer, fed with changed checkpoints; half an hour"
	@echo "make gguf    what llama.cpp answers from exported files; builds llama-cpp-python, minutes"
	@echo "make check   lint, and pytest: before each commit"
	@echo "make lint    format, style, types (mypy --strict), imports between rooms"
	@echo "make api     the API reference, from docstrings: build/api/index.html"
	@echo "make bench   what tracking costs"
	@echo "make coverage  a few known models cut, compared, trained; minutes"
	@echo "make clean   remove $(VENV) and the caches; data/ and outputs/ stay"
	@echo "With another Python: make demo PYTHON=python3.12"

# Each stamp is written last: what was interrupted is done again.
$(VENV)/made:
	@command -v $(PYTHON) >/dev/null || { echo "Cannot set up: there is no '$(PYTHON)'.\
	 Install Python 3.10 or newer, or name yours: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Cannot set up:\
	 '$(PYTHON)' is $$($(PYTHON) --version 2>&1), and 3.10 or newer is needed.\
	 Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Cannot set up: '$(PYTHON)' comes\
	 without venv. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Set-up: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed: requirements.txt $(VENV)/made
	@echo "Set-up: installing PyTorch and the rest of requirements.txt (once; takes a while)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	@echo "Set-up: installing this library and what its tests need (once)"
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed
	@for script in $(MAIN_JOBS); do \
	  echo "Demo: $$script"; \
	  $(RUN) $$script || { echo "make demo: $$script failed" >&2; exit 1; }; \
	done

test: $(VENV)/installed-dev
	@echo "Test: pytest"
	@$(PYTEST) || { echo "make test: pytest failed" >&2; exit 1; }
	@echo "Test: test_tracker.py"
	@$(TEST_RUN) test_tracker.py || { echo "make test: test_tracker.py failed" >&2; exit 1; }
	@echo "make test: all passed"

quick: $(VENV)/installed-dev
	@echo "Test: pytest, without what is slow, on $$($(RUN) --version)"
	@$(PYTEST) -m "not slow"

$(VENV)/installed-frameworks: pyproject.toml $(VENV)/installed-dev
	@echo "Set-up: installing the frameworks (once)"
	@$(PIP) --editable '.[dev,frameworks]'
	@touch $@

frameworks: $(VENV)/installed-frameworks
	@echo "Test: the frameworks themselves"
	@$(PYTEST) $(FRAMEWORK_TESTS)

# Where it was stopped, it goes on. Exports are run before it is done; llama.cpp runs its own where it is installed.
SLM_OPTIONS ?=
$(VENV)/installed-smollm: pyproject.toml $(VENV)/installed
	@echo "Set-up: installing this library, and a pretrained language model (once)"
	@$(PIP) --editable '.[smollm]'
	@touch $@

slm: $(VENV)/installed-smollm
	@$(RUN) demos/specialise_demo.py $(SLM_OPTIONS) || { echo "make slm: the demo failed" >&2; exit 1; }

# TRACKER_LONG=n: every n-th of them.
long: $(VENV)/installed-dev
	@echo "Test: removals by the thousand, faults line by line"
	@TRACKER_LONG=$${TRACKER_LONG:-1} $(TEST_RUN) -m pytest -q -s tests/surgery/test_chains.py tests/surgery/test_faults.py tests/test_nonsense.py

kills: $(VENV)/installed
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(RUN) benchmarks/kills.py $${TRACKER_KILLS:-500}

gguf: $(VENV)/installed-dev
	@$(PIP) '.[gguf]'
	@$(TEST_RUN) -m pytest -q tests/export/test_gguf.py

# The sanitizer has to be loaded before Python, and what throws exceptions with it: it watches all memory, also torch's.
ASAN_CXX ?= g++
ASAN := PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 XDG_CACHE_HOME=$(CURDIR)/build/asan \
  CXX="$(ASAN_CXX) -fsanitize=address -fno-omit-frame-pointer" TRACKER_MUTANTS=$${TRACKER_MUTANTS:-360}
asan: $(VENV)/installed-dev
	@command -v $(ASAN_CXX) >/dev/null || { echo "make asan needs $(ASAN_CXX), or another compiler: make asan\
	 ASAN_CXX=clang++" >&2; exit 1; }
	@echo "Test: the compiled code under an address sanitizer"
	@$(ASAN) LD_PRELOAD="$$($(ASAN_CXX) -print-file-name=libasan.so) $$($(ASAN_CXX) -print-file-name=libstdc++.so)" \
	  $(TEST_RUN) -m pytest -q -p no:cacheprovider tests/statistics/test_native.py tests/checkpoint/test_mutants.py \
	  --deselect tests/statistics/test_native.py::test_two_processes_build_at_once

check: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory lint
	@echo "Check: pytest"
	@$(PYTEST)

lint: $(VENV)/installed-dev
	@echo "Lint: format"
	@$(RUN) -m ruff format --check .
	@echo "Lint: style"
	@$(RUN) -m ruff check .
	@echo "Lint: types"
	@$(RUN) -m mypy
	@echo "Lint: imports between rooms"
	@$(VENV)/bin/lint-imports --no-cache --no-logo

# What users import. From docstrings; a name that cannot be imported or read is an error.
API := tracker tracker.errors tracker.export tracker.structure tracker.compensation tracker.distributed \
  tracker.integrations.loggers
api: $(VENV)/installed-dev
	@echo "API reference: build/api/index.html"
	@$(RUN) -W error::UserWarning:pdoc -m pdoc --docformat google --output-directory build/api $(API)

bench: $(VENV)/installed
	@echo "Benchmark: $(BENCHMARK)"
	@$(RUN) $(BENCHMARK)

coverage: $(VENV)/installed
	@echo "Coverage: $(COVERAGE) $(COVERAGE_OPTIONS)"
	@$(RUN) $(COVERAGE) $(COVERAGE_OPTIONS)

clean:
	@echo "Removing $(VENV) and the caches"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
