"""bench/gpu without a GPU: every script is imported, every check runs with small sizes on the CPU.

A GPU adds its own sizes, graphs, streams, compute-sanitizer and times. Triton's interpreter is chosen once a
process, the rehearsal replaces much of torch: both run in processes of their own. The others do not, because
importing torch and its operators would be most of their time.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.plugin_build import host_folder, needs_compiler

from bench.gpu import bench_ops, check_ops, check_triton, environment, logs, pack
from bench.gpu.cases import Case, Errors, MissingError, Run
from nemoquant.ops import library

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


@pytest.mark.parametrize(("device", "count"), [("cpu", 122), ("cuda", 276)])
def test_no_case_is_lost(device: str, count: int) -> None:
    """Cases are listed without running; each has its own name."""
    names = [case.name for case in check_ops.cases(device, Path("libnemoquant_host.so"))]
    assert len(names) == len(set(names)) == count


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """Takes back what check_ops sets for its whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled, used = torch.utils.deterministic.fill_uninitialized_memory, dict(library._used)
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warns)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    library._used.clear()
    library._used.update(used)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("torch_as_it_was")
def test_every_twelfth_operator_case_through_the_host_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cases take more than a minute: NQ_HOST_LIB=... python -m bench.gpu.check_ops OUT.json cpu."""
    out = tmp_path / "correct.json"
    monkeypatch.setenv("NQ_HOST_LIB", str(host_library()))
    monkeypatch.setenv("NQ_SECONDS", "600")
    with pytest.raises(SystemExit) as ended:
        said_by(check_ops, monkeypatch, out, "cpu", "--every", 12)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("11 cases, 0 not ok, 1 missing"), said
    rows = json.loads(out.read_text())["results"]
    assert all(row["ok"] is True or "built without" in row["why"] for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"scan", "scan_steps", "conv", "experts"}


def not_there() -> Errors:
    raise MissingError("no such products")


def test_a_case_over_its_limit_is_bad_and_one_that_fails_or_is_late_too(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    one = Run(out, "cpu", 60)
    one.run(Case("right", lambda: [("y", 1e-3, 1e-3)]))
    one.run(Case("wrong", lambda: [("y", 1e-3, 1e-2), ("bits", 1, 0)]))
    one.run(Case("nan", lambda: [("y", math.nan, 1)]))
    one.run(Case("raises", lambda: [("y", 1 / 0, 1)]))
    one.run(Case("not there", not_there))
    one.seconds = 0
    one.run(Case("late", lambda: []))
    one.write()
    assert (one.bad(), one.missing()) == (4, 1)
    rows = json.loads(out.read_text())["results"]
    assert [row["ok"] for row in rows] == [True, False, False, False, None, None]
    assert rows[3]["why"] == "ZeroDivisionError: division by zero"


@pytest.mark.slow
@needs_compiler
def test_all_126_cases_of_the_runner_against_the_host_build(tmp_path: Path) -> None:
    """Compiled as C++; the four of "grouped" a library without CUTLASS's products refuses."""
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
    *begun, summary = map(json.loads, run([runner]).stdout.splitlines())
    assert summary == {"ran": 126, "bad": 0}
    assert len(begun) == 126
    assert all(row.keys() == {"begins"} for row in begun)
    *rows, summary = map(json.loads, run([runner, "grouped"]).stdout.splitlines())
    assert summary == {"ran": 4, "bad": 4}
    begun, bad = rows[::2], rows[1::2]
    assert [row["begins"] for row in begun] == [row["case"] for row in bad]
    assert all("CUTLASS, which this library was built without" in row["reason"] for row in bad)
    assert refused([runner, "all"]) == "runner: no argument all; expected of: grouped unfilled\n"
    killed = run(["timeout", "0.2", runner, "unfilled"]).stdout  # what it said before is not lost
    assert killed.startswith('{"begins": "scan B2 L1 ')
    assert "case" not in killed


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
    steps = pack.Steps(tmp_path / "pack.json")
    pack.check_large(steps, tmp_path / "mid", "cpu")
    assert not steps.bad()
    rows = json.loads(steps.out.read_text())
    for recipe in ("nvfp4", "nvfp4-mse"):
        assert {"check": f"mid {recipe}: same bytes", "ok": True, "differ": []} in rows
    assert [row["check"] for row in rows if "kl" in row] == ["mid kl cpu"]
    recipes = [f"{step} {recipe}" for recipe in ("nvfp4", "nvfp4-mse") for step in ("pack", "encode")]
    stages = [row for row in rows if "stage" in row]
    assert [row["stage"] for row in stages] == ["calibrate", *recipes, "diff"]
    assert all(row["cpu_s"] > 0 and row["device_s"] > 0 and row["times"] > 0 for row in stages)


