"""The list: what is changed where, and which tests of tests/plugins are to fail then.

Each is a fault that a reader could overlook, and that no test saw once, or that none would see in one order
of copies and threads.
"""

from dataclasses import dataclass

SCAN, CONV, EXPERTS = "plugins/mamba2_scan", "plugins/causal_conv1d", "plugins/routed_experts"


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: what is wrong, in a few words.
        file: under the root of the checkout.
        old: what stands there, once.
        new: what takes its place.
        tests: a file of tests/plugins, without "test_" and ".py".
        only: which of its tests are enough, as of pytest's -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


MUTANTS = [
    # Seen by no test once.
    Mutant(
        "two stages in the ring of the experts' inputs",
        f"{EXPERTS}/kernel.cuh",
        "constexpr int STAGES = 3;",
        "constexpr int STAGES = 2;",
        "routed_experts",
        "every_order",
    ),
    Mutant(
        "a segment decays by the segment's own share, not by the one before",
        f"{SCAN}/kernel.cuh",
        "p.segment_decays[block * p.segments + slot - 1]",
        "p.segment_decays[block * p.segments + slot]",
        "mamba2_scan",
        "segments",
    ),
    Mutant(
        "every segment decays by the first one's share",
        f"{SCAN}/kernel.cuh",
        "p.segment_decays[block * p.segments + slot - 1]",
        "p.segment_decays[block * p.segments]",
        "mamba2_scan",
        "segments",
    ),
    Mutant(
        "the scan's workspace is bounded by the blocks that are wanted alone",
        f"{SCAN}/launch.cu",
        "segment_bytes(BLOCKS_WANTED + (blocks < BLOCKS_WANTED ? blocks : BLOCKS_WANTED), args->state)",
        "segment_bytes(BLOCKS_WANTED, args->state)",
        "mamba2_scan",
        "workspace",
    ),
    Mutant(
        "the experts' results may take more than the workspace has for them",
        f"{EXPERTS}/launch.cu",
        "std::max(rows * planes * padded(a.input), slab.pairs * a.input * 4)",
        "rows * planes * padded(a.input)",
        "routed_experts",
        "float32_with_whole_inputs or 16_bits",
    ),
    Mutant(
        "y of a chunk beyond 32 bits",
        f"{SCAN}/kernel.cuh",
        "const int64_t out = ((at.row * p.length + start + here[i]) * p.heads + at.head) * p.head_dim",
        "const int32_t out = ((at.row * p.length + start + here[i]) * p.heads + at.head) * p.head_dim",
        "mamba2_scan",
        "beyond_32_bits",
    ),
    Mutant(
        "y of a step beyond 32 bits",
        f"{SCAN}/kernel.cuh",
        "const int64_t t = start + i, out = ((batch * p.length + t) * p.heads + head) * p.head_dim;",
        "const int64_t t = start + i;"
        "const int32_t out = ((batch * p.length + t) * p.heads + head) * p.head_dim;",
        "mamba2_scan",
        "beyond_32_bits",
    ),
    Mutant(
        "y of the convolution beyond 32 bits",
        f"{CONV}/kernel.cuh",
        "static_cast<Y*>(p.y) + row * p.channels + channel;",
        "static_cast<Y*>(p.y) + static_cast<int32_t>(row * p.channels) + channel;",
        "causal_conv1d",
        "beyond_32_bits",
    ),
    Mutant(
        "y of the experts beyond 32 bits",
        f"{EXPERTS}/kernel.cuh",
        "static_cast<Y*>(p.y) + token * p.size + column;",
        "static_cast<Y*>(p.y) + static_cast<int32_t>(token * p.size) + column;",
        "routed_experts",
        "beyond_32_bits",
    ),
    Mutant(
        "four channels at a time where only the rows are multiples of four",
        f"{CONV}/launch.cu",
        "return a.channels % WIDTH == 0 && stride % WIDTH == 0;",
        "return stride % WIDTH == 0;",
        "causal_conv1d",
        "float64",
    ),
    Mutant(
        "experts are added from the last to the first",
        f"{EXPERTS}/kernel.cuh",
        "        const int64_t pair = token * p.chosen + j;\n"
        "        if (!is_expert(p.ids[pair], p.experts)) continue;",
        "        const int64_t pair = token * p.chosen + p.chosen - 1 - j;\n"
        "        if (!is_expert(p.ids[pair], p.experts)) continue;",
        "routed_experts",
        "order_of_the_choices",
    ),
    Mutant(
        "what the scan declares itself is not counted as shared memory",
        f"{SCAN}/launch.cuh",
        "if (shared + fixed > most) return",
        "if (shared > most) return",
        "mamba2_scan",
        "declares_itself",
    ),
    # Further ones.
    Mutant(
        "the next chunk is fetched into the one that is read",
        f"{SCAN}/kernel.cuh",
        "stages[p.stages == 2 ? 1 - turn : 0]",
        "stages[p.stages == 2 ? turn : 0]",
        "mamba2_scan",
        "every_order or recurrence",
    ),
    Mutant(
        "with one stage the next chunk is fetched before all have read this one",
        f"{SCAN}/kernel.cuh",
        "        __syncthreads();  // nobody reads the rounded state or the chunk any more\n"
        "        if (more && p.stages == 1) fetch(p, at, next, (chunk + 1) * CHUNK, !first_pass);",
        "        if (more && p.stages == 1) fetch(p, at, next, (chunk + 1) * CHUNK, !first_pass);\n"
        "        __syncthreads();",
        "mamba2_scan",
        "every_order",
    ),
    Mutant(
        "the state is shared before all have read the last one",
        f"{SCAN}/kernel.cuh",
        "        __syncthreads();  // nobody reads the rounded state or the chunk any more\n",
        "",
        "mamba2_scan",
        "every_order or recurrence",
    ),
    Mutant(
        "a stage is waited for too late by one",
        f"{EXPERTS}/kernel.cuh",
        "            copy_async_wait<1>();\n            __syncthreads();  // the stage is whole",
        "            copy_async_wait<2>();\n            __syncthreads();  // the stage is whole",
        "routed_experts",
        "every_order or float32_with_whole_inputs",
    ),
    Mutant(
        "no barrier between a stage and those who overwrite it",
        f"{EXPERTS}/kernel.cuh",
        "            __syncthreads();  // the stage is whole, and the one before it is free\n"
        "            copy(c + i + 2);",
        "            copy(c + i + 2);\n            __syncthreads();",
        "routed_experts",
        "every_order",
    ),
    Mutant(
        "FP4 products: no barrier between a stage and those who overwrite it",
        f"{EXPERTS}/native.cuh",
        "        __syncthreads();  // the stage is whole, and the one before it is free\n"
        "        copy(s + 2);",
        "        copy(s + 2);\n        __syncthreads();",
        "routed_experts",
        "every_order",
    ),
    Mutant(
        "outputs are staged over inputs that are still read",
        f"{EXPERTS}/kernel.cuh",
        "    if (staged) __syncthreads();\n",
        "",
        "routed_experts",
        "every_order",
    ),
    Mutant(
        "warps that share a row add their sums before all are there",
        f"{EXPERTS}/kernel.cuh",
        "        sums[warp][lane] = make_float4(d[0], d[1], d[2], d[3]);\n        __syncthreads();\n",
        "        sums[warp][lane] = make_float4(d[0], d[1], d[2], d[3]);\n",
        "routed_experts",
        "every_order or float32_with_whole_inputs",
    ),
    Mutant(
        "the counts of experts are read before all pairs are counted",
        f"{EXPERTS}/sorting.cuh",
        "    ids[threadIdx.x] = expert;\n    __syncthreads();\n    if (r.blocks > 1) {",
        "    ids[threadIdx.x] = expert;\n    if (r.blocks > 1) {",
        "routed_experts",
        "every_order or float32_with_whole_inputs",
    ),
    Mutant(
        "an id beyond 32 bits is an expert",
        f"{EXPERTS}/routing.cuh",
        "    return is_expert(id, r.experts) ? static_cast<int>(id) : -1;",
        "    return is_expert(static_cast<int>(id), r.experts) ? static_cast<int>(id) : -1;",
        "routed_experts",
        "ids_that_are_no_experts",
    ),
    Mutant(
        "a state that is written in place, by several tiles",
        f"{CONV}/launch.cu",
        "if (in_place && a.length > conv::STEP)",
        "if (in_place && a.length > 64)",
        "causal_conv1d",
        "overlap",
    ),
    Mutant(
        "y of the scan may overlap C",
        f"{SCAN}/launch.cu",
        '{"C", r.c, bytes_of(r, r.c_batch_stride, r.c_position_stride, shared, r.dtype)},',
        "",
        "mamba2_scan",
        "overlap",
    ),
    Mutant(
        "a limit that could not be raised leaves its error",
        "plugins/common/platform.cuh",
        "error = taken(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most));",
        "error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most);",
        "launch",
    ),
    Mutant(
        "code is loaded in the caller's mode of capture",
        "plugins/common/platform.cuh",
        "    const Relaxed relaxed;\n",
        "",
        "launch",
    ),
    Mutant(
        "the timing cache knows the first attribute alone",
        "plugins/common/plugin.cpp",
        '        id_ += (id_.empty() ? "" : " ") +',
        '        id_ = (id_.empty() ? "" : " ") +',
        "faces",
        "timing_cache",
    ),
    Mutant(
        "bounds of what is not constant are held against each other",
        "plugins/common/plugin.cpp",
        "bind(nbInputs, [&](int32_t i) -> const Dims& { return in[i].desc.dims; });",
        "bind(nbInputs, [&](int32_t i) -> const Dims& { return in[i].max; });",
        "faces",
        "contradict",
    ),
]
