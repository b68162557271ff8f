"""Every parser of a file from elsewhere: a good file, and what nemoquant does with one of its kind."""

import ast
import gzip
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from tests.faults.mutations import json_bytes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "calib/demo_model"
ROWS = "rows.npy"


@dataclass(frozen=True)
class Codec:
    """A file as a tree of values and back; ``good`` is the file that the tree came from."""

    load: Callable[[bytes], Any]
    dump: Callable[[Any, bytes], bytes]


@dataclass(frozen=True)
class Parser:
    """One kind of file.

    Attributes:
        file: its name in the folder that ``make`` fills.
        make: fills a new folder from those of :func:`checkpoints`.
        read: what reads the file, with all that uses what was read.
        codec: None for a file that is no tree.
        words: of the file's language, to insert.
        share: of all cases; slow parsers get fewer.
    """

    file: str
    make: Callable[[Path, Path], object]
    read: Callable[[Path], object]
    codec: Codec | None = None
    words: tuple[bytes, ...] = ()
    share: float = 1.0


def checkpoints(base: Path) -> None:
    """Makes what the folders of all parsers are copied from, by nemoquant itself.

    ``source``; ``out``, quantized and with a graph; ``calibrate.partial`` and ``pack.partial``, runs that
    were interrupted there; ``cache``, the reference side of a diff.
    """
    from nemoquant import api
    from nemoquant.errors import Interrupted
    from tests.support.synthetic import synthetic_checkpoint, write_rows

    source, rows = synthetic_checkpoint(base / "source"), write_rows(base / ROWS)
    options: dict[str, Any] = {"method": "max", "data": rows, "dtype": "float32", "threads": 1}
    api.quantize(source, base / "out", "nvfp4", progress=False, **options)

    for stage in ("calibrate", "pack"):

        def interrupt(now: str, done: int, total: int, what: str, stage: str = stage) -> None:  # noqa: ARG001
            if now == stage and done * 2 > total:
                raise KeyboardInterrupt

        with suppress(Interrupted):
            api.quantize(source, base / stage, "nvfp4", progress=interrupt, shard_bytes=30_000, **options)
    api.diff(
        source,
        [base / "out"],
        data=rows,
        reference_cache=base / "cache",
        threads=1,
        card=False,
        progress=False,
    )
    api.export_onnx(base / "out", progress=False)


# Codecs.

JSON = Codec(json.loads, lambda tree, good: json_bytes(tree))
YAML = Codec(yaml.safe_load, JSON.dump)


def _header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _with_header(tree: Any, good: bytes) -> bytes:
    text = json_bytes(tree)
    return len(text).to_bytes(8, "little") + text + good[8 + int.from_bytes(good[:8], "little") :]


def _array(data: bytes) -> Any:
    end = 10 + int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10:end].decode())
    return {**header, "shape": list(header["shape"])}


def _with_array(tree: Any, good: bytes) -> bytes:
    if isinstance(tree, dict) and isinstance(tree.get("shape"), list):
        tree = {**tree, "shape": tuple(tree["shape"])}
    text = repr(tree).encode("utf-8", "surrogatepass")[:60_000] + b"\n"
    return (
        good[:8] + len(text).to_bytes(2, "little") + text + good[10 + int.from_bytes(good[8:10], "little") :]
    )


def _lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _with_lines(tree: Any, good: bytes) -> bytes:  # noqa: ARG001
    return b"\n".join(map(json_bytes, tree if isinstance(tree, list) else [tree])) + b"\n"


def _signed(tree: Any, good: bytes) -> bytes:
    """A manifest that was signed anew after it was changed."""
    from nemoquant.checkpoint.manifest import canonical

    if not isinstance(tree, dict):
        return JSON.dump(tree, good)
    try:
        return JSON.dump(tree | {"sha256": hashlib.sha256(canonical(tree)).hexdigest()}, good)
    except Exception:  # what can't be signed is written as it is
        return JSON.dump(tree, good)


def _signed_state(tree: Any, good: bytes) -> bytes:
    """The state of a run, signed anew."""
    if isinstance(tree, dict) and "state" in tree:
        with suppress(Exception):  # what can't be signed is written as it is
            tree = tree | {"sha256": hashlib.sha256(json.dumps(tree["state"]).encode()).hexdigest()}
    return JSON.dump(tree, good)