def test_packing_lists_what_it_has_no_time_for(tmp_path: Path) -> None:
    steps = pack.Steps(tmp_path / "pack.json", seconds=-1)
    assert steps.staged("late", lambda progress: 1 / 0) is None
    steps.compare("calibrate", {"cpu": 2.0}.get, "cuda")
    assert json.loads(steps.out.read_text()) == [{"step": "late", "ok": None, "why": "out of time"}]


def test_the_environment_is_described_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "env.json"
    text.write_text("x" * 2000)
    monkeypatch.setattr(sys, "argv", ["environment", str(out), str(text)])
    monkeypatch.setattr(environment, "MODULES", ("torch", "nemoquant.api", "there_is_none"))
    monkeypatch.setattr(environment, "NEEDS", {"pack": ("torch", "there_is_none"), "timing": ("torch",)})
    monkeypatch.setattr(torch.cuda, "get_device_name", no_device)
    assert exit_code(environment.main) == 1
    found = json.loads(out.read_text())
    assert list(found)[:7] == ["text", "python", "date", "missing", "seconds", "device", "library"]
    assert found["text"] == "x" * 1500
    assert found["torch"] == torch.__version__
    assert found["nemoquant.api"] == "ok"
    assert found["there_is_none"] == "FAILED ModuleNotFoundError: No module named 'there_is_none'"
    assert found["device"] == "FAILED RuntimeError: no device"
    assert found["missing"] == {"pack": ["there_is_none"]}
    assert capsys.readouterr().out.startswith("pack lacks there_is_none\ndevice: FAILED")


def no_device() -> str:
    raise RuntimeError("no device")


def exit_code(main: Callable[[], None]) -> object:
    """Of a module's main, which must end the process."""
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_environment_says_that_the_library_is_of_no_use_before_it_imports_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "env.json"

    def killed(module: str) -> str:
        raise KeyboardInterrupt(module)

    monkeypatch.setattr(sys, "argv", ["environment", str(out)])
    monkeypatch.setattr(environment, "device", lambda: "H100")
    monkeypatch.setattr(environment, "MODULES", ("torch",))
    monkeypatch.setenv("NEMOQUANT_KERNELS", str(tmp_path / "none.so"))
    assert library.kernels("cpu") is None
    monkeypatch.delitem(library._used, "cuda", raising=False)
    assert exit_code(environment.main) == environment.UNUSABLE
    monkeypatch.setattr(environment, "version", killed)
    with pytest.raises(KeyboardInterrupt):
        environment.main()
    found = json.loads(out.read_text())
    assert found["device"] == "H100"
    assert found["library"].startswith(f"FAILED BuildError: {tmp_path}/none.so is not there")
    assert "torch" not in found


def test_the_environment_asks_for_what_each_step_needs() -> None:
    """The README has the same list."""
    text = (KIT / "README.md").read_text(encoding="utf-8")
    packages = {"yaml": "pyyaml"}
    for step, names in environment.NEEDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {step} | torch"))
        assert set(re.findall(r"\w+", row.split("|")[2])) == {packages.get(name, name) for name in names}
    assert environment.NEEDS.keys() < set(run(["bash", KIT / "all.sh", "--list"]).stdout.split())


