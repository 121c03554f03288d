"""Contenders that run within something that is chosen outside what is timed: a backend of torch, a road of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from .harness import Contender, Room

ROADS = {"ours, kernels of sm_80": "none", "ours, Hopper's kernels throughout": "all"}
_ROAD = "EMBEDDING_KERNELS_HOPPER"


class Within(Contender):
    """A contender whose calls run within a context, entered anew for its check and for every sample."""

    def __init__(
        self,
        name: str,
        call: Callable[[int], Any],
        verify: Callable[[Any], None] | None,
        context: Callable[[], AbstractContextManager[Any]],
        note: str = "",
    ) -> None:
        super().__init__(name, call, verify, note=note)
        self.context = context

    def timed(self, calls: int, turn: int, room: Room) -> float:
        with self.context():
            return super().timed(calls, turn, room)

    def check(self) -> None:
        with self.context():
            super().check()


@contextmanager
def road(answer: str) -> Iterator[None]:
    """Which calls go to Hopper's own kernels; the library reads the variable at every call."""
    before = os.environ.get(_ROAD)
    os.environ[_ROAD] = answer
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ROAD]
        else:
            os.environ[_ROAD] = before


def has_roads(room: Room) -> bool:
    """Only Hopper has more than one."""
    return room.device.type == "cuda" and torch.cuda.get_device_capability(room.device)[0] == 9


def other_roads(ours: Contender, names: tuple[str, ...], room: Room) -> list[Contender]:
    """Ours by the roads of those names that the device has."""
    if not has_roads(room):
        return []
    return [
        Within(name, ours.call, ours.verify, partial(road, answer), f"{_ROAD}={answer}")
        for name, answer in ROADS.items()
        if name in names
    ]
