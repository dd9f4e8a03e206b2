"""Triton kernels and their launchers, installed as ``fastclip.kernels``.

A launcher takes what ``fastclip/backends/triton.py`` hands it: a table of addresses and PyTorch tensors for the
results. Importing this package imports triton.
"""

import triton

OLDEST = (3, 6)

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"fastclip's kernels need triton 3.6 or newer; this is {triton.__version__}")
