# Everything a user or CI runs. `make demo` and `make test` set up what they need.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dspark-installed
SEED ?= 1
PARALLEL := $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile
# Sources are compiled once, not by every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := dspark_sglang kernels packaging loadtests tests requirements

.PHONY: help install demo test test-fast test-unit test-kernels test-all test-server lint format typecheck bench bench-kernels bench-load bench-load-full bench-faults bench-placement bench-selfcheck exactness simulate-fit simulate-check simulate-published net never-ends golden structure reference results v4 v4-cuda cuda-lab package-check deploy-check drill plan layouts deploy-arguments deploy-rendered gpu lock wheel clean

help:  ## Show what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Expected Python 3.11. Install it or pass PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

install: $(STAMP)  ## Create the environment (about 7 GB, a few minutes)

demo: install  ## Serve a real model without and with DSPARK, and compare
	$(BIN)/dspark demo

test: install lint typecheck test-unit test-server  ## Run every test

test-fast: install  ## Tests without a server, interpreted kernels and processes: minutes, after every change
	$(PARALLEL) -m "not server and not slow and not costly"

test-unit: install
	$(PARALLEL) -m "not server and not slow"

test-kernels: install  ## Every case of the kernels, interpreted where there is no GPU, the slow ones too
	$(PARALLEL) tests/kernels

test-all: install lint typecheck  ## Every test, the slow ones too (hours)
	$(PARALLEL) -m "not server"
	$(BIN)/python -m pytest -q -m server

test-server: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "server and not slow"

lint: install  ## Check style
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: install  ## Apply style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

typecheck: install  ## Check types, strictly
	$(BIN)/mypy

bench: install  ## Measure a round against a decode step, and where its time goes
	$(BIN)/python -m benchmarks.round_cost

bench-kernels: install  ## Count what the kernels cost, next to floor and builtin; time them on a GPU
	$(BIN)/python -m benchmarks.kernels

bench-load: install  ## Keep servers under load, four ways of serving in turn (about half an hour)
	$(BIN)/python -m benchmarks.load

bench-load-full: install  ## The same at six concurrencies, twice as many turns
	$(BIN)/python -m benchmarks.load --concurrency 1,2,4,8,16,32 --blocks 6

bench-selfcheck: install  ## Check the load generator itself: 500 streams on one core, known truth on another (1 minute)
	$(BIN)/python -m tests.selfcheck --seconds 30

bench-placement: install  ## Serve with several ranks: same texts, collectives counted, a rank killed
	$(BIN)/python -m benchmarks.placement

bench-faults: install  ## Faults under load on a real server, and how soon they are got over (about 10 minutes)
	$(BIN)/python -m pytest -q tests/serving/test_faults.py

simulate-fit: install  ## Fit the simulator to the real server here (about 7 minutes; commit the result)
	$(BIN)/python -m tests.simulation fit

simulate-check: install  ## Compare it with the server at loads that were not fitted (about 7 minutes)
	$(BIN)/python -m tests.simulation check

simulate-published: install  ## Re-derive the published V4 result (computed; about 6 minutes)
	$(BIN)/python -m tests.simulation published

exactness: install  ## Prove through the real server that the output distribution is plain decoding's
	$(BIN)/python -m tests.exactness

net: install  ## Two thousand random requests to a plain server and to one with DSPARK, in both of SGLang's loops (half an hour)
	mkdir -p runs/net
	$(BIN)/python -m tests.net.run --requests 2000 --seed $(SEED) --out runs/net/plain.json
	$(BIN)/python -m tests.net.run --requests 2000 --seed $(SEED) --overlap --out runs/net/overlap.json

never-ends: net  ## The same, every case and every planted fault: docs/results/never-ends.json
	$(BIN)/python -m tests.net.record --net runs/net/plain.json --net runs/net/overlap.json

golden: install  ## What scheduling decides and learns, step by step, against the stored traces (a few minutes)
	$(BIN)/python -m tests.golden.record --check

structure: install  ## How large the code is and how far one walks through it: docs/results/structure.json
	mkdir -p runs
	$(BIN)/python -m tests.golden.record --check --json runs/golden.json
	$(BIN)/python -m tests.structure --golden runs/golden.json

v4: install  ## DeepSeek-V4's tiny bundle against plain decoding and its reference: docs/results/v4.json (about two hours)
	$(BIN)/python -m tests.v4.record

v4-cuda: install  ## Compile SGLang's CUDA and Triton sources of V4's leaves for Hopper; needs nvcc, no GPU (about 10 minutes)
	$(BIN)/python -m pytest -q -s tests/v4/test_cuda_sources.py

cuda-lab: install  ## Count what a step asks of a CUDA device, without one, beside the builtin: docs/results/cuda.json
	$(BIN)/python -m tests.cuda_lab.record

RESULTS := docs/results

package-check: install  ## Try what packaging promises: bad input, 100 GB, both Hub clients, a served round trip
	$(BIN)/python -m tests.packaging.check

gpu: install  ## On a CUDA machine: run what needs one and save the results
	mkdir -p runs/gpu
	$(BIN)/dspark doctor | tee runs/gpu/doctor.txt
	$(BIN)/python -m pytest -m gpu --junitxml=runs/gpu/tests.xml
	$(BIN)/python -m benchmarks.kernels --out runs/gpu/kernels

deploy-check: install  ## Every overlay through every validator, rules through promtool (fetches tools once)
	$(BIN)/python tests/deploy/check.py

drill: install  ## Kill, drain, starve and misuse real servers; faults for the canary (about 35 minutes; goes on where it stopped)
	$(BIN)/python -m tests.drill $(DRILL)

deploy-arguments: install  ## Ask dspark plan for the flags of the GPU overlays again
	$(BIN)/python -m tests.deploy.generate --arguments

deploy-rendered: install  ## Write deploy/rendered/NAME.yaml again
	$(BIN)/python -m tests.deploy.generate --rendered

plan: install  ## Hold plans against what real servers allocate here: docs/results/plan.json (a few minutes)
	$(BIN)/python -m tests.planning.measure --out $(RESULTS)/plan.json

reference: install  ## Write docs/reference from the code
	$(BIN)/python -m tests.docs.reference

results: install  ## Write docs/results.md from docs/results
	$(BIN)/python -m tests.docs.results

layouts: install  ## Plan the published layouts again: docs/reference/layouts.md
	$(BIN)/python -m tests.planning.document

lock: install  ## Resolve requirements/cpu.in again
	$(BIN)/python requirements/lock.py

wheel: install  ## Build the wheel
	$(BIN)/python -m hatchling build -t wheel

clean:  ## Remove the environment, results and caches (not the user's model cache)
	rm -rf $(VENV) runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
