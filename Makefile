# Everything runs from .venv, made on first use; pip takes its index from the machine's own configuration.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test lint bench clean help

demo: .venv/.installed  ## synth, prepare, train, evaluate and predict in minutes on a CPU, into demo/
	$(BIN)/raylivecell demo --out demo

test: lint  ## lint, then all tests, those of Ray beside the rest; the slowest are named at the end
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=15

lint: .venv/.installed  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## each figure beside its rival's, same run, into runs/bench/
	for what in augment feed prepare; do $(BIN)/raylivecell bench $$what --out runs/bench/$$what || exit 1; done

clean:  ## delete what the targets above made, but not data/ and runs/
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find raylivecell tests -name __pycache__ -type d -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
