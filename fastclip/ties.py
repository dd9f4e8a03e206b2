"""Which ranks have a share in a list of gradients: what its tensors are to each process group.

A tensor is sharded over a group (any placement but Replicate) or replicated over it; or it is sharded over other
groups, and what those make of it has copies on this one's ranks, which have to agree on one, or has nothing to do with
it. A mesh on which something is sharded counts with all its dimensions, one group each, so that its replicas, too, hear
of what one of them found. Where nothing is sharded there are no ties.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip.tensors import Grads, sharded_class
from fastclip.types import RankError

SHARDED, REPLICATED, COPIED, APART = range(4)  # what a tensor is to a process group

MARKS = 1 << 48  # lists are told apart by numbers below this, exact in float64

Role = tuple[int, ...]  # one of these for each group


@dataclass(frozen=True, slots=True)
class Ties:
    """How some lists of gradients hang together over ranks.

    Attributes:
        lists: the lists.
        groups: process groups in the order of their collectives.
        roles: for each list, for each tensor that the caller listed: what it is to each of the groups.
        group: the one over which the lists' totals add up at last; or None.
        mark: tells lists of other shapes or placements from these.
        alike: global ranks that were given the same lists.
        cut: a list holds pieces of FSDP1's flat parameters, whose borders no tensor has.
    """

    lists: Sequence[Grads]
    groups: list[Any]
    roles: list[list[Role]]
    group: Any
    mark: int
    alike: frozenset[int]
    cut: bool


class _Marked:
    """Plain parameters whose ranks hold different ones, by what :func:`mark_sharded` was told."""

    def __init__(self) -> None:
        self.groups: Any = None

    def add(self, parameters: Iterable[Tensor], group: Any) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        if self.groups is None:
            self.groups = WeakIdKeyDictionary()
        for parameter in parameters:
            self.groups[parameter] = group

    def group_of(self, tensor: Tensor) -> Any:
        return None if self.groups is None else self.groups.get(tensor)


_marked = _Marked()


def mark_sharded(parameters: Tensor | Iterable[Tensor], group: Any) -> None:
    """Says of parameters that the ranks of ``group`` hold different ones: each of them counts in a norm.

    For experts that are spread over an expert-parallel group, and for tensor parallelism without DTensor. Nothing has
    to be said of what DTensors say themselves, nor of parameters of which every rank has a copy. The mark is the
    parameter's own: ``fully_shard``, which replaces parameters, comes first, and copies are marked anew.

    Args:
        parameters: one or many, as the optimizer gets them.
        group: a process group, or a mesh of one dimension.

    Raises:
        TypeError: not a process group.
    """
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    _marked.add(listed, process_group(group))


def any_marked() -> bool:
    """Whether :func:`mark_sharded` was ever told of a parameter."""
    return _marked.groups is not None


def process_group(group: Any) -> Any:
    """``group``, or that of a mesh of one dimension; None for None.

    Raises:
        TypeError: neither.
        RankError: there is no such group on this rank.
    """
    if group is None:
        return None
    if hasattr(group, "mesh_dim_names") and hasattr(group, "get_group"):
        if group.ndim != 1:
            raise TypeError(f"group: expected a mesh of one dimension, got {group.ndim}; take one by its name")
        return groups_of(group)[0]
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: expected a process group or a mesh of one dimension, got {type(group).__name__}")
    return group


def group_named(name: str | None) -> Any:
    """The process group of that name; None for None.

    Raises:
        RankError: this process has none.
    """
    if name is None:
        return None
    c10d: Any = torch.distributed.distributed_c10d
    try:
        return c10d._resolve_process_group(name)
    except RuntimeError:
        raise RankError(
            f"an optimizer was copied or unpickled that joins its norm over the process group {name!r}, which this "
            "process doesn't have. Call torch.distributed.init_process_group() and make the group first"
        ) from None


def group_of_caller() -> Any:
    """The group of the ``ZeroRedundancyOptimizer`` that is making its own optimizer now; None without one.

    It tells that optimizer nothing, though each rank's then holds other parameters. So it is looked for among the
    callers.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    code = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"].process_group


def groups_of(mesh: Any) -> list[Any]:
    """The process group of each dimension of a mesh."""
    distributed = torch.distributed
    try:
        if not distributed.is_initialized():
            raise RuntimeError("torch.distributed is not initialised")
        return [mesh.get_group(dim) for dim in range(mesh.ndim)]
    except RuntimeError as error:
        raise RankError(
            f"gradients are sharded over {mesh}, but its ranks can't be asked for their shares of the norm: {error}. "
            "Call torch.distributed.init_process_group() and make the mesh with init_device_mesh() before the model is "
            "sharded, and clip before the group is destroyed. Nothing was written"
        ) from None


def listed_in(grads: Grads) -> Sequence[Tensor]:
    """What the caller listed, which is the same on all ranks that hold shares of it; gradients may be missing."""
    if grads.parameters is not None:
        return grads.parameters
    return grads.tensors if grads.wholes is None else grads.wholes


_PLAIN, _FLAT = "plain", "flat"


def _kinds(listed: Sequence[Tensor], cls: Any, with_fsdp1: bool) -> Iterator[Any]:
    """Of each tensor what decides its roles: mesh, placements and the group it was marked with, if any; the latter
    alone; or a word."""
    for tensor in listed:
        group = _marked.group_of(tensor)
        if cls is not None and isinstance(tensor, cls):
            spec: Any = tensor._spec
            yield spec.mesh, spec.placements, group
        elif group is not None:
            yield group
        else:
            yield _FLAT if with_fsdp1 and getattr(tensor, "_fsdp_flattened", False) else _PLAIN


