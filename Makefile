# make train   train the debug recipe (CPU is enough); any recipe key can follow: make train data.text=my.txt
# make test    lint, types and tests
# Both create what they need: a Python 3.12+ virtual environment in .venv with all dependencies.

RECIPE ?= debug
# Words such as data.text=my.txt on the command line are overrides of the recipe.
OVERRIDES := $(foreach word,$(MAKEOVERRIDES),$(if $(findstring .,$(firstword $(subst =, ,$(word)))),$(word)))
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: train test lint clean

train: $(INSTALLED)
	$(VENV_PYTHON) -m megatron_carve.train $(RECIPE) $(foreach word,$(OVERRIDES),'$(word)')

test: lint
	$(VENV)/bin/pytest -n 2 --dist loadfile

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
	rm -rf $(VENV) build dist *.egg-info