def _metadata(data: bytes) -> Any:
    import onnx

    model = onnx.load_from_string(data)
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def _with_metadata(tree: Any, good: bytes) -> bytes:
    import onnx

    model = onnx.load_from_string(good)
    del model.metadata_props[:]
    for key, value in tree.items() if isinstance(tree, dict) else [("nemoquant", tree)]:
        entry = model.metadata_props.add()
        entry.key, entry.value = key.encode("utf-8", "replace").decode(), json_bytes(value).decode()
    return bytes(model.SerializeToString())


# Folders and readers. Names of nemoquant are imported where they are used: the table alone loads nothing.


def copy(name: str, *without: str) -> Callable[[Path, Path], object]:
    """A copy of one of the folders; large files are links."""

    def make(base: Path, folder: Path) -> None:
        shutil.copytree(base / name, folder, ignore=shutil.ignore_patterns(*without))

    return make


def demo(*files: str) -> Callable[[Path, Path], object]:
    """Small files of the demo model."""

    def make(base: Path, folder: Path) -> None:  # noqa: ARG001
        folder.mkdir()
        for name in files:
            shutil.copy(DEMO / name, folder)

    return make


def text_file(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path, Path], object]:
    def make(base: Path, folder: Path) -> None:  # noqa: ARG001
        folder.mkdir()
        (folder / name).write_bytes(data() if callable(data) else data)

    return make


def _config(folder: Path) -> None:
    from nemoquant import api

    api.inspect(folder / "config.json")
    api.plan(folder / "config.json", "nvfp4")


def _packed(folder: Path) -> None:
    from nemoquant import api
    from nemoquant.quantized.checkpoint import PackedCheckpoint

    api.inspect(folder)
    PackedCheckpoint(folder).checkpoint.close()


def _one_shard(base: Path, folder: Path) -> None:
    folder.mkdir()
    shard = sorted((base / "source").glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "model.safetensors")


def _tensors(folder: Path) -> None:
    from nemoquant.checkpoint.reader import Checkpoint

    with Checkpoint(folder) as checkpoint:
        for name in [*checkpoint.tensors][:3]:
            checkpoint.raw(name)


