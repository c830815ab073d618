"""Accept step, line integrals and proposals that all kernels share."""
