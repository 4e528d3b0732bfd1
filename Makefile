# make demo PROMPT="a red mug"   install into .venv and make a turntable video and a textured GLB
# make demo TORCH_INDEX=URL      the same, with PyTorch from another index (its CPU build is smaller)
# make test                      install into .venv and run linters, type checker and the whole suite
PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= a red mug
CONFIG ?= configs/quickstart.yaml
# $(value ...) keeps a $ in the prompt, and the shell reads the prompt from the environment, so quotes are safe as well.
demo: export DEMO_PROMPT := $(value PROMPT)
# Processes of the tests, one thread each.
WORKERS ?= 2
PY     := $(VENV)/bin/python

export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint install install-dev clean

demo: install
	$(PY) launch.py --config $(CONFIG) --train prompt="$$DEMO_PROMPT"

test: install-dev lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

lint: install-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# torch comes first and pinned, so that no other package's loose requirement chooses its build.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		"$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@# The tests of exported files use the Khronos validator where Node.js is there, and say so where it is not.
	if command -v npm >/dev/null; then $(PY) scripts/validate_gltf.py --install || true; fi
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
