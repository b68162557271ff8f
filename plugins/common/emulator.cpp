// What tests may set in the host build.
#include "platform.cuh"

// The most shared memory that a block can have from now on, bytes; 0 is the default. Other devices than SM90 and SM100 have less.
extern "C" NEMOQUANT_API void nemoquant_host_shared_limit(size_t bytes) {
    nq::host::machine.shared_limit = bytes ? bytes : nq::host::SHARED_LIMIT;
}

// The compute capability from now on, 10 * major + minor; 0 is the default.
extern "C" NEMOQUANT_API void nemoquant_host_capability(int capability) {
    nq::host::machine.capability = capability ? capability : nq::host::CAPABILITY;
}

// How launches run from now on, see Schedule. All 0 is the default.
extern "C" NEMOQUANT_API void nemoquant_host_schedule(int copies_at_issue, int downwards, int last_block_only) {
    nq::host::machine.schedule = {copies_at_issue != 0, downwards != 0, last_block_only != 0};
}
