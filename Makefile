# Everything is set up by the targets themselves; only make and Python 3.11+ (with venv) are assumed.
#
#   make demo     set up, write a digital-brain BIDS dataset, fit it, say where the report is
#   make test     set up and run the test suite
#   make lint     ruff and mypy
#   make image    container image (Docker or Podman)       make sif   the same for Apptainer
#   make clean    remove what the targets above made
#
# Variables: TORCH=cpu|cuda         build of torch (default cpu)
#            TORCH_INDEX=URL        where CPU builds of torch come from
#            PYTHON=/path/python3   interpreter of the environment (default: the first one new enough)
#            VENV=DIR  DEMO=DIR     where the environment and the demo go
#            PYTEST_ARGS="..."      e.g. PYTEST_ARGS="tests/engine -k nexi"

TORCH ?= cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV ?= .venv
DEMO ?= demo
CONTAINER ?= $(shell command -v docker || command -v podman)
IMAGE ?= bids_gacelle:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' bids_gacelle/__init__.py)-$(TORCH)
SIF ?= bids_gacelle.sif
# Files of one worker stay together, so that a fixture shared by a module is made once.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed-$(TORCH)
MODELS := r2star,despot1,mcmicro,nexi

.PHONY: install demo test lint image sif clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch comes first and alone, because an unpinned torch is gigabytes of CUDA libraries. The CPU build
# is looked for among the local wheels that pip knows of (PIP_FIND_LINKS), then at TORCH_INDEX.
$(VENV)/torch-$(TORCH): constraints.txt
	@test -n "$(PYTHON)" || { echo "bids_gacelle needs Python 3.11 or newer, and found only" \
	  "'$$(python3 --version 2>&1)'. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) could not make a virtual environment in" \
	  "$(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
ifeq ($(TORCH),cpu)
	@$(PIP) install --no-deps --no-index torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	|| $(PIP) install --no-deps --retries 1 --timeout 15 --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION) \
	|| { echo "No CPU build of torch at $(TORCH_INDEX): taking the package index's own build," \
	     "which on Linux brings several gigabytes of CUDA libraries." >&2; \
	     $(PIP) install -c constraints.txt torch==$(TORCH_VERSION); }
else
	$(PIP) install -c constraints.txt torch==$(TORCH_VERSION)
endif
	@touch $@

$(INSTALLED): $(VENV)/torch-$(TORCH) pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e '.[phantom,test,dev]'
	@$(PIP) check
	@touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/bids-gacelle-phantom $(DEMO)/bids
	$(BIN)/bids-gacelle $(DEMO)/bids $(DEMO)/derivatives participant --models $(MODELS) \
	  --derivatives truth=$(DEMO)/bids/derivatives/truth --work-dir $(DEMO)/work
	@echo; for report in $(DEMO)/derivatives/sub-*.html; do echo "Report: $(CURDIR)/$$report"; done

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image:
	@test -n "$(CONTAINER)" || { echo "make image needs docker or podman" >&2; exit 1; }
	$(CONTAINER) build --build-arg TORCH=$(TORCH) --build-arg TORCH_INDEX=$(TORCH_INDEX) -t $(IMAGE) .

sif:
	@command -v apptainer >/dev/null || { echo "make sif needs apptainer" >&2; exit 1; }
	apptainer build --fakeroot $(SIF) singularity.def

clean:
	rm -rf $(VENV) $(DEMO) $(SIF) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
