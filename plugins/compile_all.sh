#!/usr/bin/env bash
# Compiles every kernel for every architecture, warnings as errors, and prints what each takes. No GPU is needed.
#
#   plugins/compile_all.sh OUT [options of nemoquant plugins build]     OUT: a new folder; OUT/build.log is what the compilers said
#   python plugins/registers.py OUT/build.log --write                   keeps it: registers.tsv, and the tables of the READMEs
#
#   plugins/compile_all.sh --state                                      the sources' hash and the compiler
#
# With `--gemm-arch sm_90a` and no other option compiled.state keeps that state: CI compiles again where it is another one.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
state() {
    python -c 'from nemoquant.ops.sources import sources_hash; print(sources_hash())'
    nvcc --version | grep release
}
if [ "$1" = --state ]; then
    state
    exit
fi
out=$1
shift
[ ! -e "$out" ] || { echo "$out exists; expected a new folder: a build that goes on says nothing of what was compiled before" >&2; exit 2; }
nemoquant plugins build --out "$out" --strict "$@"
python "$(dirname "$0")/registers.py" "$out/build.log"
if [ "$*" = "--gemm-arch sm_90a" ]; then
    state >"$(dirname "$0")/compiled.state"
fi
