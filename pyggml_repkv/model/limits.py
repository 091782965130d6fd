"""Bounds of what a model file or a flag may say, far above any published model."""

# Positions and rows are 32-bit numbers in the kernels: far below, so that no sum of a few of them is too large.
MAX_CONTEXT = 2**27
MAX_SCALING = 1e6
