# Everything runs from .venv, made on first use; pip takes its index from the machine's own configuration.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test lint bench faults clean help

demo: .venv/.installed  ## synth, prepare, train, evaluate and predict in minutes on a CPU, into demo/
	$(BIN)/raylivecell demo --out demo

# Tests of Ray mostly wait for its processes, the rest computes: they run beside each other, told one after another, the
# rest with the niceness 15 that Ray gives its processes (beside one of 0 they would starve). Two clusters on one host
# disturb each other, so Ray's tests are of two halves only where the system can keep them apart.
# (pytest-xdist 3.8 could not keep them together: its --dist loadgroup does nothing under pytest 9.2.)
HALF := $(addprefix tests/test_,monitoring.py s3.py sweep.py train.py)
PYTEST := $(BIN)/python -m pytest

test: lint  ## lint, then all tests: those of Ray, and beside them the rest
	@trap 'kill $$rest $$half 2>/dev/null' EXIT; \
	nice -n 15 $(PYTEST) -m "not ray" --durations=5 >.pytest-rest.log 2>&1 & rest=$$!; \
	if tests/apart.sh true 2>/dev/null; then \
		tests/apart.sh $(PYTEST) -m ray --durations=10 $(HALF) >.pytest-half.log 2>&1 & half=$$!; \
		tests/apart.sh $(PYTEST) -m ray --durations=10 $(HALF:%=--ignore=%); code=$$?; \
		wait $$half || code=1; cat .pytest-half.log; \
	else \
		$(PYTEST) -m ray --durations=20; code=$$?; \
	fi; \
	wait $$rest || code=1; cat .pytest-rest.log; exit $$code

lint: .venv/.installed  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## each figure beside its rival's, same run, into runs/bench/
	for what in augment feed step train predict evaluate prepare startup scale; do $(BIN)/raylivecell bench $$what --out runs/bench/$$what || exit 1; done

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
