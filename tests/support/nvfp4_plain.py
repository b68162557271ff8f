"""A plain second implementation of NVFP4 in numpy, without shortcuts.

It rounds by comparing with midpoints, casts with torch, and tries every scale.
"""

import numpy as np
import torch

METHODS = ("max", "mse", "four_over_six")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # codes 0 to 126


def plain_e2m1(quotients: np.ndarray) -> np.ndarray:
    """Codes of magnitudes: the number of midpoints below, or equal where the code above is the even one."""
    up_on_tie = (0.75, 1.75, 3.5)
    return sum(
        (quotients >= m) if m in up_on_tie else (quotients > m)
        for m in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    ).astype(int)


def plain_error(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[n, 16] and a scale for each block [n] -> float64 errors [n], summed in index order."""
    magnitudes = np.abs(blocks)
    codes = plain_e2m1(magnitudes / scale[:, None])
    differences = magnitudes.astype(np.float64) - E2M1[codes].astype(np.float64) * scale[:, None].astype(
        np.float64
    )
    total = np.zeros(len(blocks))
    for i in range(16):
        total = total + differences[:, i] * differences[:, i]
    return total


def plain_scale_codes(block_amax: np.ndarray, global_scale: np.float32) -> np.ndarray:
    quotient = block_amax / (np.float32(6) * global_scale)
    codes = torch.from_numpy(quotient).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes.astype(int)


def plain_encode(values: np.ndarray, global_scale: np.float32, method: str) -> tuple[np.ndarray, np.ndarray]:
    blocks = values.reshape(-1, 16)
    block_amax = np.abs(blocks).max(axis=1)
    codes = plain_scale_codes(block_amax, global_scale)
    if method == "four_over_six":
        onto_four = plain_scale_codes(block_amax * np.float32(1.5), global_scale)
        less = plain_error(blocks, E4M3[onto_four] * global_scale) < plain_error(
            blocks, E4M3[codes] * global_scale
        )
        codes = np.where(less, onto_four, codes)
    if method == "mse":
        least = np.full(len(blocks), np.inf)
        for code in range(1, 127):
            errors = plain_error(blocks, np.full(len(blocks), E4M3[code] * global_scale, np.float32))
            codes = np.where(errors < least, code, codes)
            least = np.minimum(errors, least)
    codes = np.where(block_amax == 0, 0x38, codes)
    quotients = blocks / (E4M3[codes] * global_scale)[:, None]
    nibbles = plain_e2m1(np.abs(quotients)) | np.where(quotients < 0, 8, 0)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    rows = values.shape[0]
    return packed.reshape(rows, -1).astype(np.uint8), codes.reshape(rows, -1).astype(np.uint8)


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1], expected[1], err_msg="block scales")
    np.testing.assert_array_equal(found[0], expected[0], err_msg="packed codes")
