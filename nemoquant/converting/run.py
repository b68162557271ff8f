"""One conversion: everything is checked first, the folder is written, verified, and gets its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoquant._version import __version__
from nemoquant.checkpoint import SHARD_BYTES, converted, manifest
from nemoquant.checkpoint.folder import check_output
from nemoquant.checkpoint.intact import Say, hash_once, silent
from nemoquant.checkpoint.making import making
from nemoquant.checkpoint.reader import INDEX
from nemoquant.checkpoint.side_files import copy_side_files, side_files
from nemoquant.converting import Target
from nemoquant.converting.card import card
from nemoquant.converting.result import Converted
from nemoquant.converting.targets import CONVERSIONS, Conversion
from nemoquant.converting.tensors import Tensor, shards, write
from nemoquant.errors import VerificationError, listing
from nemoquant.files import write_again, write_json_again
from nemoquant.machine import usable_threads
from nemoquant.pack.found import verify_found
from nemoquant.progress import Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.sources.hub import from_hub
from nemoquant.words import message

WRITTEN = (INDEX, "config.json", manifest.CARD, converted.FILE)


def run(
    path: Path,
    out: Path,
    to: Target,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
    say: Say = silent,
) -> Converted:
    """See :func:`nemoquant.convert`."""
    opened = PackedCheckpoint(path)
    with opened.checkpoint:
        conversion = CONVERSIONS[to](opened)
        files = shards(conversion.tensors, SHARD_BYTES)
        before = sum(info.nbytes for info in opened.checkpoint.tensors.values())
        after = sum(tensor.nbytes for tensor in conversion.tensors)
        copied, skipped = side_files(path, opened.raw_config)
        check_output(out, path, len(conversion.tensors), after)
        result = Converted(
            out,
            to,
            opened.layout.name,
            tensors=len(conversion.tensors),
            bytes_in=before,
            bytes_out=after,
            decoded=conversion.decoded,
            notes=conversion.notes,
            warnings=conversion.warnings,
            verified={},
            skipped_files=skipped,
        )
        if dry_run:
            return result
        intact = None if opened.manifest is None else hash_once(path, opened.manifest, say, progress)
        with making(out, {*files, *copied, *WRITTEN}) as made:
            digests = _write_shards(made.folder, files, after, progress)
            copy_side_files(path, copied, made.folder)
            write_again(made.folder / manifest.CARD, card(opened, result, copied).encode("utf-8"))
            write_json_again(made.folder / "config.json", conversion.config)
            weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
            write_json_again(
                made.folder / INDEX, {"metadata": {"total_size": after}, "weight_map": weight_map}
            )
            names = sorted({*files, *copied, *WRITTEN} - {converted.FILE})
            sha256 = {name: digests.get(name) or manifest.file_sha256(made.folder / name) for name in names}
            converted.write_record(made.folder, _record(opened, to, conversion, sha256))
            opened.checkpoint.check_unchanged()
            if intact is not None:
                intact.check_unchanged()
            report = verify_found(made.folder, progress)
            if not report.ok:
                raise VerificationError(
                    f"what was written is not what was to be: {listing(report.problems, 3)}"
                )
            result.verified.update(report.checked)
        opened.checkpoint.done = True  # whatever happens to it now, OUT is whole
    return result


def _write_shards(
    folder: Path, files: Mapping[str, list[Tensor]], total: int, progress: Progress
) -> dict[str, str]:
    """Write all shards; returns their sha256."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("convert", done, total, "")

    return {file: write(folder / file, tensors, usable_threads(), count) for file, tensors in files.items()}


def _record(
    opened: PackedCheckpoint, to: Target, conversion: Conversion, files: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "schema": converted.SCHEMA,
        "nemoquant": __version__,
        "to": to,
        "made_from": {
            "layout": opened.layout.name,
            "config_sha256": manifest.config_sha256(opened.raw_config),
            "tensor_table_sha256": manifest.tensor_table_sha256(opened.checkpoint.tensors),
            "manifest_sha256": opened.manifest["sha256"] if opened.manifest else None,
        }
        | from_hub(opened.path),
        "notes": conversion.notes,
        "warnings": [message(text) for text in conversion.warnings],
        "files": dict(files),
    }
