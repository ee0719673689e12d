# Each target creates a virtual environment if there is none. To use another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Tests in one xdist group share a training run or launch, so one worker must run them all.
PYTEST_OPTIONS = -n 2 --dist loadgroup
PYTEST = $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

.PHONY: compare demo dist docs docs-serve test test-all test-versions install style model_cards

demo: $(VENV)/recipes.installed
	$(VENV)/bin/accelerate launch recipes/image_classification.py --output_dir runs/demo --overwrite_output_dir \
		--evaluate_robustness

# Which regularizer helps on noisy digits: 20 trainings, with a report in runs/regularizers. Can be interrupted.
compare: $(VENV)/recipes.installed $(VENV)/compare.installed
	$(VENV)/bin/hf-attentiondrop compare --preset regularizers --jobs 2

# All tests except those marked slow: full trainings, most multi-process launches, most compilation.
test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST) --durations=20

# All tests with the oldest supported versions, in .venv-lowest; records the result in docs/versions.md. Downloads these
# versions first, including torch as pip selects it for this machine: several gigabytes with CUDA libraries.
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
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*_*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The source distribution and the wheel of a release, checked and not uploaded.
dist: $(VENV)/dev.installed
	rm -rf build dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*

# The documentation, from the Markdown in docs/ and the docstrings, in site/. Broken links are errors.
docs: $(VENV)/docs.installed
	$(VENV)/bin/mkdocs build

docs-serve: $(VENV)/docs.installed
	$(VENV)/bin/mkdocs serve

$(VENV)/%.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@
