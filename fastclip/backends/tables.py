"""Tables of addresses: the native core's, or what it does in Python for machines without it.

Both know of one device's plain dense tensors where they lie, how long they are, and their dtypes.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastclip._native import C
from fastclip.tensors import FLOAT8
from fastclip.types import moved

CPU, CUDA, ROCM = 1, 2, 10  # DLPack's numbers for types of devices

# The order of DType in csrc/tensor_table.h.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64, *FLOAT8)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
COMMON = {dtype: code for dtype, code in CODES.items() if dtype not in FLOAT8}
WIDE = {CODES[torch.float64], CODES[torch.complex128]}
PENALISED = 3  # the last one that a penalty is added to

PLAIN = {Tensor, torch.nn.Parameter}
_DTYPE = attrgetter("dtype")
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

READ_ONLY = "8-bit floats are read for statistics only; torch has no arithmetic that writes them"


@dataclass
class PlainTable:
    """What ``_C.GradTable`` is, with the same names."""

    device_type: int
    grads: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    readonly: dict[int, str] = field(default_factory=dict)
    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)  # of dtypes
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.grads)

    @property
    def wide(self) -> bool:
        return not WIDE.isdisjoint(self.codes)

    @property
    def size_bytes(self) -> int:
        return sum(size * DTYPES[code].itemsize for size, code in zip(self.sizes, self.codes, strict=True))

    @functools.cached_property
    def facts(self) -> bytes:  # once all are known
        numbers = [0] * (3 * len(self.sizes))
        numbers[0::3], numbers[1::3], numbers[2::3] = self.addresses, self.sizes, self.codes
        return struct.pack(f"{len(numbers)}q", *numbers)

    def add(self, address: int, size: int, code: int) -> None:
        self.addresses.append(address)
        self.sizes.append(size)
        self.codes.append(code)


def table_of(grads: list[Tensor], device_type: int, native: Any = None) -> Any:
    """The table over the tensors on the first device of this type that there is."""
    if C is not None:
        return native if native is not None and native.device_type == device_type else C.GradTable(grads, device_type)
    if grads and device_type_of(grads[0].device) == device_type and (table := _table_of_alike(grads, device_type)):
        return table
    table = PlainTable(device_type)
    for position, grad in enumerate(grads):
        if reason := _refusal(grad) or _elsewhere(grad, table):
            table.refused[position] = reason
            continue
        if grad.dtype in FLOAT8:
            table.readonly[position] = READ_ONLY
        table.add(grad.data_ptr(), grad.numel(), CODES[grad.dtype])
        table.grads.append(grad)
        table.positions.append(position)
    if not table.refused:
        table.positions = []
    return table


def _table_of_alike(grads: list[Tensor], device_type: int) -> PlainTable | None:
    """Over plain dense gradients of one device, with memory, that can be written: as nearly all are. None for others.
    Each question goes to all of them at once, which takes half of the time."""
    if not set(map(type, grads)) <= PLAIN:
        return None
    try:
        addresses = list(map(Tensor.data_ptr, grads))
    except RuntimeError:  # no storage: of another layout, or functorch's
        return None
    if not (
        all(addresses)  # 0: empty, freed, meta, or functional
        and (all(map(Tensor.is_contiguous, grads)) or all(map(_is_dense, grads)))
        and len(set(map(Tensor.get_device, grads))) == 1
        and COMMON.keys() >= set(dtypes := list(map(_DTYPE, grads)))
    ):
        return None
    sizes, codes = list(map(Tensor.numel, grads)), list(map(COMMON.__getitem__, dtypes))
    return PlainTable(device_type, grads, addresses=addresses, sizes=sizes, codes=codes, device=grads[0].device)


def pieces(table: Any, masks: list[int]) -> list[int]:
    """For each tensor in how many equal pieces of memory its units lie, which extend over the dimensions of its mask;
    0 if they don't lie so."""
    if C is not None:
        counts: list[int] = C.pieces(table, masks)
        return counts
    return [_pieces_of(grad, mask) for grad, mask in zip(table.grads, masks, strict=True)]


def partners(table: Any, weights: list[Tensor]) -> Any:
    """A table over the weights of ``table``'s gradients, each at its gradient's place; one that lies otherwise in
    memory than its gradient has size 0 there, and its reason in ``refused``."""
    if C is not None:
        return C.partners(table, weights)
    found = PlainTable(table.device_type, device=table.device, grads=weights)
    for position, (grad, weight) in enumerate(zip(table.grads, weights, strict=True)):
        reason = _refusal(weight) or _elsewhere(weight, found)
        if not reason:
            if weight.dtype != grad.dtype:
                reason = "of another dtype than its gradient"
            elif CODES[weight.dtype] > PENALISED:
                reason = "a dtype without a kernel for penalties"
            elif not _lie_alike(weight, grad):
                reason = "in another memory order than its gradient"
            elif weight.is_neg() or grad.is_neg():  # torch's bit; reads and multiplications don't mind
                reason = "kept as the negative of what it is, or its gradient"
        if reason:
            found.refused[position] = reason
            found.add(0, 0, CODES[grad.dtype])
        else:
            found.add(weight.data_ptr(), weight.numel(), CODES[weight.dtype])
    return found


def one_number(value: Tensor, device: torch.device) -> Tensor:
    """One element as a float32 or float64 on that device, without waiting for it."""
    if value.dim() or value.requires_grad:
        value = value.detach().reshape(())
    if value.device != device or value.dtype not in (torch.float32, torch.float64):
        value = moved(value, device, torch.float64)
    return value


def device_type_of(device: torch.device) -> int:
    if device.type == "cuda":
        return ROCM if torch.version.hip else CUDA
    return CPU if device.type == "cpu" else 0


def _refusal(grad: Tensor) -> str:
    """ "" if the kernels of its device can work on this tensor's memory as it is."""
    if type(grad) not in PLAIN:
        return "a tensor subclass"
    if grad.layout != torch.strided or grad.is_quantized:
        return "not strided memory"
    if grad.dtype not in CODES:
        return "a dtype that the kernels do not read"
    if grad.numel() and (grad.is_meta or is_wrapped(grad) or not grad.data_ptr()):
        return "no memory behind it (fake, meta, functorch, or freed storage)"
    if grad.numel() and not _is_dense(grad):
        return "not one dense block of memory (a strided, expanded or overlapping view)"
    return ""


def _elsewhere(grad: Tensor, table: PlainTable) -> str:
    if device_type_of(grad.device) != table.device_type:
        return "not in CPU memory" if table.device_type == CPU else "not on this type of device"
    if table.device is None:
        table.device = grad.device
    return "" if grad.device == table.device else "on another device than those before it"


def _is_dense(grad: Tensor) -> bool:
    """A dimension order exists in which the tensor is one gapless block of memory."""
    if grad.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(grad.stride(), grad.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors have their elements of the same index at the same place."""
    return one.shape == other.shape and all(
        a == b or size == 1 for a, b, size in zip(one.stride(), other.stride(), one.shape, strict=True)
    )


def _pieces_of(grad: Tensor, mask: int) -> int:
    kept = [d for d in range(grad.dim()) if not mask >> d & 1]
    units, size = math.prod(grad.shape[d] for d in kept), grad.numel()
    if size == 0:
        return 0
    # The tensor is dense in some order, so its units are blocks when every other dimension steps over whole ones.
    previous = -1
    for d in reversed(kept):
        if grad.shape[d] == 1:
            continue
        if grad.stride(d) < size // units or grad.stride(d) <= previous:
            return 0
        previous = grad.stride(d)
    return units
