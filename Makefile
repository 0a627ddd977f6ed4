# make train      train the debug recipe (CPU is enough); any recipe key can follow: make train data.text=my.txt
# make test       lint, types and the tests that a change needs first
# make test-all   make test, and make test-rest: the tests that take longer
# make test-bridge  the tests with Megatron-Bridge, in an environment of its own, .venv-bridge
# All create what they need: a Python 3.12+ virtual environment in .venv with all dependencies.

RECIPE ?= debug
# Words such as data.text=my.txt on the command line are overrides of the recipe.
OVERRIDES := $(foreach word,$(MAKEOVERRIDES),$(if $(findstring .,$(firstword $(subst =, ,$(word)))),$(word)))
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile

.PHONY: train test test-rest test-all test-bridge lint clean

train: $(INSTALLED)
	$(VENV_PYTHON) -m megatron_carve.train $(RECIPE) $(foreach word,$(OVERRIDES),'$(word)')

test: lint
	$(PYTEST)

test-rest: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu and not long'

test-all: test test-rest

test-bridge: $(INSTALLED)
	sh .ci/test-bridge .venv-bridge

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	sh .ci/check-types $(VENV)/bin/mypy

$(INSTALLED): pyproject.toml
	@python=$$(sh .ci/find-python) && \
	  { [ -x $(VENV_PYTHON) ] || "$$python" -m venv $(VENV); }
	$(VENV_PYTHON) -m pip install --quiet --upgrade pip
	$(VENV_PYTHON) -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-bridge build dist *.egg-info
