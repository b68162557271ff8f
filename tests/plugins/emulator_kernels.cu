// Kernels that use the emulator's features: barriers, warp exchanges, shared memory, atomics, asynchronous copies; and wrong kernels.
#include "../../plugins/common/platform.cuh"

namespace {

struct Params {
    const float* in;
    float* out;
    int count;
};

// The sum of a block's values by halving, through dynamic shared memory. Without any one of its barriers the result is wrong.
template <int unused>
__global__ void block_sum(Params p) {
    NQ_DYNAMIC_SHARED(float, values);
    __shared__ float first;
    const int i = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
    values[threadIdx.x] = i < p.count ? p.in[i] : 0.0F;
    if (threadIdx.x == 0) first = p.in[0];
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == blockDim.x - 1) atomicAdd(p.out, values[0]);
    if (threadIdx.x == 40) p.out[1] = first;
}

__global__ void warp_exchanges(Params p) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float mine = p.in[threadIdx.x];
    float sum = mine;
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, bits);
    float running = mine;
    for (unsigned delta = 1; delta < 32; delta *= 2) {
        const float before = __shfl_up_sync(0xffffffffU, running, delta);
        if (lane >= static_cast<int>(delta)) running += before;
    }
    const float next = __shfl_down_sync(0xffffffffU, mine, 1, 8);
    const float third = __shfl_sync(0xffffffffU, mine, 3, 4);
    const unsigned positive = __ballot_sync(0xffffffffU, mine > 0.0F);
    float half = 0.0F;  // lanes of one half only
    if (lane < 16) half = __shfl_xor_sync(0x0000ffffU, mine, 1);
    float* row = p.out + threadIdx.x * 6;
    row[0] = sum, row[1] = running, row[2] = next, row[3] = third, row[4] = static_cast<float>(__popc(positive)), row[5] = half;
}

// Some threads return early; barriers and exchanges wait only for the others.
__global__ void early_exit(Params p) {
    if (threadIdx.x % 32 >= 20) return;
    __syncthreads();
    const float sum = __shfl_sync(0xfffffU, p.in[threadIdx.x], 19);
    p.out[threadIdx.x] = sum;
}

// mode 0: right. 1: never waits for its copies. 2: waits for the older group only.
__global__ void asynchronous(Params p) {
    NQ_DYNAMIC_SHARED(float, values);
    const unsigned at = threadIdx.x * 4;
    nq::copy_async16(values + at, p.in + at);
    nq::copy_async_commit();
    nq::copy_async16(values + 128 + at, p.in + 128 + at, threadIdx.x % 2 == 0);
    nq::copy_async_commit();
    if (p.count == 0) nq::copy_async_wait<0>();
    if (p.count == 2) nq::copy_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
        p.out[at + i] = values[127 - (at + i)];
        p.out[128 + at + i] = values[128 + at + i];
    }
}

// A ring of two places of 16 bytes, a thread each, of which one is read while the next but one is fetched into it.
__global__ void overwrites(Params p) {
    NQ_DYNAMIC_SHARED(float, ring);
    float* const mine = ring + threadIdx.x * 8;
    for (int turn = 0; turn < 2; ++turn) {
        nq::copy_async16(mine + turn * 4, p.in + turn * 4);
        nq::copy_async_commit();
    }
    for (int turn = 0; turn < p.count; ++turn) {
        nq::copy_async_wait<1>();
        if (turn + 2 < p.count) nq::copy_async16(mine + turn % 2 * 4, p.in + (turn + 2) * 4);
        nq::copy_async_commit();
        for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 32 + turn * 4 + i] = mine[turn % 2 * 4 + i];
    }
}

// Who came first, and who was there before: 32 lanes of two warps, two blocks.
__global__ void order(Params p) {
    const int thread = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
    p.out[thread] = atomicAdd(p.out + 128, 1.0F);
}

__global__ void waits_in_vain(Params p) {
    if (threadIdx.x < 32) __syncthreads();
    else __shfl_sync(0xffffffffU, p.in[0], threadIdx.x < 40 ? 0 : 1);
    if (threadIdx.x >= 32 && threadIdx.x < 40) __shfl_sync(0xffffffffU, p.in[0], 0);
    else if (threadIdx.x >= 32) __ballot_sync(0xffffffffU, 1);
}

__global__ void writes_behind(Params p) {
    NQ_DYNAMIC_SHARED(float, values);
    values[p.count] = 1.0F;
}

__global__ void coordinates(Params p) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    p.out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<float>(1 + thread + 100 * block);
}

}  // namespace

// As in emulator.cpp.
extern "C" NEMOQUANT_API void schedule(int copies_at_issue, int downwards, int last_block_only) {
    nq::host::machine.schedule = {copies_at_issue != 0, downwards != 0, last_block_only != 0};
}

extern "C" NEMOQUANT_API int run(const char* name, const float* in, float* out, int count, void* stream) {
    const Params p{in, out, count};
    const size_t most = nq::shared_limit();
    switch (name[0]) {
        case 's': return NQ_LAUNCH((block_sum<0>), dim3((count + 127) / 128), dim3(128), 512, stream, p);
        case 'w': return NQ_LAUNCH(warp_exchanges, dim3(1), dim3(64), 0, stream, p);
        case 'e': return NQ_LAUNCH(early_exit, dim3(1), dim3(64), 0, stream, p);
        case 'a': return NQ_LAUNCH(asynchronous, dim3(1), dim3(32), 1024, stream, p);
        case 'o': return NQ_LAUNCH(overwrites, dim3(1), dim3(2), 64, stream, p);
        case 't': return NQ_LAUNCH(order, dim3(2), dim3(64), 0, stream, p);
        case 'v': return NQ_LAUNCH(waits_in_vain, dim3(1), dim3(64), 0, stream, p);
        case 'b': return NQ_LAUNCH(writes_behind, dim3(1), dim3(1), 16, stream, p);
        case 'c': return NQ_LAUNCH(coordinates, dim3(2, 3, 2), dim3(4, 2, 3), 0, stream, p);
        case 'm': return NQ_LAUNCH(coordinates, dim3(1), dim3(1), most + 1, stream, p);
        default: return NQ_LAUNCH(coordinates, dim3(1), dim3(1025), 0, stream, p);
    }
}
