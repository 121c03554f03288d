"""Where and with what a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from embedding_kernels import _host

_ROOT = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("embedding-kernels", "torch", "numpy", "faiss-cpu", "numkong", "sentence-transformers", "triton")
_TELLING_FLAGS = re.compile(r"(avx\w*|fma|f16c|popcnt|amx\w*|gfni|asimd\w*|sve\w*|sme\w*)$")


def _cpu_fields() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cache_sizes() -> dict[str, str]:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
        sizes[f"L{level} {kind.lower()}"] = (index / "size").read_text().strip()
    return sizes


def facts(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine, for people who compare results."""
    fields = _cpu_fields()
    flags = fields.get("flags", fields.get("Features", "")).split()
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "caches": _cache_sizes(),
        "flags": sorted(flag for flag in flags if _TELLING_FLAGS.match(flag)),
        "isa_level": _host.isa(),
        "isa_levels": list(_host.isa_levels()),
        "load_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory"] = properties.total_memory
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["gpu_capability"] = [properties.major, properties.minor]
    return found


def versions() -> dict[str, str]:
    """Of Python, the compiler and every distribution that takes part."""
    found = {"python": platform.python_version(), "compiler": _host.compiler, "blas": _blas()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _blas() -> str:
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit measured, and whether the tree differed from it (results and plots aside)."""
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!bench/plots")
    return {"commit": _git("rev-parse", "--verify", "-q", "HEAD"), "dirty": None if changed is None else bool(changed)}


def slug(machine: dict[str, Any]) -> str:
    """Short name for files: processor (or GPU), cores, level of instruction set."""
    name = machine.get("gpu") or re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", machine["cpu"], flags=re.IGNORECASE)
    parts = [name, f"{machine['cores']}c", machine["isa_level"]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def command() -> str:
    """How this run was asked for."""
    return " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
