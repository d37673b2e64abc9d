# Everything runs from .venv, made on first use; pip takes its index from the machine's own configuration.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test lint bench faults clean help

demo: .venv/.installed  ## synth, prepare, train, evaluate and predict in minutes on a CPU, into demo/
	$(BIN)/raylivecell demo --out demo

# Two processes: tests of Ray wait for processes to start, the rest computes. pytest-xdist 3.8 could not keep the tests of
# Ray together (its --dist loadgroup does nothing under pytest 9.2), and two clusters on one host disturb each other.
test: lint  ## lint, then all tests: those of Ray, and beside them the rest, told last
	@trap 'kill $$rest 2>/dev/null' EXIT; \
	$(BIN)/python -m pytest -m "not ray" --durations=5 >.pytest-rest.log 2>&1 & rest=$$!; \
	$(BIN)/python -m pytest -m ray --durations=15; code=$$?; \
	wait $$rest || code=1; cat .pytest-rest.log; exit $$code

lint: .venv/.installed  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## each figure beside its rival's, same run, into runs/bench/
	for what in augment feed train predict prepare startup scale; do $(BIN)/raylivecell bench $$what --out runs/bench/$$what || exit 1; done

faults: .venv/.installed  ## on four hosts made of network namespaces (root, Linux): each fault, and what it cost; 40 minutes
	$(BIN)/python tests/faults.py

clean:  ## delete what the targets above made, but not data/ and runs/
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find raylivecell tests -name __pycache__ -type d -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