def test_every_step_that_needs_a_device_says_in_a_line_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, more in ((check_ops, []), (bench_ops, []), (check_triton, []), (pack, [tmp_path / "work"])):
        monkeypatch.setattr(sys, "argv", ["step", str(tmp_path / "out.json"), *map(str, more)])
        with pytest.raises(SystemExit, match=r"^no CUDA device: torch .* finds none; expected an NVIDIA GPU"):
            module.main()
    assert list(tmp_path.iterdir()) == []


def said_by(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["module", *map(str, arguments)])
    module.main()


def test_a_step_is_added_to_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file is begun anew, and a log that is not there is said."""
    out, log = tmp_path / "steps.json", tmp_path / "log"
    out.write_text("{")
    log.write_text("a" * 9000 + "end")
    said_by(logs, monkeypatch, "step", out, "timing", 139, 2, 110, log)
    said_by(logs, monkeypatch, "step", out, "pack", 124, 165, 165, tmp_path / "none")
    steps = json.loads(out.read_text())
    assert (steps["timing"]["rc"], steps["timing"]["seconds"], steps["timing"]["timed_out"]) == (
        139,
        2,
        False,
    )
    assert steps["timing"]["said"] == "a" * 2997 + "end"
    assert (steps["pack"]["timed_out"], steps["pack"]["said"]) == (True, "no file none")


def test_what_tools_said_becomes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log"
    log.write_text(
        '== memcheck\n{"ran": 120, "bad": 1}\n========= ERROR SUMMARY: 2 errors\n== rc 5\n'
        "== racecheck\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n== rc 124\n"
        "== initcheck\nkilled before it could say"
    )
    said_by(logs, monkeypatch, "tools", out, log)
    found = json.loads(out.read_text())
    assert list(found) == ["memcheck", "racecheck"]
    assert [found["memcheck"][name] for name in ("rc", "ran", "bad", "errors")] == [5, 120, 1, 2]
    assert found["racecheck"].keys() == {"rc", "errors", "said"}
    log.write_text(
        '== memcheck\n{"begins": "a"}\n{"begins": "b"}\n==== Error\n{"begins": "c"}\n{"begins": "d"}\n'
        '{"ran": 4, "bad": 0}\n== rc 5\n== initcheck\n{"begins": "a"}\n{"begins": "b"}\n== rc 124\n'
    )
    said_by(logs, monkeypatch, "tools", out, log)  # of the cases, those that something was said of
    said = {name: row["said"] for name, row in json.loads(out.read_text()).items()}
    last = '{"begins": "b"}\n'
    assert said == {"memcheck": f'{last}==== Error\n{{"ran": 4, "bad": 0}}\n', "initcheck": last}


def test_what_pytest_reported_becomes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log"
    log.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
        '<failure message="wrong">x</failure></testcase><testcase classname="a" name="d">'
        '<skipped message="no device"/></testcase></testsuite></testsuites>'
    )
    said_by(logs, monkeypatch, "junit", out, log)
    failed = [{"test": "a::c", "why": "wrong"}]
    counts = {"passed": 1, "failed": failed, "skipped": {"no device": 1}}
    assert json.loads(out.read_text()) == counts | {"not_begun": []}
    cut_short, none = tmp_path / "cut.xml", tmp_path / "none.xml"
    cut_short.write_text("<testsuites>")
    said_by(logs, monkeypatch, "junit", out, log, cut_short, none)  # a process died, and one was not begun
    found = json.loads(out.read_text())
    assert (found["passed"], [row["test"] for row in found["failed"]]) == (1, ["a::c", "cut"])
    assert found["not_begun"] == ["none"]
    assert found["failed"][1]["why"].startswith("no report of pytest: no element found")


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
    modules = re.findall(r"^[^#\n]*\bbench (\w+) \"", text, re.M)
    named |= {f"bench/gpu/{module}.py" for module in modules + re.findall(r"`(\w+) OUT\.json", text)}
    assert len(named) > 2
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_file_of_the_folder_that_all_takes_is_put_there_by_prepare() -> None:
    """``$kit/NAME`` in all.sh, ``NAME`` in prepare.sh."""
    taken = set(re.findall(r"\$kit\"?/([\w./*]+)", (KIT / "all.sh").read_text(encoding="utf-8")))
    assert {"libnemoquant_kernels.so", "libnemoquant_host.so", "runner", "*.whl"} <= taken
    prepare = (KIT / "prepare.sh").read_text(encoding="utf-8")
    assert [name for name in taken - {"*.whl"} if name not in prepare.replace("$work/gemm", "gemm")] == []


def test_all_steps_have_a_row_in_the_readme() -> None:
    listed = run(["bash", KIT / "all.sh", "--list"]).stdout.split()
    rows = re.findall(r"^\| (\w+) \| `\w+\.json`", (KIT / "README.md").read_text(encoding="utf-8"), re.M)
    assert rows == listed


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
    assert said.startswith("prepare.sh: no nvcc on the PATH; expected the CUDA toolkit 12.9 or later")
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
NVCC = """#!/bin/bash
[[ $* == *--enable-new-dtags* ]] || exit 1
while [ $# -gt 1 ]; do shift; done
touch $1
"""


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


def test_all_refuses_to_run_without_its_libraries_or_with_an_unknown_step() -> None:
    said = refused(["bash", KIT / "all.sh"])
    assert said.startswith(f"all.sh: no checkout with libraries around {KIT}; make them")
    assert "bash bench/gpu/prepare.sh PYTHON && bash .gpu/all.sh" in said
    assert refused(["bash", KIT / "all.sh", "timing", "nope"]) == (
        "all.sh: no step nope; expected of: env runner correct sanitizer pack triton timing grouped pytest\n"
    )


PYTHON3 = f"""#!/bin/bash
# In the place of the device's Python: says when it began and ended. CRASH, HANG: words of what does.
case "$*" in
    *gpu.logs* | *gpu.report*) PYTHONPATH={ROOT} exec {sys.executable} "$@" ;;
    *"${{CRASH:-nothing of that name}}"*) echo about to crash; kill -SEGV $$ ;;
    *gpu.environment*) rc=${{ENVIRONMENT:-0}} ;;
    *"${{HANG:-nothing of that name}}"*) echo hangs; sleep 60 ;;
