"""As on an accelerator, on the CPU: the host knows no value, and nothing may wait for one."""

import pathlib
import sys
from contextlib import contextmanager

import pytest
import torch

import fastclip
import fastclip.record

OWN = str(pathlib.Path(fastclip.__file__).parent)


def go_far(monkeypatch, backend):
    """As on an accelerator: no value is known to the host, and this backend serves."""
    monkeypatch.setattr(fastclip.backends, "forced", backend)
    for module in [m for name, m in sys.modules.items() if name.startswith("fastclip.")]:
        if hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", lambda tensor: False)


WAITING = (
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "__array__",
)


def brings(tensor, name, args, kwargs):
    """Whether this call copies numbers of the host to the device, and the host waits for that. Here all lies on one
    device: so what counts is how the call is written, and whether the tensor was made from numbers."""
    if name == "new_tensor":
        return True
    if name == "to":
        moves = "device" in kwargs or any(isinstance(arg, (torch.device, torch.Tensor)) for arg in args)
        return moves and hasattr(tensor, "from_numbers") and "non_blocking" not in kwargs
    places = args[0] if isinstance(args[0], tuple) else args[:1]
    return any(isinstance(place, list) or hasattr(place, "from_numbers") for place in places)


BRINGING = ("new_tensor", "__getitem__", "__setitem__", "to")


class no_waiting:
    """What would wait for a device raises, but for the host's own copy of the count of skipped steps, and in functions
    that are ``allowed`` to look: at what lies on the host anyway."""

    def __init__(self, *allowed):
        self.allowed = [function.__code__ for function in (fastclip.record.Echo.latest, *allowed)]

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in WAITING:
            self.patch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))
        for name in BRINGING:
            self.patch.setattr(torch.Tensor, name, self._bringing(name, getattr(torch.Tensor, name)))
        self.patch.setattr(torch, "tensor", self._marking(torch.tensor))

    def _refusing(self, name, original):
        def refuse(tensor, *args, **kwargs):
            code = sys._getframe(1).f_code
            if code in self.allowed:
                return original(tensor, *args, **kwargs)
            raise AssertionError(f"{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name} waits: {name}")

        return refuse

    def _bringing(self, name, original):
        def bring(tensor, *args, **kwargs):
            code = sys._getframe(1).f_code
            if code.co_filename.startswith(OWN) and brings(tensor, name, args, kwargs):
                raise AssertionError(f"{code.co_name} waits: {name} brings the host's numbers to the device")
            made = original(tensor, *args, **kwargs)
            return made.detach() if name == "to" else made  # which is on the device now

        return bring

    def _marking(self, original):
        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            made.from_numbers = True
            return made

        return make

    def __exit__(self, *error):
        self.patch.undo()


@contextmanager
def far_away():
    """Far from the host for some lines."""
    with pytest.MonkeyPatch.context() as patches, no_waiting():
        go_far(patches, "reference")
        yield
