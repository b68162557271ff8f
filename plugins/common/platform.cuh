// One source for the device and for the host: kernels are plain CUDA, and a C++ compiler runs them with the emulator.
//
//   nvcc   kernels are kernels; NQ_LAUNCH is <<<>>>.
//   C++    with -DNQ_HOST (and -I of the toolkit's headers, for bfloat16 and half): emulator.hpp gives threadIdx, barriers,
//          warp exchanges, atomics and intrinsics their meaning; pointers are host pointers.
//
// NQ_LAUNCH((kernel<1, 2>), grid, block, dynamic_shared_bytes, stream, arguments...) gives 0 or an error code with its reason kept.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "abi.h"
#include "last_error.hpp"

#if defined(__CUDACC__) && !defined(NQ_HOST)

#include <cuda_runtime.h>

#include <atomic>
#include <optional>

// Dynamic shared memory as ``T* name``, aligned to 128 bytes.
#define NQ_DYNAMIC_SHARED(T, name)                                \
    extern __shared__ __align__(128) unsigned char nq_dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(nq_dynamic_shared)

#define NQ_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
    ::nq::launch<kernel>(#kernel, kernel, grid, block, dynamic_shared_bytes, stream, __VA_ARGS__)

namespace nq {

// What a call of the runtime said. The error that it left for the next cudaGetLastError() is taken away: it would be the next one's.
inline cudaError_t taken(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

// While it lives, this thread may load code and set limits though a stream is being captured: neither is work of a stream, and a
// capture in its usual mode would end with an error.
class Relaxed {
  public:
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    Relaxed(const Relaxed&) = delete;
    Relaxed& operator=(const Relaxed&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    if (taken(cudaGetDevice(&device)) != cudaSuccess || taken(cudaDeviceGetAttribute(&value, which, device)) != cudaSuccess) return 0;
    return value;
}

// The most dynamic shared memory that a block of the current device can have, bytes; 0 where there is no device.
inline size_t shared_limit() { return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Of the current device, 10 * major + minor; 0 where there is none.
inline int compute_capability() {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

constexpr int DEVICES = 64;  // whose state is kept; for a further one each launch is a first one

// By kernel and device: whether its code is loaded, and its blocks may have all the shared memory that there is.
template <auto kernel>
inline std::atomic<bool> ready[DEVICES];

// At a kernel's first launch on a device its code is loaded and its limit of shared memory raised. That launch may be in a capture.
template <auto kernel, class... Parameters, class... Arguments>
int launch(const char* name, void (*)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, Arguments&&... arguments) {
    const char* doing = "cudaGetDevice";
    int device = 0;
    cudaError_t error = taken(cudaGetDevice(&device));
    const auto then = [&](const char* call, auto&& run) {
        if (error == cudaSuccess) doing = call, error = taken(run());
    };
    const bool kept = device < DEVICES, first = !kept || !ready<kernel>[device].load(std::memory_order_acquire);
    std::optional<Relaxed> relaxed;
    if (first) {
        relaxed.emplace();
        const void* const address = reinterpret_cast<const void*>(kernel);
        cudaFuncAttributes found{};
        then("cudaFuncGetAttributes", [&] { return cudaFuncGetAttributes(&found, address); });
        then("cudaFuncSetAttribute", [&] {
            const int most = static_cast<int>(shared_limit()) - static_cast<int>(found.sharedSizeBytes);
            return cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        });
    }
    then("cudaLaunchKernel", [&] {
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    });
    // After a failure everything is made anew: the context may be another one than it was.
    if (kept && (first || error != cudaSuccess)) ready<kernel>[device].store(error == cudaSuccess, std::memory_order_release);
    if (error == cudaSuccess) return NEMOQUANT_OK;
    return fail(NEMOQUANT_LAUNCH_FAILED, "%s, grid %u x %u x %u, %zu bytes of shared memory: %s: %s", name, grid.x, grid.y, grid.z,
                shared, doing, cudaGetErrorString(error));
}

// 16 bytes from global to shared memory without a register between; both 16-byte aligned. ``wanted`` false writes zeros.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool wanted = true) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most ``open`` of this thread's groups are under way; a barrier must follow before other threads read.
template <int open>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

}  // namespace nq

#elif defined(NQ_HOST)

#include "emulator.hpp"

#define NQ_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::nq::host::dynamic_shared())

#define NQ_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
    ::nq::host::launch(#kernel, kernel, grid, block, dynamic_shared_bytes, stream, __VA_ARGS__)

namespace nq {

inline size_t shared_limit() { return host::machine.shared_limit; }
inline int multiprocessors() { return 4; }
inline int compute_capability() { return host::machine.capability; }

using host::copy_async16;
using host::copy_async_commit;
using host::copy_async_wait;

}  // namespace nq

#else
#error "platform.cuh: compile with nvcc, or with a C++ compiler and -DNQ_HOST"
#endif

namespace nq {

// Whether the current device is one of those for which code of a family was built: compute capabilities ``first`` to ``last``.
inline bool runs_here(int first, int last) {
    const int here = compute_capability();
    return first <= here && here <= last;
}

// Bits at an address that is a multiple of their size, whatever is declared to lie there.
template <class T>
__device__ __forceinline__ T load_as(const void* at) {
#if defined(NQ_HOST)
    T bits;
    std::memcpy(&bits, at, sizeof bits);
    return bits;
#else
    return *static_cast<const T*>(at);
#endif
}

template <class T>
__device__ __forceinline__ void store_as(void* at, T bits) {
#if defined(NQ_HOST)
    std::memcpy(at, &bits, sizeof bits);
#else
    *static_cast<T*>(at) = bits;
#endif
}

}  // namespace nq
