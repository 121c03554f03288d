"""Calls that all ranks of a process group make together: an error on one is one on all, and none waits for ever."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_STATUS_BYTES = 4096  # of one size, so that one exchange does
_ERROR_LENGTH = 600  # characters, of at most six bytes each

Result = TypeVar("Result")


@dataclass
class Part(Generic[Result]):
    """What one rank has done in a call: its result, what must be the same on all ranks, and what it tells them."""

    result: Result
    same: str = ""
    told: Any = None


class Ranks:
    """All ranks, in process groups of their own: gloo, and NCCL for tensors on GPUs.

    Args:
        op: whose errors these are.
        timeout: seconds to wait for the others.
    """

    def __init__(self, op: str, timeout: float) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"{op}: timeout must be a number of seconds above 0, got {timeout!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{op}: there must be a process group, got none: start the script with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout = timedelta(seconds=timeout)
        self._apart = False
        self._group = self._new_group(op, "gloo")
        self._device_group: Any = None

    def use(self, op: str, device: torch.device) -> None:
        """Make ready for tensors on ``device``, which must be of one type on all ranks."""
        if device.type == "cuda":
            self._device_group = self._new_group(op, "nccl")

    @contextlib.contextmanager
    def call(self, op: str) -> Iterator[None]:
        """One call of all ranks. An error in it that not all of them have heard of leaves them out of step for good."""
        if self._apart:
            raise RuntimeError(f"{op}: the ranks lost each other in an earlier call; start all processes anew")
        self._apart = True
        yield
        self._apart = False

    def part(self) -> None:
        """Refuse all further calls."""
        self._apart = True

    def together(self, op: str, work: Callable[[], Part[Result]], what: str = "") -> tuple[Result, list[Any]]:
        """Do ``work`` on every rank; returns this rank's result and what each rank tells. Only within `call`.

        Raises:
            Exception: what ``work`` raised here.
            RuntimeError: it raised on another rank, another rank makes another call, or one does not answer.
            ValueError: ``what`` is not the same on all ranks.
        """
        part: Part[Any] = Part(None)
        failure: Exception | None = None
        try:
            part = work()
        except Exception as error:
            failure = error
        words = "" if failure is None else f"{type(failure).__name__}: {failure}"[:_ERROR_LENGTH]
        statuses = self._exchange(op, {"op": op, "error": words, "same": part.same, "told": part.told})
        failure = failure or _disagreement(op, what, statuses)
        if failure is not None:
            self._apart = False  # all ranks raise here
            raise failure
        return part.result, [status["told"] for status in statuses]

    def agreed(self, op: str, what: str, told: list[Any]) -> Any:
        """What all ranks tell that tell anything but None; None where none does. Only within `call`.

        Raises:
            ValueError: they tell different things.
        """
        known = [(rank, value) for rank, value in enumerate(told) if value is not None]
        for rank, value in known:
            if value != known[0][1]:
                self._apart = False  # all ranks raise here
                raise ValueError(
                    f"{op}: {what} must be the same on all ranks, got {known[0][1]} on rank {known[0][0]} and {value} "
                    f"on rank {rank}"
                )
        return known[0][1] if known else None

    def gather(self, op: str, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and dtype."""
        if tensor.numel() == 0:
            return [tensor] * self.size
        gathered = list(tensor.new_empty(self.size, *tensor.shape))
        with self._answers(op):
            dist.all_gather(gathered, tensor.contiguous(), group=self._device_group or self._group)
        return gathered

    def _new_group(self, op: str, backend: str) -> Any:
        with self._answers(op):
            return dist.new_group(backend=backend, timeout=self._timeout)

    def _exchange(self, op: str, status: dict[str, Any]) -> list[dict[str, Any]]:
        sent = torch.zeros(_STATUS_BYTES, dtype=torch.uint8)
        text = json.dumps(status, ensure_ascii=False).encode(errors="replace")
        sent[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        received = list(torch.empty(self.size, _STATUS_BYTES, dtype=torch.uint8))
        with self._answers(op):
            dist.all_gather(received, sent, group=self._group)
        return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in received]

    @contextlib.contextmanager
    def _answers(self, op: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo has no narrower one for a closed connection or a timeout
            seconds = self._timeout.total_seconds()
            reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0])  # without gloo's file and line
            raise RuntimeError(
                f"{op}: rank(s) died or did not answer rank {self.rank} of {self.size} within {seconds:g} s: {reason}"
            ) from error


def _disagreement(op: str, what: str, statuses: list[dict[str, Any]]) -> Exception | None:
    """What keeps the ranks from going on together, if anything does."""
    for rank, status in enumerate(statuses):
        if status["op"] != op:
            return RuntimeError(f"{op}: all ranks must make the same call, rank {rank} called {status['op']}")
    for rank, status in enumerate(statuses):
        if status["error"]:
            return RuntimeError(f"{op}: rank {rank} failed: {status['error']}")
    for rank, status in enumerate(statuses):
        if status["same"] != statuses[0]["same"]:
            return ValueError(f"{op}: {what} must be the same on all ranks, ranks 0 and {rank} differ")
    return None
