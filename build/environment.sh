#!/bin/bash
# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# Makes an environment below .venv/, once: environment.sh sglang VERSION DIRECTORY
#                                         environment.sh python VERSION DIRECTORY
#                                         environment.sh uv
#
# What is slow to install is kept in the user's cache directory for the next checkout. `uv` prints
# where uv is, and installs it there first if need be.

set -euo pipefail

UV_VERSION=0.13.9
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/sglang-weight-exporter
UV=$CACHE/uv-$UV_VERSION/bin/uv

# SGLang is 9 GB of Python that an engine imports in four processes: let it keep its bytecode.
unset PYTHONDONTWRITEBYTECODE PYTHONPATH VIRTUAL_ENV

say() { printf '\n\033[1m==> %s\033[0m\n' "$1" >&2; }

install_uv() {
  mkdir -p "$CACHE"
  exec 9>"$CACHE/lock"
  flock 9
  if [ ! -x "$UV" ]; then
    say "Installing uv $UV_VERSION"
    python3 -m venv --clear "$CACHE/uv-$UV_VERSION"
    "$CACHE/uv-$UV_VERSION/bin/pip" install -q "uv==$UV_VERSION"
  fi
}

# An SGLang with its bytecode compiled, which makes an engine start twice as fast; then a copy of
# hard links, in a second and without disk space, into which a checkout installs its own wheel.
make_sglang() {
  local version=$1 directory=$2 kept=$CACHE/sglang-$1
  if [ ! -e "$kept/complete" ]; then
    say "Installing SGLang $version once for every checkout (2 to 4 minutes)"
    rm -rf "$kept"
    "$UV" venv -q --relocatable -p 3.11 "$kept"
    "$UV" pip install -p "$kept/bin/python" --compile-bytecode "sglang==$version"
    touch "$kept/complete"
  fi
  mkdir -p "$(dirname "$directory")"
  rm -rf "$directory"
  cp -al "$kept" "$directory" 2>/dev/null || { rm -rf "$directory"; cp -a "$kept" "$directory"; }
}

make_python() {
  local version=$1 directory=$2 found
  # uv looks in PATH and can download; pyenv's interpreters are neither.
  found=$(compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python" | head -n 1 || true)
  mkdir -p "$(dirname "$directory")"
  "$UV" venv -q --clear -p "${found:-$version}" "$directory"
}

install_uv
case $1 in
  uv) echo "$UV" ;;
  sglang | python)
    [ -e "$3/made" ] && exit 0
    "make_$1" "$2" "$3"
    touch "$3/made"
    ;;
  *)
    echo "environment.sh: there is no '$1'; it makes sglang, python or uv." >&2
    exit 2
    ;;
esac
