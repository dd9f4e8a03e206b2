"""Parameters -> gradients: the place for sparse layouts, subclasses, and what is listed twice."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter
from types import GeneratorType, MappingProxyType, NoneType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastclip._native import C

TensorOrTensors: TypeAlias = Tensor | Iterable[Tensor]
Names: TypeAlias = torch.nn.Module | Iterable[tuple[str, Tensor]] | None
NAMELESS: Mapping[Tensor, str] = MappingProxyType({})
_GRAD = attrgetter("grad")

FLOAT8 = tuple(
    dtype
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if (dtype := getattr(torch, name, None)) is not None
)


LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Grads(NamedTuple):
    """Every gradient once, however often its parameter was listed.

    Attributes:
        tensors: the gradients, any device, dtype and layout.
        positions: where they stood in the caller's list; None means at 0, 1, 2, ...
        names: the caller's names for his list, or None.
        noun: how the caller's list is called in messages.
        native: the native core's table over exactly these tensors, made on the way; None without one.
        parameters: the caller's list, where it holds parameters.
        wholes: the caller's gradients, where some of them are sharded (DTensor): ``tensors`` then holds this rank's
            share of those.
    """

    tensors: list[Tensor]
    positions: list[int] | None
    names: Sequence[str] | None = None
    noun: str = "parameters"
    native: Any = None
    parameters: list[Tensor] | None = None
    wholes: list[Tensor] | None = None

    @property
    def columns(self) -> Sequence[int]:
        """Where each stood in the caller's list."""
        return range(len(self.tensors)) if self.positions is None else self.positions

    def label(self, index: int) -> str:
        """The name of gradient ``index`` in words that the caller knows."""
        return self.name_at(index if self.positions is None else self.positions[index])

    def name_at(self, position: int) -> str:
        """The name of what stood at ``position`` in the caller's list."""
        return self.names[position] if self.names is not None else f"{self.noun}[{position}]"

    def whole(self, index: int) -> Tensor:
        """Gradient ``index`` as the caller has it, of its full shape."""
        return self.tensors[index] if self.wholes is None else self.wholes[index]

    @property
    def may_be_sharded(self) -> bool:
        """Whether something that the caller listed lies on several ranks."""
        if self.native is not None and not self.native.refused:
            listed = self.parameters  # a parameter without a gradient is unknown to the native core
            return listed is not None and len(listed) > len(self.tensors) and any_sharded(listed)
        return self.wholes is not None or any_sharded(self.tensors if self.parameters is None else self.parameters)

    @property
    def sizes(self) -> list[int]:
        """Elements in each gradient, on all ranks together."""
        return [grad.numel() for grad in (self.tensors if self.wholes is None else self.wholes)]

    def describe(self, index: int) -> str:
        grad = self.whole(index)
        kind = f", {grad.layout}" if grad.layout != torch.strided else ""
        if is_sharded(grad):
            kind = f", {', '.join(map(str, placements_of(grad)))}"
        return f"{self.label(index)} ({grad.dtype}, shape {tuple(grad.shape)}, {grad.device}{kind})"


