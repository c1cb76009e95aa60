# make demo    install, train ConPreDiff on OpenMoji, sample: 10 to 20 minutes on two CPU cores
# make test    install what the tests need and run them all
# make fast    the fast half of the tests, on another Python: make fast PYTHON=python3.13 VENV=.venv313
# make docs    build the documentation as pages for a browser
# make clean   remove the environment and what the demo and the pages wrote

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/openmoji
BIN := $(VENV)/bin

.PHONY: demo test fast docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m conprediff_jax.main --config=configs/openmoji.py --workdir=$(WORKDIR)
	$(BIN)/python -m conprediff_jax.sample --workdir=$(WORKDIR) --num=64 --out=$(WORKDIR)/samples.png
	@echo
	@echo "picture grid:        $(WORKDIR)/samples.png"
	@echo "TensorBoard events:  $(BIN)/tensorboard --logdir $(WORKDIR)"
	@echo "checkpoints:         $(WORKDIR)/checkpoints"

test: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest

fast: $(VENV)/.installed-fast
	$(BIN)/python -m pytest $$(grep -l pytest.mark.every_python tests/test_*.py)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[tfds]"
	@touch $@

$(VENV)/.installed-tests: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-fast: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[fast]"
	@touch $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(WORKDIR) docs/_build
