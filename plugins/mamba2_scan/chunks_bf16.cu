// The kernels of chunks for bfloat16 inputs.
#include "launch.cuh"

template int nq::mamba2::run_chunks<__nv_bfloat16>(const Params&, int64_t, void*);
