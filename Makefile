# virtfabric: `make demo` and `make test` do everything on a fresh Debian 12 machine, as root.
SHELL := /bin/bash
VENV := .venv/bin
# what fits CI of the lab tests; `make lab` runs all, the longest last
CI_LABS := $(patsubst %,tests/lab/test_%.py,lab_life card_in_qemu cxl_lab passthrough_lab small_lab)
AGENT_LAB := tests/lab/test_agent_in_lab.py
ALL_LABS := $(filter-out $(AGENT_LAB),$(wildcard tests/lab/test_*.py)) $(AGENT_LAB)

# of the examples of property tests, `make test` looks at all and `make check` at a part
EXAMPLES ?= 1

# where tests put their files: in memory, where a program may be started there (no noexec) and 1 GiB is free
FILES := $(shell findmnt -no OPTIONS -T /dev/shm -t tmpfs 2>/dev/null | grep -qv noexec && test -w /dev/shm && \
	df --output=avail /dev/shm | awk 'END { exit $$1 < 1048576 }' && echo PYTEST_DEBUG_TEMPROOT=/dev/shm)

# compiled once: the tests start a thousand interpreters
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:

.PHONY: help demo demo-card demo-cxl demo-passthrough test check checks lab lab-agent vagrant-box bench bench-cards bench-memory bench-passthrough clean setup setup-checks setup-lab setup-vagrant

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup:  ## install packages, virtual environment, guest image
	@tools/setup all

setup-lab:  ## the same, and what nested labs need
	@tools/setup lab

setup-checks:  ## install what the checks need
	@tools/setup checks

setup-vagrant:  ## install all that, vagrant and vagrant-libvirt
	@tools/setup vagrant

demo: setup  ## the main job on real guests, with a readable account of what happened
	@$(VENV)/python demo/run.py

demo-passthrough: setup-lab  ## PCIe functions of running guests, in a nested lab; some minutes
	@$(VENV)/python demo/passthrough.py

demo-card: setup-lab  ## offload cards and running guests, in a nested lab; some minutes
	@$(VENV)/python demo/cards.py

demo-cxl: setup-lab  ## CXL memory of a running guest, in a nested lab; some minutes
	@$(VENV)/python demo/cxl.py

check: setup-checks  ## lint, types, layers, unit and contract tests (under a minute)
	@$(MAKE) --no-print-directory checks EXAMPLES=0.2

checks:
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/lint-imports
	VIRTFABRIC_EXAMPLES=$(EXAMPLES) $(FILES) $(VENV)/pytest -q -n 4 tests/unit tests/contract

test: setup-lab checks  ## checks, integration tests on real guests, the labs that fit CI
	$(VENV)/pytest -q tests/integration
	$(VENV)/pytest -q --timeout 1200 $(CI_LABS)

lab: setup-vagrant  ## all lab tests: hours; goes on where an interrupted run of this checkout ended
	VIRTFABRIC_RESUME=1 $(VENV)/pytest -v --timeout 7200 $(ALL_LABS)

lab-agent: setup-lab  ## a part of them, half of the time: the agent's integration tests in `small`
	$(VENV)/pytest -v $(AGENT_LAB)

vagrant-box: setup-vagrant  ## build the Vagrant box of this checkout into the cache
	@vagrant/build-box

bench: setup-lab  ## all benchmarks: prints a table, writes benchmarks/results.json
	@$(VENV)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@$(VENV)/python benchmarks/run.py

bench-cards: setup-checks  ## cards: decisions, combinations against OR-tools, calls through the mailbox
	@$(VENV)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@$(VENV)/python benchmarks/run.py card combination cardlink

bench-passthrough: setup-lab  ## a VF for a running guest against raw virsh, in a nested lab
	@$(VENV)/python benchmarks/run.py passthrough

bench-memory: setup-lab  ## growth of a guest on DRAM and CXL against raw virsh, in a nested lab
	@$(VENV)/python benchmarks/run.py memory

clean:  ## remove what builds and tests left in the checkout (not the cache)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
