"""bench/gpu without a GPU: every script is imported, every check runs with small sizes on the CPU.

A GPU adds its own sizes, graphs, streams, compute-sanitizer and times. Each script runs in its own process:
Triton's interpreter, and how torch treats uninitialized memory, are chosen once per process.
"""

import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plugin_build import host_folder, needs_compiler

from bench.gpu import environment, logs
from bench.gpu.cases import Case, Run
from bench.gpu.check_ops import cases

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "bench/gpu"
MODULES = sorted(path.stem for path in KIT.glob("*.py"))
SCRIPTS = ("prepare.sh", "all.sh")

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton (extra: dev)")


def run(command: list[Any], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the root of the checkout."""
    words, environment = list(map(str, command)), os.environ | variables
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def python(*arguments: object, **variables: str) -> str:
    """Runs Python in the root of the checkout, which must succeed; returns its output."""
    done = run([sys.executable, *arguments], PYTHONPATH=str(ROOT), **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def host_library() -> Path:
    return host_folder() / "libnemoquant_host.so"


@pytest.mark.parametrize("name", MODULES)
def test_every_script_is_imported(name: str) -> None:
    importlib.import_module(f"bench.gpu.{name}")


@pytest.mark.parametrize(("device", "count"), [("cpu", 104), ("cuda", 246)])
def test_no_case_is_lost(device: str, count: int) -> None:
    """Cases are listed without running; each has its own name."""
    names = [case.name for case in cases(device, Path("libnemoquant_host.so"))]
    assert len(names) == len(set(names)) == count


@pytest.mark.slow
@needs_compiler
def test_every_twelfth_operator_case_through_the_host_build(tmp_path: Path) -> None:
    """All cases take more than a minute: NQ_HOST_LIB=... python -m bench.gpu.check_ops OUT.json cpu."""
    out = tmp_path / "correct.json"
    variables = {"NQ_HOST_LIB": str(host_library()), "NQ_SECONDS": "600"}
    said = python("-m", "bench.gpu.check_ops", out, "cpu", "--every", 12, **variables)
    assert said.startswith("9 cases, 0 not ok"), said
    rows = json.loads(out.read_text())["results"]
    assert all(row["ok"] is True for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"scan", "scan_steps", "conv", "experts"}


def test_a_case_over_its_limit_is_bad_and_one_that_fails_or_is_late_too(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    one = Run(out, "cpu", 60)
    one.run(Case("right", lambda: [("y", 1e-3, 1e-3)]))
    one.run(Case("wrong", lambda: [("y", 1e-3, 1e-2), ("bits", 1, 0)]))
    one.run(Case("nan", lambda: [("y", math.nan, 1)]))
    one.run(Case("raises", lambda: [("y", 1 / 0, 1)]))
    one.seconds = 0
    one.run(Case("late", lambda: []))
    one.write()
    assert one.bad() == 4
    rows = json.loads(out.read_text())["results"]
    assert [row["ok"] for row in rows] == [True, False, False, False, None]
    assert rows[3]["why"] == "ZeroDivisionError: division by zero"


@pytest.mark.slow
@needs_compiler
def test_all_120_cases_of_the_runner_against_the_host_build(tmp_path: Path) -> None:
    """Compiled as C++. "grouped" adds four cases, which a library without CUTLASS's products refuses."""
    runner, folder = tmp_path / "runner", host_folder()
    compiler = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        "plugins",
        "-DHOST",
        "-x",
        "c++",
        "bench/gpu/runner.cu",
    ]
    linked = ["-L", folder, "-lnemoquant_host", f"-Wl,-rpath,{folder}", "-o", runner]
    compiled = run([*compiler, *linked])
    assert compiled.returncode == 0, compiled.stderr
    done = run([runner, "grouped"])
    *bad, summary = map(json.loads, done.stdout.splitlines())
    assert summary == {"ran": 124, "bad": 4}
    assert all("CUTLASS, which this library was built without" in row["reason"] for row in bad)


@pytest.mark.slow
@needs_triton
def test_all_20_small_rows_of_triton_in_its_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "triton.json"
    said = python("-m", "bench.gpu.check_triton", out, "small", TRITON_INTERPRET="1")
    assert said.startswith("20 rows, 0 bad"), said
    assert all(row["ok"] is True for row in json.loads(out.read_text()))


