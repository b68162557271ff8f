"""`nemoquant plugins build`: its files, its messages, its refusals.

Also the registers in a log, and doctor's report on the result.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import registers
from click.testing import Result
from support.commands import nemoquant
from support.plugin_build import PLUGINS, building, host_folder, needs_compiler, needs_tensorrt_headers

from nemoquant.engine.doctor import plugins as finding
from nemoquant.engine.targets import Gpu, plugin_library
from nemoquant.errors import BuildError, UsageError
from nemoquant.ops import build
from nemoquant.ops.sources import sources_hash
from nemoquant.shipped import plugin_folder

VERSION = "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n#define TRT_PATCH_ENTERPRISE 0\n"


def run(*arguments: str | Path, code: int = 0) -> Result:
    return nemoquant("plugins", "build", *arguments, code=code)


@pytest.fixture(autouse=True)
def nobodys_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def toolbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A PATH with stand-ins for the named tools, and headers of TensorRT and CUTLASS; none of them works."""

    def make(*tools: str, headers: bool = True) -> None:
        folder = tmp_path / "tools"
        folder.mkdir()
        for tool in tools:
            (folder / tool).write_text("#!/bin/sh\necho nothing works here\nexit 1\n")
            (folder / tool).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CXX", raising=False)
        for variable, name in (("TENSORRT_ROOT", "NvInferRuntime.h"), ("CUTLASS_ROOT", "cutlass/cutlass.h")):
            file = tmp_path / variable / "include" / name
            file.parent.mkdir(parents=True)
            file.touch()
            (file.parent / "NvInferVersion.h").write_text(VERSION)
            monkeypatch.setenv(variable, str(tmp_path / variable) if headers else "")

    return make


# The files of a build.


@needs_compiler
@pytest.mark.slow
@needs_tensorrt_headers
def test_a_build_says_what_and_where_and_keeps_what_it_was_made_of() -> None:
    """The session's host build: two libraries, facts, a log.

    A second build that changes nothing is quick, and prints the same.
    """
    folder = host_folder()
    facts = json.loads((folder / "build_host.json").read_text())
    assert facts["sources"] == sources_hash()
    assert (facts["host"], facts["architectures"]) == (True, [])
    assert sorted(facts["libraries"]) == ["libnemoquant_host.so", "libnemoquant_plugins_host.so"]
    with building(folder):  # other workers use it
        said = run("--host", "--out", folder, "--strict").stdout.splitlines()
        again = run("--host", "--out", folder, "--strict", "--json").stdout
    assert said[0].startswith(f"{folder}/libnemoquant_host.so: ")
    assert said[0].endswith("B, kernels for the CPU (emulated, for tests)")
    assert f"TensorRT {facts['tensorrt']} plugins for the CPU" in said[1]
    assert said[2] == f"log, with the registers of every kernel: {folder}/build_host.log"
    assert json.loads(again) == {"folder": str(folder), **facts}
    assert not list(folder.glob("*.partial"))


