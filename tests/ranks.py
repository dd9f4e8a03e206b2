"""Processes that stay: the ranks of a gloo group, which run one function of a test after the other.

They fork from one server that has imported torch, so a pool starts in a second, and each is started once per test
process. What a test wants to run on the ranks is a function at the top level of its module.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = 20.0  # seconds that gloo waits for a rank

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fastclip"]
)


class RankError(AssertionError):
    """A function raised on a rank; the message holds what it said there."""


class Failure:
    """What a rank raised."""

    def __init__(self, error: Exception) -> None:
        self.name, self.message = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __repr__(self) -> str:
        return f"{self.name}: {self.message}"


class Ranks:
    """``world`` processes in one gloo group."""

    def __init__(self, world: int, group_timeout: float = GROUP_TIMEOUT) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            here, there = server.Pipe()
            process = server.Process(target=_serve, args=(there, store, rank, world, group_timeout), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def outcomes(
        self, work: Callable[..., Any], *args: Any, within: float = 90.0, of: Sequence[int] | None = None
    ) -> list[Any]:
        """What each rank returned, or the :class:`Failure` it raised. Kills them all if one takes longer.

        Waits for the ranks ``of`` alone, if given; after that the pool can only be closed.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, args)))
        end = time.monotonic() + within
        answers: list[Any] = []
        for rank in range(self.world) if of is None else of:
            pipe = self._pipes[rank]
            if not pipe.poll(max(end - time.monotonic(), 0.0)):
                self.close()
                raise RankError(f"rank {rank} of {self.world} is still in {work.__name__} after {within:g} s")
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                answers.append(None)  # it has died
        return answers

    def run(self, work: Callable[..., Any], *args: Any, within: float = 90.0) -> list[Any]:
        """What each rank returned; raises if one raised."""
        answers = self.outcomes(work, *args, within=within)
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failure):
                self.close()  # the others may be somewhere else by now
                raise RankError(f"on rank {rank} of {self.world}:\n{answer.trace}")
        return answers

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


_pools: dict[int, Ranks] = {}


def ranks(world: int) -> Ranks:
    """The pool of that size; a new one if there is none, or the last one broke."""
    if world not in _pools or not _pools[world].alive:
        _pools[world] = Ranks(world)
    return _pools[world]


@atexit.register
def close_all() -> None:
    for pool in _pools.values():
        pool.close()


def _serve(pipe: Connection, store: str, rank: int, world: int, group_timeout: float) -> None:
    import torch

    warnings.simplefilter("ignore")  # torch.distributed warns of itself
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=group_timeout),
    )
    while True:
        try:
            work, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = work(*args)
        except Exception as error:
            answer = Failure(error)
        pipe.send_bytes(pickle.dumps(answer))  # not send(), which torch teaches to share memory
