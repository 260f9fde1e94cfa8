# Every benchmark that this machine can run. PEERS: clones of other implementations, for example
#   make bench PEERS="CrossX Hawkeye" CROSSX_DATA=data
# RUN: a trained run, for the load on the HTTP service.
PYTHON ?= python
PEERS ?=
PEER_ROOTS = $(foreach peer,$(PEERS),--peer-root $(peer))

# On a GPU, in pieces: make bench-gpu PEERS=CrossX CROSSX_DATA=data MINUTES=10, again until nothing is left
MINUTES ?=

.PHONY: bench bench-gpu fuzz test lint

bench:
	$(PYTHON) benchmarks/startup.py
	$(PYTHON) benchmarks/inference.py $(PEER_ROOTS)
	$(PYTHON) benchmarks/exported.py --runs 9
	$(PYTHON) benchmarks/training_step.py $(PEER_ROOTS)
	$(PYTHON) benchmarks/allocator.py --runs 3
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/losses.py $(PEER_ROOTS)
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/input_pipeline.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/loop_overhead.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/scaling.py
	$(PYTHON) benchmarks/collection.py --runs 3 --images 700
	$(PYTHON) benchmarks/roofline.py
	$(PYTHON) benchmarks/methods.py
	$(if $(RUN),$(PYTHON) benchmarks/serving.py $(RUN))

bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(PEER_ROOTS) $(if $(CROSSX_DATA),--data-root $(CROSSX_DATA)) $(if $(MINUTES),--minutes $(MINUTES))

# Mutated files for every parser, for hours if you like: make fuzz SECONDS=3600 PARSERS="csv cars"
SECONDS ?= 60
PARSERS ?=
fuzz:
	$(PYTHON) fuzz/fuzzing.py --seconds $(SECONDS) $(PARSERS)

test:
	pytest
	pytest -m slow

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
