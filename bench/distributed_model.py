"""What joining a norm over ranks costs per step: bytes and latency, for 8 to 16,384 ranks, beside torchtitan's way.

``python -m fastclip.bench.distributed_model [--markdown FILE]``. No cluster is measured here: the formula is NCCL's own
cost model of a tree all-reduce, and a simulation of the tree, message by message, stands beside it. A second simulation
adds up the same norms in many orders, in slots and as float32 sums of squares, and looks at the bits.

A tree all-reduce of n bytes over r ranks of which g share a node (NCCL, src/graph/tuning.cc, 2.27):

    t = base + 2 ((g - 1) intra + log2(r / g) inter) + n / bandwidth

Every rank sends its vector up the tree once and down once. fastclip's has ``r * (32 k + 16)`` bytes, k being the number
of different ways in which the list's tensors are sharded, torchtitan's 4: one float32 per mesh dimension in turn, which
is what ``get_total_norm(...).full_tensor()`` sends.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastclip.backends.reference import norm_of_norms

from . import report

# NCCL's numbers for NVLink and a network, in seconds: base, within a node, between nodes; and the share of the
# bandwidth that the protocol leaves. LL is for the shortest messages, Simple for long ones.
PROTOCOLS = {
    "LL": (6.8e-6, 0.6e-6, 5.0e-6, 1 / 3.8),
    "LL128": (14.0e-6, 1.25e-6, 8.5e-6, 0.92),
    "Simple": (8.4e-6, 4.0e-6, 14.0e-6, 1.0),
}
RANKS_OF_A_NODE = 8
BYTES_PER_S = 25e9  # of an all-reduce in a tree: half of a network port of 400 Gbit/s; assumed
PIECE = 16384  # bytes that travel as one in the simulation

SLOT, PER_KIND = 16, 32  # bytes: mark and flag; norm, NaN, Inf and worst tensor
STEP_S = 1.0  # of a training step at these sizes, for a sense of proportion; assumed


class Group(NamedTuple):
    """A process group: its ranks, how many of them share a node, and how many ways of sharding travel over it."""

    ranks: int
    of_node: int
    kinds: int = 1


@dataclass(frozen=True)
class Job:
    """One way of spreading a model, and the groups over which each joins one after the other."""

    name: str
    ours: tuple[Group, ...]
    theirs: tuple[Group, ...]


def jobs(ranks: int) -> Iterator[Job]:
    """FSDP over all ranks; in replicas of 64; FSDP with tensor parallel within the node; and 8 pipeline stages too."""
    node = RANKS_OF_A_NODE
    flat = Group(ranks, node)
    yield Job("FSDP", (flat,), (flat,))
    if ranks > 64:
        replica = Group(64, node)
        yield Job("HSDP, replicas of 64", (Group(ranks // 64, 1), replica), (replica,))
        mesh = (Group(ranks // node, 1, kinds=2), Group(node, node, kinds=2))
        yield Job("FSDP x TP 8", mesh, mesh)
    if ranks >= 1024:
        mesh = (Group(ranks // 64, 1, kinds=2), Group(node, node, kinds=2), Group(8, 1))
        yield Job("PP 8 x FSDP x TP 8", mesh, mesh)


def our_bytes(group: Group) -> int:
    return group.ranks * (SLOT + PER_KIND * group.kinds)


def tree_s(group: Group, sent: float) -> float:
    """Seconds of one all-reduce of ``sent`` bytes, by the formula, under the best protocol."""
    node, levels = _shape(group)
    return min(
        base + 2 * ((node - 1) * intra + levels * inter) + sent / (BYTES_PER_S * share)
        for base, intra, inter, share in PROTOCOLS.values()
    )


def _shape(group: Group) -> tuple[int, int]:
    """Ranks of a node, and levels of the tree of nodes."""
    node = min(group.ranks, group.of_node)
    return node, math.ceil(math.log2(group.ranks / node))


def simulated_s(group: Group, sent: float, jitter: float = 0.0, seed: int = 0) -> float:
    """Seconds of the same, piece by piece: up the chain of each node, up a binary tree of nodes, and down again.

    A link carries one piece at a time. With ``jitter`` each hop takes up to that share longer, at random.
    """
    return min(_simulated(group, sent, protocol, jitter, seed) for protocol in PROTOCOLS.values())


def _simulated(group: Group, sent: float, protocol: tuple[float, ...], jitter: float, seed: int) -> float:
    base, intra, inter, share = protocol
    chance = random.Random(seed)
    node, levels = _shape(group)
    nodes, pieces = group.ranks // node, max(math.ceil(sent / PIECE), 1)
    busy_s = sent / pieces / (BYTES_PER_S * share)

    def hops(count: int, seconds: float, arrivals: list[float]) -> list[float]:
        """The times at which pieces leave the last of ``count`` links."""
        for _ in range(count):
            free, out = 0.0, []
            for arrival in arrivals:
                start = max(arrival, free)
                free = start + busy_s
                out.append(start + seconds * (1.0 + jitter * chance.random()))
            arrivals = out
        return arrivals

    at_nodes = [hops(node - 1, intra, [0.0] * pieces) for _ in range(min(nodes, 64))]
    arrived = [max(times) for times in zip(*at_nodes, strict=True)]
    arrived = hops(2 * levels, inter, arrived)  # the deepest leaf's way to the root, and back to it
    return base + hops(node - 1, intra, arrived)[-1] + busy_s


def bits(ranks: int, orders: int = 20, seed: int = 0) -> tuple[int, int, float]:
    """Adds the ranks' shares in ``orders`` random orders.

    Returns:
        How many different norms that gives in slots, and as float32 sums of squares; and the largest relative error of
        the latter.
    """
    chance = random.Random(seed)
    norms = torch.rand(ranks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    exact = math.sqrt(math.fsum((norms**2).tolist()))
    in_slots, in_sums = set(), []
    for _ in range(orders):
        order = list(range(ranks))
        chance.shuffle(order)
        slots = torch.zeros(ranks, dtype=torch.float64)
        for rank in order:
            slots[rank] += norms[rank]
        in_slots.add(float(norm_of_norms(slots, 2.0)))
        in_sums.append(float(_tree_sum((norms.float() ** 2)[order]).sqrt()))
    return len(in_slots), len(set(in_sums)), max(abs(found / exact - 1.0) for found in in_sums)


def _tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Two numbers at a time, always the two that are ready first."""
    ready = [(0, i, float(value)) for i, value in enumerate(values)]
    count = len(ready)
    while len(ready) > 1:
        (depth, _, a), (other, _, b) = heapq.heappop(ready), heapq.heappop(ready)
        total = float(torch.tensor(a, dtype=torch.float32) + torch.tensor(b, dtype=torch.float32))
        heapq.heappush(ready, (max(depth, other) + 1, count, total))
        count += 1
    return torch.tensor(ready[0][2])


