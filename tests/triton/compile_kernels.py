"""Compiles every Triton kernel to cubins on a machine without a GPU: `python compile_kernels.py`, one JSON line each.

Run in a process of its own, without TRITON_INTERPRET. The launchers are called on CPU tensors with the launch itself
recorded, so what is compiled is what a GPU would compile for such tensors: signatures, alignments, constants.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import embedding_kernels

KERNELS = Path(embedding_kernels.__file__).parent / "kernels"
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90)
DISASSEMBLED = 90
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# ---- calls whose kernels are compiled: typical widths in every dtype, an odd width in one ----


def _codes(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.uint8)


def _anchor_scores_calls(kernels: Any) -> Iterator[Any]:
    """t5-base's width in every dtype, one that is not taken in one pass, and odd ones."""
    cu_passages = torch.zeros(17, dtype=torch.int32)
    usual, odd = [(dtype, 4, 12, 768) for dtype in FLOATS], [(dtype, 3, 5, 77) for dtype in FLOATS[:2]]
    for dtype, m, heads, dim in (*usual, (torch.bfloat16, 4, 32, 2048), *odd):
        views, queries = torch.empty(1600, m, dim, dtype=dtype), torch.empty(16, m, heads, dim, dtype=dtype)
        anchors, scores = queries[:, :, 0], torch.empty(1600, m)
        yield kernels.anchor_attention_triton(views, queries, cu_passages)
        yield kernels.anchor_attention_backward_triton(queries, views, queries, cu_passages)
        yield kernels.anchor_scores_triton(views, anchors, cu_passages)
        yield kernels.anchor_scores_triton(views, anchors, cu_passages, True)
        yield kernels.anchor_scores_backward_triton(scores[:, 0], views, anchors, cu_passages, False)
        yield kernels.anchor_scores_backward_triton(scores, views, anchors, cu_passages, True)
        yield kernels.anchor_topk_triton(views, anchors, cu_passages, 10)


