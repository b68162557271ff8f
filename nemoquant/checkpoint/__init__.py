"""Checkpoints as files: safetensors in and out, the manifest, the output folder."""

SHARD_BYTES = 5_000_000_000  # per file, unless the user sets another size
