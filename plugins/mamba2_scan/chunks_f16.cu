// The kernels of chunks for float16 inputs.
#include "launch.cuh"

template int nq::mamba2::run_chunks<__half>(const Params&, int64_t, void*);
