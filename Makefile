# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# make check                     ruff, mypy, import contracts, and the suites that need no SGLang
# make test                      everything that CI runs
# make test TESTS=tests/store    one suite, with no more installed than it needs
# make demo                      a real SGLang with the exporter beside it
# make demo-simulated            ranks that do not exist, on a real endpoint, in seconds
# make benchmark                 what things cost, as ratios to a baseline of the same run
# make dist                      sdist, wheel, SBOM and checksums of a release, in dist/
# make debian-packages           what `make test` needs of Debian; as root
#
# `make check` needs Python with venv, git and make, and neither root nor SGLang. Beside those,
# `make test` as root installs what it needs on a new Debian 12 machine. Environments live in .venv/
# and are made by build/environment.sh.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help check test lint demo demo-simulated benchmark dist debian-packages all-tests light-tests wheel clean

NEWEST := 0.5.23
OLDEST := 0.5.9
# Rooms that need no SGLang and no torch also run on the oldest and the newest Python.
OTHER_PYTHONS := 3.10 3.13
LIGHT := tests/bootstrap tests/docs tests/store tests/export tests/fuzz tests/test_ledger.py \
	tests/test_weight_table.py \
	tests/test_contracts.py \
	$(addprefix tests/table/test_,command.py main.py readers.py status.py weight_table_events.py weights_metadata.py)
DEBIAN_PACKAGES := gcc libc6-dev binutils e2fsprogs libibverbs1 libnuma1 prometheus \
	prometheus-alertmanager chromium fonts-dejavu-core mmdebstrap buildah victoria-metrics iproute2

MAIN := .venv/sglang-$(NEWEST)
ENVIRONMENTS := $(MAIN) .venv/sglang-$(OLDEST)
environment = build/environment.sh
say = printf '\n\033[1m==> %s\033[0m\n' "$(1)"
install-wheel = "$$($(environment) uv)" pip install -q -p $(1)/bin/python \
	--reinstall-package sglang-weight-exporter .venv/dist/*.whl $(2)

unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH
unexport VIRTUAL_ENV

help:
	@sed -n '/^# make/s/^# //p' $(firstword $(MAKEFILE_LIST))

# The wheel, because it is what a user installs: with its .pth, its .start and its entry point.
wheel:
	@rm -rf .venv/dist
	"$$($(environment) uv)" build -q --wheel -o .venv/dist .

# ---------------------------------------------------------------------------- without SGLang

check: lint
	@$(call say,Suites without SGLang)
	$(environment) python 3 .venv/python3
	$(call install-wheel,.venv/python3,--group test)
	.venv/python3/bin/pytest -n 4 $(LIGHT) $(PYTEST_ARGUMENTS)

lint: wheel
	@$(call say,ruff mypy lint-imports)
	$(environment) python 3 .venv/lint
	$(call install-wheel,.venv/lint,--group lint)
	.venv/lint/bin/ruff check .
	.venv/lint/bin/ruff format --check .
	.venv/lint/bin/mypy
	.venv/lint/bin/mypy autoload benchmarks dashboards demo docs tests
	.venv/lint/bin/lint-imports

light-tests: wheel
	@for version in $(if $(TESTS),3,$(OTHER_PYTHONS)); do
	  $(call say,Tests without SGLang on Python $$version)
	  if ! $(environment) python $$version .venv/python$$version; then
	    echo "SKIPPED on Python $$version: it is neither installed nor can uv download it."
	    continue
	  fi
	  $(call install-wheel,.venv/python$$version,--group test)
	  .venv/python$$version/bin/pytest -n 2 $(or $(TESTS),$(LIGHT)) $(PYTEST_ARGUMENTS)
	done

# ---------------------------------------------------------------------------- all of it

# One suite that needs no SGLang is run without it.
test: $(if $(TESTS),$(if $(filter-out $(LIGHT),$(TESTS)),all-tests,light-tests),lint light-tests all-tests)

debian-packages:
	@missing=()
	for package in $(DEBIAN_PACKAGES); do
	  dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed \
	    || missing+=($$package)
	done
	[ $${#missing[@]} = 0 ] && exit 0
	if [ $$(id -u) != 0 ]; then
	  echo "The tests need Debian packages that are not installed, and only root can install them:"
	  echo "  sudo apt-get install -y --no-install-recommends $${missing[*]}"
	  exit 1
	fi
	$(call say,Installing $${missing[*]})
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null

all-tests: debian-packages wheel
	@$(call say,Tests with SGLang $(NEWEST) $(OLDEST))
	for version in $(NEWEST) $(OLDEST); do
	  $(environment) sglang $$version .venv/sglang-$$version
	  $(call install-wheel,.venv/sglang-$$version,)
	done
	$(call install-wheel,$(MAIN),--group test --group consumers --group ray --group tracing --group panels)
	export SGLANG_ENVIRONMENTS=$(CURDIR)/$(MAIN):$(CURDIR)/.venv/sglang-$(OLDEST)
	$(MAIN)/bin/pytest $(or $(TESTS),tests) $(PYTEST_ARGUMENTS)

demo: wheel
	@$(environment) sglang $(NEWEST) .venv/demo-$(NEWEST)
	$(call install-wheel,.venv/demo-$(NEWEST),)
	exec .venv/demo-$(NEWEST)/bin/python demo/demo.py $(if $(DEMO_EXIT),--exit)

demo-simulated: wheel
	@$(environment) python 3 .venv/demo-simulated
	$(call install-wheel,.venv/demo-simulated,psutil)
	exec .venv/demo-simulated/bin/python demo/demo.py --simulated $(if $(DEMO_EXIT),--exit)

benchmark: wheel
	@$(environment) sglang $(NEWEST) $(MAIN)
	$(call install-wheel,$(MAIN),--group test)
	for program in startup pointer_table event_queue update reader_interference otlp scrape throughput; do
	  $(call say,$$program)
	  $(MAIN)/bin/python benchmarks/$$program.py
	done

dist:
	@build/dist.sh

clean:
	rm -rf .venv dist
