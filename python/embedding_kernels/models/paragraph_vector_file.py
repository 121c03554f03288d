"""Tensors and options of a model in one safetensors file, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    """Written beside its place, flushed to the disk and moved there."""
    save_file = _safetensors("safetensors.torch").save_file
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {**header, "options": json.dumps(options), "sha256": _digest(held, options)}
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        rights = partial.stat().st_mode & 0o777
        save_file(held, partial, metadata=metadata)
        partial.chmod(rights)  # safetensors makes files that only their owner can read
        _flush(partial)
        os.replace(partial, target)
        _flush(target.parent)  # the directory's entry is not durable before
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def read_tensors(path: str | os.PathLike[str], header: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and options of a file with this header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another header, is truncated, or has been altered.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"load: {name} is not a file")
    safetensors = _safetensors("safetensors")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"load: {name} is truncated or no safetensors file: {error}") from error
    for key, expected in header.items():
        if metadata.get(key) != expected:
            raise ValueError(f"load: {name} must have {key} {expected!r} in its header, got {metadata.get(key)!r}")
    try:
        options = json.loads(metadata["options"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"load: {name} has been altered: its header holds no options") from error
    if not isinstance(options, dict) or metadata.get("sha256") != _digest(tensors, options):
        raise ValueError(f"load: {name} has been altered: it does not have the checksum stored")
    return tensors, options


def _digest(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'a model is kept in safetensors, which is not installed: pip install "embedding-kernels[models]"'
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
