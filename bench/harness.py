"""How anything is timed here.

A shared machine drifts between speeds within a minute, so times taken apart cannot be divided. Every repetition
therefore runs ours, the peers and the ceilings once each, in shuffled order, between two runs of a fixed piece of
arithmetic (the calibration). What is reported is the median, with quartiles, of the ratios *within* repetitions;
repetitions in which the calibration moved by more than a tenth are dropped and counted.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

OURS = "embedding-kernels"


class WrongAnswerError(RuntimeError):
    """A contender's answer failed its check: a wrong kernel is not timed."""


@dataclass(frozen=True)
class Work:
    """What one call has to do at least, whoever does it: bytes through memory, and operations (named by ``unit``)."""

    bytes: int
    operations: int
    unit: str


@dataclass
class Contender:
    """Something timed. ``call(turn)`` does the work once; ``turn`` picks one of the rotating copies of the input."""

    name: str
    call: Callable[[int], Any]
    verify: Callable[[Any], None] | None = None  # raises AssertionError or returns
    role: str = "peer"  # "ours", "peer", "level" or "ceiling"
    work: Work | None = None  # where it differs from the case's: ceilings
    note: str = ""

    def timed(self, calls: int, turn: int, room: Room) -> float:
        """Seconds a call: the median of ``calls``, so that one that waited for a processor does not count for all."""
        turns = range(turn, turn + calls)
        return statistics.median((_device_seconds if room.device.type == "cuda" else _host_seconds)(self.call, turns))

    def check(self) -> None:
        """Run once and verify; raises WrongAnswerError."""
        answer = self.call(0)
        try:
            if self.verify is not None:
                self.verify(answer)
        except AssertionError as error:
            raise WrongAnswerError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Room:
    """What a case needs to know of where it runs."""

    device: torch.device
    threads: int
    quick: bool = False
    cold_bytes: int = 512 << 20  # rotating copies of an input add up to at least this


def _host_seconds(call: Callable[[int], Any], turns: Iterable[int]) -> list[float]:
    seconds = []
    for turn in turns:
        start = time.perf_counter()
        call(turn)
        seconds.append(time.perf_counter() - start)
    return seconds


def _device_seconds(call: Callable[[int], Any], turns: Iterable[int]) -> list[float]:
    """Between events on the stream, nobody waiting in between: what a call costs where others stand before and after
    it, its launches hidden behind the work of the one before as far as that is long enough."""
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    for turn in turns:
        call(turn)
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


@dataclass(frozen=True)
class Case:
    """One row of the results. ``build`` makes the inputs and contenders, ours first; nothing runs before.

    ``peers`` names what ours is compared with. With ``levels`` the case is instead run by one process for each
    level of instruction set (`levels.py`), and each level is compared with the one below.

    A case of ``where="cuda"`` has a size for a GPU; ``small`` is the same, by the same builder, at one for a processor,
    where it is gone through without a GPU.
    """

    op: str
    title: str
    parameters: Mapping[str, Any]
    peers: tuple[str, ...]
    build: Callable[[Room], list[Contender]]
    work: Work
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    levels: bool = False
    tiles: bool = False  # whether the level with the tile unit ("amx") is another than the one below
    where: Literal["both", "cpu", "cuda"] = "both"  # measured: a case whose size is a processor's says little of a GPU
    small: Case | None = None
    patience: float = 1.0  # how many times as long as others it may take, where a peer needs a second a call


@dataclass(frozen=True)
class Protocol:
    """How long and how often."""

    repetitions: int = 15  # kept ones wanted
    fewest: int = 7  # kept ones without which a case is marked as not settled
    seconds: float = 7.0  # a case's measuring ends here in any case
    sample_seconds: float = 0.008  # a contender faster than this is called several times in a row
    tolerance: float = 0.10  # movement of the calibration that drops a repetition
    seed: int = 0

    @classmethod
    def quick(cls) -> Protocol:
        """Enough to see that everything runs and is right; not enough to quote."""
        return cls(repetitions=3, fewest=3, seconds=0.6, sample_seconds=0.002)


