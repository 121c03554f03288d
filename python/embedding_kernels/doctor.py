"""What is installed, what is active and, for the rest, why not."""

from __future__ import annotations

import os
import platform
from importlib import metadata

Section = tuple[str, list[tuple[str, str]]]

_VARIABLES = {
    "EMBEDDING_KERNELS_ISA": "portable, avx2, avx512 or amx for the CPU kernels; read once at load",
    "EMBEDDING_KERNELS_BACKEND": "reference, cpu, triton or cuda for every public function",
    "EMBEDDING_KERNELS_HOPPER": "none or all that the kernels for Hopper can serve goes there; else long sequences",
    "EMBEDDING_KERNELS_CHECK": "1: values of offsets and masks are checked on CUDA too, at the cost of a sync",
}
_PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "faiss-cpu", "safetensors")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_rows() -> list[tuple[str, str]]:
    from . import _host

    try:
        level = _host.isa()
    except ValueError as error:
        level = f"none: {error}"
    return [
        ("processor", f"{platform.machine()}, {os.cpu_count()} cores"),
        ("instruction sets of this processor and build", ", ".join(_host.isa_levels())),
        ("instruction set in use", level),
        ("compiler", _host.compiler),
        ("built against torch", _host.built_for_torch),
    ]


def _triton_state() -> str:
    version = _version("triton")
    if version == "not installed":
        return "not installed: CUDA tensors are served only where the CUDA library has a kernel"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{version}, interpreter (TRITON_INTERPRET=1): runs on CPU tensors, slowly"
    return version


def _gpu_rows() -> list[tuple[str, str]]:
    import torch

    from . import _library

    architectures = ", ".join(f"sm_{arch}" for arch in _library.built_cuda_architectures()) or "none"
    rows = [
        ("torch's CUDA", torch.version.cuda or "none: this is a CPU build of torch"),
        ("CUDA library", f"{_library.CUDA.reason} ({_library.CUDA.path.name}, architectures: {architectures})"),
        ("Triton", _triton_state()),
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"))
    return rows


def _cuda_state(name: str, cpu_only: bool, has_kernel: bool, triton: str) -> str:
    from .ops.cuda_table import TABLE, leaves_some

    if cpu_only:
        return "refused (the operator has no GPU kernel)"
    if not has_kernel:
        return triton
    rows = [str(row) for row in TABLE.get(name, ())]
    if rows and leaves_some(name):
        rows.append(f"else {triton}")
    return "CUDA C++" + (f" ({'; '.join(rows)})" if rows else "")


def _operator_rows() -> list[tuple[str, str]]:
    from . import ops
    from .ops._registry import OPERATORS, has_cuda_kernel

    del ops  # imported for its registrations
    triton = "Triton" if _version("triton") != "not installed" else "nothing (Triton is not installed)"
    return [
        (name, "CPU tensors: C++ · CUDA tensors: " + _cuda_state(name, op.cpu_only, has_cuda_kernel(name), triton))
        for name, op in OPERATORS.items()
    ]


def _model_rows() -> list[tuple[str, str]]:
    if _version("transformers") == "not installed":
        return [("every model", "needs the models extra (transformers is not installed)")]
    from .models.backbones import BertBackbone, DecoderBackbone, PluggedBackbone

    return [
        ("BERT, RoBERTa, XLM-RoBERTa, CamemBERT", BertBackbone.road),
        ("Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2", DecoderBackbone.road),
        ("other models of transformers' attention interface", PluggedBackbone.road),
        ("the rest (MPNet, DeBERTa, …)", "transformers' padded forward"),
    ]


def report() -> list[Section]:
    """Sections of (what, state) for `embedding-kernels doctor`."""
    return [
        ("Packages", [("embedding-kernels", _version("embedding-kernels")), *((p, _version(p)) for p in _PACKAGES)]),
        ("CPU", _cpu_rows()),
        ("GPU", _gpu_rows()),
        ("Operators", _operator_rows()),
        ("Models in Embedder, which says its own in repr()", _model_rows()),
        ("Environment", [(name, f"{os.environ.get(name) or 'not set'} ({use})") for name, use in _VARIABLES.items()]),
    ]
