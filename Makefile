# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# make check                     ruff, mypy, import contracts, and what is fast of the suites that
#                                need no SGLang
# make test                      what tells whether this checkout is right; CI runs it
# make test TESTS=tests/store    one suite of it, with no more installed than it needs
# make test-release              all the rest, part by part; what came out is in test-release.txt
# make test-release PARTS="rules image"
# make demo                      a real SGLang with the exporter beside it
# make demo-simulated            ranks that do not exist, on a real endpoint, in seconds
# make benchmark                 what things cost, as ratios to a baseline of the same run
# make dist                      sdist, wheel, SBOM and checksums of a release, in dist/
# make debian-packages           what `make test` needs of Debian; as root
#
# `make check` needs Python with venv, git and make, and neither root nor SGLang. Beside those,
# `make test` as root installs what it needs on a new Debian 12 machine. Environments live in .venv/
# and are made by build/environment.sh. CONTRIBUTING.md has the suites, the parts, and the seconds
# that each may take.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help check test test-release lint demo demo-simulated benchmark dist debian-packages \
	release-packages light-tests beside-tests engine-tests some-tests newest oldest wheel clean

NEWEST := 0.5.23
OLDEST := 0.5.9
# Rooms that need no SGLang and no torch: a part of the release runs them on these as well.
OTHER_PYTHONS := 3.10 3.13
LIGHT := tests/bootstrap tests/docs tests/store tests/export tests/fuzz tests/test_ledger.py \
	tests/test_layer_rounds.py tests/test_weight_table.py \
	tests/test_contracts.py \
	$(addprefix tests/table/test_,command.py readers.py status.py status_last.py weight_table_events.py weights_metadata.py)
PARTS := oldest pythons launches alerts hosts rules boards stores deployments image distribution \
	fuzz files soak manifests zoo parallel
DEBIAN_PACKAGES := gcc libc6-dev binutils e2fsprogs libibverbs1 libnuma1 prometheus \
	prometheus-alertmanager chromium fonts-dejavu-core
RELEASE_PACKAGES := mmdebstrap buildah victoria-metrics iproute2

MAIN := .venv/sglang-$(NEWEST)
OLD := .venv/sglang-$(OLDEST)
environment = build/environment.sh
# A suite, with its seconds and its budget in the last line.
timed = build/timed.sh $(1) $(MAKE) --no-print-directory
pytest = SGLANG_ENVIRONMENTS=$(CURDIR)/$(MAIN):$(CURDIR)/$(OLD) $(MAIN)/bin/pytest --durations=20
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

# Both at once, each with its output in one piece.
check:
	@$(call say,ruff mypy lint-imports and what is fast of the suites without SGLang: a minute)
	$(MAKE) --no-print-directory -j2 --output-sync=target lint light-tests \
	  PYTEST_ARGUMENTS='-n 6 -m "not slow" $(PYTEST_ARGUMENTS)'

lint: wheel
	@$(call say,ruff mypy lint-imports)
	$(environment) python 3 .venv/lint
	$(call install-wheel,.venv/lint,--group lint)
	.venv/lint/bin/ruff check .
	.venv/lint/bin/ruff format --check .
	.venv/lint/bin/mypy
	.venv/lint/bin/mypy autoload benchmarks dashboards demo docs tests
	.venv/lint/bin/lint-imports

# More workers than a small machine has cores: most of these tests wait for a process.
light-tests: wheel
	@$(call say,Suites without SGLang)
	$(environment) python 3 .venv/python3
	$(call install-wheel,.venv/python3,--group test)
	.venv/python3/bin/pytest -n 4 --durations=20 $(or $(TESTS),$(LIGHT)) $(PYTEST_ARGUMENTS)

# ---------------------------------------------------------------------------- make test

# What is named is run without SGLang where it needs none.
ifdef TESTS
test: $(if $(filter-out $(LIGHT),$(TESTS)),some-tests,light-tests)
else
test:
	@$(call timed,lint) lint
	$(call timed,light) light-tests
	$(MAKE) --no-print-directory debian-packages newest
	$(call timed,beside) beside-tests
	$(call timed,engines) engine-tests
endif

some-tests: debian-packages newest
	$(pytest) $(TESTS) $(PYTEST_ARGUMENTS)

# Beside an SGLang, and without starting it.
beside-tests:
	@$(call say,Tests beside SGLang $(NEWEST))
	$(pytest) -n 3 -m 'not sglang' tests $(addprefix --ignore=,$(LIGHT)) --ignore=tests/gpu \
	  $(PYTEST_ARGUMENTS)

engine-tests:
	@$(call say,Tests with engines of SGLang $(NEWEST))
	$(pytest) -m sglang tests --ignore=tests/gpu $(PYTEST_ARGUMENTS)

newest: wheel
	@$(environment) sglang $(NEWEST) $(MAIN)
	$(call install-wheel,$(MAIN),--group test --group consumers --group ray --group tracing --group panels)

oldest: wheel
	@$(environment) sglang $(OLDEST) $(OLD)
	$(call install-wheel,$(OLD),)

debian-packages:
	@build/debian-packages.sh $(DEBIAN_PACKAGES)

# ---------------------------------------------------------------------------- make test-release

test-release:
	@failed=()
	for part in $(PARTS); do
	  RECORD=test-release.txt $(call timed,$$part) part-$$part || failed+=($$part)
	done
	[ $${#failed[@]} = 0 ] || { echo "Failed: $${failed[*]}"; exit 1; }

release-packages: debian-packages
	@build/debian-packages.sh $(RELEASE_PACKAGES)

part-%: release-packages newest
	@$(call say,Part $*)
	$(pytest) --release=$* $(or $(TESTS),tests) --ignore=tests/gpu $(PYTEST_ARGUMENTS)

part-oldest: oldest

part-pythons: wheel
	@for version in $(OTHER_PYTHONS); do
	  $(call say,Tests without SGLang on Python $$version)
	  $(environment) python $$version .venv/python$$version
	  $(call install-wheel,.venv/python$$version,--group test)
	  .venv/python$$version/bin/pytest -n 4 $(LIGHT) $(PYTEST_ARGUMENTS)
	done

part-fuzz: wheel
	@$(call say,Fuzzing)
	$(environment) python 3 .venv/python3
	$(call install-wheel,.venv/python3,--group test)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),3000) .venv/python3/bin/pytest -n 2 tests/fuzz $(PYTEST_ARGUMENTS)

part-soak: newest
	@$(call say,Soak)
	$(MAIN)/bin/python benchmarks/soak.py 300
	$(pytest) --release=soak tests/hooks $(PYTEST_ARGUMENTS)

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
	for program in startup pointer_table event_queue update update_steps waiting_requests reader_interference otlp scrape throughput; do
	  $(call say,$$program)
	  $(MAIN)/bin/python benchmarks/$$program.py
	done

dist:
	@build/dist.sh

clean:
	rm -rf .venv dist
