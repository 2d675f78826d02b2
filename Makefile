# Everything is set up by the targets themselves; only make and Python 3.11+ (with venv) are assumed.
#
#   make demo     set up, write a digital-brain BIDS dataset, fit it, say where the report is
#   make test     set up and run the test suite
#   make lint     ruff and mypy
#   make image    container image (Docker or Podman)       make sif   the same for Apptainer
#   make clean    remove what the targets above made
#
# Variables: TORCH=cpu|cuda         build of torch (default cpu)
#            TORCH_INDEX=URL        where CPU builds of torch come from (see scripts/install_torch.sh)
#            PYTHON=/path/python3   interpreter of the environment (default: the first one new enough)
#            VENV=DIR  DEMO=DIR     where the environment and the demo go
#            PYTEST_ARGS="..."      e.g. PYTEST_ARGS="tests/engine -k nexi"

TORCH ?= cpu
export TORCH TORCH_INDEX
VENV ?= .venv
DEMO ?= demo
CONTAINER ?= $(shell command -v docker || command -v podman)
IMAGE ?= bids_gacelle:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' bids_gacelle/__init__.py)-$(TORCH)
SIF ?= bids_gacelle.sif
# Files of one worker stay together, so that a fixture shared by a module is made once.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_ARGS := $(foreach name,TORCH TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name))))
INSTALLED := $(VENV)/installed-$(TORCH)
MODELS := r2star,despot1,mcmicro,nexi

.PHONY: install demo test lint image sif clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch comes first and alone, in the build that was asked for; see the script.
$(VENV)/torch-$(TORCH): constraints.txt scripts/install_torch.sh
	@test -n "$(PYTHON)" || { echo "bids_gacelle needs Python 3.11 or newer, but python3 is" \
	  "'$$(python3 --version 2>&1)'. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) could not make a virtual environment in" \
	  "$(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	scripts/install_torch.sh $(BIN)/python
	@touch $@

$(INSTALLED): $(VENV)/torch-$(TORCH) pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e '.[phantom,test,dev]'
	@$(PIP) check
	@touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/bids-gacelle-phantom $(DEMO)/bids --subjects 1
	$(BIN)/bids-gacelle $(DEMO)/bids $(DEMO)/derivatives participant --models $(MODELS) --combine-dwi \
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
	$(CONTAINER) build $(BUILD_ARGS) -t $(IMAGE) .

sif:
	@command -v apptainer >/dev/null || { echo "make sif needs apptainer" >&2; exit 1; }
	apptainer build --fakeroot $(BUILD_ARGS) $(SIF) singularity.def

clean:
	rm -rf $(VENV) $(DEMO) $(SIF) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
