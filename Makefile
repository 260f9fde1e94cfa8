# Every benchmark that this machine can run. PEERS: clones of other implementations, for example
#   make bench PEERS="CrossX Hawkeye" CROSSX_DATA=data
# RUN: a trained run, for the load on the HTTP service.
PYTHON ?= python
PEERS ?=
PEER_ROOTS = $(foreach peer,$(PEERS),--peer-root $(peer))

.PHONY: bench test lint

bench:
	$(PYTHON) benchmarks/startup.py
	$(PYTHON) benchmarks/inference.py $(PEER_ROOTS)
	$(PYTHON) benchmarks/exported.py
	$(PYTHON) benchmarks/training_step.py $(PEER_ROOTS)
	$(PYTHON) benchmarks/convolution.py
	$(PYTHON) benchmarks/allocator.py
	$(PYTHON) benchmarks/losses.py $(PEER_ROOTS)
	$(PYTHON) benchmarks/input_pipeline.py
	$(PYTHON) benchmarks/loop_overhead.py
	$(PYTHON) benchmarks/scaling.py
	$(PYTHON) benchmarks/collection.py
	$(PYTHON) benchmarks/roofline.py
	$(if $(RUN),$(PYTHON) benchmarks/serving.py $(RUN))

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
