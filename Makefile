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
PUBLIC ?=
SET    ?=
TIME_S ?= 600
SEED   ?=
A      ?= 1
B      ?= latest
DEAD   ?= 0.5
GRACE_S ?= 604800
OBJECTS ?= 1000000
WEIGHTS ?=
IMAGE  ?=
CHECKPOINT ?= $(OUT)/train

# Python 3.11 brings bpy 4.5, Python 3.13 brings bpy 5.2; no other Python has a wheel of a long-term Blender.
CONSTRAINTS = constraints$(shell $(PYTHON) -c 'import sys; print("-3.13" if sys.version_info[:2] == (3, 13) else "")').txt

comma := ,
flags_set  = $(foreach item,$(SET),--set '$(item)')
flags_json = $(if $(JSON),--json)
CLI := $(BIN)/python -m jobs.cli

.DEFAULT_GOAL := help
.PHONY: help setup demo plan render ingest check-captures dataset retry calibrate bench-render bench-corpus bench-ingest \
	bench-loader bench-train bench-jobs publish diff verify tombstone compact gc status why report train learn export weights \
	evaluate infer test test-crash test-cluster lint format s3-up clean

help: ## list every target with its variables
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make .venv with exact versions [PYTHON=python3.11 or python3.13]

$(VENV)/.ready: pyproject.toml constraints.txt constraints-3.13.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 13)) else "error: $(PYTHON) is Python %d.%d; 3.11 or 3.13 is needed: install one and say make PYTHON=/path/to/python3.11" % v)'
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3.11-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[render,train,dev]'
	@$(BIN)/python -c 'import bpy' || { echo 'error: Blender does not load; on Debian: apt-get install libx11-6 libxext6 libxrender1 libxfixes3 libxi6 libxkbcommon0 libsm6 libice6 libgl1 libegl1' >&2; exit 2; }
	@touch $@

demo: $(VENV)/.ready ## the main job, small: objects, renders, shards, a version, training, report.html [OUT=out]
	@$(CLI) demo --out '$(OUT)/demo'

plan: $(VENV)/.ready ## freeze the plan of a spec, or with DELTA=1 what dataset would make [SPEC= CORPUS= SET="key=value ..." JSON=1]
	@$(CLI) plan --spec '$(SPEC)' --corpus '$(CORPUS)' $(if $(DELTA),--delta) $(flags_set) $(flags_json)

render: $(VENV)/.ready ## render shards on Ray, here or on RAY_ADDRESS [SPEC= CORPUS= SHARDS=0-3 PLAN= SET="render.samples=32 ..." JSON=1]
	@$(CLI) render --spec '$(SPEC)' --corpus '$(CORPUS)' --shards '$(SHARDS)' $(if $(PLAN),--plan '$(PLAN)') $(flags_set) $(flags_json)

dataset: $(VENV)/.ready ## bring a corpus to what a spec says: make what it lacks, retry, publish [SPEC= CORPUS= SET= DRY=1 DEEP=1 JSON=1]
	@$(CLI) dataset --spec '$(SPEC)' --corpus '$(CORPUS)' $(if $(DRY),--dry-run) $(if $(DEEP),--deep) $(flags_set) $(flags_json)

retry: $(VENV)/.ready ## try again what failed with some kinds [KIND=render_timeout,network SPEC= CORPUS= SET= JSON=1]
	@$(CLI) retry --spec '$(SPEC)' --corpus '$(CORPUS)' --kind '$(KIND)' $(flags_set) $(flags_json)

ingest: $(VENV)/.ready ## photographs (MVImgNet, COLMAP) to shards on Ray [SPEC= CORPUS= SHARDS=0-3 PLAN= SET="source.path=... ..." JSON=1]
	@$(CLI) ingest --spec '$(SPEC)' --corpus '$(CORPUS)' --shards '$(SHARDS)' $(if $(PLAN),--plan '$(PLAN)') $(flags_set) $(flags_json)

check-captures: $(VENV)/.ready ## only the checks over an archive of photographs, drawn [SPEC= OUT=out SET= JSON=1]
	@$(CLI) check-captures --spec '$(SPEC)' --out '$(OUT)/checks' $(flags_set) $(flags_json)

