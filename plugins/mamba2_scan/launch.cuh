// Launches the kernels, once the arguments are known to be right. 0, or an error whose reason is kept.
#pragma once

#include "kernel.cuh"

namespace nq::mamba2 {

int run_steps(const Params& p, int64_t batch, void* stream);

template <class T, int size>
int launch_chunks(Params p, int64_t batch, void* stream) {
    // Of a block; and what the kernel declares itself, up to where the rest begins.
    const size_t most = nq::shared_limit(), fixed = (sizeof(Decays[2]) + 127) / 128 * 128;
    p.stages = shared_bytes<T, size>(2) + fixed <= most ? 2 : 1;
    const size_t shared = shared_bytes<T, size>(p.stages);
    if (shared + fixed > most) return run_steps(p, batch, stream);
    const auto blocks = static_cast<unsigned>(p.heads * (p.head_dim / TILE)), rows = static_cast<unsigned>(batch);
    const auto segments = static_cast<unsigned>(p.segments);
    int error = NEMOQUANT_OK;
    if (segments > 1)
        error = NQ_LAUNCH((scan_chunks<T, size>), dim3(blocks, rows, segments - 1), dim3(THREADS), shared, stream, p, true);
    if (!error) error = NQ_LAUNCH((scan_chunks<T, size>), dim3(blocks, rows, segments), dim3(THREADS), shared, stream, p, false);
    return error;
}

template <class T>
int run_chunks(const Params& p, int64_t batch, void* stream) {
    switch (p.state) {
        case 64: return launch_chunks<T, 64>(p, batch, stream);
        case 96: return launch_chunks<T, 96>(p, batch, stream);
        case 128: return launch_chunks<T, 128>(p, batch, stream);
        default: return launch_chunks<T, 256>(p, batch, stream);
    }
}

extern template int run_chunks<__half>(const Params&, int64_t, void*);
extern template int run_chunks<__nv_bfloat16>(const Params&, int64_t, void*);

}  // namespace nq::mamba2
