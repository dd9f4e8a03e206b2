"""Several optimizers as one, for one norm over all their parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastclip.riding import RIDERS, aboard

HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class _States(MutableMapping[Tensor, Any]):
    """The states of all of them, each in its own place."""

    def __init__(self, states: list[MutableMapping[Tensor, Any]], owners: dict[Tensor, int]) -> None:
        self._states, self._owners = states, owners

    def _of(self, parameter: Tensor) -> MutableMapping[Tensor, Any]:
        owner = self._owners.get(parameter)
        if owner is not None:
            return self._states[owner]
        for state in self._states:
            if parameter in state:  # it has left its group, and its state is still there
                return state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for state in self._states for parameter in state)

    def __len__(self) -> int:
        return sum(map(len, self._states))


class Several(Optimizer):
    """Steps each of its optimizers in turn; their param groups, in a row, are its own.

    Attributes:
        parts: the optimizers.
    """

    _fastclip_several = True

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        # Optimizer.__init__ is not called: it would build param_groups and state of its own.
        self.parts = list(parts)
        for name in HOOKS:
            setattr(self, name, OrderedDict())

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        owners = {p: i for i, part in enumerate(self.parts) for group in part.param_groups for p in group["params"]}
        return _States([part.state for part in self.parts], owners)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return {}

    def step(self) -> None:  # type: ignore[override]
        """Each one's step; what rides with this one rides with all of them."""
        riders = {name: vars(self)[name] for name in RIDERS if name in vars(self)}
        for part in self.parts:
            if riders:
                with aboard(part, **riders):
                    part.step()
            else:
                part.step()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Each one's own, with what was given here and no more: those of apex have no argument."""
        given = () if set_to_none is None else (set_to_none,)
        for part in self.parts:
            part.zero_grad(*given)

    def state_dict(self) -> dict[str, Any]:
        """``{"optimizers": [...]}``, the state dict of each."""
        return {"optimizers": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["optimizers"]
        if len(saved) != len(self.parts):
            raise ValueError(f"the state of {len(saved)} optimizers was saved, here are {len(self.parts)}")
        for part, own in zip(self.parts, saved, strict=True):
            part.load_state_dict(own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise TypeError("several optimizers are clipped here as one: call add_param_group of the one it belongs to")

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Several.__init__(self, state["parts"])

    def __repr__(self) -> str:
        return f"[{', '.join(type(part).__name__ for part in self.parts)}]"
