"""What SECURITY.md promises, with every verb over a checkpoint that was made to harm.

It has a pickle where old checkpoints have their weights, Python files by every name that a loader might
import, and settings that name them. While the verbs run, in their own process:

- nothing of it is executed, compiled, imported, unpickled or loaded as a library; no program is started but
  nemoquant's own renderer of chat templates;
- no socket is connected to a network: neither by Python nor by a library;
- no file is changed but in the output, where an option points to, and in the cache of nemoquant.
"""

import json
import os
import pickle
import random
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemoquant.files import UNFINISHED

from .cases import Case
from .child import Ended, call, main_of
from .watch import Kind, events
from .world import RUN, World

RUNS = (
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "ctypes.dlopen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
)
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "pty.spawn")
CALLS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.bind",
    "urllib.Request",
)
TEMPLATE = "template_worker.py"  # the only program that nemoquant starts by itself
HARM = "raise SystemExit('code of a checkpoint was run')\n"


class Bomb:
    """What makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/unpickled-by-nemoquant",)


def hostile(world: World) -> Path:
    """The source, with everything in it that a careless loader would run."""
    path = world.root() / "source"
    shutil.copytree(world.source, path)
    for name in ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "rows.npy"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    for name in (
        "modeling_nemotron_h",
        "tokenizer_evil",
        "sitecustomize",
        "usercustomize",
        "torch",
        "conftest",
        "setup",
    ):
        (path / f"{name}.py").write_text(HARM)
    raw = json.loads((path / "config.json").read_text())
    raw["auto_map"] |= {
        "AutoModelForCausalLM": "modeling_nemotron_h.Model",
        "AutoTokenizer": ["tokenizer_evil.T", None],
    }
    (path / "config.json").write_text(json.dumps(raw, indent=2))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenizer_evil.T", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:  # noqa: ARG001  all of it, always
    """Every verb, in its order."""
    source = hostile(world)
    root = source.parent
    chats = root / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "the of and"}]}) + "\n" for _ in range(40)
        )
    )
    out, copy, report = root / "out", root / "copy", root / "report.html"
    verbs: dict[str, tuple[list[object], list[Path]]] = {  # arguments, and where they may write
        "inspect": ([source], []),
        "plan": ([source, "--recipe", "nvfp4"], []),
        "quantize": (
            [source, out, "--recipe", "nvfp4", "--calib", chats, "--rows", 4, "--seq-len", 8, *RUN],
            [out, root / "out.partial"],
        ),
        "verify": ([out, "--against", source], []),
        "diff": (
            [source, out, "--data", world.rows, "--threads", 1, "--html", report],
            [out, report, Path(f"{report}{UNFINISHED}")],
        ),
        "export": (["onnx", out], [out]),
        "export a copy": (["onnx", out, copy], [copy, root / "copy.partial"]),
        "generate": ([out, "--prompt", "the", "--chat", "--max-tokens", 2, "--threads", 1], []),
        "recipes": (["list"], []),
    }
    for verb, (arguments, places) in verbs.items():
        yield one(world, source, verb, arguments, places)
    yield control(source)
    problems = ["a pickle was loaded"] if Path("/tmp/unpickled-by-nemoquant").exists() else []
    yield Case(
        "promises",
        "pickles",
        "every verb",
        "not as it should be" if problems else "not loaded",
        tuple(problems),
    )
    shutil.rmtree(root)


def one(world: World, source: Path, verb: str, arguments: list[object], places: list[Path]) -> Case:
    """Run a verb with every audited event and every changed file looked at."""
    ended, found = watched(main_of([verb.split()[0], *arguments]), source)
    allowed = [*places, world.folder / "stamps", Path.home() / ".cache/nemoquant"]
    problems = [*ended.success(), *found, *dict.fromkeys(elsewhere(ended.log, allowed))]
    outcome = "not as it should be" if problems else "no code, no network, no other file"
    return Case("promises", verb, "a checkpoint made to harm", outcome, tuple(problems[:8]))


def control(source: Path) -> Case:
    """All of that done on purpose: it must be seen, or the rest proves nothing."""

    def harm() -> None:
        exec(compile("1", str(source / "torch.py"), "exec"))
        pickle.loads(pickle.dumps(Path))
        os.system("true")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect(("127.0.0.1", 9))
        (source.parent / "elsewhere").write_text("x")

    ended, found = watched(harm, source)
    seen = " ".join([*found, *elsewhere(ended.log, [source])])
    wanted = ("compile", "pickle.find_class", "os.system", "socket.connect", "a socket of family", "CREATE")
    problems = ended.success() + [f"{what} was not seen" for what in wanted if what not in seen]
    outcome = "not as it should be" if problems else "seen"
    return Case("promises", "control", "all of it, done on purpose", outcome, tuple(problems))


def watched(function: Callable[[], object], source: Path) -> tuple[Ended, list[str]]:
    """Run a function in a child that stands in ``source``; returns what its audit hooks found, too."""
    notes = os.memfd_create("notes")

    def audited(event: str, details: tuple[Any, ...]) -> None:
        text = repr(details)
        foreign = event in RUNS and (str(source) in text or event in ("pickle.find_class", "os.system"))
        if event in CALLS or foreign or (event in STARTS and TEMPLATE not in text):
            os.write(notes, f"{event} {text[:200]}\n".encode())

    def before() -> None:
        os.chdir(source)  # as if whoever calls stood in it
        sys.addaudithook(audited)

    ended = call(function, root=Path("/"), log=True, before=before)
    with os.fdopen(notes, "rb") as f:
        f.seek(0)
        return ended, f.read().decode().splitlines()


def elsewhere(log: bytes, allowed: list[Path]) -> Iterator[str]:
    """Sockets that were connected, and files that were changed outside of ``allowed``."""
    for event in events(log):
        path = event.path
        nameless = path.endswith(" (deleted)") or (event.kind is Kind.OPEN and Path(path).is_dir())
        harmless = not path.startswith("/") or path.startswith(("/dev/", "/proc/", "/memfd:")) or nameless
        if event.kind is Kind.CONNECT:
            yield f"a socket of family {event.size} was connected"
        elif event.kind is Kind.FSYNC or harmless or any(Path(path).is_relative_to(p) for p in allowed):
            continue
        else:
            yield f"{event.kind.name} {path}"
