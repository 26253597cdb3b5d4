# make quickstart, make test: both install first, into .venv. The oldest supported set is in .venv-official.
PYTHON ?= python3
MODEL ?= sd15
ARGS ?=
SEED ?= 0
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal

help:
	@echo "make quickstart   install, post-train the shapes world's one-step generator, show before and after"
	@echo "make quickstart MODEL=sd15_4step   the same for a generator of four steps"
	@echo "make quickstart MODEL=sdxl   the same for its sibling in the format of Stable Diffusion XL; MODEL=sd3: of 3"
	@echo "make test         install, run the quick tests"
	@echo "make test-all     install, run all tests"
	@echo "make test-oldest  run the tests in the oldest supported set, requirements-official.txt, but for long programs"
	@echo "make parity       compare our rewards with hpsv2 and image-reward at real size, in both sets; SEED=1: other weights"
	@echo "make stress       kill training runs 50 times and compare them with runs left alone; SEED=1: other moments"
	@echo "make shapes       train the shapes world's models again (about two and a half hours on 2 cores)"
	@echo "make ablation     continue the ablation of Table 2 (hours), write docs/ablation.md"
	@echo "make check        measure the shapes world's models"
	@echo "make gpu          measure on one GPU what a CPU cannot show; without one, its small form"
	@echo "make sync         write what the SD1.5 script shares with the SDXL script into the latter"
	@echo "make style        run ruff"

# The tests need what PixArt needs. Its tokenizer reads with a newer protobuf than hpsv2x names and never imports.
PIXART = sentencepiece protobuf beautifulsoup4 ftfy

.venv/installed: requirements.txt
.venv-official/installed: requirements-official.txt
%/installed:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet -r $<
	touch $@

.venv/pixart: .venv/installed
	.venv/bin/python -m pip install --quiet --upgrade --no-warn-conflicts $(PIXART)
	touch $@

install: .venv/installed
install-tests: .venv/pixart
install-official: .venv-official/installed

quickstart: install
	.venv/bin/python examples/shapes/quickstart.py --model $(MODEL) $(ARGS)

test: install-tests
	$(call PYTEST,.venv) -m "not parity and not slow" $(ARGS)

test-all: install-tests
	$(call PYTEST,.venv) $(ARGS)

test-oldest: install-official
	$(call PYTEST,.venv-official) -m "not once and not parity" $(ARGS)

parity: install-tests install-official
	PARITY_SEED=$(SEED) .venv-official/bin/python -m pytest -m parity $(ARGS)
	PARITY_SEED=$(SEED) .venv/bin/python -m pytest -m parity $(ARGS)

stress: install
	.venv/bin/python tests/stress.py --seed $(SEED) $(ARGS)

shapes: install
	.venv/bin/python examples/shapes/build_pipelines.py $(ARGS)

ablation: install
	.venv/bin/python examples/shapes/ablation.py $(ARGS)
	.venv/bin/python examples/shapes/ablation.py --report

check: install
	.venv/bin/python examples/shapes/build_pipelines.py --stages check check_sdxl check_sd3

gpu: install
	.venv/bin/python examples/gpu_acceptance.py $(ARGS)

sync:
	$(PYTHON) utils/sync_scripts.py

style: install
	.venv/bin/python -m pip install --quiet ruff
	.venv/bin/ruff check .

.PHONY: help install install-tests install-official quickstart test test-all test-oldest parity stress shapes ablation check gpu sync style