def sharded_class() -> Any:
    """The class of tensors that lie on several ranks; None as long as nobody has imported it: then there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them lies on several ranks."""
    cls = sharded_class()
    return cls is not None and any(issubclass(kind, cls) for kind in set(map(type, tensors)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies on several ranks, whatever its placements."""
    cls = sharded_class()
    return cls is not None and isinstance(tensor, cls)


def mesh_of(tensor: Any) -> Any:
    """The mesh of ranks over which a sharded tensor lies."""
    return tensor.device_mesh


def placements_of(tensor: Any) -> tuple[Any, ...]:
    """One for each dimension of the mesh of a sharded tensor."""
    placements: tuple[Any, ...] = tensor.placements
    return placements


def local(tensor: Any) -> Tensor:
    """This rank's share of a sharded tensor, in shared memory; any other tensor itself."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    with torch.no_grad():
        return _share(tensor)


def _share(tensor: Any) -> Tensor:
    """Of a sharded tensor; without autograd."""
    own: Tensor = tensor.to_local()
    return own if type(own) is Tensor else _arrived(own)


def _arrived(share: Any) -> Tensor:
    """A collective that makes it may be under way."""
    arrived: Tensor = share.wait() if hasattr(share, "wait") else share
    return arrived


def _settled(grad: Any, parameter: Any) -> Tensor:
    """A gradient that lies as its parameter does; without one, a gradient without open sums.

    Shares that only together are the gradient (Partial) have no norms that could be joined, and the optimizer would ask
    for the sum anyway.
    """
    placements = placements_of(grad)
    if parameter is not None:
        wanted = placements_of(parameter)
    elif any(placement.is_partial() for placement in placements):
        from torch.distributed.tensor import Replicate, Shard

        closed: Any = Shard(0) if grad.dim() else Replicate()  # as little as possible is moved
        wanted = tuple(closed if placement.is_partial() else placement for placement in placements)
    else:
        wanted = placements
    if wanted == placements:
        settled: Tensor = grad
        return settled
    settled = grad.redistribute(placements=wanted)
    return settled


def _listed(tensors: TensorOrTensors, noun: str) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, torch.nn.Module) and not isinstance(tensors, torch.nn.ParameterList):
        raise TypeError(f"{noun}: got a {type(tensors).__name__} module; pass module.parameters()")
    if isinstance(tensors, (str, bytes)) or not isinstance(tensors, Iterable):
        raise TypeError(f"{noun}: expected a tensor or an iterable of tensors, got {type(tensors).__name__}")
    listed = list(tensors)
    if not listed and isinstance(tensors, GeneratorType):
        warnings.warn(
            f"`{noun}` is an empty generator, no gradient clipping will occur: was it used up before?", stacklevel=4
        )
    return listed


def _gather(listed: list[Tensor], take_grad: bool) -> tuple[list[Tensor], list[int] | None, None]:
    """What ``_C.gather`` does, for machines without it; no table."""
    if all(issubclass(kind, Tensor) for kind in set(map(type, listed))):  # nearly always, and each pass in C
        found = list(map(_GRAD, listed)) if take_grad else listed
        if NoneType not in set(map(type, found)) and len(set(map(id, found))) == len(found):
            return found, None, None
    grads: list[Tensor] = []
    positions: list[int] = []
    seen: set[int] = set()
    for position, tensor in enumerate(listed):
        if tensor is None and not take_grad:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"item {position} is a {type(tensor).__name__}, not a torch.Tensor")
        grad = tensor.grad if take_grad else tensor
        if grad is not None and id(grad) not in seen:
            seen.add(id(grad))
            grads.append(grad)
            positions.append(position)
    in_order = not positions or positions[-1] + 1 == len(positions)
    return grads, None if in_order else positions, None


def _gathered(
    listed: list[Tensor], take_grad: bool, noun: str, names: Sequence[str] | None = None, adopt: bool = False
) -> Grads:
    """With ``adopt`` a gradient that lies otherwise than its parameter is replaced, there, by one that doesn't."""
    try:
        grads, positions, native = C.gather(listed, take_grad) if C is not None else _gather(listed, take_grad)
    except TypeError as error:
        raise TypeError(f"{noun}: {error}") from None
    parameters, cls = listed if take_grad else None, sharded_class()
    if (native is not None and not native.refused) or not any_sharded(grads):  # what it takes is plain memory
        return Grads(grads, positions, names, noun, native, parameters)
    wholes, shares = list(grads), list(grads)
    with torch.no_grad():
        for i, position in enumerate(range(len(grads)) if positions is None else positions):
            if not isinstance(grads[i], cls):
                continue
            wholes[i] = _settled(grads[i], listed[position] if take_grad else None)
            shares[i] = _share(wholes[i])
            if adopt and wholes[i] is not grads[i]:
                listed[position].grad = wholes[i]
    return Grads(shares, positions, names, noun, None, parameters, wholes)


def grads_of(parameters: TensorOrTensors) -> Grads:
    """The gradients of ``parameters``: a tensor or an iterable of tensors, generators included.

    Parameters without a gradient are left out.

    Raises:
        TypeError: an item is not a tensor.

    Warns when nothing has a gradient and nothing requires one: gradients were passed by mistake.
    """
    listed = _listed(parameters, "parameters")
    grads = _gathered(listed, True, "parameters", adopt=True)
    if not grads.tensors and any(hasattr(p, "ds_id") for p in listed):
        raise TypeError(
            "parameters: DeepSpeed's ZeRO keeps the gradients of these to itself, and clips them in its own step: set "
            '"gradient_clipping" in its config instead'
        )
    if not grads.tensors and listed and not any(p.requires_grad for p in listed):
        warnings.warn(
            f"none of the {len(listed)} tensors has a .grad and none requires one, so nothing was clipped: "
            "were gradients passed where parameters are meant?",
            stacklevel=3,
        )
    return grads


