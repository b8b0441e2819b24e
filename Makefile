# One front door: `make demo` shows it, `make test` proves it.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
RUNS ?= demo-runs

.PHONY: install test slow lint format dist demo bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,cloud]" --group dev
	touch $@

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Wheel and sdist, installed and used outside this folder.
dist: install
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tests/packaging/try_dist.py dist

# Real work, end to end, on a Ray of its own: MNIST trained for two epochs and its norms for every layer,
# then FFDNet trained shortly on sample photographs and the norms of its eleventh layer.
demo: install
	$(BIN)/infl submit grad-norms --task mnist --layer all --epochs 2 --runs $(RUNS)
	$(BIN)/infl submit grad-norms --layer 11 --epochs 2 --runs $(RUNS)
	$(BIN)/infl runs --runs $(RUNS)
	$(BIN)/infl top grad-norms-ffdnet --k 5 --runs $(RUNS)
	@$(BIN)/infl cluster status
	@echo "The Ray above ends itself when idle; end it now with: $(BIN)/infl cluster down"

# A page for each script, made anew: `make bench`, or `make bench OPTIONS=--full` for all sizes, or `make bench BENCHES=scores`;
# once every script has one, benchmarks/RESULTS.md. On a machine with nothing else to do. The peers live apart:
# kronfluence's wheel brings a package named `tests`.
ALL_BENCHES := norms_mnist norms_ffdnet norms_models scores s_test solvers retraining submit scaling simulation
BENCHES ?= $(ALL_BENCHES)
PAGES := $(ALL_BENCHES:%=benchmarks/pages/%.md)
PEERS := .venv-bench

bench: $(PEERS)/installed
	mkdir -p benchmarks/pages
	set -e; for name in $(BENCHES); do \
	    $(PEERS)/bin/python benchmarks/$$name.py $(OPTIONS) > benchmarks/pages/$$name.new; \
	    mv benchmarks/pages/$$name.new benchmarks/pages/$$name.md; \
	done
	if ls $(PAGES) > /dev/null; then \
	    (printf '# Results\n\nMade by `make bench`; [what to make of it](README.md).\n'; \
	    for page in $(PAGES); do echo; sed 's/^#/##/' $$page; done) > benchmarks/RESULTS.md; \
	fi

$(PEERS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,bench]"
	$(PEERS)/bin/python -m pip install --quiet --no-deps pyDVL==0.10.0
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) dist