def _recipe_folder(base: Path, folder: Path) -> None:
    shutil.copytree(base / "source", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copy(ROOT / "calib/recipes/nvfp4.yaml", folder / "recipe.yaml")


def _recipe(folder: Path) -> None:
    from nemoquant import api

    api.plan(folder / "config.json", folder / "recipe.yaml").to_json()


def _legacy_folder(base: Path, folder: Path) -> None:
    copy("out", "*.onnx", "nemoquant*")(base, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["quantization_config"]
    path.write_text(json.dumps(raw))


def _scales_folder(base: Path, folder: Path) -> None:
    shutil.copytree(base / "source", folder)
    shutil.copy(base / "out/nemoquant_scales.json", folder)


def _scales(folder: Path) -> None:
    from nemoquant import api

    out = folder.parent / "never"
    given = {"method": "max", "scales": folder / "nemoquant_scales.json", "threads": 1}
    api.quantize(folder, out, "nvfp4", dry_run=True, progress=False, **given)


def _verify(folder: Path) -> None:
    from nemoquant import api

    api.verify(folder, progress=False)


def _state(folder: Path) -> None:
    from nemoquant.run import unfinished

    found = unfinished.load(folder)
    if found is not None:
        found.describe()
        unfinished.check_identity(found, found.identity)
        found.keep_finished({}, 1)


def _rows(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        from nemoquant.model.parse import load_config
        from nemoquant.tokens.rows import load_rows

        load_rows(folder / name, DEMO, load_config(DEMO)[0], 2, 16)

    return read


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    out = io.BytesIO()
    texts = ["It is a truth universally acknowledged, that a single man. " * 4] * 3
    parquet.write_table(pa.table({"text": texts, "input_ids": [[*range(5, 25)]] * 3}), out)
    return out.getvalue()


def _npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).integers(3, 90, (4, 16)))
    return out.getvalue()


def _npz() -> bytes:
    out = io.BytesIO()
    ids = np.random.default_rng(0).integers(3, 90, (4, 16))
    np.savez(out, input_ids=ids, attention_mask=ids > 20)
    return out.getvalue()


def _arrow() -> bytes:
    import pyarrow as pa

    texts = ["It is a truth universally acknowledged, that a single man. " * 4] * 3
    table, out = pa.table({"text": texts, "input_ids": [[*range(5, 25)]] * 3}), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return out.getvalue()


CSV = b'id,text,input_ids\n1,"It is a truth, universally ""known"", that a single man",\n2,,"[5, 6, 7]"\n' * 4
JSONL = (
    b'{"text": "It is a truth universally acknowledged, that a single man in possession of a good fortune"}\n'
    b'{"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Cats."}]}\n'
    b'{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]}\n'
) * 2


def _chat(folder: Path) -> None:
    from nemoquant.tokens.codec import TextCodec

    TextCodec(folder).chat("What is it?")


def _text(folder: Path) -> None:
    from nemoquant.tokens.codec import TextCodec

    codec = TextCodec(folder)
    codec.decode(codec.encode("It is a truth universally acknowledged")[:50])


def _tokenizer_folder(base: Path, folder: Path) -> None:
    """A tokenizer with a part of every kind and few tokens, so that most changes are of its parts."""
    demo("config.json")(base, folder)
    data = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < 280}
    data["model"]["merges"] = []
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+| "}, "behavior": "Isolated", "invert": False}
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace]}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, data["pre_tokenizer"]]}
    data["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        **{"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": 2},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _stop(folder: Path) -> None:
    from nemoquant.engine.generate import stop_tokens
    from nemoquant.model.parse import load_config

    stop_tokens(folder, load_config(folder)[0])


def _engine_folder(base: Path, folder: Path) -> None:
    from nemoquant.checkpoint.manifest import file_sha256, read_manifest
    from nemoquant.engine import TARGETS
    from nemoquant.engine.enginefile import SCHEMA

    copy("out", "*.onnx")(base, folder)
    engine = folder / "model.engine"
    engine.write_bytes(b"engine" * 50)
    facts = {
        "schema": SCHEMA,
        "runtime": TARGETS["rtx"].module,
        "version": "1.1.0",
        "sm": 120,
        "compute": "bfloat16",
        "max_seq_len": 256,
        "max_batch": 1,
        "checkpoint": "out",
        "part": "main",
        "sha256": file_sha256(engine),
        "config": file_sha256(folder / "config.json"),
        "bytes": engine.stat().st_size,
        "last_token_only": False,
        "with_hidden": False,
        "strip_weights": False,
        "weight_streaming": False,
        "plan": read_manifest(folder)["plan"]["sha256"],
        "mtp": None,
        "plugins": None,
    }
    (folder / "model.engine.json").write_text(json.dumps(facts))


def _engine(folder: Path) -> None:
    from nemoquant.engine.enginefile import read_facts

    read_facts(folder / "model.engine", folder, "rtx")


def _graph(folder: Path) -> None:
    from nemoquant.engine.files import check_shards, graph_facts, read_graph

    path = folder / "model.onnx"
    check_shards(path, graph_facts(read_graph(path), path), "onnxruntime")


def _cache_folder(base: Path, folder: Path) -> None:
    shutil.copytree(base / "source", folder)
    shutil.copy(base / "cache", folder)
    shutil.copy(base / ROWS, folder)


def _cache(folder: Path) -> None:
    from nemoquant.evaluate.reference import check_cache
    from nemoquant.sources.source import open_weights
    from nemoquant.tokens.rows import load_rows

    source = open_weights(folder, "")
    with source.checkpoint:
        check_cache(folder / "cache", source, load_rows(folder / ROWS, folder, source.config, 8, 32), "cpu")


BUILT = {
    "nemoquant": "0.1",
    "sources": "0" * 64,
    "host": False,
    "architectures": ["90a"],
    "gemm_architectures": [],
    "tensorrt": "10.14.1",
    "libraries": {"libnemoquant_plugins.so": "0" * 64},
}


def _built(folder: Path) -> None:
    from nemoquant.ops.built import read_built

    read_built(folder)


ARGUMENTS = b"4G\n500M\n0:3\nkl > 0.02\nsm_90a,100a\n0.5\n8\nauto"
ARGUMENT_WORDS = (
    *(b"nan", b"inf", b"-inf", b"-1", b"0", b"1e400", b"1e-400", b"100000", b"9" * 30, b"9" * 5000),
    *(b"1e30G", b"~/x", b"~nobody/x", b"\n", b"\xff", b"\xc2\xb2", b"\x1b[2J", b"a" * 5000, b":", b"-"),
)


def _arguments(folder: Path) -> None:
    """Each line as the value of every option whose text nemoquant reads itself."""
    from nemoquant.cli import VERBS, main
    from nemoquant.errors import NemoquantError

    lines = (folder / "arguments").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:8]
    context = click.Context(main)
    for verb in VERBS:
        command = main.get_command(context, verb)
        commands = command.commands.values() if isinstance(command, click.Group) else [command]
        for parameter in (p for c in commands for p in c.params if not getattr(p, "is_flag", False)):
            for line in lines:
                with click.Context(main) as inner:
                    try:
                        value = parameter.type_cast_value(inner, (line,) if parameter.multiple else line)
                        if parameter.callback is not None:
                            parameter.callback(inner, parameter, value)
                    except (click.ClickException, NemoquantError):
                        pass


