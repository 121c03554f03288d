"""The ceilings that torch reaches, for `gpu.py`: reading, copying, a large matrix product; one JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import ceilings
from bench.harness import Contender, Room

_CALLS = 15


def timed(contender: Contender, room: Room) -> dict[str, Any]:
    """The median call, once the machine has warmed to it."""
    assert contender.work is not None
    contender.timed(_CALLS, 0, room)
    seconds = contender.timed(_CALLS, 0, room)
    return {
        "name": contender.name,
        "milliseconds": round(1e3 * seconds, 4),
        "gigabytes_per_second": round(contender.work.bytes / seconds / 1e9, 2),
        "giga_operations_per_second": round(contender.work.operations / seconds / 1e9, 1),
        "operations_are": contender.work.unit,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    room = Room(parser.parse_args().device, torch.get_num_threads())
    contenders = (ceilings.read(room), ceilings.copy(room), ceilings.matmul(room, torch.bfloat16))
    print(json.dumps([timed(contender, room) for contender in contenders]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
