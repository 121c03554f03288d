"""Measure. ``python bench/run.py --help``; how to read what comes out: bench/README.md."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import DEFAULT, FAMILIES, ceilings, machine, plot, results
from bench.harness import Case, Protocol, Room, Samples, admit, measure, summarise
from bench.levels import Workers

# calls that take long want longer for as many repetitions
_CASE_SECONDS = {
    "attention": 14.0,
    "embedder": 30.0,
    "hamming_large": 40.0,
    "latent_attention_head": 40.0,
    "multi_view": 110.0,
    "paragraph_vector": 60.0,
    "token_prepending": 60.0,
}
# what a family may take, else 170; kept to by measuring less, never by leaving a case out
_FAMILY_SECONDS = {
    "attention": 260.0,
    "embedder": 260.0,
    "hamming_large": 1200.0,
    "latent_attention_head": 420.0,
    "multi_view": 420.0,
    "norm": 260.0,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of embedding-kernels against its peers.")
    parser.add_argument(
        "--family",
        choices=list(FAMILIES),
        action="append",
        help=f"default: {', '.join(DEFAULT)}; may be repeated",
    )
    parser.add_argument("--op", action="append", help="only this operator; may be repeated")
    parser.add_argument("--case", default="", help="only cases whose title contains this")
    parser.add_argument("--quick", action="store_true", help="few cases, few repetitions: does it run, is it right")
    parser.add_argument("--output", type=Path, help="folder for results; default: bench/results and bench/plots")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for every contender alike")
    return parser.parse_args()


def _chosen(family: str, arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for op, cases in FAMILIES[family].items()
        for case in cases
        if (not arguments.quick or case.quick)
        and (not arguments.op or op in arguments.op)
        and arguments.case in case.title
        and (not case.levels or arguments.device.type == "cpu")
    ]


def _run_case(case: Case, room: Room, workers: Workers, protocol: Protocol) -> dict[str, Any]:
    contenders, refused = admit(workers.contenders(case) if case.levels else case.build(room))
    calibration = ceilings.fma(room)
    samples = Samples({})
    with tqdm(total=protocol.repetitions, desc=f"{case.op}: {case.title}", leave=False, file=sys.stderr) as bar:
        for samples in measure(contenders, calibration, protocol, room):
            bar.update(len(samples.kept(protocol.tolerance)) - bar.n)
    return summarise(case, contenders, refused, calibration, samples, protocol)


def _paced(protocol: Protocol, deadline: float, cases_left: int) -> Protocol:
    """Less time for a case when, on a busy machine, there is less left; preparing it takes its share."""
    share = 0.6 * (deadline - time.monotonic()) / cases_left
    return replace(protocol, seconds=min(protocol.seconds, max(share, 0.5)))


def run_family(family: str, cases: list[Case], room: Room, protocol: Protocol) -> dict[str, Any]:
    """Measure the cases; the whole result."""
    where = machine.facts(room.device, room.threads)
    started, date = time.monotonic(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = []
    with Workers(where["isa_levels"], room) as workers:
        for done, case in enumerate(tqdm(cases, desc=family, file=sys.stderr)):
            paced = _paced(protocol, started + _FAMILY_SECONDS.get(family, 170.0), len(cases) - done)
            found.append(_run_case(case, room, workers, paced))
    return {
        "schema": 1,
        "family": family,
        "date": date,
        "wall_seconds": round(time.monotonic() - started, 1),
        "quick": room.quick,
        "command": machine.command(),
        "git": machine.commit(),
        "machine": where,
        "versions": machine.versions(),
        "protocol": {**asdict(protocol), "cold_bytes": room.cold_bytes},
        "cases": found,
    }


def _keep(found: dict[str, Any], output: Path | None, partial_run: bool) -> None:
    """Write JSON and pictures. A quick or partial run replaces nothing unless a folder is named for it."""
    if partial_run and output is None:
        print("\nnot kept: name a folder with --output to keep a quick or partial run")
        return
    name = f"{machine.slug(found['machine'])}-{found['family']}"
    path = (output or results.DIRECTORY) / f"{name}.json"
    results.write(found, path)
    drawn = plot.draw(found, name, output) if output else plot.draw(found, name)
    print("\n" + "\n".join(map(str, [path, *drawn])))


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    cold = 128 << 20 if arguments.quick else 512 << 20
    room = Room(arguments.device, arguments.threads, arguments.quick, cold)
    try:
        for family in arguments.family or DEFAULT:
            cases = _chosen(family, arguments)
            if not cases:
                continue
            protocol = (
                Protocol.quick() if arguments.quick else Protocol(seconds=_CASE_SECONDS.get(family, Protocol.seconds))
            )
            found = run_family(family, cases, room, protocol)
            print(f"{family}: times are medians; × is a peer's time over ours, median [quartiles] of paired ratios")
            print("\n".join(results.table(found)), flush=True)
            _keep(found, arguments.output, bool(arguments.quick or arguments.op or arguments.case))
    except KeyboardInterrupt:
        print("\ninterrupted; the family being measured was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
