"""Loads the compiled libraries and remembers what could not be loaded, and why."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
#: of a block on sm_80: what the CUDA library's kernels may take, and the emulation that proves them allows
_SHARED_MEMORY = 163 * 1024


@dataclass(frozen=True)
class LibraryState:
    """One compiled library: where it is, whether it is in use and, if not, why not."""

    path: Path
    loaded: bool
    reason: str


def _load(path: Path) -> LibraryState:
    if not path.exists():
        return LibraryState(path, False, "not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's own text names only the path; the cause names the missing symbol or library
        return LibraryState(path, False, str(error.__cause__ or error))
    return LibraryState(path, True, "loaded")


def _load_cpu() -> LibraryState:
    state = _load(_HERE / "_cpu.so")
    if not state.loaded:
        raise ImportError(
            f"embedding_kernels: the compiled operators could not be loaded ({state.path.name}: {state.reason}); "
            "build them with `pip install --no-build-isolation .` under the torch that is to run them"
        )
    return state


def built_cuda_architectures() -> tuple[int, ...]:
    """Architectures (80, 90, …) that the CUDA library holds code for; written beside it by the build."""
    listing = _HERE / "_cuda.architectures"
    if not listing.exists():
        return ()
    return tuple(int("".join(filter(str.isdigit, entry))) for entry in listing.read_text().split(";") if entry)


def _cuda_refusal() -> str | None:
    """Why the CUDA library must not be loaded here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return None  # registers kernels for export; nothing can be launched
    built = built_cuda_architectures()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # code of one major version runs on later minor ones; 90a runs on 9.0 alone
        if not any(arch // 10 == major and arch % 10 <= minor for arch in built):
            names = ", ".join(f"sm_{arch}" for arch in built) or "nothing"
            return f"GPU {index} is sm_{major}{minor} and the library holds code for {names}"
        # sm_86 and sm_89 run code of sm_80, but give a block 99 KiB
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        if shared < _SHARED_MEMORY:
            return f"GPU {index} gives a block {shared} bytes of shared memory and kernels take up to {_SHARED_MEMORY}"
    return None


def _load_cuda() -> LibraryState:
    path = _HERE / "_cuda.so"
    reason = _cuda_refusal() if path.exists() else None
    return LibraryState(path, False, reason) if reason else _load(path)


def host_module() -> str | None:
    """File of the torch-free extension module, if it was built."""
    found = glob.glob(os.path.join(_HERE, "_host.*.so"))
    return found[0] if found else None


CPU = _load_cpu()
CUDA = _load_cuda()
