"""Triton kernels and their launchers, installed as ``fastclip.kernels``.

No Triton kernel ships in this version: ``fastclip.backends.BACKENDS`` lists what does.
"""