@dataclass
class Samples:
    """What was measured: seconds a call of each contender, and of the calibration, for each repetition."""

    calls: dict[str, int]
    seconds: list[dict[str, float]] = field(default_factory=list)
    calibrations: list[tuple[float, float]] = field(default_factory=list)
    cores_busy_elsewhere: float | None = None

    def kept(self, tolerance: float) -> list[int]:
        """Repetitions whose calibrations, before and after, lie within ``tolerance`` of the case's median."""
        if not self.calibrations:
            return []
        median = float(np.median(self.calibrations))
        return [
            i
            for i, pair in enumerate(self.calibrations)
            if all(abs(seconds / median - 1) <= tolerance for seconds in pair)
        ]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


class Elsewhere:
    """Cores kept busy, on average since it was made, by anybody but this process; None where it cannot be known."""

    def __init__(self) -> None:
        self._start = (time.monotonic(), time.process_time(), self._busy())

    @staticmethod
    def _busy() -> float | None:
        try:
            with open("/proc/stat") as file:
                user, nice, system, _idle, _waiting, *rest = map(int, file.readline().split()[1:])
        except (OSError, ValueError):
            return None
        return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float | None:
        wall, own, busy = self._start
        now = self._busy()
        if busy is None or now is None:
            return None
        elsewhere = (now - busy) - (time.process_time() - own)
        return round(max(0.0, elsewhere) / max(time.monotonic() - wall, 1e-9), 2)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, for the shapes of one case."""
    # of one piece of code torch compiles eight variants a process; it would run the ninth case's uncompiled
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


def copies(tensor: torch.Tensor, room: Room, most: int = 64) -> list[torch.Tensor]:
    """The tensor and as many clones as make a rotation through them miss every cache."""
    count = -(-room.cold_bytes // max(tensor.nbytes, 1))
    return [tensor, *(tensor.clone() for _ in range(min(max(count, 2), most) - 1))]


def prepared(name: str, make: Callable[[], Contender | None]) -> Contender | None:
    """The peer that is made. One that cannot be made is refused by `admit`, as one whose call fails."""
    try:
        return make()
    except Exception as error:
        failure = error.with_traceback(None)  # which holds what the peer had made

    def call(turn: int) -> Any:
        raise failure

    return Contender(name, call)


def admit(contenders: Sequence[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Those whose answer is right, and why the others are not timed. A wrong answer of ours ends the run.

    A peer may also have no kernel for the case, too little memory, or fail to compile: each library has its own errors.
    """
    admitted, refused = [], {}
    for contender in contenders:
        try:
            contender.check()
            admitted.append(contender)
        except Exception as error:
            if contender.role != "peer":
                raise
            wrong = isinstance(error, WrongAnswerError)
            refused[contender.name] = str(error) if wrong else f"{type(error).__name__}: {error}"[:500]
    return admitted, refused


def _calls_a_sample(contender: Contender, protocol: Protocol, room: Room) -> int:
    seconds = contender.timed(1, 1, room)  # the first call after the check
    if seconds < protocol.sample_seconds:
        seconds = min(seconds, contender.timed(2, 2, room))
    return max(1, min(2000, round(protocol.sample_seconds / max(seconds, 1e-7))))


#: seconds in which the previous contender's OpenMP threads stop spinning; the next one's then wake up untimed
_SETTLE = 0.003
_CALIBRATIONS = 24


