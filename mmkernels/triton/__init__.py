"""The operations in Triton, for NVIDIA and AMD: one module an operation, imported when it is first chosen.

With TRITON_INTERPRET=1 in the environment they run on CPU tensors, to be tested without a GPU.
"""
