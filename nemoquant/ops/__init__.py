"""The nemoquant operators as compiled kernels: building and loading the library, operators for torch."""