JINJA = (
    b"{% for i in range(1000000000) %}x{% endfor %}",
    b"{{ 'a' * 1000000000 }}",
    b"{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    b"{{ messages.__class__ }}",
    b"{{ raise_exception('no') }}",
    b"{{ [1] * 100000000 }}",
    b"{{ '%999999999s' | format('a') }}",
    b"{% set x = 10 ** 10000000 %}",
    b"{{ messages | tojson(indent=1000000000) }}",
    b"{{ ",
    b"}}",
    b"{%",
    b"((((",
    b"\xed\xa0\x80",
)
YAML_WORDS = (
    b"&a [*a, *a]",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"? ",
    b"- ",
    b"- - - - ",
    b"!!python/object/apply:os.system ['true']",
    b"!!binary ",
    b"!!timestamp 2000-99-99",
    b"2000-99-99",
    b"0x" + b"f" * 5000,
    b"1" * 5000,
    b"1:" * 300,
    b'"\\ud800"',
    b"[",
    b"{",
    b": ",
    b"\n",
    b"#",
    b"|\n",
    b"%YAML 9.9\n",
    b"---\n",
    b"\xff\xfe",
)
JSON_WORDS = (
    b'"\\ud800"',
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"null",
    b'"a": 1, ',
    b"\xef\xbb\xbf",
    b"\x00",
)
TOKENIZER_WORDS = (
    *JSON_WORDS,
    b'{"type": "Precompiled", "precompiled_charsmap": "AAAA"}',
    b'{"type": "Replace", "pattern": {"String": ""}, "content": "aa"}',
    b'{"type": "Replace", "pattern": {"Regex": "(e+|[a-z ]+)+$x"}, "content": ""}',
    b"(a+|[a-z ]+)+$x",
    b'"pad_to_multiple_of": 0',
    b'"stride": 9',
)
TEXT_WORDS = (b"a" * 5000, b" " * 5000, b"\n", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"<|im_end|>", b"\r")

STATE = Codec(json.loads, _signed_state)