class GroupNames(Sequence[str]):
    """Names of the parameters of an optimizer's param groups, in order; made only when one is asked for.

    The caller's own where he gave them, or gave the optimizer named parameters, else the way to them.

    Args:
        groups: each with its index among all groups.
        own: what some of the parameters are called, as :func:`named` makes it.

    Attributes:
        parameters: the parameters.
    """

    def __init__(self, groups: list[tuple[int, dict[str, Any]]], own: Mapping[Tensor, str] = NAMELESS) -> None:
        # as they are now: each group's index, its length and what it calls its parameters
        self._groups = [(index, len(group["params"]), group.get("param_names")) for index, group in groups]
        self._own = own
        self._names: list[str] | None = None
        # at every step, for thousands of them: in a third of a comprehension's time
        self.parameters: list[Tensor] = list(chain.from_iterable(group["params"] for _, group in groups))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": {}, "_names": None}  # a copy has other parameters

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, position: Any) -> Any:
        if self._names is None:
            self._names = self._made()
        return self._names[position]

    def _made(self) -> list[str]:
        """Two of one name, as several optimizers in a row may have, are called by their places."""
        places: list[str] = []
        called: list[str] = []
        for index, length, names in self._groups:
            own = [f"param_groups[{index}]['params'][{i}]" for i in range(length)]
            places += own
            called += names if names is not None and len(names) == length else own
        called = [self._own.get(parameter, name) for parameter, name in zip(self.parameters, called, strict=True)]
        counts = Counter(called)
        return [name if counts[name] == 1 else place for name, place in zip(called, places, strict=True)]


def named(names: Names) -> Mapping[Tensor, str]:
    """What a model, or pairs, call each parameter, for as long as it lives."""
    if names is None:
        return NAMELESS
    given: Any = names.named_parameters() if isinstance(names, torch.nn.Module) else names
    pairs = list(given) if isinstance(given, Iterable) else [given]
    for pair in pairs:
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            raise TypeError(
                "names: expected a module, or (name, parameter) pairs as of module.named_parameters() or dict.items(); "
                f"got {type(given).__name__} of {type(pair).__name__}"
            )
    return WeakTensorKeyDictionary({parameter: name for name, parameter in pairs})


def check_named(names: Mapping[Tensor, str], parameters: list[Tensor]) -> None:
    """Warns of names that somebody gave, and that none of the parameters has: they are those of another model."""
    if names is not NAMELESS and parameters and not any(parameter in names for parameter in parameters):
        warnings.warn(
            f"names: none of the optimizer's {len(parameters)} parameters is among them, and each is called by its "
            "place; pass the model that they are of",
            RuntimeWarning,
            stacklevel=2,
        )


def grads_of_groups(
    groups: list[tuple[int, dict[str, Any]]], own: Mapping[Tensor, str] = NAMELESS
) -> tuple[Grads, bool]:
    """The gradients of an optimizer's param groups, each with its index among all groups, and names as of GroupNames.

    Returns:
        The gradients, and whether an optimizer would meet one of them twice, at two parameters.
    """
    names = GroupNames(groups, own)
    listed = names.parameters
    grads = _gathered(listed, True, "param_groups", names, adopt=True)
    if len(grads.tensors) == len(listed):
        return grads, False
    return grads, sum(parameter.grad is not None for parameter in listed) > len(grads.tensors)


def check_groups_disjoint(groups: list[dict[str, Any]]) -> None:
    """Raises ``ValueError`` for a parameter in two groups: each step would move it twice."""
    owner: dict[int, int] = {}
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if owner.setdefault(id(parameter), index) != index:
                raise ValueError(
                    f"param_groups[{index}]['params'][{position}] is also in param_groups[{owner[id(parameter)]}]: "
                    "each step would move it twice; take it out of one of them. Nothing was written"
                )


def grads_among(tensors: TensorOrTensors, noun: str = "tensors") -> Grads:
    """``tensors`` themselves as gradients; None entries are left out."""
    return _gathered(_listed(tensors, noun), False, noun)


