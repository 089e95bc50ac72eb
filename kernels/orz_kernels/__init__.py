"""Triton kernels of the PPO path, and the loader of the CUDA C++ ones.

consumes  plain tensors on one CUDA device (or on the CPU under TRITON_INTERPRET=1): contiguous, checked by the caller
produces  plain tensors: results, gradients, and statistics in the order of `ppo_loss.FIELDS` and `value_loss.FIELDS`

A leaf: nothing here imports the package that uses it. README.md one folder up has each op's equation and roofline.
"""
