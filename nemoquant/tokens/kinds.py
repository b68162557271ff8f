"""Which kind of file a name ends in: the table of what is read, and what to do about what is not.

Light: the command line asks here before anything else is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from nemoquant.errors import CalibrationError

PACKED = ".gz"
TEXT_KINDS: Mapping[str, str] = MappingProxyType(  # these may be packed
    {".txt": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "table", ".tsv": "table"}
)
KINDS: Mapping[str, str] = MappingProxyType(
    {**TEXT_KINDS, ".parquet": "parquet", ".arrow": "arrow", ".npy": "array", ".npz": "array"}
)
EXPECTED = (
    ".txt, .jsonl, .ndjson, .json, .csv, .tsv (each also as .gz), .parquet, .arrow, .npy or .npz, a folder "
    "of such files, or the name of a data set"
)
_PICKLE = (
    "it is a pickle, which can run code and is not opened; write the ids with numpy: "
    "np.savez('ids.npz', input_ids=..., attention_mask=...)"
)
_UNPACK = "unpack it"
_PACKED = "it is packed; unpack it, or pack it as .gz"
_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle"), _PICKLE),
        **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz"), _PACKED),
        **dict.fromkeys((".xlsx", ".xls", ".ods"), "it is a workbook; save the sheet as .csv"),
        **dict.fromkeys((".md", ".text", ".rst", ".html"), "name it .txt, if its text is meant as it is"),
        **dict.fromkeys((".safetensors", ".gguf"), "it holds tensors; calibration takes text or token ids"),
        **dict.fromkeys((".yaml", ".yml", ".xml"), "write its documents as .jsonl"),
    }
)


def is_packed(path: Path) -> bool:
    """Whether a file is named as one that gzip has packed."""
    return path.suffix.lower() == PACKED


def ending(path: Path) -> str:
    """The end of a name in small letters, of its content where it is packed: ``.jsonl`` of X.JSONL.GZ."""
    return (Path(path.stem) if is_packed(path) else path).suffix.lower()


def is_known(path: Path) -> bool:
    """Whether a file of this name is read."""
    return ending(path) in (TEXT_KINDS if is_packed(path) else KINDS)


def kind_of(path: Path) -> str:
    """The kind of a file, a value of ``KINDS``.

    Raises:
        CalibrationError: files of this name are not read; says what to do.
    """
    if not is_known(path):
        is_content_known = ending(path) in KINDS or ending(path) in _ADVICE
        advice = (_UNPACK if is_content_known else "") if is_packed(path) else _ADVICE.get(ending(path), "")
        raise CalibrationError(
            f"{path}: unknown kind {path.suffix!r}" + f", {advice}" * bool(advice) + f"; expected {EXPECTED}"
        )
    return KINDS[ending(path)]