@needs_compiler
@pytest.mark.slow
def test_a_compilers_refusal_is_one_line_and_leaves_the_last_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source with a mistake: the error names the source and the log; the previous libraries stay."""
    sources = tmp_path / "plugins"
    shutil.copytree(plugin_folder(), sources, ignore=shutil.ignore_patterns("mamba2_scan", "routed_experts"))
    monkeypatch.setattr(build, "plugin_folder", lambda: sources)
    out = tmp_path / "out"
    run("--host", "--kernels-only", "--out", out)
    before = (out / "libnemoquant_host.so").read_bytes()
    assert not (out / "libnemoquant_plugins_host.so").exists()
    launcher = sources / "causal_conv1d/launch.cu"
    text = launcher.read_text()
    launcher.write_text(text + "\nint broken( {\n")
    result = run("--host", "--kernels-only", "--out", out, code=2)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("configure: done")]
    assert len(lines) == 1
    assert lines[0].startswith("error: the build failed: ")
    assert "causal_conv1d/launch.cu" in lines[0]
    assert lines[0].endswith(f"the whole log is {out}/build_host.log")
    assert (out / "libnemoquant_host.so").read_bytes() == before
    moved = sources.rename(
        tmp_path / "elsewhere"
    )  # another installation: files of the old one do not disturb
    (moved / "causal_conv1d/launch.cu").write_text(text)
    monkeypatch.setattr(build, "plugin_folder", lambda: moved)
    run("--host", "--kernels-only", "--out", out)


# What it refuses.


@pytest.mark.parametrize(
    ("tools", "options", "says"),
    [
        (
            ["nvcc", "g++"],
            [],
            "cmake was not found on the PATH; expected CMake 3.22 or later: pip install cmake ninja",
        ),
        (
            ["cmake", "g++"],
            [],
            "nvcc was not found on the PATH; it compiles the kernels: install the CUDA toolkit",
        ),
        (
            ["cmake", "g++"],
            ["--host"],
            "nvcc was not found on the PATH; its headers of bfloat16 and half are needed on the host too",
        ),
        (
            ["cmake", "nvcc"],
            [],
            "no C++ compiler was found; expected g++ or clang++ on the PATH, or its name in CXX",
        ),
        (["cmake", "nvcc", "g++"], [], "the build failed: nothing works here; the whole log is "),
    ],
)
def test_missing_tools(tools: list[str], options: list[str], says: str, toolbox: Any, tmp_path: Path) -> None:
    toolbox(*tools)
    result = run("--out", tmp_path / "out", *options, code=2)
    assert result.stderr.startswith(f"error: {says}")
    assert result.stdout == ""
    assert not list(tmp_path.glob("out/*.so"))


def test_missing_headers(toolbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolbox("cmake", "nvcc", "g++", headers=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    message = run("--out", tmp_path / "out", code=2).stderr
    assert message.startswith(
        "error: TensorRT's headers were not found; the plugins need those of TensorRT 10 or 11: pip install "
        "'nemoquant[plugins]'"
    )
    assert "TENSORRT_ROOT" in message
    assert "--kernels-only builds what torch uses" in message
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    message = run("--out", tmp_path / "out", code=2).stderr
    assert message.startswith(
        f"error: TENSORRT_ROOT={tmp_path}: no NvInferRuntime.h there, nor in its include; expected a folder "
        f"that has it"
    )
    message = run("--kernels-only", "--gemm-arch", "90a", code=2).stderr
    assert message.startswith(
        "error: CUTLASS's headers were not found; --gemm-arch needs them: pip install --no-deps "
        "nvidia-cutlass"
    )
    assert (
        "nothing works here" in run("--kernels-only", "--out", tmp_path / "out", code=2).stderr
    )  # without this option they are not


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--arch", "hopper"],
            "--arch hopper: expected names as nvcc has them, such as sm_90a; the default is 80, 90a, 100f, "
            "120f",
        ),
        (["--arch", "sm_90a,"], "--arch : expected names as nvcc has them"),
        (["--host", "--arch", "sm_90a"], "got --host with --arch or --gemm-arch; expected one or the other"),
        (
            ["--arch", "sm_90a", "--gemm-arch", "100a"],
            "--gemm-arch 100a: expected some of those that are built, 90a, and of the families that "
            "CUTLASS's products are written for, sm_90, sm_100: 90a",
        ),
        (
            ["--gemm-arch", "90a,80"],
            "--gemm-arch 90a, 80: expected some of those that are built, 80, 90a, 100f, 120f, and of the "
            "families that CUTLASS's products are written for, sm_90, sm_100: 90a, 100f",
        ),
    ],
)
def test_options_that_make_no_sense(options: list[str], says: str) -> None:
    assert run(*options, code=2).stderr.startswith(f"error: {says}")


def test_architectures_that_the_compiler_does_not_know(toolbox: Any, tmp_path: Path) -> None:
    """12.8 has no names with f; no toolkit has all architectures."""
    toolbox("cmake", "g++", "nvcc")
    (tmp_path / "tools/nvcc").write_text(
        "#!/bin/sh\n"
        "[ $1 = --version ] && echo Cuda compilation tools, release 12.8, V12.8.61\n"
        "[ $1 = --list-gpu-code ] && echo sm_80 sm_90 sm_100 sm_120\n"
        "true\n"
    )
    for arch, says in {
        "100f": "names with f are known from 12.9 on; name others",
        "121a": "its code is for sm_80, sm_90, sm_100, sm_120; name others with --arch, or install a later",
    }.items():
        message = run("--arch", f"90a,{arch}", "--out", tmp_path / "out", code=2).stderr
        assert message.startswith(f"error: --arch sm_{arch}: nvcc 12.8 does not know it: {says}")
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("family", "architectures", "expected"),
    [
        (120, "80;90a;100f;120f", "120f from 120 to 129"),
        (100, "80;90a;100f;120f", "100f from 100 to 109"),
        (90, "80;90a;100f;120f", "90a from 90 to 90"),
        (120, "120a", "120a from 120 to 120"),
        (120, "120a;121a", "120a;121a from 120 to 121"),
        (120, "121a", "121a from 121 to 121"),
        (100, "103f;90a", "103f from 103 to 109"),
        (100, "110a;90a;100", ""),
        (120, "100f", ""),
        (120, "", ""),
    ],
)
def test_a_kernel_of_a_family_is_built_for_its_members(
    family: int, architectures: str, expected: str, tmp_path: Path
) -> None:
    """What CMake makes of --arch: which of them, and on which compute capabilities that code runs."""
    script = tmp_path / "ask.cmake"
    script.write_text(
        f"include({PLUGINS}/common/families.cmake)\n"
        f"members(found first last {family} {architectures})\n"
        'if(found)\n  message("${found} from ${first} to ${last}")\nendif()\n'
    )
    asked = subprocess.run(["cmake", "-P", script], check=True, capture_output=True, text=True)
    assert asked.stderr.strip() == expected
    known = [name for name in architectures.split(";") if name and build.in_family(name, family)]
    assert known == (expected.split(" ")[0].split(";") if expected else [])


def test_an_architecture_has_the_instructions_of_its_family() -> None:
    has = ("100a", "100f", "103a", "103f")
    for name in (*has, "100", "103", "90a", "110a", "120f"):
        assert build.in_family(name, 100) == (name in has)


def test_architectures_are_read_in_any_spelling() -> None:
    assert build.parse_architectures(["sm_90a, 80", "100a", "80"]) == ("90a", "80", "100a")
    with pytest.raises(UsageError, match="--arch 9"):
        build.parse_architectures(["9"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(toolbox: Any) -> None:
    toolbox("cmake", "nvcc", "g++")
    assert "choose another folder with --out" in run("--out", "/proc/nothing", code=2).stderr


# The content of a log.

LOG = """[1/9] Building CUDA object CMakeFiles/objects.dir/one/launch.cu.o
ptxas info    : Compiling entry function '_ZN2nq3one4workI13__nv_bfloat16fLi4EEEvNS_1PE' for 'sm_80'
ptxas info    : Function properties for _ZN2nq3one4workI13__nv_bfloat16fLi4EEEvNS_1PE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1664 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN2nq3one4workIffLi4EEEvNS_1PE' for 'sm_80'
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN2nq3one4workIffLi4EEEvNS_1PE' for 'sm_120a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
"""


def test_registers_and_spills_are_read_from_a_log() -> None:
    kernels = registers.read(LOG.splitlines())
    assert [vars(k) for k in kernels[:2]] == [
        {
            "arch": "sm_80",
            "folder": "one",
            "name": "work<bf16, fp32, 4>",
            "registers": 40,
            "stack": 0,
            "stores": 0,
            "loads": 0,
            "shared": 1664,
        },
        {
            "arch": "sm_80",
            "folder": "one",
            "name": "work<fp32, fp32, 4>",
            "registers": 255,
            "stack": 16,
            "stores": 12,
            "loads": 8,
            "shared": 0,
        },
    ]
    assert registers.table(kernels).splitlines() == [
        "| kernel (variants) | sm_80 | sm_120a |",
        "|---|---|---|",
        "| `work` (2) | 40 to 255; 1 spill, at most 20 bytes | 64 |",
    ]
    alone = replace(kernels[2], name="native<8>")
    assert (
        registers.table([*kernels, alone]).splitlines()[2] == "| `native` (1) |  | 64 |"
    )  # built for one architecture only
    assert registers.parse("# a head\n" + "\n".join(k.line() for k in kernels)) == kernels


def test_a_log_that_was_not_written_anew_is_noticed() -> None:
    built = registers.read(LOG.splitlines())
    other_arch = replace(built[0], arch="sm_90a")  # not built this time
    assert registers.check(built, [*built, other_arch]) == []
    assert registers.check(built[1:], built) == [f"kept:  {built[0].line()}"]  # no longer in the build
    changed = [replace(built[0], registers=41), *built[1:]]
    assert registers.check(built, changed) == [f"built: {built[0].line()}", f"kept:  {changed[0].line()}"]


def test_the_tables_of_the_readmes_are_those_of_the_log_that_is_kept() -> None:
    """The kept log also has every operator that has a launcher."""
    kernels = registers.parse((PLUGINS / "registers.tsv").read_text(encoding="utf-8"))
    folders = {path.parent.name for path in PLUGINS.glob("*/launch.cu")}
    assert {k.folder for k in kernels} == folders
    for folder in sorted(folders):
        text = (PLUGINS / folder / "README.md").read_text(encoding="utf-8")
        between = text.partition(f"{registers.BEGIN}\n")[2].partition(registers.END)[0]
        assert between.strip() == registers.table([k for k in kernels if k.folder == folder])


def test_no_kernel_of_the_convolution_spills() -> None:
    kernels = registers.parse((PLUGINS / "registers.tsv").read_text(encoding="utf-8"))
    assert {k.arch for k in kernels} == {f"sm_{a}" for a in build.ARCHITECTURES}
    assert [k for k in kernels if k.folder == "causal_conv1d" and (k.stores or k.loads)] == []


# doctor's report.


def test_doctor_on_the_plugins(toolbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toolbox("cmake", "nvcc", "g++")
    found = finding(None)
    assert (found.builds, found.runs) == (True, False)
    assert found.why == "none are built; `nemoquant plugins build` makes them"
    folder = build.default_folder()
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "nemoquant": "0",
        "sources": sources_hash(),
        "host": False,
        "architectures": ["90a"],
        "gemm_architectures": ["90a"],
        "tensorrt": "10.14.1",
        "libraries": {"libnemoquant_plugins.so": "0"},
    }
    (folder / "build.json").write_text(json.dumps(facts))
    found = finding(Gpu("a GPU", 90))
    assert (found.builds, found.runs) == (True, True)
    assert found.why == f"libnemoquant_plugins.so in {folder}, for sm_90a, TensorRT 10.14.1's headers"
    assert finding(None).why.endswith("; no CUDA device is usable here")
    with pytest.raises(
        UsageError, match=rf"and {folder}/libnemoquant_plugins.so is not there; build it with"
    ):
        plugin_library(None)
    (folder / "libnemoquant_plugins.so").touch()
    assert plugin_library(None) == folder / "libnemoquant_plugins.so"
    (folder / "build.json").write_text(json.dumps(facts | {"sources": "0"}))
    with pytest.raises(UsageError, match="was built from other sources than this version's; build it again"):
        plugin_library(None)
    assert (
        "built from other sources than this version's; `nemoquant plugins build` makes them"
        in finding(Gpu("a GPU", 90)).why
    )
    (folder / "build.json").write_text("[]")
    assert "is not what `nemoquant plugins build` writes" in finding(Gpu("a GPU", 90)).why
    monkeypatch.setenv("PATH", "")
    shutil.rmtree(folder)
    assert "none are built; `nemoquant plugins build` can't: cmake was not found" in finding(None).why


def test_a_root_without_headers_is_an_error_of_doctor_too(
    toolbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolbox("cmake", "nvcc", "g++")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    assert "no NvInferRuntime.h there" in finding(None).why
    with pytest.raises(BuildError, match=r"no NvInferRuntime.h there"):
        build.tensorrt_headers()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "TENSORRT_ROOT"))
    headers = build.tensorrt_headers()
    assert headers is not None
    assert build.tensorrt_version(headers) == "11.1.0"
