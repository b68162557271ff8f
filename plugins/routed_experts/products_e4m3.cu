#include "launch.cuh"

template int nq::experts::run_product<nq::experts::E4m3>(Product, Size, int64_t, void*);
