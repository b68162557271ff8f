"""The nemoquant operators as compiled kernels: building them, finding and loading the library, and offering
them to torch."""
