// In the place of libcudart, for code that nvcc compiled: no device, but a record of what was called, and failures on request.
//
// What a real one does and no document says plainly is not here; that needs a GPU.
#include <driver_types.h>

#include <cstring>
#include <string>

namespace {
std::string record, failing;  // the calls since the last take(); the name of the call that fails once
int device = 0;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
cudaError_t last = cudaSuccess;

cudaError_t called(const char* name, const std::string& more = "") {
    record += (record.empty() ? "" : " ") + std::string(name) + more;
    if (failing != name) return cudaSuccess;
    failing.clear();
    return last = cudaErrorInvalidValue;
}
}  // namespace

#define FAKE extern "C" __attribute__((visibility("default")))

FAKE void fake_fail(const char* name) { failing = name; }
FAKE void fake_device(int number) { device = number; }
FAKE int fake_mode() { return mode; }
FAKE int fake_last() { return last; }
FAKE const char* fake_take() {
    static std::string taken;
    taken = std::move(record);
    record.clear();
    return taken.c_str();
}

FAKE cudaError_t cudaGetDevice(int* number) {
    *number = device;
    return failing == "cudaGetDevice" ? called("cudaGetDevice") : cudaSuccess;
}
FAKE cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 200000;
    return cudaSuccess;
}
FAKE cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
    std::swap(mode, *other);
    return cudaSuccess;
}
FAKE cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    *found = {};
    found->sharedSizeBytes = 16;
    return called("load", mode == cudaStreamCaptureModeRelaxed ? "(relaxed)" : "(capturing)");
}
FAKE cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) { return called("limit", "=" + std::to_string(value)); }
FAKE cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    return called("launch", "=" + std::to_string(config->dynamicSmemBytes) + (mode == cudaStreamCaptureModeRelaxed ? "(relaxed)" : ""));
}
FAKE cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
FAKE const char* cudaGetErrorString(cudaError_t error) { return error ? "a reason" : "no error"; }

// What nvcc's own code calls when the library is loaded.
FAKE void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
FAKE void __cudaRegisterFatBinaryEnd(void**) {}
FAKE void __cudaUnregisterFatBinary(void**) {}
FAKE void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
FAKE unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
FAKE cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
FAKE cudaError_t __cudaGetKernel(void**, const void*) { return cudaSuccess; }
FAKE cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { return called("nvcc's own launch"); }