esac
echo "begin $*" >>"$CALLS"
kernels=${{NEMOQUANT_KERNELS##*.gpu/}}
echo "$2 $kernels $PYTHONPATH $TRITON_CACHE_DIR ${{PYTEST_ADDOPTS-unset}}" >>"$CALLS.given"
sleep 0.05
echo "end $*" >>"$CALLS"
exit ${{rc:-0}}
"""
TOOL = """#!/bin/bash
echo "begin $0 $*" >>"$CALLS"
case "$*" in *"${HANG:-nothing of that name}"*) echo hangs; sleep 60 ;; esac
echo '{"ran": 120, "bad": 0}'
echo "end $0 $*" >>"$CALLS"
"""


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A folder that all.sh takes for the project, with stand-ins for all that it calls."""
    root = tmp_path / "checkout"
    for name in ("bench/gpu", ".gpu/gemm", "bin"):
        (root / name).mkdir(parents=True)
    shutil.copy(KIT / "all.sh", root / ".gpu")
    for name in ("libnemoquant_kernels.so", "build.json", "gemm/libnemoquant_kernels.so"):
        (root / ".gpu" / name).touch()
    (root / "bench/gpu/check_ops.py").touch()
    made = {"bin/python3": PYTHON3, ".gpu/runner": TOOL, "bin/compute-sanitizer": TOOL}
    for name, text in made.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    return root


def all_steps(kit: Path, *steps: str, **variables: str) -> tuple[int, str, dict[str, Any], list[str]]:
    """Returns the exit code, the output, steps.json, and when what was called began and ended."""
    calls = kit / "calls"
    path = f"{kit / 'bin'}:{os.environ['PATH']}"
    given = {"PATH": path, "CALLS": str(calls), "OUT": str(kit / "out")} | variables
    done = run(["bash", kit / ".gpu/all.sh", *steps], **given)
    found = json.loads((kit / "out/steps.json").read_text())
    return done.returncode, done.stdout + done.stderr, found, calls.read_text().splitlines()


def test_all_steps_in_order_and_nothing_beside_what_is_timed(kit: Path) -> None:
    code, said, steps, calls = all_steps(kit)
    assert code == 0, said
    assert list(steps) == run(["bash", KIT / "all.sh", "--list"]).stdout.split()
    assert {step["rc"] for step in steps.values()} == {0}
    for timed in ("gpu.pack ", "gpu.check_triton ", "gpu.bench_ops "):
        begin = next(i for i, line in enumerate(calls) if line.startswith("begin") and timed in line)
        assert calls[begin + 1] == calls[begin].replace("begin", "end")
        assert sum(line.startswith("begin") for line in calls[:begin]) == sum(
            line.startswith("end") for line in calls[:begin]
        )
    tools = re.findall(r"begin \S*compute-sanitizer --tool (\w+)", "\n".join(calls))
    each = ["memcheck", "racecheck", "synccheck"]
    assert tools == [*each, "initcheck", *each]
    words = re.findall(r"begin \S*(?:runner|compute-sanitizer --tool \w+ .*runner) ?(.*)", "\n".join(calls))
    assert words == ["", "", "", "", "unfilled", *["grouped"] * 4]
    for name, names in (("sanitizer", [*each, "initcheck"]), ("grouped_runner", ["runner", *each])):
        written = json.loads((kit / f"out/{name}.json").read_text())
        assert {tool: row["ran"] for tool, row in written.items()} == dict.fromkeys(names, 120)
    assert "open  scan prefill" in said
    assert json.loads((kit / "out/summary.json").read_text())["missing"]["timing"] == "no timing.json"


def test_a_step_that_crashes_or_hangs_is_written_down_and_the_others_run(kit: Path) -> None:
    """The second call adds to what is there."""
    variables = {"CRASH": "check_ops", "HANG": "bench_ops", "NQ_TOTAL": "4"}
    (kit / "out").mkdir()
    (kit / "out/correct.json").write_text("of an earlier run")
    code, said, steps, calls = all_steps(kit, "pytest", "timing", "correct", **variables)
    assert code == 1
    assert not (kit / "out/correct.json").exists()
    assert list(steps) == ["correct", "timing", "pytest"], said
    assert (steps["correct"]["rc"], steps["timing"]["rc"], steps["timing"]["timed_out"]) == (139, 124, True)
    assert "about to crash" in steps["correct"]["said"]
    assert steps["timing"]["said"].startswith("hangs\n")
    assert steps["pytest"]["said"].startswith("not begun: ")
    assert not any("-m pytest" in line for line in calls)
    code, _, steps, _ = all_steps(kit, "triton")
    assert (code, list(steps)) == (0, ["correct", "timing", "pytest", "triton"])


def test_what_a_step_is_given(kit: Path) -> None:
    """The library with CUTLASS's products for times and what is grouped; none of the caller's settings."""
    theirs = {"PYTHONPATH": "/theirs", "PYTEST_ADDOPTS": "-x", "TRITON_CACHE_DIR": "/theirs"}
    code, said, _, calls = all_steps(kit, "correct", "timing", "grouped", "pytest", **theirs)
    assert code == 0, said
    lines = (kit / "calls.given").read_text().splitlines()
    given = [line.split(" ") for line in lines if not line.startswith("pip ")]
    plain, gemm = "libnemoquant_kernels.so", "gemm/libnemoquant_kernels.so"
    checks, times = "bench.gpu.check_ops", "bench.gpu.bench_ops"
    assert [row[:2] for row in given if row[0] != "pytest"] == [
        [checks, plain],
        [times, gemm],
        [checks, gemm],
    ]
    tests = [line for line in calls if line.startswith("begin -m pytest")]
    assert len(tests) == 8
    assert [row[1] for row in given if row[0] == "pytest"] == [*[plain] * 6, gemm, gemm]
    assert "-k grouped tests/gpu/test_gpu_first_calls.py" in tests[7]
    assert not any("-k" in line for line in tests[:7])
    found = json.loads((kit / "out/pytest.json").read_text())  # stand-ins leave no report, as what dies does
    assert [row["test"] for row in found["failed"]][-2:] == ["grouped_experts", "grouped_first_calls"]
    assert (len(found["failed"]), found["not_begun"]) == (8, [])
    for _, _, path, cache, options in given:
        assert path.split(":")[-2:] == [str(kit), "/theirs"]
        assert cache != "/theirs"
        assert options == "unset"


def functions() -> str:
    """Those of all.sh that its steps are made of."""
    text = (KIT / "all.sh").read_text(encoding="utf-8")
    return text[text.index("rest() {") : text.index("measure() {")]


def one_step(kit: Path, name: str, seconds: int, **variables: str) -> int:
    """Runs a step with so many seconds; returns its exit code."""
    python3 = f"{kit / 'bin'}:{os.environ['PATH']}"
    folders = dict.fromkeys(("OUT", "work"), str(kit)) | {
        "kit": str(kit / ".gpu"),
        "CALLS": str(kit / "calls"),
    }
    given = folders | {"limit": str(seconds), "sanitizer": str(kit / "bin/compute-sanitizer")} | variables
    return run(["bash", "-c", f"{functions()}\nstep_{name}"], PATH=python3, **given).returncode


def test_a_tool_that_hangs_costs_no_result_of_the_others(kit: Path) -> None:
    """And where too little time is left, the first one is not begun."""
    assert one_step(kit, "sanitizer", 18, HANG="racecheck") == 124
    found = json.loads((kit / "sanitizer.json").read_text())
    codes = {"memcheck": 124, "racecheck": 124, "synccheck": 0, "initcheck": 0}
    assert {name: row["rc"] for name, row in found.items()} == codes
    assert found["memcheck"]["said"] == "not begun: no time was left\n"
    assert found["racecheck"]["said"].endswith("hangs\n")


def test_files_of_tests_that_were_not_begun_are_named(kit: Path) -> None:
    """That no time was left for them is an error of the step."""
    assert one_step(kit, "pytest", 2) == 124
    found = json.loads((kit / "pytest.json").read_text())
    assert (found["passed"], found["failed"], len(found["not_begun"])) == (0, [], 8)


def test_a_step_that_is_not_begun_leaves_earlier_results(kit: Path) -> None:
    (kit / "out").mkdir()
    (kit / "out/triton.json").write_text("of an earlier run")
    (kit / "calls").touch()
    _, _, steps, _ = all_steps(kit, "triton", NQ_TOTAL="1")
    assert steps["triton"]["said"].startswith("not begun: ")
    assert (kit / "out/triton.json").read_text() == "of an earlier run"


def test_all_ends_where_the_library_is_of_no_use_and_goes_on_without_a_device(kit: Path) -> None:
    code, said, steps, _ = all_steps(kit, ENVIRONMENT=str(environment.UNUSABLE))
    assert (code, list(steps)) == (2, ["env"])
    assert "all.sh: the kernel library can't be used on this device" in said
    code, _, steps, _ = all_steps(kit, "env", "triton", ENVIRONMENT="1")
    assert (code, list(steps), steps["env"]["rc"]) == (1, ["env", "triton"], 1)


def test_what_a_step_began_ends_with_it(tmp_path: Path) -> None:
    """With its children, though `timeout` makes a group of them, which the step's signal does not reach."""
    words = f"""within 60 bash -c 'sleep 50 & echo $! >"$0/pid"; wait' "{tmp_path}"; echo went on"""
    done = run(["timeout", "-k", "5", "0.5", "bash", "-c", functions() + words])
    assert (done.returncode, done.stdout) == (124, "")
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")

    def lives() -> bool:
        try:
            return status.read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    until = time.monotonic() + 20  # the signal is sent, and takes effect when the machine gets to it
    while lives() and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives()


def test_limits_of_the_steps_before_pytest_are_within_the_whole() -> None:
    text = (KIT / "all.sh").read_text(encoding="utf-8")
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    total = re.findall(r"NQ_TOTAL:-(\d+)", text)
    del limits["pytest"]
    beside = min(limits.pop("sanitizer"), limits["correct"])
    assert sum(limits.values()) < int(total[0])
    assert beside == limits["correct"]  # the sanitizer ends no earlier, and may not end much later