calibrate: $(VENV)/.ready ## print what samples and the noise target give and cost [SPEC= SET= JSON=1 ASSETS=6 VIEWS=3]
	@$(CLI) calibrate --spec '$(SPEC)' --assets '$(ASSETS)' --views '$(VIEWS)' $(flags_set) $(flags_json)

bench-render: $(VENV)/.ready ## our renderer against the public scripts' way: speed, noise, memory [ARGS="--only tree"]
	@$(BIN)/python -m tests.bench.render $(ARGS)

bench-corpus: $(VENV)/.ready ## a million made-up objects: time and memory of plan, merge, publish, status, diff, open [OBJECTS=1000000]
	@$(BIN)/python -m tests.bench.corpus --objects '$(OBJECTS)' $(ARGS)

bench-ingest: $(VENV)/.ready ## photographs from zip to shard, beside decode + remap + encode alone [ARGS="--captures 20"]
	@$(BIN)/python -m tests.bench.ingest $(ARGS)

PEERS := $(VENV)-bench
$(PEERS)/.ready: $(VENV)/.ready tests/bench/requirements-loader.txt
	$(PYTHON) -m venv $(PEERS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/project.pth
	@grep -E '^(torch|numpy|pyarrow|pillow|opencv-python-headless)==' $(CONSTRAINTS) > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PEERS)/constraints.txt --requirement tests/bench/requirements-loader.txt
	@ln -sf $(abspath $(BIN))/weed $(PEERS)/bin/weed
	@touch $@

bench-loader: $(PEERS)/.ready ## our loader against webdataset, litdata, MosaicML Streaming: folder, S3, slow S3 [ARGS="--rounds 1"]
	@$(PEERS)/bin/python -m tests.bench.loader $(ARGS)

bench-jobs: $(VENV)/.ready ## what the system itself costs an object, its driver's memory, and a simulated farm [ARGS="--nodes 200"]
	@$(BIN)/python -m tests.bench.jobs $(ARGS)

publish: $(VENV)/.ready ## make a version of what is committed [CORPUS= DEEP=1 PUBLIC=1 JSON=1; SPEC= SET= for one spec of several]
	@$(CLI) publish --corpus '$(CORPUS)' $(if $(DEEP),--deep) $(if $(PUBLIC),--public) $(if $(filter command environment,$(firstword $(origin SPEC))),--spec '$(SPEC)') $(flags_set) $(flags_json)

diff: $(VENV)/.ready ## what changed between two versions, by object [CORPUS= A=1 B=latest FILE=diff.json JSON=1]
	@$(CLI) diff --corpus '$(CORPUS)' --a '$(A)' --b '$(B)' $(if $(FILE),--out '$(FILE)') $(flags_json)

verify: $(VENV)/.ready ## check all that a version names; DEEP=1 reads and decodes it [CORPUS= VERSION=latest DEEP=1 JSON=1]
	@$(CLI) verify --corpus '$(CORPUS)' --version '$(VERSION)' $(if $(DEEP),--deep) $(flags_json)

tombstone: $(VENV)/.ready ## withdraw objects from the next version, made now, and all later ones [CORPUS= UID=a,b JSON=1]
	@$(CLI) tombstone --corpus '$(CORPUS)' --uid '$(if $(filter command,$(firstword $(origin UID))),$(UID))' $(flags_json)

compact: $(VENV)/.ready ## copy live samples out of shards that are mostly dead [CORPUS= DEAD=0.5 JSON=1]
	@$(CLI) compact --corpus '$(CORPUS)' --dead '$(DEAD)' $(flags_json)

gc: $(VENV)/.ready ## list what nothing names; DELETE=1 deletes it [CORPUS= GRACE_S=604800 DELETE=1 JSON=1]
	@$(CLI) gc --corpus '$(CORPUS)' --grace-s '$(GRACE_S)' $(if $(DELETE),--delete) $(flags_json)

