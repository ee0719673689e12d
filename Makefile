# demo and test make a virtual environment first, if there is none. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test install style model_cards

demo: $(VENV)/recipes.installed
	$(VENV)/bin/accelerate launch recipes/image_classification.py --output_dir runs/demo --overwrite_output_dir \
		--evaluate_robustness

test: install
	$(VENV)/bin/python -m pytest -n 2

install: $(VENV)/test.installed

model_cards: $(VENV)/recipes.installed
	$(VENV)/bin/python model_cards/generate.py

style: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/%.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[$*]'
	touch $@
