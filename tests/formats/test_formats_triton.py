"""The GPU's kernels in Triton's interpreter on the CPU: every byte equals that of the CPU's kernels.

The CPU's kernels have their oracles in the other tests of this folder. The interpreter must be chosen before
Triton is imported, so each case runs in a separate process. Triton's compiler needs no GPU either: its output
is searched for what would change bytes: fused multiply-adds, approximate divisions, subnormal numbers flushed
to zero.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import run_python

from nemoquant.errors import UsageError
from nemoquant.formats import fp8, mxfp8, nvfp4
from nemoquant.formats.amax import amax

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra: dev)"
)

PROGRAM = """
import numpy as np
import torch
from nemoquant.formats import fp8, fp8_gpu, mxfp8, mxfp8_gpu, nvfp4, nvfp4_gpu
from nemoquant.formats.amax import amax

rng = np.random.default_rng(0)
normal = rng.standard_normal((1, 256))
spreads = [
    normal * 0.02,
    np.sign(normal) * 2.0 ** rng.uniform(-40, 10, normal.shape),  # all magnitudes
    rng.integers(-24, 25, normal.shape) * 0.25,  # a lattice, rich in ties
    normal * 2.0**-105,  # near the smallest normal bf16
    np.where(np.arange(256) // 16 % 2 == 0, -0.0, normal),  # blocks of zeros, negative ones
    np.eye(*normal.shape) * 3,
]
# as inputs may be: NaN, Inf, a block that underflows, one below the least scale of weights, empty ones
special = np.zeros((2, 64), np.float32)
special[0, [3, 20, 40]] = np.nan, -np.inf, -1e-30
special[1, 16:32], special[1, 50] = np.linspace(-1e-3, 1e-3, 16), -0.0
# 96 blocks, so that one program takes them all: the interpreter is slow
floats = np.concatenate(spreads).astype(np.float32)
for weight, group in (((floats.view(np.uint32) >> 16).astype(np.uint16), 1), (floats, 0.01))[:WEIGHTS]:
    case = f"{weight.dtype}, scale times {group}"
    largest = amax(weight)
    assert amax(weight, device="cuda").tobytes() == largest.tobytes(), case
    scale = fp8.decode_scale(largest * np.float32(group))
    codes = fp8.encode(weight, scale)
    np.testing.assert_array_equal(fp8.encode(weight, scale, device="cuda"), codes, err_msg=case)
    decoded = fp8.decode(codes, scale)
    np.testing.assert_array_equal(fp8.decode(codes, scale, device="cuda"), decoded, err_msg=case)
    expected = mxfp8.encode(weight)
    for part, theirs, ours in zip(("codes", "scales"), expected, mxfp8.encode(weight, device="cuda")):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{case}, mxfp8, {part}")
    assert mxfp8.decode(*expected, device="cuda").tobytes() == mxfp8.decode(*expected).tobytes(), case
    for method in METHODS:
        scale = nvfp4.global_decode_scale(largest * np.float32(group), method)
        expected = nvfp4.encode(weight, scale, method)
        found = nvfp4.encode(weight, scale, method, device="cuda")
        for part, theirs, ours in zip(("codes", "scales"), expected, found):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{case}, {method}, {part}")
        values = nvfp4.decode(*expected, scale, device="cuda")
        assert values.tobytes() == nvfp4.decode(*expected, scale).tobytes(), case
values = np.concatenate([floats.reshape(-1), special.reshape(-1)]).reshape(-1, 32)
for scale in (fp8.decode_scale(largest), np.float32(3e-4), np.float32(1)):
    there = torch.from_numpy(values)
    expected = {
        "fp8": fp8.decode(fp8.encode(values, scale), scale),
        "mxfp8": mxfp8.decode(*mxfp8.encode_activations(values)),
        "nvfp4": nvfp4.decode(*nvfp4.encode_activations(values, scale), scale),
    }
    rounded = {
        "fp8": fp8_gpu.rounded(there, scale),
        "mxfp8": mxfp8_gpu.rounded(there),
        "nvfp4": nvfp4_gpu.rounded(there, scale),
    }
    for name, theirs in expected.items():
        ours = rounded[name]
        np.testing.assert_array_equal(ours.numpy(), theirs, err_msg=f"inputs, {name}, scale {scale}")
        assert (np.signbit(ours.numpy()) == np.signbit(theirs))[~np.isnan(theirs)].all(), name
every = np.arange(256, dtype=np.uint8)
np.testing.assert_array_equal(fp8.decode(every, 0.3, device="cuda"), fp8.decode(every, 0.3))
# every code under every block scale; then amaxes around every threshold of a scale, NaN and Inf too
pairs = np.tile(every, (256, 1)), np.tile(every[:, None], (1, 8))
np.testing.assert_array_equal(mxfp8.decode(*pairs, device="cuda"), mxfp8.decode(*pairs))
edges = np.ldexp(448.0, np.arange(-158, 120)).astype(np.float32).view(np.uint32)
special = 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0xFFC00000
edges = np.concatenate([edges + 1, edges, edges - (edges > 0), special])
blocks = np.zeros((len(edges), 32), np.uint32)
blocks[:, 9], blocks[:, 4], blocks[:, 30] = edges, 0x80000000, edges // 2
blocks = blocks.view(np.float32)
for part, theirs, ours in zip(("codes", "scales"), mxfp8.encode(blocks), mxfp8.encode(blocks, device="cuda")):
    np.testing.assert_array_equal(ours, theirs, err_msg=f"edges, mxfp8, {part}")
assert amax(np.array([[1, np.nan]], np.float32), device="cuda") != 1, "NaN is seen"
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "weights"), [(("max", "four_over_six"), 2), (("mse",), 1)], ids=["max, four_over_six", "mse"]
)
def test_bytes_are_those_of_the_cpu(methods: tuple[str, ...], weights: int) -> None:
    """Weights in bf16, then in float32 with scales far too small; inputs too.

    The search through all scales is slow and gets only bf16.
    """
    program = PROGRAM.replace("METHODS", repr(methods)).replace("WEIGHTS", str(weights))
    run_python(program, TRITON_INTERPRET="1")


COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemoquant.formats import fp8_gpu, mxfp8_gpu, nvfp4_gpu, triton_shared

BLOCKS = dict(packed="*u8", block_scales="*u8", scales="*fp32", count="i32")
ENCODE = dict(shift="i32", onto="fp32", reached="*i32") | BLOCKS
cases = {}
for method, number in nvfp4_gpu._METHODS.items():
    weight = dict(weight="*i32" if method == "activations" else "*i16")
    cases[method] = nvfp4_gpu.encode_kernel, weight | ENCODE, dict(METHOD=number, LANES=128)
one = dict(LANES=1024)
cases["amax"] = triton_shared.amax_kernel, dict(weight="*i16", shift="i32", largest="*i32", count="i32"), one
FP8 = dict(decode_scale="fp32", codes="*u8", count="i32")
cases["fp8"] = fp8_gpu.encode_kernel, dict(weight="*i16", shift="i32") | FP8, one
cases["fp8 decode"] = fp8_gpu.decode_kernel, dict(table="*fp32", values="*fp32") | FP8, one
cases["nvfp4 decode"] = nvfp4_gpu.decode_kernel, dict(values="*fp32") | BLOCKS, one
MXFP8 = dict(codes="*u8", block_scales="*u8", count="i32")
for name, patterns in (("mxfp8", "*i16"), ("mxfp8 float32", "*i32")):
    cases[name] = mxfp8_gpu.encode_kernel, dict(weight=patterns, shift="i32") | MXFP8, dict(LANES=64)
cases["mxfp8 decode"] = mxfp8_gpu.decode_kernel, dict(table="*fp32", values="*fp32") | MXFP8, one
disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
found = {}
for name, (kernel, signature, constants) in cases.items():
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [disassembler, "-c", file.name]
        machine = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    divisions = set(re.findall(r"div\\.[a-z.0-9]+", made.asm["ptx"]))
    found[name] = {
        "ptx": [word for word in ("fma.", ".ftz", ".approx") if word in made.asm["ptx"]],
        "divisions": sorted(divisions),
        "fused": {word: len(re.findall(rf"\\b{word}\\b", machine)) for word in ("DFMA", "FFMA")},
        "double": len(re.findall(r"\\bDMUL\\b", machine)),
    }
print(json.dumps(found))
"""


@needs_triton
@pytest.mark.slow
def test_what_they_compile_to_for_sm_90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two roundings where two are defined.

    IEEE division is itself made of single-precision fused multiply-adds, so those are allowed there.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = json.loads(run_python(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).stdout)
    dividing = {"max", "four_over_six", "activations", "fp8", "mxfp8", "mxfp8 float32"}
    assert found.keys() == dividing | {"mse", "amax", "fp8 decode", "mxfp8 decode", "nvfp4 decode"}
    for name, one in found.items():
        assert one["ptx"] == [], name
        assert one["divisions"] == (["div.rn.f32"] if name in dividing else []), name
        assert one["fused"]["DFMA"] == 0, name
        assert name in dividing or one["fused"]["FFMA"] == 0, name
        assert (one["double"] > 0) == (name in ("mse", "four_over_six")), (
            f"{name}: errors are in float64, nothing else"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a machine without a GPU")
@pytest.mark.parametrize(
    "call",
    [
        lambda w: amax(w, device="cuda"),
        lambda w: fp8.encode(w, 1.0, device="cuda"),
        lambda w: fp8.decode(w.astype(np.uint8), 1.0, device="cuda"),
        lambda w: mxfp8.encode(np.ones((1, 32), np.float32), device="cuda"),
        lambda w: mxfp8.decode(np.zeros((1, 32), np.uint8), np.zeros((1, 1), np.uint8), device="cuda"),
        lambda w: nvfp4.encode(w, 1.0, device="cuda"),
        lambda w: nvfp4.decode(w.astype(np.uint8)[:, :8], w.astype(np.uint8)[:, :1], 1.0, device="cuda"),
    ],
)
def test_without_a_gpu_the_device_is_refused(call, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UsageError,
        match=r"device: got cuda, but torch finds no CUDA GPU here \(torch .*\); expected one, or take "
        r"device cpu",
    ):
        call(np.ones((1, 16), np.float32))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device: got 'tpu', expected cpu or cuda"):
        amax(np.ones((1, 16), np.float32), device="tpu")