def _calibrate(calibration: Contender, room: Room) -> float:
    time.sleep(_SETTLE)
    calibration.timed(_CALIBRATIONS // 2, 0, room)
    return calibration.timed(_CALIBRATIONS, 0, room)


def _repetition(contenders: Sequence[Contender], calls: Mapping[str, int], turn: int, room: Room) -> dict[str, float]:
    seconds = {}
    for contender in contenders:
        time.sleep(_SETTLE)
        count = calls[contender.name]
        if count > 1:
            contender.timed(1, turn, room)
        seconds[contender.name] = contender.timed(count, turn + 1, room)
    return seconds


def measure(
    contenders: Sequence[Contender], calibration: Contender, protocol: Protocol, room: Room
) -> Iterator[Samples]:
    """Repeat until enough is kept or time is up; yields the samples so far each time. `admit` comes before."""
    samples = Samples({contender.name: _calls_a_sample(contender, protocol, room) for contender in contenders})
    shuffled = list(contenders)
    order = random.Random(protocol.seed)
    start, turn, elsewhere = time.monotonic(), 0, Elsewhere()
    gc.collect()
    gc.disable()
    try:
        before = _calibrate(calibration, room)
        while True:
            order.shuffle(shuffled)
            samples.seconds.append(_repetition(shuffled, samples.calls, turn, room))
            after = _calibrate(calibration, room)
            samples.calibrations.append((before, after))
            before = after
            turn += max(samples.calls.values()) + 1
            if not any(contender.role == "level" for contender in contenders):  # those work in other processes
                samples.cores_busy_elsewhere = elsewhere.cores()
            yield samples
            kept = len(samples.kept(protocol.tolerance))
            if kept >= protocol.repetitions or time.monotonic() - start > protocol.seconds:
                return
    finally:
        gc.enable()


def _rates(seconds: Mapping[str, float], work: Work) -> dict[str, Any]:
    time_ = seconds["median"]
    return {
        "seconds": dict(seconds),
        "gigabytes_per_second": work.bytes / time_ / 1e9,
        "giga_operations_per_second": work.operations / time_ / 1e9,
        "operations_are": work.unit,
    }


def summarise(
    case: Case,
    contenders: Sequence[Contender],
    refused: Mapping[str, str],
    calibration: Contender,
    samples: Samples,
    protocol: Protocol,
) -> dict[str, Any]:
    """The case's entry in the results: spread of every contender, and ratios paired within repetitions."""
    kept = samples.kept(protocol.tolerance)
    used = kept if len(kept) >= 3 else list(range(len(samples.seconds)))
    rows = [samples.seconds[i] for i in used]
    assert calibration.work is not None
    ratios = []
    for peer, ours in compared(contenders):
        spread = quartiles([row[peer] / row[ours] for row in rows])
        target = 1.0 if case.levels else case.targets.get(peer)
        entry: dict[str, Any] = {"peer": peer, "ours": ours, **spread, "target": target}
        if target is not None:
            entry["met"] = spread["median"] >= target
            entry["low_quartile_met"] = spread["low"] >= target
        ratios.append(entry)
    return {
        "op": case.op,
        "title": case.title,
        "parameters": dict(case.parameters),
        "levels": case.levels,
        "work": {"bytes": case.work.bytes, "operations": case.work.operations, "operations_are": case.work.unit},
        "repetitions": {
            "kept": len(kept),
            "dropped": len(samples.seconds) - len(kept),
            "used": len(used),
            "settled": len(kept) >= protocol.fewest,
            "cores_busy_elsewhere": samples.cores_busy_elsewhere,
        },
        "calibration": _rates(quartiles([sum(samples.calibrations[i]) / 2 for i in used]), calibration.work),
        "contenders": [
            {
                "name": contender.name,
                "role": contender.role,
                "note": contender.note,
                "calls_a_sample": samples.calls[contender.name],
                **_rates(quartiles([row[contender.name] for row in rows]), contender.work or case.work),
            }
            for contender in contenders
        ],
        "absent_peers": [] if case.levels else sorted(set(case.peers) - {c.name for c in contenders} - set(refused)),
        "refused_peers": dict(refused),
        "ratios": ratios,
    }


def compared(contenders: Sequence[Contender]) -> list[tuple[str, str]]:
    """(slower expected, ours) pairs: every peer with ours, or each level with the next."""
    levels = [c.name for c in contenders if c.role == "level"]
    if levels:
        return list(itertools.pairwise(levels))
    ours = next(c.name for c in contenders if c.role == "ours")
    return [(c.name, ours) for c in contenders if c.role == "peer"]
