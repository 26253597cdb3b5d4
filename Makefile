# make quickstart, make test: both install first, into .venv.
PYTHON ?= python3
MODEL ?= sd15
ARGS ?=

help:
	@echo "make quickstart   install, post-train the shapes world's one-step generator, show before and after"
	@echo "make quickstart MODEL=sdxl   the same for its sibling in the format of Stable Diffusion XL"
	@echo "make test         install, run the tests"
	@echo "make shapes       train the shapes world's models again (about 90 minutes on 2 cores)"
	@echo "make check        measure the shapes world's models"
	@echo "make style        ruff, and that the copies in the scripts are equal to their sources"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

install: .venv/installed

quickstart: install
	.venv/bin/python examples/shapes/quickstart.py --model $(MODEL) $(ARGS)

test: install
	.venv/bin/python -m pytest $(ARGS)

shapes: install
	.venv/bin/python examples/shapes/build_pipelines.py $(ARGS)

check: install
	.venv/bin/python examples/shapes/build_pipelines.py --stages check check_sdxl

style: install
	.venv/bin/python -m pip install --quiet ruff
	.venv/bin/ruff check .
	.venv/bin/python utils/check_copies.py

.PHONY: help install quickstart test shapes check style
