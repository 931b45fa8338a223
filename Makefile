# One command a job. Variables stand behind each target in `make help`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
SPEC   ?= jobs/specs/demo.toml
CORPUS ?= $(OUT)/corpus
SHARDS ?= all
VERSION ?= latest
CONFIG ?= tiny
ASSETS ?= 6
VIEWS  ?= 3
ARGS   ?=
TESTS  ?= tests
JSON   ?=
SET    ?=
WEIGHTS ?=

# Python 3.11 brings bpy 4.5, Python 3.13 brings bpy 5.2; no other Python has a wheel of a long-term Blender.
CONSTRAINTS = constraints$(shell $(PYTHON) -c 'import sys; print("-3.13" if sys.version_info[:2] == (3, 13) else "")').txt

comma := ,
flags_set  = $(foreach item,$(SET),--set '$(item)')
flags_json = $(if $(JSON),--json)
CLI := $(BIN)/python -m jobs.cli

.DEFAULT_GOAL := help
.PHONY: help setup demo plan render calibrate bench-render publish status report train weights bench-train test lint format s3-up clean

help: ## list every target with its variables
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make .venv with exact versions [PYTHON=python3.11 or python3.13]

$(VENV)/.ready: pyproject.toml constraints.txt constraints-3.13.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 13)) else "error: $(PYTHON) is Python %d.%d; 3.11 or 3.13 is needed: install one and say make PYTHON=/path/to/python3.11" % v)'
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3.11-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[render,train,dev]'
	@$(BIN)/python -c 'import bpy' || { echo 'error: Blender does not load; on Debian: apt-get install libx11-6 libxext6 libxrender1 libxfixes3 libxi6 libxkbcommon0 libsm6 libice6 libgl1 libegl1' >&2; exit 2; }
	@touch $@

demo: $(VENV)/.ready ## the main job, small: objects, renders, shards, a version, training, report.html [OUT=out]
	@$(CLI) demo --out '$(OUT)/demo'

plan: $(VENV)/.ready ## freeze the plan of a spec [SPEC= CORPUS= SET="key=value ..." JSON=1]
	@$(CLI) plan --spec '$(SPEC)' --corpus '$(CORPUS)' $(flags_set) $(flags_json)

render: $(VENV)/.ready ## render shards on Ray, here or on RAY_ADDRESS [SPEC= CORPUS= SHARDS=0-3 SET="render.samples=32 ..." JSON=1]
	@$(CLI) render --spec '$(SPEC)' --corpus '$(CORPUS)' --shards '$(SHARDS)' $(flags_set) $(flags_json)

calibrate: $(VENV)/.ready ## print what samples and the noise target give and cost [SPEC= SET= JSON=1 ASSETS=6 VIEWS=3]
	@$(CLI) calibrate --spec '$(SPEC)' --assets '$(ASSETS)' --views '$(VIEWS)' $(flags_set) $(flags_json)

bench-render: $(VENV)/.ready ## our renderer against the public scripts' way: speed, noise, memory [ARGS="--only tree"]
	@$(BIN)/python -m tests.bench.render $(ARGS)

publish: $(VENV)/.ready ## make a version of what is committed [CORPUS= JSON=1; SPEC= SET= for one plan of several]
	@$(CLI) publish --corpus '$(CORPUS)' $(if $(filter command environment,$(firstword $(origin SPEC))),--spec '$(SPEC)') $(flags_set) $(flags_json)

status: $(VENV)/.ready ## tell where a corpus stands, from its receipts alone [CORPUS= JSON=1]
	@$(CLI) status --corpus '$(CORPUS)' $(flags_json)

report: $(VENV)/.ready ## draw a version: report.html and PNGs [CORPUS= VERSION=latest OUT=out]
	@$(CLI) report --corpus '$(CORPUS)' --version '$(VERSION)' --out '$(OUT)/report'

train: $(VENV)/.ready ## train an LRM on a version; resumes [CORPUS= VERSION=latest CONFIG=tiny OUT=out SET="train.steps=500 ..."]
	@$(CLI) train --corpus '$(CORPUS)' --version '$(VERSION)' --config '$(CONFIG)' --out '$(OUT)/train' $(flags_set)

weights: $(VENV)/.ready ## fetch the weights of the perceptual loss, 553 MB, verified [WEIGHTS=file; default in ~/.cache]
	@$(CLI) weights $(if $(WEIGHTS),--out '$(WEIGHTS)')

bench-train: $(VENV)/.ready ## speed and memory of the model and its renderers on this machine [ARGS="--preset small"]
	@$(BIN)/python -m tests.bench.train $(ARGS)

test: $(VENV)/.ready lint ## lint, then every test that needs no network and no GPU [TESTS=tests/pipeline]
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.ready ## ruff, mypy, and the layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

s3-up: $(VENV)/.ready ## a real S3 server on loopback, over OUT/s3, until Ctrl-C [OUT=out]
	@$(BIN)/python -m tests.s3 '$(OUT)/s3'

clean: ## remove OUT (renders, versions, checkpoints of the default folders)
	rm -rf $(OUT)
