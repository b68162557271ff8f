#!/usr/bin/env bash
# Makes .gpu/ in the project's root: what a GPU machine without network needs beside the checkout.
#
#     bash bench/gpu/prepare.sh [PYTHON]
#
# from any folder. PYTHON (default: python) has the project with its extras dev and plugins, torch, and pip.
# Needs nvcc, g++ and CMake; about five minutes of CPU. Run it again after any change in plugins/. Git ignores
# .gpu/: it holds wheels and other people's sources, which are not committed.
set -euo pipefail

fail() {
    echo "prepare.sh: $*" >&2
    exit 2
}

py=${1:-python}
case $py in
    /*) ;;
    */*) py=$PWD/$py ;;
    *) py=$(command -v "$py") || fail "no ${1:-python} on the PATH; name a Python that has the project" ;;
esac
[ -x "$py" ] || fail "$py is not there; name a Python that has the project"
PATH=$(dirname "$py"):$PATH # its CMake and Ninja

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
[ -f plugins/CMakeLists.txt ] || fail "no plugins/CMakeLists.txt in $root; expected a checkout of the project"

# ---- what is needed

for tool in nvcc g++ cmake; do
    command -v "$tool" >/dev/null ||
        fail "no $tool on the PATH; expected the CUDA toolkit 12.9 or later, g++, and CMake (extra: plugins)"
done
for module in pip torch nemoquant; do
    "$py" -c "import $module" 2>/dev/null ||
        fail "$py can't import $module; expected pip, torch, and the project: pip install -e '.[dev,plugins]'"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
made=$work/made # becomes .gpu at the end, when all of it is there
mkdir "$made"
cp bench/gpu/all.sh "$made/"

# ---- our libraries, for the device and for the host, and the runner of small cases

build() { # FOLDER OPTIONS...
    local folder=$1
    shift
    "$py" -m nemoquant plugins build --kernels-only --out "$folder" "$@"
}

build "$work/sm90" --arch sm_90a || fail "the kernels were not built, see above"
build "$work/sm90" --host || fail "the host build failed, see above"
for name in libnemoquant_kernels.so build.json libnemoquant_host.so build_host.json; do
    cp "$work/sm90/$name" "$made/"
done
# A RUNPATH, since LD_LIBRARY_PATH, by which all.sh chooses another library, would not win over an RPATH.
nvcc -std=c++17 -O1 -gencode=arch=compute_90,code=sm_90 bench/gpu/runner.cu -I plugins -L "$made" \
    -lnemoquant_kernels -Xlinker --enable-new-dtags -Xlinker "-rpath=\$ORIGIN" -o "$made/runner" ||
    fail "bench/gpu/runner.cu was not compiled, see above"

if build "$work/gemm" --arch sm_90a --gemm-arch sm_90a; then
    mkdir "$made/gemm"
    cp "$work/gemm/libnemoquant_kernels.so" "$work/gemm/build.json" "$made/gemm/"
else
    echo "prepare.sh: no library with CUTLASS's products, see above; all.sh leaves them out" >&2
fi

# ---- wheels that the device's Python 3.12 lacks

"$py" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d "$made" \
    annotated-types==0.7.0 typing-inspection==0.4.2 pydantic==2.12.5 pydantic-core==2.41.5 ||
    fail "pydantic's wheels were not downloaded, see above; without them nemoquant can't be imported there"

# ---- mamba_ssm's Triton kernels, to be timed beside ours: sources of its package, their __init__ files
# emptied, because theirs import compiled parts

mamba=mamba-ssm==2.3.2.post1
if (cd "$work" && MAMBA_SKIP_CUDA_BUILD=TRUE "$py" -m pip download -q --no-deps --no-binary :all: \
    --no-build-isolation "$mamba" && tar xzf mamba_ssm-*.tar.gz); then
    theirs=$(echo "$work"/mamba_ssm-*/mamba_ssm)
    ours=$made/mamba/mamba_ssm
    mkdir -p "$ours/ops/triton" "$ours/utils"
    touch "$ours"/{,ops/,ops/triton/,utils/}__init__.py
    for name in k_activations layernorm_gated selective_state_update softplus \
        ssd_bmm ssd_chunk_scan ssd_chunk_state ssd_combined ssd_state_passing; do
        cp "$theirs/ops/triton/$name.py" "$ours/ops/triton/"
    done
    cp "$theirs"/utils/{determinism,torch}.py "$ours/utils/"
else
    echo "prepare.sh: $mamba was not downloaded, see above; its times will be missing" >&2
fi

rm -rf .gpu
mv "$made" .gpu
du -sh .gpu
