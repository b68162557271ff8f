"""Checkpoints as files: safetensors in and out, the manifest, the output folder."""

SHARD_BYTES = 5_000_000_000  # of one file, unless the user says otherwise