def grads_or_parameters(
    source: torch.nn.Module | TensorOrTensors | Iterable[tuple[str, Tensor]], names: Iterable[str] | None = None
) -> Grads:
    """Gradients from a module, from (name, tensor) pairs, or from a list of parameters or of gradients.

    A list is taken for parameters when one of its tensors has a ``.grad`` or is a leaf that requires one.
    """
    if isinstance(source, torch.nn.Module):
        source = source.named_parameters()
    listed = _listed(source, "params_or_grads")  # type: ignore[arg-type]
    if listed and names is None and all(isinstance(item, tuple) and len(item) == 2 for item in listed):
        names = [name for name, _ in listed]
        listed = [tensor for _, tensor in listed]
    take_grad = any(isinstance(t, Tensor) and t.is_leaf and (t.requires_grad or t.grad is not None) for t in listed)
    return _gathered(listed, take_grad, "parameters" if take_grad else "grads", _names(names, len(listed)))


def _names(names: Iterable[str] | None, count: int) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError("names: expected one name per tensor, got a single string")
    listed = list(names)
    if len(listed) != count:
        raise ValueError(f"names: {len(listed)} names for {count} tensors")
    if len(set(listed)) < count:
        twice = next(name for name in listed if listed.count(name) > 1)
        raise ValueError(f"names: {twice!r} stands for more than one tensor")
    return listed


def unserved(grad: Tensor) -> str:
    """Why plain torch operations can't work on this gradient; "" if they can."""
    if not (grad.is_floating_point() or grad.is_complex()) or (grad.dtype.itemsize == 1 and grad.dtype not in FLOAT8):
        return f"{grad.dtype} gradients have no norm"
    if grad.is_quantized or grad.is_nested or grad.layout not in LAYOUTS:
        return f"tensors that are quantized, nested or of layout {grad.layout} are not served"
    if is_sharded(grad):
        return "a sharded gradient (DTensor) is served through this rank's share of it, which torch.compile doesn't see"
    return ""


def dense(grad: Tensor) -> Tensor:
    """The numbers of a gradient as a strided tensor; shared memory, except for uncoalesced sparse ones.

    A sparse gradient's norms are those of its values: what it doesn't list is 0. A subclass that only adds
    Python behaviour is taken off; one that implements the operations itself (fake tensors) stays.
    """
    if type(grad) is not Tensor and type(grad).__torch_dispatch__ is Tensor.__torch_dispatch__:
        with torch._C.DisableTorchFunctionSubclass():
            grad = grad.as_subclass(Tensor)
    if grad.layout == torch.strided:
        return grad
    if grad.layout == torch.sparse_coo:
        with its_mode(grad):
            return (grad if grad.is_coalesced() else grad.coalesce())._values()
    return grad.values()  # CSR, CSC, BSR, BSC


def its_mode(grad: Tensor) -> AbstractContextManager[Any]:
    """In which torch lets it be written: an inference tensor only in inference mode, as it has no version counter. By
    that autograd finds what was written after it had been saved; but inference tensors are never saved."""
    return torch.inference_mode() if grad.is_inference() else nullcontext()


def write_back(grad: Tensor, values: Tensor) -> None:
    """After a write to ``values = dense(grad)``: brings it to ``grad`` where memory isn't shared."""
    if grad.layout != torch.sparse_coo:
        return
    if not grad.is_coalesced():
        coalesced = grad.coalesce()
        coalesced._values().copy_(values)
        with torch.no_grad():
            grad.copy_(coalesced)
    elif not (own := grad._values()).is_set_to(values):  # coalesced by the write before this one
        own.copy_(values)


def read_only(grad: Tensor) -> str:
    """Why this strided gradient can't be written in place; "" if it can."""
    if grad.dtype in FLOAT8:
        return "8-bit floats are read for statistics only; torch has no arithmetic that writes them"
    if grad._is_zerotensor():
        return "it is a zero without memory of its own; clone() it"
    if _shares_memory(grad):
        return "several of its elements share one place in memory (an expanded or overlapping view); clone() it"
    return ""


def _shares_memory(grad: Tensor) -> bool:
    """Whether two elements have one address."""
    dims = sorted((stride, size) for stride, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)
    span = 1
    for stride, size in dims:
        if stride < span:
            break
        span += stride * (size - 1)
    else:
        return False
    if grad.numel() == 0 or dims[0][0] == 0:
        return grad.numel() > 0
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return len(set(offsets.tolist())) < grad.numel()


def first_nonfinite(grad: Tensor) -> tuple[tuple[int, ...], complex]:
    """Index and value of the first NaN or Inf in row-major order. Synchronises."""
    with its_mode(grad):
        values = grad if grad.layout == torch.strided else grad.to_dense()
    widened = values.to(torch.float32) if values.dtype in FLOAT8 else values
    index = tuple(torch.isfinite(widened).logical_not().nonzero()[0].tolist())
    return index, widened[index].item()
