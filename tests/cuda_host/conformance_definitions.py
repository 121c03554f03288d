"""What each wrapper of csrc/cuda/ptx.cuh does, in NumPy, from the words and formulas of the PTX ISA; and the operands
on which it is tried. Nothing here is shared with the emulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]  # [blocks, threads, words]
Shape = tuple[int, int, int]
Draw = Callable[[np.random.Generator, Shape], Words]
LANES = np.arange(32)


@dataclass(frozen=True)
class Instruction:
    """Operands by kind, the definition, and how results are compared: as words, or within a tolerance as float32.

    ``tolerance`` takes operands and gives what float32 results may be off by; kinds in ``exact`` get none.
    ``nan_of`` names the type whose NaNs are all one: the ISA leaves their payload to the instruction.
    """

    definition: Callable[[Words], Words]
    operands: Mapping[str, Draw]
    tolerance: Callable[[Words], NDArray[np.float64]] | None = None
    exact: tuple[str, ...] = ()
    nan_of: str = ""

    def allowed(self, kind: str, operands: Words) -> NDArray[np.float64] | None:
        return None if self.tolerance is None or kind in self.exact else self.tolerance(operands)

    def canonical(self, words: Words) -> NDArray[Any]:
        """Words with all NaNs alike."""
        if not self.nan_of:
            return words
        width, infinity = {"float32": (32, 0x7F800000), "float16": (16, 0x7C00), "bfloat16": (16, 0x7F80)}[self.nan_of]
        parts = words.view(np.uint16 if width == 16 else np.uint32).copy()
        parts[(parts & ((1 << width - 1) - 1)) > infinity] = infinity + 1
        return parts


# ---- operands ----


def bits(seeded: np.random.Generator, shape: Shape) -> Words:
    return seeded.integers(0, 1 << 32, shape, dtype=np.uint32)


def _few_bits(seeded: np.random.Generator, shape: Shape) -> Words:
    """Words of every length, zero and all ones among them."""
    kept = bits(seeded, shape) >> seeded.integers(0, 32, shape, dtype=np.uint32)
    kept[0, :4, 0] = (0, 1, 0xFFFFFFFF, 0x80000000)
    return kept


def _floats(low: float, high: float, *special: float) -> Draw:
    """Uniform between two bounds; the special ones in the first block."""

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        values = seeded.uniform(low, high, shape).astype(np.float32)
        values[0, : len(special), 0] = special
        return values.view(np.uint32)

    return draw


def _magnitudes(low: int, high: int, signed: bool, *special: float) -> Draw:
    """Powers of two between the bounds, times 1 to 2; the special ones in the first block."""

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        sign = np.where(signed & (seeded.random(shape) < 0.5), -1, 1)
        values = (sign * seeded.uniform(1, 2, shape) * 2.0 ** seeded.integers(low, high, shape)).astype(np.float32)
        values[0, : len(special), 0] = special
        return values.view(np.uint32)

    return draw


def _to_be_rounded(dropped: int, low: int, high: int) -> Draw:
    """Floats around the range of a type that drops so many bits: half of them lie midway between two of its values."""

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        words = _magnitudes(low, high, True)(seeded, shape)
        midway = seeded.random(shape) < 0.5
        words[midway] = words[midway] >> dropped << dropped | 1 << dropped - 1
        return words

    return draw


def _exact_sums(seeded: np.random.Generator, shape: Shape) -> Words:
    """a, b, c whose a b + c float64 holds exactly, so that one rounding gives the fused result."""
    values = seeded.uniform(1, 2, shape) * np.where(seeded.random(shape) < 0.5, -1, 1)
    values[..., 2] *= 2.0 ** seeded.integers(-20, 4, shape[:2])
    return values.astype(np.float32).view(np.uint32)


_INF, _NAN, _TINY = np.inf, np.nan, 1e-40  # the last is subnormal
_ANY = {"random bits": bits}


def _floats_of(words: Words) -> NDArray[np.float64]:
    return words.view(np.float32).astype(np.float64)


def _of(function: Callable[[NDArray[np.float64]], Any], flush: bool) -> Callable[[Words], Words]:
    """A function of one float32, computed in float64; `flush` takes subnormal operands and results as 0."""

    def flushed(x: NDArray[Any]) -> NDArray[Any]:
        return np.where((np.abs(x) < 2.0**-126) & flush, np.copysign(0.0, x), x)

    def definition(words: Words) -> Words:
        with np.errstate(all="ignore"):
            return flushed(function(flushed(_floats_of(words)))).astype(np.float32).view(np.uint32)

    return definition


def _relative(function: Callable[[NDArray[np.float64]], Any], bound: float, least: float = 0.0) -> Any:
    def tolerance(words: Words) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            size = np.abs(function(_floats_of(words)))
        return np.where(np.isfinite(size), bound * np.maximum(size, least), 0.0)

    return tolerance


# ---- between lanes ----


def opposite(words: Words) -> Words:
    return words[:, ::-1]


def arrive(words: Words) -> Words:
    return np.concatenate([words[:, ::-1][:, :32], words[:, 32:]], axis=1)


def _from_lane(source: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Words], Words]:
    """Value (word 0) of the lane that `source` names from the second operand's five low bits."""
    return lambda words: np.take_along_axis(words[..., :1], source(words[..., 1:2].astype(np.int64) & 31), axis=1)


