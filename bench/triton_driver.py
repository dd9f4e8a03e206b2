"""A stand-in for Triton's driver: kernels are compiled, and not run. One for a process, no GPU's."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Launches = list[tuple[Any, tuple[Any, ...]]]  # compiled kernel, and what it was launched with

_launched: Launches | None = None  # a list keeps what it holds alive: memory that a launch was given is not used again


class Launcher:
    """Triton makes one for each compiled kernel, and calls it for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *launch: Any) -> None:
        if _launched is not None:
            _launched.append((self, launch))


class Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class StandIn:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda


def stand_in(launched: Launches | None = None) -> None:
    """From now on Triton has this driver, which lists in ``launched``, if given, what would have run."""
    global _launched
    _launched = launched
    driver.set_active(StandIn())
