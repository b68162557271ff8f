"""A quantized checkpoint written again for other programs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from nemoquant import arguments
from nemoquant.api.model import found
from nemoquant.arguments import PathLike
from nemoquant.bars import shown
from nemoquant.checkpoint.intact import silent
from nemoquant.converting import TARGETS, Target
from nemoquant.progress import Progress

if TYPE_CHECKING:
    from nemoquant.converting.result import Converted


def convert(
    path: PathLike,
    out: PathLike,
    to: Target,
    *,
    dry_run: bool = False,
    download: bool = False,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> "Converted":
    """Write the quantized checkpoint in ``path`` into the new folder ``out``, for other programs.

    Nothing is calibrated or encoded again. Everything is checked before the first byte is written; ``out``
    appears only when it is complete and verified. No manifest is written, but a record of every file's hash,
    which :func:`verify` reads.

    Args:
        path: its folder, or a model's name on the hub: FP8, MXFP8 or NVFP4, in the ModelOpt layout or (for
            bf16) in that of compressed-tensors.
        to: ``compressed-tensors`` for transformers, of FP8 checkpoints alone: the same codes, scales rounded
            to bf16, inputs' upwards; scales of a KV cache are left out. ``bf16``: every weight decoded, no
            quantization in the config, for fine-tuners or to quantize it again.
        dry_run: check everything, write nothing.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        progress: None shows it in a terminal or notebook; False shows nothing; a function is called with it.
        say: called with a line of text on what is read beforehand.
    Raises:
        CheckpointError: it is damaged, or has a format that the target does not take, with the reason.
            OutputError, UsageError. Interrupted: Ctrl-C; nothing is kept.
    """
    target = arguments.path("out", out)
    arguments.check_word("to", to, TARGETS)
    arguments.check_flags(dry_run=dry_run)
    bars = shown(progress)
    arguments.check_functions(say=say)
    folder = found("path", path, download=download, say=say, progress=progress)
    from nemoquant.converting.run import run

    with bars as report:
        return run(folder, target, to, dry_run=dry_run, progress=report, say=say or silent)
