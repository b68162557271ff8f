#!/usr/bin/env bash
# Compiles every kernel for every architecture, warnings as errors, and prints what each takes. No GPU is needed.
#
#   plugins/compile_all.sh OUT [options of nemoquant plugins build]     OUT: a new folder; OUT/build.log is what the compilers said
#   plugins/compile_all.sh OUT --gemm-arch sm_90a                       the CUTLASS kernels, which take longest, for one alone
#   python plugins/registers.py OUT/build.log --write                   keeps it: registers.tsv, and the tables of the READMEs
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1
shift
[ ! -e "$out" ] || { echo "$out exists; expected a new folder: a build that goes on says nothing of what was compiled before" >&2; exit 2; }
nemoquant plugins build --out "$out" --strict "$@"
python "$(dirname "$0")/registers.py" "$out/build.log"
