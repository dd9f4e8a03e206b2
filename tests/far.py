"""As on an accelerator, on the CPU: the host knows no value, and nothing may wait for one."""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

import fastclip
import fastclip.record


def go_far(monkeypatch, backend):
    """As on an accelerator: no value is known to the host, and this backend serves."""
    fastclip.backends.forced = backend
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


class no_waiting:
    """What would wait for a device raises, but for the host's own copy of the count of skipped steps."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in WAITING:
            self.patch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))

    def _refusing(self, name, original):
        def refuse(tensor, *args, **kwargs):
            code = sys._getframe(1).f_code
            if code is fastclip.record.Echo.latest.__code__:
                return original(tensor, *args, **kwargs)
            raise AssertionError(f"{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name} waits: {name}")

        return refuse

    def __exit__(self, *error):
        self.patch.undo()


@contextmanager
def far_away(may_wait=False):
    """Far from the host for some lines."""
    with pytest.MonkeyPatch.context() as patches, nullcontext() if may_wait else no_waiting():
        go_far(patches, "reference")
        yield
