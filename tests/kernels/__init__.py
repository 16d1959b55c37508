"""Tests of `pallas_kernels`: against the XLA references, interpreted on the CPU, and lowered for devices."""
