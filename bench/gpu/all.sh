#!/usr/bin/env bash
# Everything that a GPU can tell, in about 9 minutes on one H100 or H200, what is right first. prepare.sh copies
# this file into .gpu/; from there it calls the checkout's bench/gpu/*.py.
#
#     OUT=FOLDER bash .gpu/all.sh [STEP...]
#     bash .gpu/all.sh --list
#
# Needs Python 3.12 with torch, Triton, numba and pytest; no network. Results are JSON under $OUT; what each step
# is: bench/gpu/README.md. A step that crashes, or whose time is over, leaves what it wrote, and the others run;
# steps.json has the exit code, the seconds and the last words of each. NQ_TOTAL (seconds, default 550) is for all
# of it: a step gets what is left, or is not begun. The exit code is 1 if a step's was not 0.
set -u
steps=(env runner correct sanitizer pack triton timing grouped pytest)
declare -A limits=([env]=40 [runner]=20 [correct]=105 [sanitizer]=110 [pack]=165 [triton]=75 [timing]=110
    [grouped]=80 [pytest]=600)

self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
kit=$(dirname "$self")
root=$(dirname "$kit")
chosen=()
for word in "$@"; do
    if [ "$word" = --list ]; then
        printf '%s\n' "${steps[@]}"
        exit 0
    fi
    if [[ " ${steps[*]} " != *" $word "* ]]; then
        echo "all.sh: no step $word; expected of: ${steps[*]}" >&2
        exit 2
    fi
    chosen+=("$word")
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${steps[@]}")
wanted() { [[ " ${chosen[*]} " == *" $1 "* ]]; }

cd "$root" || exit 1
if [ ! -f "$kit/libnemoquant_kernels.so" ] || [ ! -f bench/gpu/check_ops.py ]; then
    echo "all.sh: no checkout with libraries around $kit; make them, then take the copy:" >&2
    echo "    bash bench/gpu/prepare.sh PYTHON && bash .gpu/all.sh" >&2
    exit 2
fi

