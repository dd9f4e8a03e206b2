"""Sharded tensors and models for tests on several ranks."""

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

_meshes = {}


def mesh_of(*shape):
    """Made once: every mesh makes process groups."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
    return _meshes[shape]


class counted(TorchDispatchMode):
    """During the ``with`` block: the groups over which float64 was all-reduced, and how many collectives there were."""

    def __init__(self):
        super().__init__()
        self.groups, self.collectives, self._plain = [], 0, dist.all_reduce

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional") and "wait" not in op.name():
            self.collectives += 1
        return op(*args, **(kwargs or {}))

    def __enter__(self):
        def all_reduce(tensor, *args, group=None, **kwargs):
            if tensor.dtype == torch.float64:
                self.groups.append(group.group_name)
            return self._plain(tensor, *args, group=group, **kwargs)

        dist.all_reduce = all_reduce
        return super().__enter__()

    def __exit__(self, *error):
        dist.all_reduce = self._plain
        return super().__exit__(*error)


def placed(full, mesh, placements):
    """``full`` as a DTensor; what is open in it sums up to ``full``."""
    closed = [Replicate() if p.is_partial() else p for p in placements]
    whole = distribute_tensor(full.clone(), mesh, closed, src_data_rank=None)
    if closed == list(placements):
        return whole
    local, peers = whole.to_local().clone(), 1
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            peers *= mesh.size(dim)
            local *= 1.0 if mesh.get_local_rank(dim) == 0 else 2.0
    share = local / math.prod(2 * mesh.size(d) - 1 for d, p in enumerate(placements) if p.is_partial())
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def with_grad(full, mesh, placements):
    closed = [Replicate() if p.is_partial() else p for p in placements]
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones_like(full), mesh, closed, src_data_rank=None))
    parameter.grad = placed(full, mesh, placements)
    return parameter


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )


def whole(tensors):
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def sharded(kind, optimizer="fused"):
    """Model and parameters under some sharding."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, world = network(), dist.get_world_size()
    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh_of(world))
        fully_shard(model, mesh=mesh_of(world))
    elif kind == "offload":
        fully_shard(model, mesh=mesh_of(world), offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh_of(2, 2))
    elif kind == "ignored":
        fully_shard(model, mesh=mesh_of(world), ignored_params={model[2].weight, model[4].bias})
    elif kind == "tp":
        parallelize_module(model, mesh_of(world), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif kind == "fsdp-tp":
        mesh = mesh_of(2, 2)
        parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["a"])
    elif kind == "two meshes":
        fully_shard(model[0], mesh=mesh_of(world))
        fully_shard(model[2], mesh=mesh_of(2, world // 2))
        fully_shard(model[4], mesh=mesh_of(world))
    return model
