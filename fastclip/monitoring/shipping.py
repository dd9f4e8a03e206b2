"""From the gradients' device to the host: what some steps left behind, in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.ladder import Event
from fastclip.reading import read
from fastclip.record import Outcome, Seen, Sent
from fastclip.tensors import FLOAT8, dense
from fastclip.types import ALWAYS_FIELDS, MAX_ABS, TOTAL_NORM, ZEROS, Request, on_device

PER_READING = 7  # leaves
SAMPLE = 4096  # elements of a gradient among which subnormal ones are counted

Leaf: TypeAlias = "float | bool | Tensor | None"


class Sighting(NamedTuple):
    """One step as it was seen, its values still where they were.

    Attributes:
        leaves: clipped, skipped, loss, each reason, each learning rate, then for each of ``seen``: rows, totals,
            clip_coef, norm after it, largest magnitudes, shares of zeros, shares of subnormal numbers.
        unknown: of each of ``seen`` whether only another read would tell the norm after clipping.
    """

    step: int
    time: float
    fold: str | None
    seen: list[Seen]
    reasons: list[str]
    lrs: int
    rolled_back: bool
    rungs: list[Event]
    unknown: list[bool]
    leaves: list[Leaf]


def sighting(outcome: Outcome, step: int, time: float, fold: str | None, census: bool) -> Sighting:
    """Takes from a step what outlives its gradients; with ``census`` reads them once more."""
    leaves: list[Leaf] = [outcome.clipped, outcome.skipped, outcome.loss, *outcome.reasons.values(), *outcome.lrs]
    unknown = []
    for seen, verdict in zip(outcome.seen, outcome.verdicts, strict=True):
        reading, (coef, _, unit_coefs, clamp) = verdict.reading, verdict.decision
        after: Leaf = None
        if unit_coefs is not None:
            coef = unit_coefs.amin() if unit_coefs.numel() else 1.0
            if reading.peers is None:
                after = reading.after(1.0, unit_coefs, Request(seen.request.norm_type)).totals[TOTAL_NORM]
        rows, largest, zeros, subnormal = seen.rows, None, None, None
        if rows.shape[0] > ALWAYS_FIELDS:
            rows, largest = rows[:ALWAYS_FIELDS], rows[MAX_ABS]
        if census:
            counted = read(reading.plan, Request(extras=True), outcome.grad_scale).rows
            grads = reading.plan.grads.tensors  # of sharded ones this rank's own elements, as those that are counted
            sizes = on_device([max(grad.numel(), 1) for grad in grads], counted.dtype, counted.device)
            largest, zeros = counted[MAX_ABS], counted[ZEROS] / sizes
            subnormal = subnormal_shares(grads, counted)
        unknown.append(clamp is not None or (unit_coefs is not None and after is None))
        leaves += [rows, seen.totals, coef, after, largest, zeros, subnormal]
    return Sighting(
        step,
        time,
        fold,
        outcome.seen,
        list(outcome.reasons),
        len(outcome.lrs),
        outcome.rolled_back,
        outcome.rungs,
        unknown,
        leaves,
    )


@torch.no_grad()
def subnormal_shares(grads: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of each gradient the share of elements whose magnitude is below the smallest normal number of its dtype, but not
    0, among at most SAMPLE of them, evenly spaced; on the device and in the dtype of ``like``. A sparse gradient is
    looked at where it lists elements; the others are 0."""
    shares = like.new_zeros(len(grads))
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor, float]]] = {}
    for i, grad in enumerate(grads):
        flat = dense(grad).reshape(-1)
        if flat.numel():
            sample = flat[:: -(-flat.numel() // SAMPLE)] if flat.numel() > SAMPLE else flat
            stands_for = len(sample) * (grad.numel() / flat.numel())
            kinds.setdefault((grad.device, grad.dtype), []).append((i, sample, stands_for))
    for (device, dtype), members in kinds.items():
        places, samples, elements = zip(*members, strict=True)
        values = torch.cat(samples)
        values = torch.view_as_real(values).flatten(1) if values.is_complex() else values.unsqueeze(1)
        values = values.to(torch.float32) if dtype in FLOAT8 else values
        size = values.abs()
        counts = ((size > 0) & (size < torch.finfo(dtype).smallest_normal)).sum(dim=1).cumsum(0)
        ends = torch.tensor([len(sample) for sample in samples], device="cpu").cumsum(0)
        at_ends = counts[(ends - 1).to(device, non_blocking=True)]
        own = at_ends.diff(prepend=at_ends.new_zeros(1)).to(like)
        lengths = on_device([count * values.shape[1] for count in elements], like.dtype, like.device)
        shares[on_device(places, torch.int64, like.device)] = own / lengths
    return shares


class Shipment:
    """What some sightings hold, on its way.

    Attributes:
        sightings: whose it is.
    """

    def __init__(self, sightings: list[Sighting]) -> None:
        self.sightings = sightings
        aboard = [leaf for each in sightings for leaf in each.leaves if isinstance(leaf, Tensor)]
        if not aboard:
            self._sent = Sent(torch.empty(0, device="cpu"))
            return
        # an accelerator where one of them lies on one: nothing is to be waited for on its way here
        home = next((leaf.device for leaf in aboard if leaf.device.type != "cpu"), aboard[0].device)
        here = [leaf if leaf.device == home else leaf.to(home, non_blocking=True) for leaf in aboard]
        self._sent = Sent(torch.cat([leaf.detach().reshape(-1) for leaf in here]))

    @property
    def has_arrived(self) -> bool:
        return self._sent.has_arrived

    def unpack(self) -> list[list[Any]]:
        """The leaves of each sighting as the host can use them: numbers, and arrays for all tensors but those with one
        element and no dimension. Waits until they have arrived."""
        values: NDArray[Any] = self._sent.values().numpy()
        at = 0
        unpacked = []
        for each in self.sightings:
            leaves: list[Any] = []
            for leaf in each.leaves:
                if not isinstance(leaf, Tensor):
                    leaves.append(leaf)
                    continue
                piece = values[at : at + leaf.numel()]
                at += leaf.numel()
                leaves.append(piece.reshape(leaf.shape) if leaf.dim() else float(piece[0]))
            unpacked.append(leaves)
        return unpacked