def _up(by: NDArray[Any]) -> NDArray[Any]:
    lanes = LANES[:, None]
    return np.where(lanes - by >= 0, lanes - by, lanes)


def _ballot(words: Words) -> Words:
    lanes = ((words & 4) != 0).astype(np.uint64) << LANES[:, None].astype(np.uint64)
    return np.broadcast_to(lanes.sum(axis=1, keepdims=True), words.shape).astype(np.uint32)


def _over_warp(reduce: Any) -> Callable[[Words], Words]:
    return lambda words: np.broadcast_to(reduce(words, axis=1, keepdims=True), words.shape).astype(np.uint32)


# ---- bits ----


def bit_table(words: Words) -> NDArray[np.uint8]:
    """[..., 32], the lowest first."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")


def _reverse(words: Words) -> Words:
    return np.packbits(bit_table(words)[..., ::-1], axis=-1, bitorder="little").view(np.uint32)


def _count(words: Words) -> Words:
    return bit_table(words).sum(axis=-1, keepdims=True).astype(np.uint32)


def _highest(words: Words) -> Words:
    table = bit_table(words)
    found = 31 - table[..., ::-1].argmax(axis=-1)
    return np.where(table.any(axis=-1), found, 0xFFFFFFFF)[..., None].astype(np.uint32)


def _dot_bytes(words: Words) -> Words:
    a, b = (np.ascontiguousarray(words[..., i : i + 1]).view(np.int8).astype(np.int64) for i in range(2))
    return (words[..., 2:].astype(np.int64) + (a * b).sum(axis=-1, keepdims=True)).astype(np.uint32)


# ---- conversions ----


def round_bfloat16(words: Words) -> Words:
    upper, lower = words >> 16, words & 0xFFFF
    up = (lower > 0x8000) | ((lower == 0x8000) & (upper & 1 == 1))
    is_nan = (words & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FFF, upper + up).astype(np.uint32)


def round_float16(words: Words) -> Words:
    with np.errstate(all="ignore"):
        return words.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


def _packed(round_: Callable[[Words], Words]) -> Callable[[Words], Words]:
    return lambda words: round_(words[..., :1].copy()) | round_(words[..., 1:].copy()) << 16


def _widen(words: Words) -> Words:
    with np.errstate(all="ignore"):
        return (words & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


def _fused(words: Words) -> Words:
    a, b, c = np.moveaxis(_floats_of(words), -1, 0)
    return (a * b + c).astype(np.float32)[..., None].view(np.uint32)


# ---- memory ----


def _shared_address(words: Words) -> Words:
    return 16 * (words[..., :1] % 32) + 4 * (words[..., 1:] % 4)


def _added(words: Words) -> tuple[Words, Words, Words]:
    """Before, after, and the sum of all that a warp adds."""
    before, value = words[..., :1], words[..., 1:]
    return before, before + value, np.broadcast_to(value.sum(axis=1, keepdims=True, dtype=words.dtype), before.shape)


def _add_global(words: Any) -> Any:
    before, after, total = _added(words)
    return np.concatenate([before, after, np.where(LANES[:, None] == 0, total, 0)], axis=-1).astype(words.dtype)


def _add_global_wide(words: Words) -> Words:
    return _add_global(np.ascontiguousarray(words).view(np.uint64)).view(np.uint32)


def _add_shared(words: Words) -> Words:
    return np.concatenate(_added(words), axis=-1)


def _copied(size: int) -> Callable[[Words], Words]:
    """The first bytes, as many as the word behind them says; zeros after."""
    words_of = size // 4

    def definition(words: Words) -> Words:
        parts = np.ascontiguousarray(words[..., :words_of]).view(np.uint8).copy()
        parts[np.arange(size) >= words[..., words_of : words_of + 1] % (size + 1)] = 0
        return parts.view(np.uint32)

    return definition


def _two_of_others(words: Words) -> Words:
    return np.concatenate([words[:, ::-1, :2], words[..., 2:]], axis=-1)


# ---- matrices; lane = 4 × group + place, as the ISA's formulas have it ----

_GROUP, _PLACE = LANES >> 2, LANES & 3


def _matrices(count: int, transposed: bool) -> Callable[[Words], Words]:
    """Threads 8 i to 8 i + 7 hold the rows of matrix i; a thread gets elements (group, 2 place) and the next."""

    def definition(words: Words) -> Words:
        halves = np.ascontiguousarray(words).view(np.uint16).astype(np.uint32)  # [blocks, 32, 8]
        found = []
        for i in range(count):
            matrix = halves[:, 8 * i : 8 * i + 8]
            if transposed:
                matrix = matrix.swapaxes(1, 2)
            found.append(matrix[:, _GROUP, 2 * _PLACE] | matrix[:, _GROUP, 2 * _PLACE + 1] << 16)
        return np.stack(found, axis=-1)

    return definition


def bfloat16_values(words: Words) -> NDArray[np.float64]:
    return (np.ascontiguousarray(words).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def float16_values(words: Words) -> NDArray[np.float64]:
    return np.ascontiguousarray(words).view(np.float16).astype(np.float64)


def bit_values(words: Words) -> NDArray[np.float64]:
    return bit_table(words).astype(np.float64)


def _whole_matrices(words: Words, values: Callable[[Words], Any], width: int) -> tuple[Any, Any]:
    """A [blocks, 16, K] and B [blocks, K, 8] out of the registers; `width` values a register."""
    blocks = len(words)
    a, b = np.zeros((blocks, 16, 8 * width)), np.zeros((blocks, 8 * width, 8))
    of_a = values(words[..., :4]).reshape(blocks, 32, 4 * width)
    of_b = values(words[..., 4:6]).reshape(blocks, 32, 2 * width)
    for i in range(4 * width):
        # rows of registers 1 and 3 lie 8 below, columns of registers 2 and 3 half of K to the right
        row = _GROUP + 8 * (i // width % 2)
        column = _PLACE * width + i % width + 4 * width * (i // (2 * width))
        a[:, row, column] = of_a[:, LANES, i]
    for i in range(2 * width):
        b[:, _PLACE * width + i % width + 4 * width * (i // width), _GROUP] = of_b[:, LANES, i]
    return a, b


def _accumulators(matrix: NDArray[Any]) -> NDArray[Any]:
    """[blocks, 32, 4] of D [blocks, 16, 8]."""
    return np.stack([matrix[:, _GROUP + 8 * (i // 2), 2 * _PLACE + i % 2] for i in range(4)], axis=-1)


def _product(values: Callable[[Words], Any]) -> Callable[[Words], Words]:
    def definition(words: Words) -> Words:
        a, b = _whole_matrices(words, values, 2)
        with np.errstate(all="ignore"):
            return (_accumulators(a @ b) + _floats_of(words[..., 6:].copy())).astype(np.float32).view(np.uint32)

    return definition


def _product_of_bits(words: Words) -> Words:
    a, b = _whole_matrices(words, bit_values, 32)
    return words[..., 6:] + _accumulators(a @ b).astype(np.uint32)


def _product_tolerance(values: Callable[[Words], Any]) -> Callable[[Words], NDArray[np.float64]]:
    """The ISA leaves the order and the precision of additions open, "at least single precision" where not otherwise
    said: each of K + 1 may be cut off, not rounded, below the largest term's last bit."""

    def tolerance(words: Words) -> NDArray[np.float64]:
        a, b = _whole_matrices(words, values, 2)
        terms = _accumulators(np.abs(a) @ np.abs(b)) + np.abs(_floats_of(words[..., 6:].copy()))
        return 17 * 2.0**-23 * terms

    return tolerance


