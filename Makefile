PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: help install format check test test-slow demo build clean

help:
	@echo "make install    create $(VENV) and install the package with its train and test extras"
	@echo "make demo       pre-train, fine-tune and evaluate a small model on the pictures in examples/data"
	@echo "make test       fast tests            make test-slow  the slow ones"
	@echo "make check      lint and format check make format     fix both"
	@echo "make build      wheel and sdist into dist/"
	@echo "make clean      remove $(VENV), build output and caches"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(PIP) --editable '.[train,test]'
# Gradio asks for a Pillow below 13, whose resizing rounds otherwise than the fixtures' 13, and runs with 13: it comes without
# that one requirement.
	@$(PIP) --no-deps 'gradio>=6.31,<7'
	@$(BIN)/python -c "from importlib.metadata import requires; print(*[r for r in requires('gradio') \
		if not r.startswith('pillow') and 'extra ==' not in r], sep='\n')" > $(VENV)/gradio.txt
	@$(PIP) --requirement $(VENV)/gradio.txt
	@touch $@

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: install
	@$(BIN)/python -m pytest

test-slow: install
	@$(BIN)/python -m pytest -m "slow and not gpu"

demo: install
	@$(BIN)/python examples/demo.py --output_dir runs/demo

build: install
	@rm -rf dist
	@$(BIN)/python -m build --quiet

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
