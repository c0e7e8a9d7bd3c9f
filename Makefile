# Needs Python 3.11 or newer, make and a package index; no compiler. `make PYTHON=python3.12 ...` picks another Python.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/installed

.PHONY: help demo test test-all test-gpu chaos load lint format proto released bench bench-all bench-peers ci clean

help:
	@echo "make demo      fetch a small model, serve it from two hosts on this machine, ask it a question"
	@echo "make test      the tests (CPU only, some minutes)"
	@echo "make test-all  and the long rest of the matrices"
	@echo "make test-gpu  the tests that need CUDA devices"
	@echo "make chaos     kill, stop and scale a served fleet at random, five minutes a seed: SEEDS=\"1 2 3\""
	@echo "make load      k6 streams from 64 clients for a minute, with thresholds: STREAMS=64 SECONDS=60 ADDRESS=HOST:PORT"
	@echo "make lint      ruff, mypy, buf (style, and what would break clients), freshness of the generated code"
	@echo "make format    ruff format and the fixes that are safe"
	@echo "make proto     generate proto/shardray/v1/*_pb2* again"
	@echo "make released  keep proto/ as what later versions may not break; at a release"
	@echo "make bench     shardray beside its peers, and the table of targets (half an hour)"
	@echo "make bench-all everything of docs/performance.md, and the page itself (an hour)"
	@echo "make bench-peers  an environment for each peer (llama.cpp: compiles)"
	@echo "make ci        everything that continuous integration runs"

# A torch that the machine already has (a CUDA build, say) is kept; otherwise constraints.txt names the version.
$(READY): pyproject.toml constraints.txt
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv && grep -v '^torch==' constraints.txt > .venv/constraints.txt; \
	else \
		$(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt; \
	fi
	$(BIN)/pip install --quiet --use-pep517 -c .venv/constraints.txt -e ".[cpu,dev,gateway,kserve,metrics,tracing,uvloop]"
	@# CUDA builds of torch bring their own triton; elsewhere the tests compile and interpret CUDA kernels with this one.
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet --no-deps triton==3.6.0 \
		|| echo "no triton here: the tests of the CUDA kernels are skipped"
	@touch $@

demo: $(READY)
	@$(BIN)/shardray demo

# Two at a time; what starts Ray, or loads the machine, runs one at a time, afterwards. Files are given out in the order of
# tests/conftest.py: xdist's own, by the number of tests, leaves the longest for the end.
TEST_WORKERS ?= 2
SHARED_OUT = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(BIN)/pytest $(SHARED_OUT) -m "not (slow or gpu or integration)"
	$(BIN)/pytest -m "integration and not (slow or gpu)"

test-all: $(READY)
	$(BIN)/pytest $(SHARED_OUT) -m "not (gpu or integration)"
	$(BIN)/pytest -m "integration and not gpu"

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

SEEDS ?= 1 2 3
SECONDS_A_SEED ?= 300
chaos: $(READY)
	@failed=; for seed in $(SEEDS); do \
		$(BIN)/python -m tests.chaos --seconds $(SECONDS_A_SEED) --seed $$seed --json benchmarks/results/chaos.jsonl || failed="$$failed $$seed"; \
	done; [ -z "$$failed" ] || { echo "failed with seed:$$failed"; exit 1; }

STREAMS ?= 64
SECONDS ?= 60
load: $(READY)
	$(BIN)/python -m tests.outside.load --streams $(STREAMS) --seconds $(SECONDS) $(if $(ADDRESS),--address $(ADDRESS))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released.binpb
	$(BIN)/python proto/generate.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(READY)
	$(BIN)/python proto/generate.py

released: $(READY)
	$(BIN)/buf build --exclude-source-info -o proto/released.binpb

bench: $(READY)
	$(BIN)/python -m benchmarks run

bench-all: $(READY)
	$(BIN)/python -m benchmarks all

bench-peers: $(READY)
	$(BIN)/python -m benchmarks peers

ci:
	.ci/run

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