left() { echo $((${NQ_TOTAL:-550} - SECONDS)); }

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -cs 'A-Za-z0-9\n' '-')
: "${OUT:=$root/bench/gpu/results/$(date +%F)-${device:-no-device}}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
    "$kit"/*.whl >"$work/pip.txt" 2>&1

export kit OUT work
export PYTHONPATH=$work/site:$kit/mamba:$root PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # torch asks for it where results must repeat
export NEMOQUANT_KERNELS=$kit/libnemoquant_kernels.so NQ_HOST_LIB=$kit/libnemoquant_host.so
export XDG_CACHE_HOME=$work/cache # a user's own stays as it is
sanitizer=$(command -v compute-sanitizer ||
    ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
export sanitizer

# ---- the steps, each run by a bash of its own; $limit is its seconds, of which a process needs a few to begin

bench() { # MODULE ARGUMENTS...; cases that would begin after $limit are left out, and listed
    NQ_SECONDS=$((limit > 30 ? limit - 15 : limit / 2)) \
        python3 -m "bench.gpu.$1" "${@:2}"
}
tool() { # NAME SECONDS COMMAND...: what bench.gpu.logs reads as a tool's; its exit code
    echo "== $1"
    timeout -k 3 "$2" "${@:3}" 2>&1
    local rc=$?
    echo "== rc $rc"
    return $rc
}
sanitized() { # TOOL SECONDS ARGUMENTS...: the runner under it
    if [ -z "$sanitizer" ]; then
        tool "$1" 5 sh -c 'echo "no compute-sanitizer was found"; exit 3'
    else
        tool "$1" "$2" "$sanitizer" --tool "$1" --print-limit 5 --error-exitcode 5 "$kit/runner" "${@:3}"
    fi
}
step_env() {
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader
        nvcc --version | tail -2 | head -1
        cat "$work/pip.txt"
    } >"$work/env.txt" 2>&1
    bench environment "$OUT/env.json" "$work/env.txt"
}
step_runner() {
    tool runner 18 "$kit/runner" | tee "$work/runner.txt"
    local rc=${PIPESTATUS[0]}
    bench logs tools "$OUT/runner.json" "$work/runner.txt"
    return "$rc"
}
step_correct() { bench check_ops "$OUT/correct.json"; }
step_sanitizer() {
    local rc=0 name
    for name in memcheck racecheck synccheck initcheck; do
        sanitized $name 25 || rc=$?
    done >"$work/sanitizer.txt"
    cat "$work/sanitizer.txt"
    bench logs tools "$OUT/sanitizer.json" "$work/sanitizer.txt"
    return $rc
}
step_pack() { bench pack "$OUT/pack.json" "$work/pack"; }
step_triton() { bench check_triton "$OUT/triton.json"; }
step_timing() { bench bench_ops "$OUT/timing.json"; }
step_grouped() { # CUTLASS's products, in a library of their own
    if [ ! -f "$kit/gemm/libnemoquant_kernels.so" ]; then
        echo "$kit/gemm has no library with CUTLASS's products: bench/gpu/prepare.sh said why"
        return 3
    fi
    local rc=0
    export LD_LIBRARY_PATH=$kit/gemm${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export NEMOQUANT_KERNELS=$kit/gemm/libnemoquant_kernels.so
    {
        tool runner 15 "$kit/runner" grouped || rc=$?
        sanitized memcheck 25 grouped || rc=$?
    } >"$work/grouped.txt"
    cat "$work/grouped.txt"
    bench logs tools "$OUT/grouped_runner.json" "$work/grouped.txt"
    bench check_ops "$OUT/grouped.json" --only grouped || rc=$?
    return $rc
}
step_pytest() { # a process for each file, since a fault of the device ends one; what matters most is first
    local rc=0 name until=$((SECONDS + (limit > 20 ? limit - 12 : limit))) reports=()
    for name in first_calls causal_conv1d mamba2_scan routed_experts packing files grouped_experts; do
        [ $((until - SECONDS)) -ge 2 ] || break
        reports+=("$work/$name.xml")
        tests "$name" $((until - SECONDS)) || rc=$?
    done
    bench logs junit "$OUT/pytest.json" "${reports[@]}"
    return $rc
}
tests() { # FILE SECONDS: interrupted when time is over, which Python must be able to hear: then it writes its report
    local library=$kit/libnemoquant_kernels.so
    [ "$1" != grouped_experts ] || [ ! -f "$kit/gemm/libnemoquant_kernels.so" ] || library=$kit/gemm/libnemoquant_kernels.so
    NEMOQUANT_KERNELS=$library env --default-signal=INT timeout -s INT -k 6 "$2" python3 -m pytest -q \
        -p no:cacheprovider -W default -m "not slow" "tests/gpu/test_gpu_$1.py" --junitxml="$work/$1.xml"
}

measure() { # STEP: runs it within its time; what it took is left for `record`
    local name=$1 start=$SECONDS most
    rm -f "$OUT/$name.json" "$OUT/${name}_runner.json" # of an earlier run: what crashes at once has no results
    most=$(left)
    limit=$((limits[$name] < most ? limits[$name] : most))
    if [ "$limit" -lt 2 ]; then
        echo "not begun: $most s were left" >"$work/$name.log"
        echo "124 0 $limit" >"$work/$name.rc"
        return
    fi
    export limit
    timeout -k 5 "$limit" bash -c "step_$name" >"$work/$name.log" 2>&1
    echo "$? $((SECONDS - start)) $limit" >"$work/$name.rc"
}
failed=0
record() { # STEP: into steps.json, and onto the screen
    local rc seconds limit
    read -r rc seconds limit <"$work/$1.rc"
    python3 -m bench.gpu.logs step "$OUT/steps.json" "$1" "$rc" "$seconds" "$limit" "$work/$1.log"
    [ "$rc" -eq 0 ] || failed=1
    echo "---- $1: exit code $rc, $seconds s (of all, $(left) s are left)"
    tail -n 15 "$work/$1.log" | cut -c 1-400
}
export -f bench tool sanitized tests "${steps[@]/#/step_}"

# Nothing timed runs beside anything: the sanitizer runs beside `correct`, and is over before `pack` begins.
background=
for name in "${steps[@]}"; do
    wanted "$name" || continue
    case $name in
        correct)
            if wanted sanitizer; then
                measure sanitizer &
                background=$!
            fi
            measure correct
            ;;
        sanitizer)
            if [ -n "$background" ]; then wait "$background"; else measure sanitizer; fi
            ;;
        *) measure "$name" ;;
    esac
    record "$name"
done
python3 -m bench.gpu.report --summary "$OUT"
echo "all.sh: results are in $OUT, after $SECONDS s"
exit $failed
