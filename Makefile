# The two commands that matter: make serve, make test.
PYTHON ?= python3
PORT ?= 23333
HOST ?= 127.0.0.1
MODEL ?= demo
REPLICAS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
PARALLEL := -n logical --maxprocesses 4 --dist worksteal --durations=12

.DEFAULT_GOAL := help
.PHONY: help setup serve stop test test-fast test-long test-browser test-hosts test-clients contract chaos families check format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## Make .venv with everything (serve and test call it)

$(STAMP): pyproject.toml
	@echo "Setting up .venv (some minutes the first time; the log is .venv/install.log)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Echelon needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' > .venv/install.log 2>&1 \
		|| { tail -20 .venv/install.log; echo "The installation failed; the whole log is .venv/install.log"; exit 1; }
	@touch $(STAMP)

serve: $(STAMP)  ## Serve the embedded demo model: two replicas, http://127.0.0.1:23333/v1 (PORT=, MODEL=, REPLICAS=)
	@$(BIN)/echelon serve $(MODEL) --host $(HOST) --port $(PORT) --replicas $(REPLICAS)

stop: $(STAMP)  ## Stop what make serve started on PORT
	@$(BIN)/echelon stop --port $(PORT)

test: $(STAMP)  ## Run all tests: fast ones first, then the kernels in Triton's interpreter, then Ray
	$(BIN)/pytest $(PARALLEL) -m "not ray and not slow"
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) tests/kernels/interpreter
	$(BIN)/pytest $(PARALLEL) -m "slow and not ray and not hosts"
	$(BIN)/pytest --durations=12 -m "ray and not hosts and not long"

test-fast: $(STAMP)  ## Run the fast tests only
	$(BIN)/pytest $(PARALLEL) -m "not ray and not slow"

contract: $(STAMP)  ## Run the documents of 2023-24 as an executable contract (minutes; ARGS="--only NAME ...", docs/compat.md)
	@PYTHONPATH=.:tests:benchmarks $(BIN)/python -m contract $(ARGS)

chaos: $(STAMP)  ## Ten minutes of faults under load, no GPU needed; writes chaos.json (ARGS=, docs/reliability.md)
	@PYTHONPATH=.:tests:benchmarks $(BIN)/python -m chaos $(ARGS)

test-clients: $(STAMP)  ## Try clients that are not ours against a live server (installs them into .clients; ARGS="--only NAME", docs/clients.md)
	@PYTHONPATH=. $(BIN)/python -m tests.clients $(ARGS)

test-long: $(STAMP)  ## Run what takes minutes on a cluster (not part of make test)
	$(BIN)/pytest -m "long and not browser"

test-browser: $(STAMP)  ## Run the web pages in chromium, and make their pictures (docs/web.md; not part of make test)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[browser]'
	$(BIN)/pytest -m browser tests/browser

test-hosts: $(STAMP)  ## Run what needs several hosts: as root, with openssh-server (some minutes; not part of make test)
	$(BIN)/pytest -m hosts tests/hosts

families: $(STAMP)  ## Print how far each model family's logits are from its reference's (docs/models.md)
	@PYTHONPATH=. $(BIN)/python tests/workers/family_table.py

check: $(STAMP)  ## Lint, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
