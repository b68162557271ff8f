/* The C interface of RoutedExperts. Plain C. T tokens, k experts of a token, E experts, I input, M width.
 *
 *     y[t] = sum over j < k of expert_weights[t, j] * down_e(relu(up_e(x[t]))^2),    e = expert_ids[t, j]
 */
#pragma once

#include "../common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum nemoquant_experts_format {
    NEMOQUANT_EXPERTS_BF16 = 0,  /* bfloat16 weights */
    NEMOQUANT_EXPERTS_W8A16 = 1, /* E4M3 codes, one scale an expert */
    NEMOQUANT_EXPERTS_FP8 = 2,   /* the same, and the inputs of both products rounded to E4M3 */
    NEMOQUANT_EXPERTS_W4A16 = 3, /* E2M1 codes, E4M3 scales of 16, one scale an expert (NVFP4) */
    NEMOQUANT_EXPERTS_NVFP4 = 4  /* the same, and the inputs of both products rounded to NVFP4 */
};

/* Which of the ways to multiply; all give the numbers that README.md's table has, in sums of another order. */
enum nemoquant_experts_products {
    NEMOQUANT_EXPERTS_AUTO = 0,    /* DECODED: the others become a choice once a GPU has been seen to run them right, and faster */
    NEMOQUANT_EXPERTS_DECODED = 1, /* mma.sync, FP4 decoded to bfloat16: on every device, for every format */
    NEMOQUANT_EXPERTS_NATIVE = 2,  /* mma.sync of FP4 with block scales: nvfp4, tiles of 32 and 64, compute capability 12.x */
    NEMOQUANT_EXPERTS_GROUPED = 3  /* CUTLASS, if built so: bf16 with bfloat16 x, fp8; nvfp4 on 10.x; tile 0; compute capability 9.0, 10.x */
};

/* All arrays are contiguous and aligned to 16 bytes (skipped to 4). Nothing may overlap. Of a projection [out, in] is [M, I] for up, [I, M] for down. */
typedef struct nemoquant_routed_experts_args {
    const void* x;               /* [T, I] of dtype */
    const int64_t* expert_ids;   /* [T, k]; one that is no expert (below 0, or E and more) adds nothing */
    const float* expert_weights; /* [T, k] */
    const void* up;              /* [E, out, in] bfloat16 or E4M3 codes, or [E, out, in / 2] E2M1 codes, the even one in the low half */
    const void* down;
    const void* up_block_scales; /* E4M3 [E, out, in / 16], none negative, w4a16 and nvfp4; else ignored */
    const void* down_block_scales;
    const float* up_global_scale; /* [E], all but bf16 */
    const float* down_global_scale;
    const float* up_input_scale; /* [E], fp8 and nvfp4 */
    const float* down_input_scale;
    void* y;          /* [T, I] of dtype */
    int32_t* skipped; /* null, or [1]: the pairs whose id is no expert are added to it */
    void* workspace;  /* of nemoquant_routed_experts_workspace(args) bytes */
    int64_t tokens, chosen, experts, input, width; /* T >= 1; k and E 1 to 4096; I and M multiples of 32, I * M at most 2^30 */
    int64_t slab;       /* pairs of a token and an expert that are under way at once, which bounds the workspace; 0: 98304 */
    int32_t dtype;      /* enum nemoquant_dtype: float32, float16 or bfloat16 */
    int32_t format;     /* enum nemoquant_experts_format */
    int32_t activation; /* 0: relu squared */
    int32_t tile;       /* tokens of one expert that a block takes at a time: 8, 32 or 64; 0: chosen from the sizes */
    int32_t products;   /* enum nemoquant_experts_products; what is not there is refused */
} nemoquant_routed_experts_args;

/* Never falls when a size grows. 0 for arguments that the launcher would refuse for their sizes. */
NEMOQUANT_API size_t nemoquant_routed_experts_workspace(const nemoquant_routed_experts_args* args);

/* 0, or an error of enum nemoquant_error. */
NEMOQUANT_API int nemoquant_routed_experts(const nemoquant_routed_experts_args* args, void* stream);

#ifdef __cplusplus
}
#endif
