# Start here: `make demo` shows what it does, `make test` runs the tests.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
RUNS ?= demo-runs

.PHONY: install notebooks test test-faults slow models mutants lint docs links format dist demo bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	    --editable ".[cli,cloud]" --group dev
	touch $@

# Idle threads of torch sleep soon, as in `infl`: two processes share the cores.
test: install
	GOMP_SPINCOUNT=10000 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow

# Faults in whole runs, and random schedules of them, side by side; then docs/reliability.md. Half an
# hour on two idle cores. OPTIONS="--seed 17" repeats a schedule, OPTIONS="-k GCS" some of the faults.
test-faults: install
ifdef OPTIONS
	$(BIN)/python -m pytest tests/faults -m "" $(OPTIONS)
else
	rm -f faults.jsonl
	$(BIN)/python -m pytest -q tests/faults/test_schedules.py -m "" & a=$$!; \
	    $(BIN)/python -m pytest -q tests/faults/test_every_fault.py -m "" -k "store" & b=$$!; \
	    $(BIN)/python -m pytest -q tests/faults/test_every_fault.py -m "" -k "not store" & c=$$!; \
	    $(BIN)/python -m pytest -q -m faults --ignore=tests/faults; d=$$?; \
	    wait $$a && wait $$b && wait $$c && exit $$d
	$(BIN)/python tests/faults/faults_page.py
endif

# Which command is right for which of some fifty models? An hour or two; it goes on where it was
# stopped, and keeps its cells in models.jsonl. The page is docs/models.md.
models: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group models
	$(BIN)/python tests/models/table.py $(OPTIONS)

# How many small changes of the code do the tests notice? Hours; OPTIONS="--sample 20" for less.
mutants: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group mutants
	$(BIN)/python tests/mutants.py $(OPTIONS)

# Execute the notebooks of docs/notebooks and keep their outputs; some minutes.
notebooks: install
	$(BIN)/python docs/notebooks/execute.py

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# The site of the documents, in site/html/. Any warning ends it: a link that leads nowhere, a page without
# a place, a docstring that reads badly. It needs no network.
docs: install
	$(BIN)/python docs/site/rooms_picture.py
	$(BIN)/sphinx-build -q -W --keep-going -E -c docs/site -b html . site/html
	@echo "site/html/index.html"

# Do the links to other sites still lead somewhere? It asks them, and so is not part of CI.
links: install
	$(BIN)/sphinx-build -q -E -c docs/site -b linkcheck . site/links

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Build wheel and sdist; install and try them outside this folder.
dist: install
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tests/packaging/try_dist.py dist

# Two real runs on a local Ray: train the MNIST classifier for two epochs and store the norms of all
# layers; then train FFDNet on sample photographs and store the norms of its eleventh layer.
demo: install
	$(BIN)/infl submit grad-norms --task mnist --layer all --epochs 2 --runs $(RUNS)
	$(BIN)/infl submit grad-norms --layer 11 --epochs 2 --runs $(RUNS)
	$(BIN)/infl runs --runs $(RUNS)
	$(BIN)/infl top grad-norms-ffdnet --k 5 --runs $(RUNS)
	@$(BIN)/infl cluster status
	@echo "The Ray above ends itself when idle; end it now with: $(BIN)/infl cluster down"

# Run the benchmarks, on a machine with nothing else to do. Each script writes a page; when all
# pages exist, they make up benchmarks/RESULTS.md. `make bench OPTIONS=--full` runs all sizes,
# `make bench BENCHES=scores` one script. The peers have an environment of their own: kronfluence's
# wheel installs a package named `tests`.
ALL_BENCHES := norms_mnist norms_ffdnet norms_models scores s_test solvers retraining submit \
	scaling simulation
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
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[cli]" \
	    --group bench
	$(PEERS)/bin/python -m pip install --quiet --no-deps pyDVL==0.10.0
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) dist site