status: $(VENV)/.ready ## where a corpus stands: done, failed, running, stale, speed, cost [CORPUS= SET="workers.price_per_cpu_hour=0.03" JSON=1]
	@$(CLI) status --corpus '$(CORPUS)' $(flags_set) $(flags_json)

why: $(VENV)/.ready ## all that is known of one object, and its pictures [CORPUS= UID= OUT=out JSON=1]
	@$(CLI) why --corpus '$(CORPUS)' --uid '$(if $(filter command,$(firstword $(origin UID))),$(UID))' --out '$(OUT)/why' $(flags_json)

report: $(VENV)/.ready ## draw a version: report.html and PNGs [CORPUS= VERSION=latest OUT=out]
	@$(CLI) report --corpus '$(CORPUS)' --version '$(VERSION)' --out '$(OUT)/report'

train: $(VENV)/.ready ## train an LRM on a version, here or on RAY_ADDRESS; resumes [CORPUS= VERSION=latest CONFIG=tiny OUT=out WORKERS=8 DRY=1 JSON=1 SET="train.steps=500 ..."]
	@$(CLI) train --corpus '$(CORPUS)' --version '$(VERSION)' --config '$(CONFIG)' --out '$(OUT)/train' $(if $(WORKERS),--workers '$(WORKERS)') $(if $(DRY),--dry-run) $(flags_set) $(flags_json)

export: $(VENV)/.ready ## weights of a run, averaged ones if it has some, as one safetensors file [CHECKPOINT=out/train OUT=out]
	@$(CLI) export --checkpoint '$(or $(CHECKPOINT),$(OUT)/train)' --out '$(OUT)/model.safetensors'

learn: $(VENV)/.ready ## does it learn? procedural objects rendered, tiny trained, judged on unseen objects [OUT=out SET="train.steps=1000"]
	@$(CLI) learn --out '$(OUT)/learn' $(flags_set) --json

weights: $(VENV)/.ready ## fetch the weights of the perceptual loss, 553 MB, verified [WEIGHTS=file; default in ~/.cache]
	@$(CLI) weights $(if $(WEIGHTS),--out '$(WEIGHTS)')

evaluate: $(VENV)/.ready ## measure a checkpoint on the objects held out [CHECKPOINT=out/train CORPUS= VERSION= OUT=out SET= JSON=1]
	@$(CLI) evaluate --checkpoint '$(CHECKPOINT)' --corpus '$(CORPUS)' --version '$(VERSION)' --out '$(OUT)/evaluation' $(flags_set) $(flags_json)

infer: $(VENV)/.ready ## a picture, or a folder of them, to mesh, film, views [IMAGE= CHECKPOINT=out/train OUT=out SET="resolution=384" JSON=1]
	@$(if $(IMAGE),,echo 'error: IMAGE= is empty; name a picture or a folder of pictures' >&2; exit 2;) $(CLI) infer --image '$(IMAGE)' --checkpoint '$(CHECKPOINT)' --out '$(OUT)/infer' $(flags_set) $(flags_json)

bench-train: $(VENV)/.ready ## speed and memory of the model and its renderers on this machine [ARGS="--preset small"]
	@$(BIN)/python -m tests.bench.train $(ARGS)

test: $(VENV)/.ready lint ## lint, then every test that needs no network and no GPU [TESTS=tests/pipeline]
	@# By files, in as many processes as there are cores: most tests wait for children and servers of their own.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(if $(filter tests,$(TESTS)),tests --ignore=tests/cluster,$(TESTS))

test-crash: $(VENV)/.ready ## kill and fail at random for TIME_S seconds, hold the corpora to an oracle [TIME_S=600 SEED=1]
	@$(BIN)/python -m tests.crash.storm --time-s '$(TIME_S)' $(if $(SEED),--seed '$(SEED)')

$(VENV)/.cluster: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[render,train,dev,cluster]'
	@touch $@

test-cluster: $(VENV)/.cluster ## Ray on several hosts (network namespaces), Slurm, both real: root, iproute2, slurm-wlm, munge [TESTS=tests/cluster]
	$(BIN)/python -m pytest $(if $(filter command,$(firstword $(origin TESTS))),$(TESTS),tests/cluster)

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
