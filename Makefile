# Everything runs from .venv, made on first use; pip takes its index from the machine's own configuration.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test test-slow test-all lint bench faults clean help

demo: .venv/.installed  ## synth, prepare, train, evaluate and predict in minutes on a CPU, into demo/
	$(BIN)/raylivecell demo --out demo

# Files of the second group of slow Ray tests: about half of their time.
SECOND := $(addprefix tests/,cluster/test_kubernetes_pod.py cluster/test_monitoring.py cluster/test_s3.py project/test_readme.py sweep/test_sweep.py)

test: lint  ## lint, unit tests and quick tests of Ray; 6 minutes on two cores
	tests/streams.sh "not slow"

test-slow: .venv/.installed  ## the slow tests alone: whole runs, kills, S3, a browser, databases, a fault; 19 minutes
	tests/streams.sh slow $(SECOND)

test-all: test test-slow  ## both; what CI runs

lint: .venv/.installed  ## ruff (rules and format), the text of all files, which package imports which, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/lint_text.py
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

bench: .venv/.installed  ## each figure compared with its baseline in one run, into runs/bench/
	for what in augment feed step train predict evaluate prepare startup scale; do $(BIN)/raylivecell bench $$what --out runs/bench/$$what || exit 1; done

faults: .venv/.installed  ## each fault on four hosts made of network namespaces (root, Linux), and what it cost; 40 minutes
	$(BIN)/python tests/faults.py

clean:  ## delete what the targets above made, but not data/ and runs/
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find raylivecell tests -name __pycache__ -type d -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
