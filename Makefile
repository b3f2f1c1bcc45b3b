# make help lists the targets. Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

# OMP_WAIT_POLICY: threads that wait for each other sleep meanwhile, so that a busy machine does not stall them.
demo: $(VENV)/.run   ## install, train on digits, sample, show where the pictures are
	rm -rf demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ddpm-train digits --labels --out-dir demo/run
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ddpm-sample demo/run --steps 60 --out demo/samples.png --gif demo/reverse.gif
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ddpm-sample fashion_mnist --guidance 2 --out demo/clothes.png
	@echo "Eight of each digit that did not exist before: demo/samples.png, and how they came about: demo/reverse.gif"
	@echo "Eight of each of ten pieces of clothing, drawn with weights that come with the package: demo/clothes.png"

test: docs           ## install, and run every check
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal

lab: $(VENV)/.dev    ## the book in JupyterLab
	$(BIN)/jupyter trust nbs/*.ipynb   # so that stored figures and players show before a page is run
	OMP_WAIT_POLICY=PASSIVE $(BIN)/jupyter lab --config=tools/lab.py --notebook-dir=. nbs/index.ipynb

docs: $(VENV)/.dev   ## the docs site in _site/; warnings and broken links are errors
	OMP_NUM_THREADS=1 $(BIN)/python docs/build.py

docs-serve: docs     ## the docs site in a browser: http://localhost:8000
	$(BIN)/python -m http.server --bind localhost --directory _site 8000

evaluate: $(VENV)/.dev   ## every row of page 15's tables for RUN=runs/plain (FULL=--full on a GPU)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tools/table.py $(RUN) $(FULL)

ship: evaluate       ## put RUN's weights into the package, with COMMIT=... and DEVICE="its name"
	$(BIN)/python tools/fashion_mnist.py figures $(RUN)
	$(BIN)/python tools/ship.py $(RUN) fashion_mnist_plain --commit $(COMMIT) --device "$(DEVICE)"
	$(BIN)/python tools/readme.py
	PATH=$(BIN):$$PATH nbdev-test nbs/15_fashion_mnist.ipynb --save --n-workers 0
	$(BIN)/nbdev-clean --fname nbs/15_fashion_mnist.ipynb

bench: $(VENV)/.bench  ## speed, memory and lines of code beside diffusers and lucidrains
	$(BIN)/python -m benchmarks.side_by_side

clean:               ## remove what the other targets made, the installation too
	rm -rf $(VENV) demo build dist *.egg-info _proc _site

$(VENV)/.pip:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

$(VENV)/.run: $(VENV)/.pip settings.ini setup.py pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.dev: $(VENV)/.pip settings.ini setup.py pyproject.toml
	$(BIN)/pip install -q -e ".[dev,docs,evaluate,interop]"
	touch $@ $(VENV)/.run

$(VENV)/.bench: $(VENV)/.pip settings.ini setup.py pyproject.toml
	$(BIN)/pip install -q -e ".[interop,bench]"
	touch $@ $(VENV)/.run

.PHONY: help demo test lab docs docs-serve evaluate ship bench clean
