"""Scikit-learn's handwritten digits, which several examples learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.examples.extras import extra

PIXELS, CLASSES = 64, 10  # of a digit, row by row; how many digits there are


@dataclass(frozen=True)
class Digits:
    """Pixels from 0 to 1 ``[n, 64]``, and which digit each is ``[n]``; the test digits are trained on by nobody."""

    train_pixels: Tensor
    train_digits: Tensor
    test_pixels: Tensor
    test_digits: Tensor


def all_digits() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1 ``[1797, 64]``, and which digit each is."""
    loaded = extra("sklearn.datasets").load_digits()
    return torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
