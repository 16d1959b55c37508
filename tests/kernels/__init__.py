"""Tests of `pallas_kernels`: against the XLA references, interpreted on the CPU, and lowered for devices.

Each folder of the package has a file here of its name; `test_attention_lowering` lowers attention's kernels.
`test_decode_step`, `test_update_lowering` and `test_whole` are about programs of several operations.
"""
