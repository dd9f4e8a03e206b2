"""Which tensors a run tells of, and where each stands in its records."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastclip.record import Seen

Places: TypeAlias = "slice | NDArray[np.intp]"


class Tensors:
    """The parameters that a run tells of, each by its place; new ones join at the end.

    Args:
        include: matches the names of those whose own norms are recorded; None for all.
        given: parameter -> its name, where the optimizer's own name for it shall not count.
    """

    def __init__(self, include: re.Pattern[str] | None, given: Mapping[Tensor, str]) -> None:
        self._include, self._given = include, given
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.dims: list[int] = []
        self.included: list[int] = []
        self._parameters: list[Tensor] = []  # kept, so that no other gets the identity of one of them
        self._place: dict[int, int] = {}
        self._taken: set[str] = set()
        self._latest: tuple[list[Tensor], tuple[list[int] | None, int], Places] = ([], (None, 0), slice(0, 0))

    def add(self, parameters: Sequence[Tensor], names: Iterable[str]) -> None:
        """Those of them that are new."""
        for parameter, name in zip(parameters, names, strict=True):
            if id(parameter) in self._place:
                continue
            own = self._given.get(parameter, name)
            while own in self._taken:
                own += "'"
            self._taken.add(own)
            self._place[id(parameter)] = len(self.names)
            if self._include is None or self._include.search(own):
                self.included.append(len(self.names))
            self.names.append(own)
            self.sizes.append(parameter.numel())
            self.dims.append(parameter.dim())
            self._parameters.append(parameter)

    def places(self, seen: Seen) -> Places:
        """Where the columns of a reading belong; parameters that are new join."""
        listed, columns = seen.listed, seen.rows.shape[1]
        latest, of, places = self._latest
        if (seen.positions, columns) != of or len(listed) != len(latest) or not all(map(operator.is_, listed, latest)):
            own = [listed[i] for i in (range(columns) if seen.positions is None else seen.positions)]
            if any(id(parameter) not in self._place for parameter in own):
                self.add(own, seen.names)
            found = [self._place[id(parameter)] for parameter in own]
            in_order = found == list(range(columns))
            places = slice(0, columns) if in_order else np.array(found, dtype=np.intp)
            self._latest = listed, (seen.positions, columns), places
        return places
