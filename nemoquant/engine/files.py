"""An exported graph on disk, checked before a runtime loads it: its metadata, and the shards it refers to."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.errors import CheckpointError, MissingExtraError, brief, field_problem
from nemoquant.files import parse_json, plain_name, read_bytes

MOST_GRAPH = 1 << 30  # bytes: weights are not in it, so even Super's has a few megabytes


def _plain(name: str) -> str:
    if not plain_name(name):
        raise ValueError("expected a plain file name")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class ShardFacts(_Part):
    """A shard that the graph points into; ``sha256`` is None where no manifest tells it."""

    size: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: str | None


class GraphFacts(_Part):
    """The metadata that are read; there are more of them, for people."""

    dialect: str
    compute: str
    files: Annotated[dict[Annotated[str, AfterValidator(_plain)], ShardFacts], Field(min_length=1)]


def read_graph(path: Path) -> Any:
    """The ``onnx.ModelProto`` without its external data.

    Raises:
        CheckpointError: the file is missing, is not one of nemoquant's ONNX files, or its external data lie
            outside its folder.
    """
    onnx = onnx_package()
    try:
        model = onnx.load_model_from_string(read_bytes(path, MOST_GRAPH))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; make it with `nemoquant export onnx {path.parent}`"
        ) from None
    except Exception as error:  # protobuf's exceptions have no common base
        raise CheckpointError(f"{path} cannot be read as ONNX ({error}); export it again") from None
    for tensor in (
        *_graph_tensors(model.graph),
        *_attribute_tensors(a for f in model.functions for a in f.attribute_proto),
        *_attribute_tensors(a for f in model.functions for n in f.node for a in n.attribute),
    ):
        for entry in tensor.external_data:
            if entry.key == "location" and not plain_name(entry.value):
                raise CheckpointError(
                    f"{path}: {brief(tensor.name)} has its data in {brief(entry.value)}; expected a plain "
                    f"file name beside the graph, export it again"
                )
    return model


def _graph_tensors(graph: Any) -> Iterator[Any]:
    """All tensors of a graph, including those of its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(attribute for node in graph.node for attribute in node.attribute)


def _attribute_tensors(attributes: Iterable[Any]) -> Iterator[Any]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def onnx_package() -> Any:
    """The onnx module, once onnx_ir is installed too.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        import onnx
        import onnx_ir  # noqa: F401
    except ImportError:
        raise MissingExtraError("graphs need the extra `onnx`: pip install 'nemoquant[onnx]'") from None
    return onnx


def graph_facts(model: Any, path: Path) -> dict[str, Any]:
    """The metadata that the export wrote: dialect, compute dtype, plan, files with size and sha256.

    Raises:
        CheckpointError: they are missing, or not in that form.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == "nemoquant"), None)
    try:
        if not isinstance(text, str):  # onnx gives bytes where they are no UTF-8
            raise ValueError("there are none" if text is None else "they are not UTF-8")
        facts = parse_json(text)
        GraphFacts.model_validate(facts)
    except ValidationError as error:
        why = field_problem(error)
    except ValueError as error:
        why = str(error)
    else:
        return dict(facts)
    raise CheckpointError(
        f"{path} was not exported by nemoquant, or was changed: its metadata are not as expected ({why}); "
        f"export it again"
    )


def check_shards(
    path: Path, facts: dict[str, Any], dialect: str, known: Mapping[str, str] | None = None
) -> None:
    """Make sure that the graph is for ``dialect`` and that the shards beside it are the ones it was made for.

    Args:
        known: shard -> the sha256 that it is held against elsewhere; others are hashed here.
    Raises:
        CheckpointError: another dialect; a shard is missing, has another size, or (where its hash is known)
            other bytes.
    """
    if facts["dialect"] != dialect:
        raise CheckpointError(
            f"{path} is in the {facts['dialect']} dialect, expected {dialect}; export it again with "
            f"--dialect {dialect}"
        )
    for name, expected in facts["files"].items():
        shard = path.parent / name
        if not shard.is_file():
            raise CheckpointError(
                f"{shard} is missing; {path.name} points into it, copy it there or export again"
            )
        if shard.stat().st_size != expected["size"]:
            raise CheckpointError(
                f"{shard} has {shard.stat().st_size:,} bytes, {path.name} was made for "
                f"{expected['size']:,}; export it again"
            )
        if expected["sha256"] is None:
            continue
        digest = None if known is None else known.get(name)
        if (digest or file_sha256(shard)) != expected["sha256"]:
            raise CheckpointError(
                f"{shard} was changed after {path.name} was made: its sha256 is another; export it again"
            )
