# make demo | test | bench | docs | build | clean; each sets up what it needs in .venv first.
#
#   PYTHON=python3.12     the interpreter that .venv is made with
#   TORCH_INDEX=URL       a package index to take torch from, such as PyTorch's own of the much smaller CPU builds
#   ARGS='--quick'        passed on to the demo, to pytest or to the benchmark
#   FASTSAM_CPU=0         do without the C++ extension, which test, bench and build otherwise require

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# Twice quiet: errors alone. pip's warnings are about the machine's settings, and fill a screen.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench docs build clean
.DELETE_ON_ERROR:

# A demo may run without a compiler; what checks or measures the extension may not.
test bench build: export FASTSAM_CPU ?= 1
test: export FASTSAM_REQUIRE_CPU ?= 1

demo: $(VENV)/.with-demo
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/fastsam demo $(ARGS)

test: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SITE) --quiet
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

bench: build
	$(BIN)/python -m benchmarks.optimizer_step $(ARGS)

docs: $(VENV)/.with-dev
	$(SITE)

build: $(VENV)/.with-dev
	$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf $(VENV) build dist site *.egg-info fastsam/_*.so fastsam/_build_info.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp of one set of extras. Without build isolation, objects compiled here are reused by the next build.
$(VENV)/.with-%: $(VENV)/.with-torch pyproject.toml
	$(INSTALL) --no-build-isolation -e '.[$*]'
	touch $@

# torch alone comes from TORCH_INDEX and comes first, so that nothing later picks another build of it.
$(VENV)/.with-torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) 'setuptools>=77' 'pybind11>=2.13' ninja
	$(INSTALL) --no-deps --retries 1 $(TORCH_INDEX:%=--extra-index-url %) torch
	touch $@
