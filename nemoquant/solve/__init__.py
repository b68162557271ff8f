"""Solved weights: codes chosen for the outputs of a GEMM, not for the weights themselves.

Of a weight W [out, in] with codes that decode to Q, it is the sum over rows of ``(w - q)' H (w - q)`` that is
made small, with H from the inputs that the GEMM was seen to have (``metric.py``). Pure functions, no files.

    metric.py   H: from inputs, damped, and its triangular factor
    grids.py    what the kernels need to know of a format: its codes, blocks and scales
    lanes.py    the kernels' common parts; rows of W are the vector's lanes, so that all arrays are [in, rows]
    gptq.py     codes one after the other, each making up for the errors before it
    hess.py     a scale for each block by the block's own part of H
    descent.py  one code at a time to where the objective is least
    solver.py   all of it, for one weight
    on_device.py  the same in torch's operators, for a GPU
"""
