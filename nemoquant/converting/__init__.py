"""A quantized checkpoint written again for other programs, from its codes alone: no source, no calibration.

    compressed-tensors  the codes as they are, under the names and in the config that transformers reads
    bf16                every weight decoded, for programs that know no quantization

Importing this package loads nothing heavy.
"""

from typing import Literal, get_args

Target = Literal["compressed-tensors", "bf16"]
TARGETS: tuple[Target, ...] = get_args(Target)