PARSERS: dict[str, Parser] = {
    "config": Parser("config.json", copy("source", "*.safetensors*"), _config, JSON, JSON_WORDS),
    "quantization_config": Parser(
        "config.json", copy("out", "*.onnx", "nemoquant*"), _packed, JSON, JSON_WORDS, share=0.3
    ),
    "hf_quant_config": Parser("hf_quant_config.json", _legacy_folder, _packed, JSON, JSON_WORDS, share=0.3),
    "header": Parser("model.safetensors", _one_shard, _tensors, Codec(_header, _with_header), JSON_WORDS),
    "index": Parser("model.safetensors.index.json", copy("source"), _tensors, JSON, JSON_WORDS),
    "recipe": Parser("recipe.yaml", _recipe_folder, _recipe, YAML, YAML_WORDS, share=0.3),
    "scales": Parser("nemoquant_scales.json", _scales_folder, _scales, JSON, JSON_WORDS, share=0.3),
    "manifest": Parser(
        "nemoquant.json", copy("out", "*.onnx"), _verify, Codec(json.loads, _signed), JSON_WORDS, 0.5
    ),
    "state, calibrating": Parser(
        "nemoquant_resume/state.json", copy("calibrate.partial"), _state, STATE, JSON_WORDS, 0.5
    ),
    "state, packing": Parser(
        "nemoquant_resume/state.json", copy("pack.partial"), _state, STATE, JSON_WORDS, 0.5
    ),
    "npy": Parser("rows.npy", text_file("rows.npy", _npy), _rows("rows.npy"), Codec(_array, _with_array)),
    "jsonl": Parser(
        "rows.jsonl",
        text_file("rows.jsonl", JSONL),
        _rows("rows.jsonl"),
        Codec(_lines, _with_lines),
        JSON_WORDS,
        share=0.06,
    ),
    "txt": Parser("rows.txt", text_file("rows.txt", JSONL), _rows("rows.txt"), None, TEXT_WORDS, share=0.1),
    "parquet": Parser("rows.parquet", text_file("rows.parquet", _parquet), _rows("rows.parquet"), share=0.5),
    "arrow": Parser("rows.arrow", text_file("rows.arrow", _arrow), _rows("rows.arrow"), share=0.5),
    "npz": Parser("rows.npz", text_file("rows.npz", _npz), _rows("rows.npz")),
    "json array": Parser(
        "rows.json",
        text_file(
            "rows.json",
            lambda: json.dumps([json.loads(line) for line in JSONL.splitlines()], indent=1).encode(),
        ),
        _rows("rows.json"),
        JSON,
        share=0.1,  # a template's process each
    ),
    "csv": Parser("rows.csv", text_file("rows.csv", CSV), _rows("rows.csv")),
    "gzip": Parser("rows.csv.gz", text_file("rows.csv.gz", lambda: gzip.compress(CSV)), _rows("rows.csv.gz")),
    "tokenizer_config": Parser(
        "tokenizer_config.json",
        demo("config.json", "tokenizer.json", "tokenizer_config.json"),
        _chat,
        JSON,
        JSON_WORDS,
        share=0.03,
    ),
    "tokenizer": Parser("tokenizer.json", _tokenizer_folder, _text, JSON, TOKENIZER_WORDS),
    "chat_template": Parser(
        "chat_template.jinja",
        demo("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        _chat,
        None,
        JINJA,
        share=0.03,
    ),
    "generation_config": Parser(
        "generation_config.json", demo("config.json", "generation_config.json"), _stop, JSON, JSON_WORDS
    ),
    "engine facts": Parser("model.engine.json", _engine_folder, _engine, JSON, JSON_WORDS),
    "onnx": Parser("model.onnx", copy("out"), _graph, Codec(_metadata, _with_metadata), JSON_WORDS, 0.3),
    "reference cache": Parser(
        "cache", _cache_folder, _cache, Codec(_header, _with_header), JSON_WORDS, share=0.2
    ),
    "plugins' build.json": Parser(
        "build.json", text_file("build.json", json.dumps(BUILT).encode()), _built, JSON, JSON_WORDS, 0.5
    ),
    "arguments": Parser(
        "arguments", text_file("arguments", ARGUMENTS), _arguments, None, ARGUMENT_WORDS, share=0.05
    ),
}


def _misbehaving(act: Callable[[], object]) -> Parser:
    def read(folder: Path) -> None:
        if (folder / "file").read_bytes() != b"good":
            act()

    return Parser("file", text_file("file", b"good"), read)


BAD: dict[str, Parser] = {  # what the fuzzer must find; not among its parsers
    "raises": _misbehaving(lambda: {}["key"]),
    "panics": _misbehaving(lambda: (_ for _ in ()).throw(BaseException("panic"))),
    "speaks": _misbehaving(lambda: os.write(2, b"thread panicked")),
    "dies": _misbehaving(lambda: os._exit(3)),
    "hangs": _misbehaving(lambda: time.sleep(1000)),
    "hoards": _misbehaving(lambda: b"x" * (5 << 28)),
    "devours": _misbehaving(lambda: b"x" * (1 << 40)),
}


def workspace(name: str, base: Path) -> Path:
    """The folder of one parser, made when it is first asked for."""
    folder = base / "work" / name.replace(" ", "_")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(folder.name + f".{os.getpid()}")
        (PARSERS | BAD)[name].make(base, made)
        made.rename(folder)
    return folder