def _factors(pack: Callable[[NDArray[np.float32]], Any], whole: bool) -> Draw:
    """Registers of 16-bit values and float32 sums: normal ones, or small whole numbers, whose sums are exact."""

    def numbers(seeded: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        drawn = seeded.integers(-16, 17, shape) if whole else seeded.standard_normal(shape)
        return drawn.astype(np.float32)

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        halves = np.ascontiguousarray(pack(numbers(seeded, (*shape[:2], 12))).astype(np.uint16))
        return np.concatenate([halves.view(np.uint32), numbers(seeded, (*shape[:2], 4)).view(np.uint32)], axis=-1)

    return draw


def _multiplies(round_: Callable[[Words], Words], values: Callable[[Words], Any]) -> Instruction:
    def pack(numbers: NDArray[np.float32]) -> Words:
        return round_(numbers.view(np.uint32))

    kinds = {"whole numbers": _factors(pack, True), "normal numbers": _factors(pack, False)}
    return Instruction(_product(values), kinds, _product_tolerance(values), exact=("whole numbers",))


# ---- the table, by name in conformance.cu ----

_COPY = Instruction(lambda words: words, _ANY)
_OPPOSITE = Instruction(opposite, _ANY)
_AROUND_BFLOAT16 = {"random bits": bits, "midway": _to_be_rounded(16, -130, 127)}
_AROUND_FLOAT16 = {"random bits": bits, "midway": _to_be_rounded(13, -26, 17)}

INSTRUCTIONS: dict[str, Instruction] = {
    "sync_block": _OPPOSITE,
    "sync_threads": _OPPOSITE,
    "arrive": Instruction(arrive, _ANY),
    "sync_warp": _OPPOSITE,
    "vote_ballot": Instruction(_ballot, _ANY),
    "shuffle": Instruction(_from_lane(lambda by: by), _ANY),
    "shuffle float": Instruction(_from_lane(lambda by: by), _ANY),
    "shuffle_xor": Instruction(_from_lane(lambda by: LANES[:, None] ^ by), _ANY),
    "shuffle_xor float": Instruction(_from_lane(lambda by: LANES[:, None] ^ by), _ANY),
    "shuffle_up": Instruction(_from_lane(_up), _ANY),
    "warp_add": Instruction(_over_warp(np.sum), _ANY),
    "warp_min": Instruction(_over_warp(np.min), _ANY),
    "reverse_bits": Instruction(_reverse, _ANY),
    "count_bits": Instruction(_count, {"few bits": _few_bits}),
    "highest_bit": Instruction(_highest, {"few bits": _few_bits}),
    "dot_bytes": Instruction(_dot_bytes, _ANY),
    "bits_of": Instruction(lambda words: words ^ np.uint32(0x80000000), _ANY, nan_of="float32"),
    "float_of": _COPY,
    "exp2_near": Instruction(
        _of(np.exp2, flush=True),
        {"numbers": _floats(-125, 127.9, _INF, -_INF, _NAN, 0.0, -0.0, _TINY, 200.0, -200.0)},
        _relative(np.exp2, 2 * 2.0**-23),
    ),
    "log2_near": Instruction(
        _of(np.log2, flush=False),
        {
            "numbers": _magnitudes(-126, 127, False, _INF, _NAN, 0.0, -1.0, 1.0, _TINY),
            "around 1": _floats(0.5, 2.0, 1.0),
        },
        _relative(np.log2, 2.0**-22, least=1.0),
    ),
    "reciprocal_near": Instruction(
        _of(lambda x: 1 / x, flush=True),
        {"numbers": _magnitudes(-120, 120, True, _INF, -_INF, _NAN, 0.0, -0.0, _TINY, -_TINY)},
        _relative(lambda x: 1 / x, 2.0**-23),
    ),
    # the emulation cuts off more than the ISA allows to be wrong, so that nobody relies on it
    "tanh_near": Instruction(
        _of(np.tanh, flush=False),
        {"numbers": _magnitudes(-12, 4, True, _INF, -_INF, _NAN, 0.0, -0.0)},
        _relative(np.tanh, 2.0**-10),
    ),
    "fused_multiply_add": Instruction(_fused, {"numbers": _exact_sums}),
    "pack_bfloat16": Instruction(_packed(round_bfloat16), _AROUND_BFLOAT16, nan_of="bfloat16"),
    "pack_float16": Instruction(_packed(round_float16), _AROUND_FLOAT16, nan_of="float16"),
    "round_bfloat16": Instruction(round_bfloat16, _AROUND_BFLOAT16, nan_of="bfloat16"),
    "round_float16": Instruction(round_float16, _AROUND_FLOAT16, nan_of="float16"),
    "widen_float16": Instruction(_widen, _ANY, nan_of="float32"),
    "load_words4": _COPY,
    "load_constant_words4": _COPY,
    "store_words4": _COPY,
    "shared_address": Instruction(_shared_address, _ANY),
    "load_shared_words4": _OPPOSITE,
    "store_shared_words4": _OPPOSITE,
    "add_global": Instruction(_add_global, _ANY),
    "add_global 64": Instruction(_add_global_wide, _ANY),
    "add_shared": Instruction(_add_shared, _ANY),
    "copy16_async": Instruction(_copied(16), _ANY),
    "copy4_async": Instruction(_copied(4), _ANY),
    "commit_copies": Instruction(_two_of_others, _ANY),
    "wait_copies": _OPPOSITE,
    "load_matrices4": Instruction(_matrices(4, False), _ANY),
    "load_matrices4_transposed": Instruction(_matrices(4, True), _ANY),
    "load_matrices2": Instruction(_matrices(2, False), _ANY),
    "load_matrices2_transposed": Instruction(_matrices(2, True), _ANY),
    "multiply_bfloat16": _multiplies(round_bfloat16, bfloat16_values),
    "multiply_float16": _multiplies(round_float16, float16_values),
    "multiply_bits": Instruction(_product_of_bits, _ANY),
}
