#!/bin/bash
# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# Makes in dist/ what a release consists of, and checks it: sdist, wheel, SBOM (CycloneDX, of what
# the wheel's dependencies resolve to today) and SHA256SUMS.
#
# The same commit gives the same sdist and wheel, byte for byte, on every machine: hatchling, whose
# version pyproject.toml fixes, takes the time of what it packs from SOURCE_DATE_EPOCH.

set -euo pipefail
cd "$(dirname "$0")/.."

TOOLS=.venv/dist-tools
RUNTIME=.venv/dist-runtime
UV=$(build/environment.sh uv)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

build/environment.sh python 3 "$TOOLS"
"$UV" pip install -q -p "$TOOLS/bin/python" --group dist

rm -rf dist
"$UV" build -q -o dist . # The wheel is made from the sdist, which therefore is complete.
"$TOOLS/bin/twine" check --strict dist/*.whl dist/*.tar.gz
"$TOOLS/bin/check-wheel-contents" dist/*.whl

rm -rf "$RUNTIME"
build/environment.sh python 3 "$RUNTIME"
wheel=$(echo dist/*.whl)
"$UV" pip install -q -p "$RUNTIME/bin/python" "$wheel[grpc,web]"
version=$(basename dist/*.whl | cut -d- -f2)
# The generator takes the version from pyproject.toml, where it is dynamic.
"$TOOLS/bin/cyclonedx-py" environment "$RUNTIME" --output-reproducible \
  --pyproject <(sed "s/^dynamic = .*/version = \"$version\"/" pyproject.toml) \
  -o "dist/sglang_weight_exporter-$version.cdx.json"

cd dist
sha256sum -- *.whl *.tar.gz *.cdx.json >SHA256SUMS
sed 's/^/  /' SHA256SUMS
