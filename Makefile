# Everything runs from .venv, created on first use; pip uses the index of the machine's configuration.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test test-slow test-all lint bench faults clean help

demo: .venv/.installed  ## synth, prepare, train, evaluate and predict in minutes on a CPU, into demo/
	$(BIN)/raylivecell demo --out demo

# Files of the second group of slow tests of Ray, about half of their time.
SECOND := $(addprefix tests/,cli/test_submit.py cluster/test_kubernetes_pod.py cluster/test_monitoring.py cluster/test_s3.py project/test_readme.py runtime/test_working_folder.py sweep/test_sweep.py)

test: lint  ## lint, unit tests and quick tests of Ray; 6 minutes on two cores
	tests/streams.sh "not slow"

test-slow: .venv/.installed  ## the slow tests alone: complete runs, kills, S3, a browser, databases, a fault; 19 minutes
	tests/streams.sh slow $(SECOND)

test-all: test test-slow  ## both, as CI does

lint: .venv/.installed  ## ruff (rules and format), text of all files, imports between packages, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/lint_text.py
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

bench: .venv/.installed  ## each figure compared with its baseline in one run, into runs/bench/
	for what in augment feed step train predict evaluate prepare startup scale serve; do $(BIN)/raylivecell bench $$what --out runs/bench/$$what || exit 1; done

faults: .venv/.installed  ## ten faults on four hosts in network namespaces (root, Linux), with the time each costs; 40 minutes
	$(BIN)/python tests/faults.py

clean:  ## delete what the targets above created, but not data/ and runs/
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find raylivecell tests -name __pycache__ -type d -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
