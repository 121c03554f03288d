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

from bench import DEFAULT, FAMILIES, ceilings, machine, results
from bench.harness import Case, Contender, Protocol, Room, Samples, admit, measure, summarise
from bench.levels import Workers
from embedding_kernels.ops._registry import OPERATORS

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


def cases_for(family: str, device: torch.device, quick: bool) -> list[Case]:
    """What of a family is measured on a device: no levels of the processor's instruction set on a GPU, and no
    operators that it has no kernel for; what is sized for a GPU comes first there, in the order of its file."""
    on_host = device.type == "cpu"
    found = [
        case
        for op, cases in FAMILIES[family].items()
        for case in cases
        if case.where in ("both", device.type)
        and (not quick or case.quick)
        and (on_host or not (case.levels or (op in OPERATORS and OPERATORS[op].cpu_only)))
    ]
    return sorted(found, key=lambda case: case.where != "cuda")


def _chosen(family: str, arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in cases_for(family, arguments.device, arguments.quick)
        if (not arguments.op or case.op in arguments.op) and arguments.case in case.title
    ]


def time_case(case: Case, built: list[Contender], room: Room, protocol: Protocol) -> dict[str, Any]:
    """Check and time a case's contenders; its entry in the results."""
    contenders, refused = admit(built)
    calibration = ceilings.fma(room)
    samples = Samples({})
    with tqdm(total=protocol.repetitions, desc=f"{case.op}: {case.title}", leave=False, file=sys.stderr) as bar:
        for samples in measure(contenders, calibration, protocol, room):
            bar.update(len(samples.kept(protocol.tolerance)) - bar.n)
    return summarise(case, contenders, refused, calibration, samples, protocol)


def paced(protocol: Protocol, deadline: float, cases_left: float, least: float = 0.5) -> Protocol:
    """Less time for a case when, on a busy machine, there is less left; preparing it takes its share."""
    share = 0.6 * (deadline - time.monotonic()) / cases_left
    return replace(protocol, seconds=min(protocol.seconds, max(share, least)))


def header(family: str, room: Room, protocol: Protocol) -> dict[str, Any]:
    """A family's result without its cases."""
    return {
        "schema": 1,
        "family": family,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": 0.0,
        "quick": room.quick,
        "command": machine.command(),
        "git": machine.commit(),
        "machine": machine.facts(room.device, room.threads),
        "versions": machine.versions(),
        "protocol": {**asdict(protocol), "cold_bytes": room.cold_bytes},
        "cases": [],
    }


def run_family(family: str, cases: list[Case], room: Room, protocol: Protocol) -> dict[str, Any]:
    """Measure the cases; the whole result."""
    started, whole = time.monotonic(), header(family, room, protocol)
    deadline = started + _FAMILY_SECONDS.get(family, 170.0)
    with Workers(whole["machine"]["isa_levels"], room) as workers:
        for done, case in enumerate(tqdm(cases, desc=family, file=sys.stderr)):
            built = workers.contenders(case) if case.levels else case.build(room)
            whole["cases"].append(time_case(case, built, room, paced(protocol, deadline, len(cases) - done)))
    whole["wall_seconds"] = round(time.monotonic() - started, 1)
    return whole


def _keep(found: dict[str, Any], output: Path | None, partial_run: bool) -> None:
    """Write JSON and pictures. A quick or partial run replaces nothing unless a folder is named for it."""
    if partial_run and output is None:
        print("\nnot kept: name a folder with --output to keep a quick or partial run")
        return
    from bench import plot  # matplotlib, which measuring does without

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
