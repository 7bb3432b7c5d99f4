# Two commands: `make demo` and `make test`. Both install into .venv first and may be repeated.
PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
BIN    := $(VENV)/bin

.PHONY: demo test bench check install chromium clean

demo: $(VENV)/.installed
	$(BIN)/fed-sim phantom $(DEMO)/data --sites 6 --subjects 16 --grid 80 80 52
	$(BIN)/fed-sim run $(DEMO)/data --out $(DEMO)/run --preset quick
	@echo 'Look again: $(BIN)/fed-sim results $(DEMO)/run'

test: $(VENV)/.installed-dev chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/.installed
	@echo 'Small sizes, to see that all run: fixed costs weigh more, and not every aim (for full sizes) is met.'
	for name in preprocessing training_step augmentation_speed loss_speed metrics_speed averaging epoch dp_cost; \
		do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done
	$(BIN)/python benchmarks/round_overhead.py

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedbrats needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray,dicom,tensorboard,mlflow]'
	touch $(VENV)/.installed $@

# The pages are tested in Debian's Chromium. Who is not root installs it, or these tests are skipped.
chromium:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		get="apt-get install --yes --quiet --no-install-recommends chromium chromium-driver"; \
		{ $$get || { apt-get update --quiet && $$get; }; } >/dev/null; \
	else echo "no chromium and chromedriver here: the tests of the pages will be skipped"; fi

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
