"""The tensor table as the kernels read it: addresses on the device, checked against the current ones on every call.

Each tensor is cut into units (itself, or rows and filters), and those into chunks, one for each program; borders depend
on sizes and dtypes only. A chunk is a unit or a piece of one, or where units are short several of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import CHUNK_BYTES, SHORT_BYTES, UNITS
from .chunks import ADDRESS, ALIGNED, COUNT, FIRST_CHUNK, FIRST_ROW, TAG, UNIT_SIZE, WEIGHT, WEIGHT_ALIGNED, WORDS
from .formats import ELEMENT_BYTES

WIDE = 16  # bytes of the widest load
MOST_CHUNKS = 2**31 - 1  # programs of a launch

_ELEMENT_BYTES = np.array(ELEMENT_BYTES)


@dataclass(frozen=True, slots=True)
class Work:
    """One launch.

    Attributes:
        words: int64 ``[tensors, WORDS]``, see chunks.py; on the host a numpy array, on the device a tensor.
        owners: int32 ``[chunks]``, each chunk's tensor.
        chunks: how many there are.
        present: bit k is set if a tensor of dtype k is among them.
        units: 1, or how many short units make a chunk.
        cut: whether a unit consists of several chunks.
    """

    words: Any
    owners: Any
    chunks: int
    present: int
    units: int
    cut: bool


def works_of(facts: np.ndarray, counts: list[int] | None = None, weights: np.ndarray | None = None) -> list[Work]:
    """Cuts tensors into chunks: one launch, and one more if there are short units.

    Args:
        facts: int64 ``[n, 3]``: address, elements and dtype of each tensor.
        counts: of how many units each tensor consists, 0 leaves it out; None for one each.
        weights: the facts of each tensor's weight; of another size where the kernel is not to look at it.
    """
    if not len(facts):
        return []
    address, size, dtype = facts.T
    units = np.ones(len(facts), np.int64) if counts is None else np.array(counts, np.int64)
    first_row = np.cumsum(units) - units
    unit_size = size // np.maximum(units, 1)
    unit_bytes = unit_size * _ELEMENT_BYTES[dtype]
    short = (units > 1) & (unit_bytes <= SHORT_BYTES)

    pieces = np.maximum(-(-unit_bytes // CHUNK_BYTES), 1)
    words = np.zeros((len(facts), int(WORDS)), np.int64)
    words[:, ADDRESS], words[:, UNIT_SIZE], words[:, FIRST_ROW] = address, unit_size, first_row
    words[:, COUNT] = np.where(short, units, pieces)
    # Wide loads: every unit, and with it every chunk, has to begin at a multiple of 16.
    wide = (address % WIDE == 0) & ((units == 1) | (unit_bytes % WIDE == 0))
    words[:, TAG] = dtype + np.where(wide, int(ALIGNED), 0)
    if weights is not None:
        # nothing has no address, but a row to fill: any will do
        address = np.where(size == 0, WIDE, weights[:, 0]) * (weights[:, 1] == size)
        words[:, WEIGHT] = address
        words[:, TAG] += np.where(address % WIDE == 0, int(WEIGHT_ALIGNED), 0)

    works = []
    for group, together in ((~short, 1), (short, UNITS)):
        chosen = np.flatnonzero(group & (units > 0))
        if not len(chosen):
            continue
        own = words[chosen]
        chunks = -(-units[chosen] // together) * (pieces[chosen] if together == 1 else 1)
        if chunks.sum() > MOST_CHUNKS:
            raise ValueError(f"{chunks.sum():,} chunks are more than one launch has programs, {MOST_CHUNKS:,}")
        own[:, FIRST_CHUNK] = np.cumsum(chunks) - chunks
        owners = np.repeat(np.arange(len(chosen), dtype=np.int32), chunks)
        present = int(np.bitwise_or.reduce(1 << dtype[chosen]))
        cut = bool(together == 1 and (pieces[chosen] > 1).any())
        works.append(Work(own, owners, len(owners), present, together, cut))
    return works


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy there, without waiting for it."""
    host = torch.from_numpy(array)
    if device.type == "cpu":  # interpreted
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


class DeviceCache:
    """What was uploaded for a list, by the stream that did it and by what it was made of: on another stream it may not
    be there yet. A graph is captured on a stream of its own and takes what any stream has: it runs later."""

    CAPACITY = 64  # lists; an optimizer with clipping by units and a penalty uses four

    def __init__(self) -> None:
        self._entries: list[tuple[int, Any, Any]] = []  # stream, key, and what was made; the latest that was used last
        self._of_graphs: list[Any] = []  # a captured graph reads them for as long as it lives

    def get(self, stream: int, key: Any, make: Callable[[], Any], capturing: bool) -> Any:
        """The entry of ``key`` on ``stream``, made now if there is none.

        Raises:
            RuntimeError: it would have to be made while a graph is being captured: the graph would copy it anew from
                host memory at each replay.
        """
        # Looked for one after the other: other addresses differ at once, and to hash all takes longer than the rest.
        for found in reversed(self._entries):
            if found[1] == key and (found[0] == stream or capturing):
                break
        else:
            if capturing:
                raise RuntimeError(
                    "these gradients are new to fastclip's Triton kernels, and a CUDA graph is being captured: run the "
                    "same call once before the capture, with gradients at the same addresses (allocate them before, "
                    "and use zero_grad(set_to_none=False)); the CUDA backend has no such limit"
                )
            found = stream, key, make()
        if not self._entries or self._entries[-1] is not found:  # a new list, as another thread may be looking
            others = [entry for entry in self._entries if entry is not found]
            self._entries = [*others[-self.CAPACITY + 1 :], found]
        if capturing:
            self._of_graphs.append(found[2])
        return found[2]
