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
        "what lies between the convolution's rows is not counted as its inputs",
        f"{CONV}/launch.cu",
        "strided(rows, a.x_stride ? a.x_stride : a.channels, a.channels, item)",
        "rows * a.channels * item",
        "causal_conv1d",
        "overlap",
    ),
    Mutant(
        "what lies between the scan's positions is not counted as its inputs",
        f"{SCAN}/launch.cu",
        "batch_stride, (r.length - 1) * Wide{position_stride} + columns, item_of(dtype));",
        "0 * batch_stride, (r.length - 1) * Wide{0 * position_stride} + columns, item_of(dtype));",
        "mamba2_scan",
        "overlap",
    ),
    Mutant(
        "a row that is read again is counted again",
        f"{SCAN}/launch.cu",
        "return strided(r.batch, batch_stride, (r.length - 1)",
        "return strided(r.batch, batch_stride + columns, (r.length - 1)",
        "mamba2_scan",
        "read_again",
    ),
    Mutant(
        "the scan's results may overlap its bias",
        f"{SCAN}/launch.cu",
        '                        {"dt_bias", r.dt_bias, Wide{r.heads} * 4},\n',
        "",
        "mamba2_scan",
        "overlap",
    ),
    Mutant(
        "the seed may lie in the state",
        f"{SCAN}/launch.cu",
        '{"seed", r.rounding == NEMOQUANT_STOCHASTIC ? r.seed : nullptr, 8},',
        "",
        "mamba2_scan",
        "overlap",
    ),
    Mutant(
        "the scan's workspace may overlap anything",
        f"{SCAN}/launch.cu",
        '{"workspace", workspace, static_cast<Wide>(workspace_bytes)}},\n                       {{"x"',
        '{"workspace", workspace, static_cast<Wide>(0 * workspace_bytes)}},\n                       {{"x"',
        "mamba2_scan",
        "workspace",
    ),
    Mutant(
        "no bytes at an address inside an array overlap it",
        "plugins/common/overlap.hpp",
        " || one.bytes <= 0 || other.bytes <= 0",
        "",
        "mamba2_scan",
        "workspace",
    ),
    Mutant(
        "two stages where what the scan declares itself leaves room for one",
        f"{SCAN}/launch.cuh",
        "p.stages = shared_bytes<T, size>(2) + fixed <= most ? 2 : 1;",
        "p.stages = shared_bytes<T, size>(2) <= most ? 2 : 1;",
        "mamba2_scan",
        "declares_itself",
    ),
    Mutant(
        "results of down beyond 32 bits",
        f"{EXPERTS}/kernel.cuh",
        "p.results[static_cast<int64_t>(p.order[tile.first + token + i % 2]) * p.rows + row",
        "p.results[static_cast<int32_t>(p.order[tile.first + token + i % 2]) * p.rows + row",
        "routed_experts",
        "beyond_32_bits",
    ),
    Mutant(
        "slots are read before all are laid out, which threads that run upwards do not show",
        f"{EXPERTS}/sorting.cuh",
        "[&](int e, int slot) { counts[e] = slot; });\n    __syncthreads();\n",
        "[&](int e, int slot) { counts[e] = slot; });\n",
        "routed_experts",
        "every_order",
    ),
    Mutant(
        "a launch that failed leaves its error",
        "plugins/common/platform.cuh",
        "if (error == cudaSuccess) doing = call, error = taken(run());",
        "if (error == cudaSuccess) doing = call, error = run();",
        "launch",
    ),
    Mutant(
        "code is loaded in the caller's mode of capture",
        "plugins/common/platform.cuh",
        "        relaxed.emplace();\n",
        "",
        "launch",
    ),
    Mutant(
        "a kernel stays ready in a context that is gone",
        "plugins/common/platform.cuh",
        "if (kept && (first || error != cudaSuccess))",
        "if (kept && first)",
        "launch",
    ),
    Mutant(
        "the workspace of a profile is that of the loosest bound",
        "plugins/common/plugin.cpp",
        "size = size < 0 ? bound : std::min(size, bound);",
        "size = size < 0 ? bound : std::max(size, bound);",
        "faces",
        "contradict",
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
