# Each target makes a virtual environment first, if there is none. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Tests of one group share what was trained or launched once, so that one worker takes them all.
PYTEST_OPTIONS = -n 2 --dist loadgroup
PYTEST = $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

.PHONY: demo test test-all test-versions install style model_cards

demo: $(VENV)/recipes.installed
	$(VENV)/bin/accelerate launch recipes/image_classification.py --output_dir runs/demo --overwrite_output_dir \
		--evaluate_robustness

# All but what is marked slow: whole trainings, most launches of several processes, most of what compiles.
test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST) --durations=20

# All tests on the oldest versions that are supported, in .venv-lowest; the outcome goes into docs/versions.md. They are
# downloaded first, torch among them, as pip finds it for this machine: gigabytes with the libraries of CUDA.
test-versions:
	$(MAKE) install VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt
	$(VENV)-lowest/bin/python docs/generate_versions_table.py $(PYTEST_OPTIONS)

install: $(VENV)/test.installed

model_cards: $(VENV)/recipes.installed
	$(VENV)/bin/python model_cards/generate.py

style: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/%.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@
