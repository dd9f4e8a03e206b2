"""The functions as ``torch.library`` operators, for code under ``torch.compile``.

A call into the extension would break the graph; an operator with a fake kernel does not. Never used in
eager code, where the dispatcher alone would cost more than a short list of gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastclip import clipping
from fastclip.stats import GradStats
from fastclip.tensors import Grads, TensorOrTensors
from fastclip.types import Request
