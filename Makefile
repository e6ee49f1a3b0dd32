# SPDX-License-Identifier: GPL-2.0-or-later

# The doors to this repository. ARGS goes to the command behind a target: make test ARGS="-k link"

.DEFAULT_GOAL := help
.PHONY: help setup demo install uninstall test test-slow test-all lint format lock schema newer-roots test-matrix versions bench-start bench-overhead bench-probe bench-outage bench-agent man clean

BIN := .venv/bin
# Tests that share something of the host name it with @pytest.mark.xdist_group, and then run one after the other.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

help:  ## lists these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

setup:  ## installs what the other targets need; says nothing if all is there
	@scripts/setup

demo: setup  ## boots a real guest on a real passt, and shows what happens
	@$(BIN)/qrapd demo $(ARGS)

test: setup  ## all tests but the slow ones
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup  ## the slow tests
	@$(PYTEST) -m slow $(ARGS)

test-all: setup  ## all tests
	@$(PYTEST) $(ARGS)

newer-roots:  ## makes roots of Debian 13 and sid, with newer parts; as root; ARGS=--renew makes them again
	@scripts/newer-roots $(ARGS)

test-matrix: setup  ## the link tests on this host and in the newer roots; as root; ARGS="--only sid -k swap"
	@$(BIN)/python scripts/matrix.py $(ARGS)

versions: setup  ## the same, and writes what works where into docs/versions.md
	@$(BIN)/python scripts/matrix.py --write $(ARGS)

install:  ## installs qrapd with its units: as root into /usr/local, else into ~/.local; PREFIX=, DESTDIR=, PYTHON=
	@scripts/install

uninstall:  ## takes that away again; VM files and disk images stay
	@scripts/install --uninstall

lint: setup  ## ruff, mypy, layers and the like: tests/test_code.py
	@$(BIN)/pytest tests/test_code.py $(ARGS)

format: setup  ## lets ruff format the code and mend what it can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix $(ARGS)

lock:  ## pins the requirements anew; ARGS=--upgrade takes the newest of each
	@scripts/lock $(ARGS)

schema: setup  ## writes config/qrapd-vm.schema.json
	@$(BIN)/qrapd schema > config/qrapd-vm.schema.json.new
	@mv config/qrapd-vm.schema.json.new config/qrapd-vm.schema.json

bench-start: setup  ## measures from `qrapd run` to QEMU's start
	@$(BIN)/python benchmarks/start_up.py $(ARGS)

bench-overhead: setup  ## measures a boot under qrapd against one by a shell script
	@$(BIN)/python benchmarks/overhead.py $(ARGS)

bench-probe: setup  ## measures qrap's search for a passt beside the C program's; as root
	@$(BIN)/python benchmarks/probe.py $(ARGS)

bench-outage: setup  ## measures how long a lost passt cuts the guest off; ARGS="--root trixie": there, with its rivals
	@$(BIN)/python benchmarks/outage.py $(ARGS)

bench-agent: setup  ## measures the host agent with 200 VMs: start, memory, idle, API, lost passts, its own death
	@$(BIN)/python benchmarks/agent.py $(ARGS)

man: $(patsubst docs/man/%,build/man/man1/%.gz,$(wildcard docs/man/*.1))  ## checks and packs the man pages: man -M build/man qrap

build/man/man1/%.gz: docs/man/%
	@mkdir -p $(@D)
	@if command -v groff >/dev/null; then complaints=$$(groff -man -t -Tutf8 -ww -z $< 2>&1); \
		[ -z "$$complaints" ] || { printf '%s\n' "$$complaints" >&2; exit 1; }; fi
	@gzip -9nc $< > $@.new
	@mv $@.new $@

clean:  ## removes what the targets made here, .venv included
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
