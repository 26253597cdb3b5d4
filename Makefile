# make quickstart, make test: both install first, into .venv.
PYTHON ?= python3
ARGS ?=

help:
	@echo "make quickstart   install, post-train the shapes world's one-step generator, show before and after"
	@echo "make test         install, run the tests"
	@echo "make shapes       train the shapes world's models again (about 50 minutes on 2 cores)"
	@echo "make check        measure the shapes world's models"
	@echo "make style        ruff"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

install: .venv/installed

quickstart: install
	.venv/bin/python examples/shapes/quickstart.py $(ARGS)

test: install
	.venv/bin/python -m pytest $(ARGS)

shapes: install
	.venv/bin/python examples/shapes/build_pipelines.py $(ARGS)

check: install
	.venv/bin/python examples/shapes/build_pipelines.py --stages check

style: install
	.venv/bin/python -m pip install --quiet ruff
	.venv/bin/ruff check .

.PHONY: help install quickstart test shapes check style
