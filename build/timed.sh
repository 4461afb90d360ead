#!/bin/bash
# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
#
# timed.sh SUITE COMMAND...: runs a suite, and says in the last line how long it took, and how much
# memory. Its budget is in CONTRIBUTING.md; a suite that takes twice that says so. With RECORD=FILE
# it adds a line there.

set -uo pipefail
cd "$(dirname "$0")/.."

suite=$1
shift
budget=$(sed -n "s/^| \`$suite\` | \([0-9]*\) s .*/\1/p" CONTRIBUTING.md)
if [ -z "$budget" ]; then
  echo "timed.sh: CONTRIBUTING.md has no budget of '$suite'." >&2
  exit 2
fi

# All that ran on this machine: what a killed engine leaves is nobody's child.
busy() { awk '/^cpu / { printf "%d", ($2 + $3 + $4 + $7 + $8) / hertz }' hertz="$(getconf CLK_TCK)" /proc/stat; }

# KiB that programs could still have, without swapping; the least of each second is the peak.
available() { awk '/^MemAvailable:/ { print $2 }' /proc/meminfo; }
least=$(mktemp)
watch_memory() {
  local now low=$(available)
  while now=$(available); [ "$now" -ge "$low" ] || low=$now; echo "$low" >"$least"; do
    sleep 1
  done
}

before=$(busy)
free_before=$(available)
watch_memory &
watcher=$!
trap 'kill $watcher 2>/dev/null; rm -f "$least"' EXIT
began=$SECONDS
"$@"
status=$?
seconds=$((SECONDS - began))
outcome=$([ $status = 0 ] && echo passed || echo FAILED)
line="$suite: $outcome in $seconds s of $budget s, $(($(busy) - before)) s of this machine's processors"
line+=", $(awk '{ printf "%.1f", (free - $1) / 1e6 * 1.024 }' free="$free_before" "$least") GB of memory at most"
[ $seconds -gt $((2 * budget)) ] && line+=": TWICE ITS BUDGET"
printf '\033[1m%s\033[0m\n' "$line"
if [ -n "${RECORD:-}" ]; then
  commit=$(git describe --always --dirty --abbrev=12)
  echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $commit $line" >>"$RECORD"
fi
exit $status
