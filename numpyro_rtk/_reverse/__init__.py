"""Reverse transitions: the target of a segment, its kernels one a file, and the pass."""
