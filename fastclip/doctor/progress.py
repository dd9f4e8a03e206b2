"""A progress bar where tqdm is installed and it takes some seconds; else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DELAY = 3.0  # seconds until it shows


class _Silent:
    def update(self) -> None:
        pass


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """Something with ``update()``."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _Silent()
        return
    with tqdm(total=total, desc="learning rates", delay=DELAY, leave=False, disable=None) as bar:
        yield bar
