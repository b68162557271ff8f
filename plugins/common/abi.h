/* What the C interfaces of all kernels share. Plain C.
 *
 * Every operator has one struct of arguments, one launcher and one function that tells how much workspace it wants:
 *     int nemoquant_<op>(const nemoquant_<op>_args* args, void* stream);          0, or an error code below
 *     size_t nemoquant_<op>_workspace(const nemoquant_<op>_args* args);            bytes
 * Pointers are device pointers (host pointers in the host build); ``stream`` is a cudaStream_t. A launcher checks its arguments
 * before it starts anything, never ends the process, and never waits for the device.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define NEMOQUANT_API __attribute__((visibility("default")))
#else
#define NEMOQUANT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum nemoquant_error {
    NEMOQUANT_OK = 0,
    NEMOQUANT_BAD_ARGUMENT = 1, /* a pointer, size, dtype or attribute that the operator does not take */
    NEMOQUANT_UNSUPPORTED = 2,  /* right in itself, but this device or build has no kernel for it */
    NEMOQUANT_LAUNCH_FAILED = 3 /* the device refused the launch */
};

enum nemoquant_dtype {
    NEMOQUANT_FLOAT32 = 0,
    NEMOQUANT_FLOAT16 = 1,
    NEMOQUANT_BFLOAT16 = 2,
    NEMOQUANT_E4M3 = 3,
    NEMOQUANT_E2M1X2 = 4, /* two codes a byte, the even index in the low half */
    NEMOQUANT_INT64 = 5,
    NEMOQUANT_INT32 = 6
};

/* Why the last call on this thread failed; empty if none did. Valid until the next failure on this thread. */
NEMOQUANT_API const char* nemoquant_last_error(void);

#ifdef __cplusplus
}
#endif