def table(sizes: Sequence[int] = (8, 64, 512, 1024, 4096, 16384)) -> list[str]:
    """Lines of markdown."""
    lines = [
        "| ranks | spread | collectives | bytes sent per rank | formula | simulated | torchtitan: collectives | bytes |"
        " formula | of a step of 1 s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sizes:
        for job in jobs(size):
            ours = [(group, our_bytes(group)) for group in job.ours]
            ours_s = sum(tree_s(*of) for of in ours)
            simulated = sum(simulated_s(*of, jitter=0.1) for of in ours)
            theirs_s = sum(tree_s(group, 4) for group in job.theirs)
            lines.append(
                f"| {size:,} | {job.name} | {len(ours)} | {sum(sent for _, sent in ours):,} | {ours_s * 1e6:.0f} us "
                f"| {simulated * 1e6:.0f} us | {len(job.theirs)} | {4 * len(job.theirs)} | {theirs_s * 1e6:.0f} us "
                f"| {ours_s / STEP_S:.3%} |"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip.bench.distributed_model", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--markdown", type=report.place, help="where the table goes; default: the terminal")
    arguments = parser.parse_args(argv)
    lines = table()
    for ranks in (8, 64, 1024):
        slots, sums, error = bits(ranks)
        lines.append("")
        lines.append(
            f"{ranks:,} ranks, 20 orders of adding: {slots} norm in slots; {sums} in float32 sums of squares, off by "
            f"up to {error:.0e}."
        )
    text = "\n".join(lines) + "\n"
    report.write(text, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
