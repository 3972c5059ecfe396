# make demo [SEED=n]   the whole system on a laptop CPU, in outputs/demo-seed<n>/
# make demo-control    the same with rewards shuffled between samples: it must not learn
# make bench           compares slime with its alternatives and updates docs/PERFORMANCE.md; or one of bench-engine,
#                      bench-trainer, bench-packing, bench-host, bench-arrival, bench-rollout, bench-evaluation,
#                      bench-state, bench-checkpoint, bench-sync, bench-memory, bench-loop (which installs TRL
#                      into .venv-trl)
# make bench-estimators   trains the demo's task with every estimator and updates docs/ALGORITHMS.md
#                      (after make demo, and MODEL=qwen3-moe-tiny make demo)
# make test            the tests        make check    lint, format and types
# make test-kill       a run killed or stopped at 45 random points ends like the unbroken one (fewer: KILLS=2)
# make test-layouts    one step of 300 random models, algorithms and layouts equals that of one process (fewer: DRAWS=20)
# make test-inputs     2400 random command lines, files and hooks end in a plan or one message (others: SEED=n)
# make test-chaos      a run whose engines die and hang, and whose rewards fail, still learns
# make test-gpu        the checks that need GPUs, and one table of results; some of them: make test-gpu CHECKS='engine'
# The first call makes a virtual environment in .venv.

SEED ?= 1
PYTHON ?= python3
VENV ?= .venv
# abspath splits a path at its blanks
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
STAMP := $(VENV)/.installed

TRL_VENV ?= .venv-trl
TRL_BIN := $(if $(filter /%,$(TRL_VENV)),$(TRL_VENV),$(CURDIR)/$(TRL_VENV))/bin
TRL_STAMP := $(TRL_VENV)/.installed

.PHONY: install demo demo-control bench bench-engine bench-estimators bench-trainer bench-packing bench-host bench-arrival bench-rollout bench-evaluation bench-state bench-checkpoint bench-sync bench-memory bench-loop test test-kill test-layouts test-inputs test-chaos test-gpu check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: a CPU build (2.13.0+cpu) satisfies this pin wherever one is offered,
	# while a range in the middle of a larger resolution may pull in a CUDA build and gigabytes of libraries.
	"$(BIN)/python" -m pip install --quiet torch==2.13.0
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	PATH="$(BIN):$$PATH" SEED=$(SEED) bash scripts/demo.sh

demo-control: $(STAMP)
	PATH="$(BIN):$$PATH" SEED=$(SEED) CONTROL=1 bash scripts/demo.sh

$(TRL_STAMP): bench/trl-requirements.txt
	$(PYTHON) -m venv $(TRL_VENV)
	"$(TRL_BIN)/python" -m pip install --quiet torch==2.13.0
	"$(TRL_BIN)/python" -m pip install --quiet --requirement bench/trl-requirements.txt
	touch $@

bench: bench-engine bench-trainer bench-packing bench-host bench-arrival bench-rollout bench-evaluation bench-state bench-checkpoint bench-sync bench-memory bench-loop
	"$(BIN)/python" -m bench.report

bench-engine: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.engine

bench-trainer: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.trainer

bench-packing: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.packing

bench-host: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.host

bench-arrival: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.arrival

bench-rollout: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.rollout_schedule

bench-evaluation: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.evaluation

bench-memory: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.memory

bench-state: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.state

bench-checkpoint: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.checkpoint

bench-sync: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.weight_sync

bench-estimators: $(STAMP)
	"$(BIN)/python" -W ignore -m bench.estimators
	"$(BIN)/python" -m bench.report

bench-loop: $(STAMP) $(TRL_STAMP)
	"$(BIN)/python" -W ignore -m bench.loop --trl-python "$(TRL_BIN)/python"

# Three workers on two cores, because many tests wait for processes to start and to end. A file stays on one worker, so
# that its fixtures are made once.
test: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -m pytest -n 3 --dist loadfile --no-loadscope-reorder

KILLS ?= 45

test-kill: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -m tests.kill --kills $(KILLS) --seed 0 --out outputs/kill

DRAWS ?= 300

test-layouts: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -W ignore -m tests.layouts --draws $(DRAWS) --seed 0

LINES ?= 2400

test-inputs: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -m tests.inputs --lines $(LINES) --seed $(SEED)000000

test-chaos: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -m tests.chaos --seed 1 --out outputs/chaos

# It uses the packages of PYTHON_GPU, because .venv has PyTorch for CPUs.
PYTHON_GPU ?= python3

test-gpu:
	$(PYTHON_GPU) -m tests.gpu $(CHECKS)

check: $(STAMP)
	PATH="$(BIN):$$PATH" ruff check
	PATH="$(BIN):$$PATH" ruff format --check
	PATH="$(BIN):$$PATH" pyright
