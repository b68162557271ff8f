#!/usr/bin/env bash
# Everything that a GPU can tell, in about 9 minutes on one H100 or H200, what is right first. prepare.sh copies
# this file into .gpu/; from there it calls the checkout's bench/gpu/*.py.
#
#     OUT=FOLDER bash .gpu/all.sh [STEP...]
#     bash .gpu/all.sh --list
#
# Needs Python 3.12 with torch and NumPy, no network, and what bench/gpu/README.md says of each step. Results are
# JSON under $OUT. A step that crashes, or whose time is over, leaves what it wrote, and the others run; steps.json
# has the exit code, the seconds and the last words of each. NQ_TOTAL (seconds, default 550) is for all of it: a
# step gets what is left, or is not begun. The exit code is 1 if a step's was not 0, and 2 where nothing was run
# because the kernel library can't be used on this device.
set -u
steps=(env runner correct sanitizer pack triton timing grouped pytest)
# Those before pytest are within NQ_TOTAL together; sanitizer runs beside correct.
declare -A limits=([env]=30 [runner]=15 [correct]=100 [sanitizer]=100 [pack]=150 [triton]=65 [timing]=105
    [grouped]=70 [pytest]=600)

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
export PYTHONPATH=$work/site:$kit/mamba:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET PYTEST_ADDOPTS CUDA_LAUNCH_BLOCKING MAMBA_DETERMINISTIC # each changes what is measured
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # torch asks for it where results must repeat
export NEMOQUANT_KERNELS=$kit/libnemoquant_kernels.so NQ_HOST_LIB=$kit/libnemoquant_host.so
export XDG_CACHE_HOME=$work/cache TRITON_CACHE_DIR=$work/triton # a user's own stay as they are
sanitizer=$(command -v compute-sanitizer ||
    ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
export sanitizer

# ---- the steps, each run by a bash of its own; $limit is its seconds, of which a process needs a few to begin

rest() { echo $((limit - SECONDS)); } # of the step's seconds

bench() { # MODULE ARGUMENTS...; cases that would begin after the step's time are left out, and listed
    local most
    most=$(rest)
    NQ_SECONDS=$((most > 30 ? most - 15 : most / 2)) \
        python3 -m "bench.gpu.$1" "${@:2}"
}
within() { # as timeout, whose processes are a group of their own: where the step is ended, they are too
    timeout "$@" &
    local child=$!
    trap 'kill "$child"; wait "$child"; exit 124' TERM
    wait "$child"
    local rc=$?
    trap - TERM
    return $rc
}
tool() { # RESULT NAME SECONDS COMMAND...: into RESULT.json, at once, since a step's end may come; its exit code
    local rc=124 file=$work/$1.txt
    echo "== $2" >>"$file"
    if [ "$3" -lt 1 ]; then
        echo "not begun: no time was left" >>"$file"
    else
        within -k 3 "$3" "${@:4}" >>"$file" 2>&1
        rc=$?
    fi
    echo "== rc $rc" >>"$file"
    bench logs tools "$OUT/$1.json" "$file"
    return $rc
}
sanitized() { # RESULT TOOL SECONDS ARGUMENTS...: the runner under it
    if [ -z "$sanitizer" ]; then
        tool "$1" "$2" 5 sh -c 'echo "no compute-sanitizer was found"; exit 3'
    else
        tool "$1" "$2" "$3" "$sanitizer" --tool "$2" --print-limit 5 --error-exitcode 5 "$kit/runner" "${@:4}"
    fi
}
share() { # COUNT SECONDS: what one of COUNT tools may take, so that SECONDS of the step are left after all
    echo $((($(rest) - $2) / $1 - 3)) # 3: until one that does not end is killed
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
    local rc=0
    tool runner runner "$(share 1 2)" "$kit/runner" || rc=$?
    cat "$work/runner.txt"
    return $rc
}
step_correct() { bench check_ops "$OUT/correct.json"; }
step_sanitizer() {
    local rc=0
    sanitized sanitizer memcheck "$(share 4 4)" || rc=$?
    sanitized sanitizer racecheck "$(share 3 4)" || rc=$?
    sanitized sanitizer synccheck "$(share 2 4)" || rc=$?
    sanitized sanitizer initcheck "$(share 1 4)" unfilled || rc=$?
    cat "$work/sanitizer.txt"
    return $rc
}
step_pack() { bench pack "$OUT/pack.json" "$work/pack"; }
step_triton() { bench check_triton "$OUT/triton.json"; }
step_timing() { # the same kernels, and CUTLASS's products where there are some
    [ ! -f "$kit/gemm/libnemoquant_kernels.so" ] || export NEMOQUANT_KERNELS=$kit/gemm/libnemoquant_kernels.so
    bench bench_ops "$OUT/timing.json"
}
step_grouped() { # CUTLASS's products, in a library of their own
    if [ ! -f "$kit/gemm/libnemoquant_kernels.so" ]; then
        echo "$kit/gemm has no library with CUTLASS's products: bench/gpu/prepare.sh said why"
        return 3
    fi
    local rc=0 cases=$((limit / 3)) # seconds for check_ops
    export LD_LIBRARY_PATH=$kit/gemm${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export NEMOQUANT_KERNELS=$kit/gemm/libnemoquant_kernels.so
    tool grouped_runner runner "$(share 4 $cases)" "$kit/runner" grouped || rc=$?
    sanitized grouped_runner memcheck "$(share 3 $cases)" grouped || rc=$?
    sanitized grouped_runner racecheck "$(share 2 $cases)" grouped || rc=$?
    sanitized grouped_runner synccheck "$(share 1 $cases)" grouped || rc=$?
    cat "$work/grouped_runner.txt"
    bench check_ops "$OUT/grouped.json" --only grouped || rc=$?
    return $rc
}
step_pytest() { # a process for each file, since a fault of the device ends one; what matters most is first
    local rc=0 name seconds reports=()
    for name in first_calls causal_conv1d mamba2_scan routed_experts packing files grouped_experts \
        grouped_first_calls; do
        reports+=("$work/$name.xml")
        seconds=$(($(rest) - (limit > 20 ? 12 : 1))) # until it is killed, and the reports are read
        if [ "$seconds" -ge 2 ]; then
            tests "$name" "$seconds" || rc=$?
        elif [ $rc -eq 0 ]; then
            rc=124
        fi
    done
    bench logs junit "$OUT/pytest.json" "${reports[@]}"
    return $rc
}
tests() { # NAME SECONDS: interrupted when time is over, which Python must be able to hear: then it writes its report
    local file=$1 library=$kit/libnemoquant_kernels.so only=()
    case $1 in grouped_*)
        [ ! -f "$kit/gemm/libnemoquant_kernels.so" ] || library=$kit/gemm/libnemoquant_kernels.so
        ;;
    esac
    [ "$1" != grouped_first_calls ] || { file=first_calls only=(-k grouped); }
    touch "$work/$1.xml" # a file whose process dies has begun
    NEMOQUANT_KERNELS=$library within -s INT -k 6 "$2" env --default-signal=INT python3 -m pytest -q \
        -p no:cacheprovider -W default -m "not slow" "${only[@]}" "tests/gpu/test_gpu_$file.py" \
        --junitxml="$work/$1.xml"
}

measure() { # STEP: runs it within its time; what it took is left for `record`
    local name=$1 start=$SECONDS most
    most=$(left)
    limit=$((limits[$name] < most ? limits[$name] : most))
    if [ "$limit" -lt 2 ]; then
        echo "not begun: $most s were left" >"$work/$name.log"
        echo "124 0 $limit" >"$work/$name.rc"
        return
    fi
    rm -f "$OUT/$name.json" "$OUT/${name}_runner.json" # of an earlier run: what crashes at once has no results
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
export -f rest bench within tool sanitized share tests "${steps[@]/#/step_}"

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
    if [ "$name" = env ] && grep -q '^4 ' "$work/env.rc"; then # UNUSABLE of environment.py
        echo "all.sh: the kernel library can't be used on this device, see above; nothing else was run; make it" >&2
        echo "    again from this checkout: bash bench/gpu/prepare.sh PYTHON" >&2
        exit 2
    fi
done
python3 -m bench.gpu.report --summary "$OUT"
echo "all.sh: results are in $OUT, after $SECONDS s"
exit $failed