@pytest.mark.slow
@needs_compiler
def test_every_row_of_the_wide_table_of_times_with_tiny_models(tmp_path: Path) -> None:
    """Everything but the times: see rehearsal.py."""
    out = tmp_path / "timing.json"
    python(Path(__file__).with_name("rehearsal.py"), host_library(), out)
    found = json.loads(out.read_text())
    rows: dict[str, dict[str, Any]] = {row["case"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    assert [name for name, row in rows.items() if "us" not in row] == []
    kinds = [" ".join(name.split()[:2]) for name in rows]
    decodes, prefills, convolutions, experts = 2 * 2 * 4, 2 * 6, 2 * 4, 2 * 5 * 2
    assert len(rows) == decodes + prefills + convolutions + experts
    assert kinds.count("scan decode") == decodes / 2
    assert kinds.count("experts Nano") == experts / 2
    assert rows["scan decode B8 state float16"].keys() >= {"floor_us", "of_floor", "stochastic_us"}
    assert rows["conv 8 x 1"].keys() >= {"torch_us"}
    eight_bits = rows["experts Super fp8 5"]
    assert eight_bits.keys() >= {"decoded_us", "native", "narrow_floor_us"}
    assert "CUTLASS" in eight_bits["grouped"]


@pytest.mark.slow
def test_packing_and_the_diff_of_a_tiny_checkpoint(tmp_path: Path) -> None:
    """Only the random checkpoint of the step "pack", on the CPU in place of the device."""
    program = """
import sys
from pathlib import Path
from bench.gpu.pack import Steps, check_large
steps = Steps(Path(sys.argv[1]))
check_large(steps, Path(sys.argv[2]), "cpu")
assert not steps.bad()
"""
    out = tmp_path / "pack.json"
    python("-c", program, out, tmp_path / "mid")
    rows = json.loads(out.read_text())
    assert {"check": "mid: same bytes", "ok": True, "differ": []} in rows
    assert [row["check"] for row in rows if "kl" in row] == ["mid kl cpu"]


def test_the_environment_is_described_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text", tmp_path / "env.json"
    text.write_text("x" * 2000)
    monkeypatch.setattr(sys, "argv", ["environment", str(out), str(text)])
    monkeypatch.setattr(environment, "MODULES", ("torch", "nemoquant.api", "there_is_none"))
    environment.main()
    found = json.loads(out.read_text())
    assert found["text"] == "x" * 1500
    assert found["torch"] == torch.__version__
    assert found["nemoquant.api"] == "ok"
    assert found["there_is_none"] == "FAILED ModuleNotFoundError: No module named 'there_is_none'"
    assert found.keys() >= {"device", "date", "library", "python", "seconds"}


def test_logs_keep_the_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "log", tmp_path / "logs.json"
    log.write_text("a" * 9000 + "end")
    monkeypatch.setattr(sys, "argv", ["logs", str(out), f"one={log}", f"two={log}"])
    logs.main()
    kept = json.loads(out.read_text())
    assert kept["one"] == kept["two"] == "a" * 7997 + "end"


# ---- the shell scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse(script: str) -> None:
    assert run(["bash", "-n", KIT / script]).returncode == 0


@pytest.mark.parametrize("script", [*SCRIPTS, "README.md"])
def test_files_that_they_name_exist(script: str) -> None:
    """Files of the checkout, and modules that are run by name."""
    text = (KIT / script).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:bench|plugins|tests)/[\w/]+\.(?:py|sh|cu|txt|md)", text))
    named |= {f"bench/gpu/{name}" for name in re.findall(r"`(\w+\.(?:py|cu|sh))`", text)}
    modules = re.findall(r"^[^#\n]*\b(?:bench|limited \d+) (\w+) \"", text, re.M)
    named |= {f"bench/gpu/{module}.py" for module in modules + re.findall(r"`(\w+) OUT\.json", text)}
    elsewhere = {"bench/gpu/test_gpu_grouped_experts.py"}  # the scripts name it next to tests/gpu
    assert len(named) > 2
    assert [name for name in sorted(named - elsewhere) if not (ROOT / name).is_file()] == []


def test_every_file_of_the_folder_that_all_takes_is_put_there_by_prepare() -> None:
    """``$kit/NAME`` in all.sh, ``NAME`` in prepare.sh."""
    taken = set(re.findall(r"\$kit\"?/([\w./*]+)", (KIT / "all.sh").read_text(encoding="utf-8")))
    assert {"libnemoquant_kernels.so", "libnemoquant_host.so", "build.json", "runner", "*.whl"} <= taken
    prepare = (KIT / "prepare.sh").read_text(encoding="utf-8")
    assert [name for name in taken - {"*.whl"} if name not in prepare.replace("$work/gemm", "gemm")] == []


def test_all_steps_have_a_row_in_the_readme() -> None:
    said = set(re.findall(r"^\s*say (\w+)$", (KIT / "all.sh").read_text(encoding="utf-8"), re.M))
    rows = set(re.findall(r"^\| (\w+) \| ", (KIT / "README.md").read_text(encoding="utf-8"), re.M))
    assert said - {"end"} <= rows


def refused(command: list[Any], **variables: str) -> str:
    """Runs a script that must refuse with exit code 2; returns its message, a line or two."""
    done = run(command, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_prepare_without_python_or_compiler_says_so(tmp_path: Path) -> None:
    """It refuses from any folder, and before it makes a file."""
    prepare = KIT / "prepare.sh"
    assert refused(["bash", prepare, tmp_path / "none"]) == (
        f"prepare.sh: {tmp_path}/none is not there; name a Python that has the project\n"
    )
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/bash\nexit 1\n")
    fake.chmod(0o755)
    said = refused([tmp_path / "bash", prepare, fake], PATH=str(tmp_path))
    assert said.startswith("prepare.sh: no nvcc on the PATH; expected the CUDA toolkit 12.8 or later")
    for name in ("nvcc", "g++", "cmake"):
        (tmp_path / name).symlink_to(fake)
    said = refused([tmp_path / "bash", prepare, fake], PATH=str(tmp_path))
    assert said.startswith(f"prepare.sh: {fake} can't import pip; expected pip, torch, and the project")


PYTHON = """#!/bin/bash
# In the place of Python: builds and downloads make empty files; FAIL is a word of what fails.
case "$*" in
    *"${FAIL:-nothing of that name}"*) echo "no $FAIL" >&2; exit 1 ;;
    *"plugins build"*)
        while [ "$1" != --out ]; do shift; done
        mkdir -p "$2"
        touch "$2"/{libnemoquant_kernels.so,libnemoquant_host.so,build.json,build_host.json} ;;
    *mamba-ssm*)
        mkdir -p mamba_ssm-1/mamba_ssm/{ops/triton,utils}
        touch mamba_ssm-1/mamba_ssm/utils/{determinism,torch}.py
        touch mamba_ssm-1/mamba_ssm/ops/triton/{k_activations,layernorm_gated,selective_state_update}.py
        touch mamba_ssm-1/mamba_ssm/ops/triton/{softplus,ssd_bmm,ssd_chunk_scan,ssd_chunk_state}.py
        touch mamba_ssm-1/mamba_ssm/ops/triton/{ssd_combined,ssd_state_passing,not_taken}.py
        tar czf mamba_ssm-1.tar.gz mamba_ssm-1
        rm -r mamba_ssm-1 ;;
    *"pip download"*)
        while [ "$1" != -d ]; do shift; done
        touch "$2/pydantic.whl" ;;
esac
"""
NVCC = "#!/bin/bash\ntouch runner\nwhile [ $# -gt 1 ]; do shift; done\nmv runner $1\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that prepare.sh takes for the project; its bin/ has stand-ins for Python and nvcc."""
    root = tmp_path / "checkout"
    for name in ("bench/gpu/prepare.sh", "bench/gpu/all.sh", "plugins/CMakeLists.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "bin").mkdir()
    for name, text in {"python": PYTHON, "nvcc": NVCC, "g++": "", "cmake": ""}.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    return root


def prepared(checkout: Path, fail: str = "") -> tuple[int, str, set[str]]:
    """Returns the exit code, the output, and the files of .gpu/."""
    done = run(["bash", checkout / "bench/gpu/prepare.sh", checkout / "bin/python"], FAIL=fail)
    kit = checkout / ".gpu"
    files = {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()}
    return done.returncode, done.stderr, files


def test_prepare_puts_everything_together_and_leaves_out_what_can_be_missing(checkout: Path) -> None:
    """With stand-ins for the real tools: no compiler, no network."""
    code, said, files = prepared(checkout)
    assert (code, said) == (0, "")
    libraries = {"libnemoquant_kernels.so", "libnemoquant_host.so", "build.json", "build_host.json", "runner"}
    grouped = {"gemm/libnemoquant_kernels.so", "gemm/build.json"}
    theirs = {name for name in files if name.startswith("mamba/")}
    assert files - theirs == libraries | grouped | {"all.sh", "pydantic.whl"}
    assert len(theirs) == 4 + 9 + 2  # __init__ files, kernels, and the modules that these import
    assert not any("not_taken" in name for name in theirs)

    code, said, files = prepared(checkout, "--gemm-arch")
    assert code == 0
    assert said.endswith("no library with CUTLASS's products, see above; all.sh leaves them out\n")
    assert not files & grouped  # the files of the previous run are removed

    code, said, files = prepared(checkout, "mamba-ssm")
    assert code == 0
    assert said.endswith("was not downloaded, see above; its times will be missing\n")
    assert files == libraries | grouped | {"all.sh", "pydantic.whl"}


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        ("--arch", "the kernels were not built"),
        ("--host", "the host build failed"),
        ("pydantic", "pydantic's wheels were not downloaded"),
    ],
)
def test_prepare_keeps_what_it_made_before_where_it_fails(checkout: Path, fail: str, reason: str) -> None:
    (checkout / ".gpu").mkdir()
    (checkout / ".gpu/old").touch()
    code, said, files = prepared(checkout, fail)
    assert code == 2
    assert f"prepare.sh: {reason}" in said
    assert files == {"old"}


def test_all_refuses_to_run_without_its_libraries() -> None:
    said = refused(["bash", KIT / "all.sh"])
    assert said.startswith(f"all.sh: no checkout with libraries around {KIT}; make them")
    assert "bash bench/gpu/prepare.sh PYTHON && bash .gpu/all.sh" in said
