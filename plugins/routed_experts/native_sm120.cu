// The products of FP4 that only SM120 has; on the host by the emulator.
#include "native.cuh"

int nq::experts::multiply_native(const Projection& p, int tile, int64_t tiles, void* stream) {
    const dim3 grid(static_cast<unsigned>((p.rows + WIDE_ROWS - 1) / WIDE_ROWS), static_cast<unsigned>(tiles)), block(WIDE_WARPS * 32);
    if (tile == 32) return NQ_LAUNCH((native<4>), grid, block, STAGES * NATIVE_STAGE<4>, stream, p);
    return NQ_LAUNCH((native<8>), grid, block, STAGES * NATIVE_STAGE<8>, stream, p);
}