def ties_of(lists: Sequence[Grads], group: Any = None) -> Ties | None:
    """How these lists hang together over ranks; None where all that counts is here.

    Args:
        group: process group whose ranks hold other lists, which count too: pipeline stages, ZeroRedundancyOptimizer. Of
            FSDP1 the one over which it shards.

    Raises:
        RankError: no process group joins the ranks of a mesh; FSDP1's parameters without ``group``.
        ValueError: ``group`` is one over which the gradients are sharded already.
    """
    # torch.compile imports the module too, but only in a job of several ranks it is used
    with_fsdp1 = "torch.distributed.fsdp._flat_param" in sys.modules and torch.distributed.is_initialized()
    if group is None and not with_fsdp1 and _marked.groups is None and not any(of.may_be_sharded for of in lists):
        return None
    listed = [listed_in(grads) for grads in lists]
    different: dict[Any, int] = {}
    kinds = [
        [different.setdefault(k, len(different)) for k in _kinds(own, sharded_class(), with_fsdp1)] for own in listed
    ]
    cut = _FLAT in different
    if cut and group is None:
        raise RankError(
            "these parameters are pieces of FullyShardedDataParallel's flat ones, and don't tell which ranks have the "
            "other pieces: pass group=model.process_group, or shard with fully_shard(). Nothing was written"
        )
    meshes = _meshes_in_play(different)
    groups: dict[str, Any] = {}
    marked = [kind[2] if isinstance(kind, tuple) else kind for kind in different if not isinstance(kind, str)]
    for found in (*meshes.values(), [own for own in marked if own is not None]):
        groups |= {own.group_name: own for own in found if own.size() > 1}
    if cut and group.size() > 1:
        groups[group.group_name] = group
    last = None if cut or group is None or group.size() == 1 else group
    if not groups and last is None:
        return None
    ranks_of = torch.distributed.get_process_group_ranks
    members = {name: frozenset(ranks_of(own)) for name, own in groups.items()}
    roles = [_role(kind, members, meshes, group) for kind in different]
    alike = {torch.distributed.get_rank()}.union(*members.values())
    for kind in different:
        if isinstance(kind, tuple) and kind[0] in meshes:
            alike.update(_ranks_of(kind[0]))
    if last is not None and len(alike.intersection(ranks_of(last))) > 1:
        raise ValueError(
            "group: its ranks hold shares of these very gradients, which would count several times; leave group out, "
            "or pass the group of the ranks that hold other ones. Nothing was written"
        )
    return Ties(
        lists,
        list(groups.values()),
        [[roles[kind] for kind in own] for own in kinds],
        last,
        _mark(listed, kinds, list(different), roles),
        frozenset(alike),
        cut,
    )


def _meshes_in_play(kinds: Iterable[Any]) -> dict[Any, list[Any]]:
    """The groups of every mesh over which something is sharded, and of which this rank is a part."""
    found: dict[Any, list[Any]] = {}
    for kind in kinds:
        if isinstance(kind, tuple):
            mesh, placements, _ = kind
            sharded = any(not p.is_replicate() and mesh.size(dim) > 1 for dim, p in enumerate(placements))
            if sharded and mesh not in found and mesh.get_coordinate() is not None:
                found[mesh] = groups_of(mesh)
    return found


def _ranks_of(mesh: Any) -> list[int]:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _role(kind: Any, members: dict[str, frozenset[int]], meshes: dict[Any, list[Any]], group: Any) -> Role:
    if kind == _PLAIN:
        return (REPLICATED,) * len(members)
    own: dict[str, int] = {}
    known: set[int] = set()  # the ranks that know the same of it once its own groups have joined it
    marked = kind[2] if isinstance(kind, tuple) else group if kind == _FLAT else kind
    if isinstance(kind, tuple):
        mesh, placements, _ = kind
        if mesh in meshes or mesh.get_coordinate() is not None:
            for of_dim, placement in zip(meshes.get(mesh) or groups_of(mesh), placements, strict=True):
                own[of_dim.group_name] = REPLICATED if placement.is_replicate() else SHARDED
            known.update(_ranks_of(mesh))
    if marked is not None:
        own[marked.group_name] = SHARDED
        known.update(members.get(marked.group_name, ()))
    return tuple(own.get(name, APART if ranks <= known else COPIED) for name, ranks in members.items())


def _mark(listed: Sequence[Sequence[Tensor]], kinds: list[list[int]], different: list[Any], roles: list[Role]) -> int:
    """The same number on every rank with the same lists, whatever the names of groups there."""
    spelled = [zlib.crc32(repr(kind[1]).encode()) if isinstance(kind, tuple) else 0 for kind in different]
    pieces = different.index(_FLAT) if _FLAT in different else -1  # their shapes differ by design
    shapes = [
        tuple(tensor.shape if kind != pieces else () for tensor, kind in zip(tensors, own, strict=True))
        for tensors, own in zip(listed, kinds, strict=True)
    ]
    # of numbers alone: Python hashes them alike in all processes
    return hash((*shapes, *map(tuple, kinds), tuple(roles), tuple(spelled))) % MARKS
