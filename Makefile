# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# make demo                      a real SGLang with the exporter beside it
# make test                      everything that CI runs
# make test TESTS=tests/store    one suite, without lint and without other Python versions
# make lint                      ruff and mypy
# make benchmark                 what things cost, as ratios to a baseline of the same run
#
# On a new Debian 12 machine `make test` as root installs what it needs. Environments live in
# .venv/; what is slow to install is kept in the user's cache directory for the next checkout.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := help
.PHONY: help test lint demo benchmark wheel debian-packages main-tests other-pythons clean

NEWEST := 0.5.23
OLDEST := 0.5.9
SGLANG := $(NEWEST) $(OLDEST)
# Rooms that need no SGLang and no torch also run on the oldest and the newest Python.
OTHER_PYTHONS := 3.10 3.13
WITHOUT_SGLANG := $(wildcard $(addprefix tests/,bootstrap records store export cli \
	$(addprefix table/test_,command.py readers.py weights_metadata.py)))
DEBIAN_PACKAGES := gcc binutils libibverbs1 libnuma1 prometheus prometheus-alertmanager chromium \
	fonts-dejavu-core
UV_VERSION := 0.13.9

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sglang-weight-exporter
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
ENVIRONMENTS := $(SGLANG:%=.venv/sglang-%)
MAIN := .venv/sglang-$(NEWEST)
say = printf '\n\033[1m==> %s\033[0m\n' "$(1)"

# SGLang is 9 GB of Python that an engine imports in four processes: let it keep its bytecode.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH
unexport VIRTUAL_ENV

help:
	@sed -n '/^# make/s/^# //p' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------------------- what is kept

$(UV):
	@$(call say,Installing uv $(UV_VERSION))
	mkdir -p $(CACHE)
	exec 9>$(CACHE)/lock; flock 9
	[ -x $@ ] && exit 0
	python3 -m venv --clear $(CACHE)/uv-$(UV_VERSION)
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install -q uv==$(UV_VERSION)

# An SGLang of each version with its bytecode compiled, which makes an engine start twice as fast.
$(CACHE)/sglang-%/complete: | $(UV)
	@exec 9>$(CACHE)/lock; flock 9
	[ -e $@ ] && exit 0
	$(call say,Installing SGLang $* once for every checkout (2 to 4 minutes))
	rm -rf $(@D)
	$(UV) venv -q --relocatable -p 3.11 $(@D)
	$(UV) pip install -p $(@D)/bin/python --compile-bytecode sglang==$*
	touch $@

# Hard links: a second, and no disk space. A checkout can install its own wheel into its own copy.
define copy-sglang
mkdir -p .venv
rm -rf $(@D)
cp -al $(CACHE)/sglang-$* $(@D) 2>/dev/null || { rm -rf $(@D); cp -a $(CACHE)/sglang-$* $(@D); }
touch $@
endef
.venv/sglang-%/copied: | $(CACHE)/sglang-%/complete
	@$(copy-sglang)
.venv/demo-%/copied: | $(CACHE)/sglang-%/complete
	@$(copy-sglang)

# uv looks in PATH and can download; pyenv's interpreters are neither.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
.venv/python%/created: | $(UV)
	@mkdir -p .venv
	$(UV) venv -q --clear -p $(or $(firstword $(wildcard $(PYENV)/$*.*/bin/python)),$*) $(@D)
	touch $@

# ---------------------------------------------------------------------------- tests

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

# The wheel, because it is what a user installs: with its .pth, its .start and its entry point.
wheel: | $(UV)
	@rm -rf .venv/dist
	$(UV) build -q --wheel -o .venv/dist .

define install-wheel
$(UV) pip install -q -p $(1)/bin/python --reinstall-package sglang-weight-exporter \
  .venv/dist/*.whl $(2)
endef

test: $(if $(TESTS),,lint other-pythons) main-tests

main-tests: debian-packages $(ENVIRONMENTS:%=%/copied) wheel
	@$(call say,Tests with SGLang $(SGLANG))
	$(call install-wheel,$(MAIN),--group test --group consumers --group ray --group panels)
	for environment in $(filter-out $(MAIN),$(ENVIRONMENTS)); do
	  $(call install-wheel,$$environment,)
	done
	export SGLANG_ENVIRONMENTS=$(subst $() ,:,$(addprefix $(CURDIR)/,$(ENVIRONMENTS)))
	$(MAIN)/bin/pytest $(or $(TESTS),tests) $(PYTEST_ARGUMENTS)

other-pythons: wheel
	@for version in $(OTHER_PYTHONS); do
	  [ -n "$(WITHOUT_SGLANG)" ] || break
	  $(call say,Tests without SGLang on Python $$version)
	  if ! $(MAKE) -s .venv/python$$version/created; then
	    echo "SKIPPED on Python $$version: it is neither installed nor can uv download it."
	    continue
	  fi
	  $(call install-wheel,.venv/python$$version,--group test)
	  .venv/python$$version/bin/pytest $(WITHOUT_SGLANG)
	done

lint: wheel .venv/python3/created
	@$(call say,ruff and mypy)
	$(call install-wheel,.venv/python3,--group lint)
	.venv/python3/bin/ruff check .
	.venv/python3/bin/ruff format --check .
	.venv/python3/bin/mypy
	.venv/python3/bin/mypy autoload benchmarks dashboards demo docs tests

# ---------------------------------------------------------------------------- demo

demo: .venv/demo-$(NEWEST)/copied wheel
	@$(call install-wheel,.venv/demo-$(NEWEST),)
	exec .venv/demo-$(NEWEST)/bin/python demo/demo.py $(if $(DEMO_EXIT),--exit)

# ---------------------------------------------------------------------------- benchmarks

benchmark: $(MAIN)/copied wheel
	@$(call install-wheel,$(MAIN),--group test)
	for program in startup pointer_table reader_interference otlp scrape throughput; do
	  $(call say,$$program)
	  $(MAIN)/bin/python benchmarks/$$program.py
	done

clean:
	rm -rf .venv
