#!/usr/bin/env bash
# Everything that a GPU can tell, in about 7 minutes on one H100 or H200. prepare.sh copies this file into
# .gpu/; from there it calls the checkout's bench/gpu/*.py.
#
#     OUT=FOLDER bash .gpu/all.sh
#
# Needs Python 3.12 with torch, Triton, numba and pytest; no network. Results are JSON and text under $OUT;
# what each step is: bench/gpu/README.md. A step that fails leaves its results, and the others run.
set -u
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$kit")
cd "$root" || exit 1
if [ ! -f "$kit/libnemoquant_kernels.so" ] || [ ! -f bench/gpu/check_ops.py ]; then
    echo "all.sh: no checkout with libraries around $kit; make them, then take the copy:" >&2
    echo "    bash bench/gpu/prepare.sh PYTHON && bash .gpu/all.sh" >&2
    exit 2
fi

began=$(date +%s)
elapsed() { echo $(($(date +%s) - began)); }
say() { echo "[$(elapsed) s] $*"; }

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -cs 'A-Za-z0-9\n' '-')
: "${OUT:=$root/bench/gpu/results/$(date +%F)-${device:-no-device}}"
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
    "$kit"/*.whl >"$work/pip.txt" 2>&1

export PYTHONPATH=$work/site:$kit/mamba:$root PYTHONUNBUFFERED=1 OMP_NUM_THREADS=12
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # torch asks for it where results must repeat
export NEMOQUANT_KERNELS=$kit/libnemoquant_kernels.so NQ_HOST_LIB=$kit/libnemoquant_host.so
# some tests look only where `nemoquant plugins build` puts the library; a user's own stays as it is
export XDG_CACHE_HOME=$work/cache
mkdir -p "$XDG_CACHE_HOME/nemoquant/plugins"
cp "$kit/libnemoquant_kernels.so" "$kit/build.json" "$XDG_CACHE_HOME/nemoquant/plugins/"

bench() { # MODULE ARGUMENTS...
    local module=$1
    shift
    python3 -m "bench.gpu.$module" "$@" 2>&1
}
limited() { # SECONDS MODULE ARGUMENTS...: the same, for no longer
    local seconds=$1 module=$2
    shift 2
    timeout "$seconds" python3 -m "bench.gpu.$module" "$@" 2>&1
}

# ---- env

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader
    nvcc --version | tail -2 | head -1
    cat "$work/pip.txt"
} >"$work/env.txt" 2>&1
bench environment "$OUT/env.json" "$work/env.txt"
say env

# ---- runner, correct, timing: nothing else runs beside them

timeout 20 "$kit/runner" >"$work/runner.log" 2>&1
echo "runner rc $?" >>"$work/runner.log"
tail -2 "$work/runner.log"
say runner
NQ_SECONDS=80 limited 100 check_ops "$OUT/correct.json" | tail -15
say correct
NQ_SECONDS=100 limited 120 bench_ops "$OUT/timing.json" | tail -45
say timing

# ---- sanitizer; its kernels are few, and nothing is timed any more: triton and pack run beside it

sanitizer=$(command -v compute-sanitizer ||
    ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
sanitized() { # TOOL SECONDS ARGUMENTS...: the runner under it
    local tool=$1 seconds=$2
    shift 2
    if [ -z "$sanitizer" ]; then
        echo "no compute-sanitizer was found"
    else
        timeout "$seconds" "$sanitizer" --tool "$tool" --print-limit 5 "$kit/runner" "$@" 2>&1
    fi
}
for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    sanitized "$tool" 40 | tail -12
done >"$work/sanitizer.log" 2>&1 &
sanitizing=$!

limited 100 check_triton "$OUT/triton.json" | tail -12
say triton
limited 110 pack "$OUT/pack.json" "$work/pack" | tail -40
say pack
wait $sanitizing
bench logs "$OUT/sanitizer.json" "runner=$work/runner.log" "sanitizer=$work/sanitizer.log"
grep -E "==|ERROR SUMMARY|RACECHECK SUMMARY|ran|no compute" "$work/sanitizer.log"
say sanitizer

# ---- grouped: CUTLASS's products, in a library of their own

touch "$work/grouped.log" "$work/pytest.log"
if [ -f "$kit/gemm/libnemoquant_kernels.so" ] && [ "$(elapsed)" -lt 420 ]; then
    (
        export LD_LIBRARY_PATH=$kit/gemm${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        timeout 20 "$kit/runner" grouped
        sanitized memcheck 40 grouped
    ) >"$work/grouped.log" 2>&1
    tail -3 "$work/grouped.log"
    NEMOQUANT_KERNELS=$kit/gemm/libnemoquant_kernels.so timeout 60 \
        python3 -m pytest -q -p no:cacheprovider -W default tests/gpu/test_gpu_grouped_experts.py \
        -k "(nano and (93 or 745)) or every_code or no_experts or graph" 2>&1 |
        tail -8 | tee -a "$work/grouped.log"
    say grouped
fi

# ---- pytest: tests/gpu as far as time goes

left=$((480 - $(elapsed)))
if [ "$left" -gt 25 ]; then
    timeout "$left" python3 -m pytest -q -p no:cacheprovider --maxfail=5 -W default \
        tests/gpu/test_gpu_causal_conv1d.py tests/gpu/test_gpu_packing.py --junitxml="$OUT/pytest.xml" 2>&1 |
        tail -8 | tee "$work/pytest.log"
fi
cat "$work/grouped.log" "$work/pytest.log" >"$OUT/rest.txt"
say end