def _attention_options(sequences: int, max_seqlen: int, heads: int, **given: Any) -> list[Any]:
    """All that follows q, k and v; those that are not given have their defaults."""
    offsets = torch.zeros(sequences + 1, dtype=torch.int32)
    options: dict[str, Any] = {
        **{"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen},
        **{"scale": None, "causal": False, "window_left": -1, "window_right": -1, "softcap": 0.0, "bias_table": None},
        **{"rope_cos": None, "rope_sin": None, "positions_q": None, "positions_k": None, "seqused_k": None},
    }
    if given.pop("table", False):
        options["bias_table"] = torch.empty(heads, 183)
    return list({**options, **given}.values())


def _attention_passes(
    kernels: Any, dtype: torch.dtype, dim: int, heads: int, key_heads: int, options: list[Any]
) -> Iterator[Any]:
    q, (k, v) = torch.empty(4096, heads, dim, dtype=dtype), torch.empty(2, 4096, key_heads, dim, dtype=dtype)
    out, lse = kernels.varlen_attention_triton(q, k, v, *options)
    yield kernels.varlen_attention_backward_triton(out, None, out, lse, q, k, v, *options)


def _attention_calls(kernels: Any) -> Iterator[Any]:
    for dtype in FLOATS:
        yield from _attention_passes(kernels, dtype, 64, 12, 12, _attention_options(32, 512, 12))
        rows, lse = torch.empty(512, 12, 64, dtype=dtype), torch.empty(12, 512)
        yield kernels.merge_attention_triton(rows, lse, rows, lse)
        yield kernels.merge_attention_backward_triton(rows, lse, rows, lse, rows, lse)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _attention_passes(kernels, dtype, 64, 12, 12, _attention_options(32, 512, 12, table=True))
    positions, angles = torch.zeros(4096, dtype=torch.int32), torch.empty(512, 24)
    everything = {
        **{"causal": True, "window_left": 100, "softcap": 50.0, "table": True, "rope_cos": angles, "rope_sin": angles},
        **{"positions_q": positions, "positions_k": positions, "seqused_k": positions[:32]},
    }
    for dim in (64, 128):
        yield from _attention_passes(kernels, torch.bfloat16, dim, 16, 4, _attention_options(32, 512, 16, **everything))
    for dim in (80, 256):
        yield from _attention_passes(kernels, torch.bfloat16, dim, 4, 1, _attention_options(32, 512, 4, causal=True))
    q, k = torch.empty(2, 4096, 12, 64, dtype=torch.bfloat16)
    short, cross = _attention_options(200, 40, 12), _attention_options(200, 1, 12)
    cross[3] = 512
    for options in (short, cross):
        yield kernels.varlen_attention_triton(q, k, k, *options)


def _hamming_calls(kernels: Any) -> Iterator[Any]:
    for dtype in FLOATS:
        yield kernels.pack_bits_triton(torch.empty(512, 384, dtype=dtype))
    yield kernels.pack_bits_triton(torch.empty(5, 77))
    for width in (48, 13):
        yield kernels.hamming_distance_triton(_codes(40, width), _codes(20000, width))
    for width in (48, 13, 128, 1024):
        yield kernels.hamming_topk_triton(_codes(40, width), _codes(20000, width), 100)
        yield kernels.hamming_range_triton(_codes(40, width), _codes(20000, width), 8 * width)
    allowed = _codes(1, 2500)[0]
    yield kernels.hamming_topk_triton(_codes(40, 48), _codes(20000, 48), 100, allowed)
    yield kernels.hamming_range_triton(_codes(40, 48), _codes(20000, 48), 100, allowed)
    yield from _rescoring(kernels)


def _rescoring(kernels: Any) -> Iterator[Any]:
    """Vectors of every kind, then a query of another dtype, one of an odd size and a view of the first dimensions."""
    candidates, queries = torch.zeros(40, 100, dtype=torch.int64), torch.empty(40, 384)
    for dtype in FLOATS:
        yield kernels.rescore_topk_triton(queries.to(dtype), candidates, torch.empty(200, 384, dtype=dtype), 10)
    whole = torch.zeros(200, 384, dtype=torch.int8)
    yield kernels.rescore_topk_triton(queries, candidates, whole, 10, queries[0])
    yield kernels.rescore_topk_triton(queries.half(), candidates, _codes(200, 48), 10)
    yield kernels.rescore_topk_triton(queries, candidates, _codes(200, 48), 10)
    yield kernels.rescore_topk_triton(torch.empty(40, 4096), candidates, _codes(200, 512), 10)
    yield kernels.rescore_topk_triton(queries[:, :77], candidates, torch.empty(200, 77), 10)
    yield kernels.rescore_topk_triton(queries[:, :256], candidates, torch.empty(200, 1024)[:, :256], 10)


def _latent_attention_calls(kernels: Any) -> Iterator[Any]:
    offsets = torch.zeros(9, dtype=torch.int32)
    for dtype in FLOATS:
        scores = torch.empty(2048, 4096, dtype=dtype)
        yield kernels.grouped_softmax_triton(scores, 8)
        yield kernels.grouped_softmax_backward_triton(scores, scores, 8)
        hidden, grad = torch.empty(2048, 32768, dtype=dtype), torch.empty(8, 16384, dtype=dtype)
        yield kernels.geglu_segment_pool_triton(hidden, hidden[0], offsets)
        yield kernels.geglu_segment_pool_backward_triton(grad, hidden, hidden[0], offsets, None)
    for width, groups in ((77, 7), (8192, 1), (512, 64)):
        scores = torch.empty(2048, width, dtype=torch.bfloat16)
        yield kernels.grouped_softmax_triton(scores, groups)
        yield kernels.grouped_softmax_backward_triton(scores, scores, groups)
    for width in (2048, 154):
        hidden, bias, weights = torch.empty(2048, width, dtype=torch.bfloat16), torch.empty(width), torch.empty(2048)
        yield kernels.geglu_segment_pool_triton(hidden, bias, offsets, weights, torch.float32)
        yield kernels.geglu_segment_pool_triton(hidden, None, offsets, weights)
        yield kernels.geglu_segment_pool_backward_triton(
            bias[: width // 2].expand(8, -1), hidden, bias, offsets, weights
        )
        yield kernels.geglu_segment_pool_backward_triton(grad[:, : width // 2], hidden, None, offsets, weights)


def _norm_calls(kernels: Any) -> Iterator[Any]:
    # every width in one dtype, every dtype at one width
    for dtype in FLOATS:
        for width in (384, 1024, 4096) if dtype == torch.bfloat16 else (1024,):
            rows, vector = torch.empty(2048, width, dtype=dtype), torch.empty(width, dtype=dtype)
            yield kernels.add_rms_norm_triton(rows, rows, vector)
            yield kernels.add_layer_norm_triton(rows, rows, vector, vector)
            yield kernels.add_rms_norm_backward_triton(rows, rows, rows, vector, 1e-6, False)
            yield kernels.add_layer_norm_backward_triton(rows, rows, rows, vector, vector, 1e-5)
            yield from _token_prepend(kernels, rows, rows, vector)
    for width in (77, 8192):
        rows, vector = torch.empty(2048, width, dtype=torch.bfloat16), torch.empty(width)
        yield kernels.add_rms_norm_triton(rows, None, vector, 1e-6, True)
        yield kernels.add_layer_norm_triton(rows, None, vector, None)
        yield kernels.add_rms_norm_backward_triton(rows, None, rows, vector, 1e-6, True)
        yield kernels.add_layer_norm_backward_triton(rows, rows, rows, vector, vector, 1e-5)
        yield from _token_prepend(kernels, rows, None, vector)


def _token_prepend(kernels: Any, rows: Tensor, residual: Tensor | None, weight: Tensor) -> Iterator[Any]:
    sources, targets = torch.arange(64), torch.arange(64, 128)
    yield kernels.token_prepend_triton(rows, sources, targets)
    yield kernels.token_prepend_backward_triton(rows, sources, targets)
    yield kernels.token_prepend_rms_norm_triton(rows, residual, sources, targets, weight, 1e-6, residual is None)
    yield kernels.token_prepend_rms_norm_backward_triton(rows, residual, rows, sources, targets, weight, 1e-6, False)


def _pooling_calls(kernels: Any) -> Iterator[Any]:
    offsets, few, tokens = torch.zeros(301, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 20000
    weights = torch.empty(tokens)
    for dtype in FLOATS:
        rows = torch.empty(tokens, 384, dtype=dtype)
        yield kernels.segment_pool_triton(rows, offsets, "mean", normalize=True)
        yield _backward(kernels, rows, offsets, "max", None, False)
    yield kernels.segment_pool_triton(rows, few, "mean", 1, weights, True)
    yield _backward(kernels, rows, offsets, "mean", weights, True)
    yield _backward(kernels, rows, offsets, "mean_sqrt_len", weights, True, reads=False)
    rows = torch.empty(tokens, 4096, dtype=torch.bfloat16)
    yield kernels.segment_pool_triton(rows, offsets, "weighted_mean", normalize=True)
    yield kernels.segment_pool_triton(rows, few, "max", normalize=True)
    yield kernels.segment_pool_triton(rows, offsets, "first_m")
    yield kernels.segment_pool_pack_bits_triton(rows, offsets, "mean")
    yield _backward(kernels, rows, offsets, "weighted_mean", None, True)
    yield _backward(kernels, rows, offsets, "first_m", None, False)
    yield _backward(kernels, rows, offsets, "last", None, False)
    yield kernels.segment_pool_triton(torch.empty(tokens, 77), offsets, "mean", 1, weights, True)
    mask = torch.zeros(40, 500, dtype=torch.int64)
    for dtype in (torch.uint8, torch.bfloat16, torch.int64):
        yield kernels.pack_padded_triton(torch.empty(40, 500, 384, dtype=dtype), mask, tokens)
        yield kernels.unpack_padded_triton(torch.empty(tokens, 384, dtype=dtype), mask)


def _backward(
    kernels: Any, rows: Tensor, offsets: Tensor, mode: str, weights: Tensor | None, normalize: bool, reads: bool = True
) -> Any:
    grad = torch.empty(offsets.shape[0] - 1, rows.shape[1], dtype=rows.dtype)
    if mode == "first_m":
        grad = grad.unsqueeze(1)
    hidden = rows if reads else None
    normalize = normalize and reads
    return kernels.segment_pool_backward_triton(
        grad, hidden, offsets, *rows.shape, rows.dtype, mode, 1, weights, normalize
    )


CALLS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "anchor_scores": _anchor_scores_calls,
    "attention": _attention_calls,
    "hamming": _hamming_calls,
    "latent_attention": _latent_attention_calls,
    "norm": _norm_calls,
    "pooling": _pooling_calls,
}

# ---- recording ----


def _specialised(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What triton.jit makes of the arguments: types, constants, multiples of 16."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, multiples = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            multiples += [place] if value.data_ptr() % 16 == 0 else []
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            multiples += [place] if value % 16 == 0 and not parameter.do_not_specialize else []
    return {"signature": signature, "constants": constants, "multiples": multiples, "options": values}


def load_kernels() -> dict[str, dict[str, JITFunction]]:
    """The jit functions of every file of kernels/, by file and name."""
    found: dict[str, dict[str, JITFunction]] = {}
    for path in sorted(KERNELS.glob("*.py")):
        module = importlib.import_module(f"embedding_kernels.kernels.{path.stem}")
        if hasattr(module, "require_device"):
            module.require_device = lambda op, tensor: None
        own = {
            n: v for n, v in vars(module).items() if isinstance(v, JITFunction) and v.fn.__module__ == module.__name__
        }
        found[path.stem] = own
    return found


def record(kernels: dict[str, dict[str, JITFunction]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(file, kernel, variant) of every launch that the calls make, each once."""
    launches: dict[str, tuple[str, str, dict[str, Any]]] = {}

    def recorder(file: str, name: str) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            variant = _specialised(kernels[file][name], args, kwargs)
            launches.setdefault(f"{file} {name} {variant}", (file, name, variant))

        return run

    for file, functions in kernels.items():
        for name, kernel in functions.items():
            kernel.run = recorder(file, name)
    for family, calls in CALLS.items():
        for _ in calls(importlib.import_module(f"embedding_kernels.kernels.{family}")):
            pass
    return list(launches.values())


def never_compiled(kernels: dict[str, dict[str, JITFunction]], launched: set[str]) -> list[str]:
    """Jit functions that no recorded kernel is or calls."""
    sources = {name: f.src for functions in kernels.values() for name, f in functions.items()}
    reached, pending = set(), list(launched)
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [other for other in sources if re.search(rf"\b{other}\b", sources[name])]
    return sorted(set(sources) - reached)


# ---- compiling ----


def narrow_products(ttir: str) -> list[str]:
    """Pointer offsets that come from a 32-bit product of two run-time values, which could overflow."""
    defined = dict(re.findall(r"^\s*(%[\w#:]+) = (.*?)(?: loc\(.*)?$", ttir, re.M))

    def is_constant(name: str) -> bool:
        line = defined.get(name, "")
        return line.startswith("arith.constant") or (line.startswith("tt.splat") and is_constant(_operands(line)[0]))

    def is_narrow(name: str, depth: int = 0) -> bool:
        line = defined.get(name, "")
        if depth > 30 or not re.match(r"arith\.(muli|addi|subi|extsi)|tt\.(splat|broadcast|expand_dims)", line):
            return False
        operands = _operands(line)
        product = line.startswith("arith.muli") and line.endswith(("i32", "xi32>"))
        if product and not any(map(is_constant, operands)):
            return True
        return any(is_narrow(operand, depth + 1) for operand in operands)

    offsets = [(line, _operands(line)[1]) for line in defined.values() if line.startswith("tt.addptr")]
    return [line for line, offset in offsets if is_narrow(offset)]


def _operands(line: str) -> list[str]:
    return re.findall(r"%[\w#]+", line)


def _inspect(tool: str, options: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([BINARIES / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def compile_variant(job: tuple[str, str, dict[str, Any], int]) -> dict[str, Any]:
    file, name, variant, architecture = job
    kernel = getattr(importlib.import_module(f"embedding_kernels.kernels.{file}"), name)
    attrs = {(place,): [["tt.divisibility", 16]] for place in variant["multiples"]}
    source = ASTSource(kernel, signature=variant["signature"], constexprs=variant["constants"], attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant["options"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _inspect("cuobjdump", ["-res-usage"], compiled.asm["cubin"])))
    # disassembly takes half the time of a compilation, so one architecture's is read, without analysis of data flow
    sass = _inspect("nvdisasm", ["-c", "-ndf"], compiled.asm["cubin"]) if architecture == DISASSEMBLED else ""
    constants = {key: value for key, value in variant["constants"].items() if value is not None}
    return {
        "file": file,
        "kernel": name,
        "sm": architecture,
        "variant": " ".join([*variant["signature"].values(), *map(str, constants.items())]),
        "constants": constants,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
        "opcodes": sorted(set(re.findall(r"\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", sass))),
        "leftover_popcount": "0x55555555" in sass,
        "narrow_products": narrow_products(compiled.asm["ttir"]),
    }


def main() -> None:
    kernels = load_kernels()
    launches = record(kernels)
    launched = {name for _, name, _ in launches}
    print(json.dumps({"never_compiled": never_compiled(kernels, launched), "files": sorted(kernels)}), flush=True)
    jobs = [(*launch, architecture) for launch in launches for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for result in pool.map(compile_variant, jobs, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
