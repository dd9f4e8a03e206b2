"""Measurements: ratios against torch (compare), the README's table and picture (report), single kernels over time."""
