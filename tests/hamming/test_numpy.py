"""embedding_kernels.numpy: the same answers as the operators, without torch."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import embedding_kernels as ek
import embedding_kernels.numpy as ekn

limits_memory = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves more than any limit"
)


def run_without_torch(script: str) -> str:
    script = "import sys; sys.modules['torch'] = None\nimport numpy as np, embedding_kernels.numpy as ekn\n" + script
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_imports_without_torch():
    script = (
        "codes = ekn.pack_bits(np.eye(9, dtype=np.float32))\n"
        "print(ekn.hamming_topk(codes, codes, 2)[1][:, 0].tolist())\n"
        "print([array.tolist() for array in ekn.hamming_range(codes, codes, 1)])\n"
        "print(ekn.hamming_distance(codes[:1], codes).tolist())"
    )
    expected = [list(range(9)), [list(range(10)), [0] * 9, list(range(9))], [[0] + [2] * 8]]
    assert run_without_torch(script) == "\n".join(map(str, expected))


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("shape", ((0, 5), (7, 0), (3, 9), (4000, 100)))
def test_pack_bits(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert np.array_equal(ekn.pack_bits(x), np.packbits(x > 0, axis=1))
    strided = np.random.default_rng(0).standard_normal((shape[0], 2 * shape[1])).astype(dtype)[:, ::2]
    assert np.array_equal(ekn.pack_bits(strided), np.packbits(strided > 0, axis=1))


def random_codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def assert_equals_operators(queries, codes, allowed, num_threads):
    """Every function of NumPy arrays against the operator of the same name."""
    tensors = [torch.from_numpy(np.array(array)) for array in (queries, codes)]
    mask = None if allowed is None else torch.from_numpy(allowed)
    radius = 3 * queries.shape[1] + 1
    got = [
        ekn.hamming_distance(queries, codes, num_threads=num_threads),
        *ekn.hamming_topk(queries, codes, 30, allowed=allowed, num_threads=num_threads),
        *ekn.hamming_range(queries, codes, radius, allowed=allowed, num_threads=num_threads),
    ]
    expected = [
        ek.hamming_distance(*tensors),
        *ek.hamming_topk(*tensors, 30, allowed=mask),
        *ek.hamming_range(*tensors, radius, allowed=mask),
    ]
    for array, tensor in zip(got, expected, strict=True):
        assert array.dtype == tensor.numpy().dtype
        assert np.array_equal(array, tensor.numpy())


@pytest.mark.parametrize("num_threads", (0, 1, 2, 5, 1 << 62))
@pytest.mark.parametrize("queries", (1, 6))
def test_equals_the_operators(queries, num_threads):
    codes, asked = random_codes(40_000, 12), random_codes(queries, 12)
    for allowed in (None, random_codes(5000)):
        assert_equals_operators(asked, codes, allowed, num_threads)


@pytest.mark.parametrize(("queries", "count"), ((0, 5), (3, 0), (0, 0)))
def test_empty(queries, count):
    codes = np.zeros((count, 4), np.uint8)
    offsets, distances, indices = ekn.hamming_range(np.zeros((queries, 4), np.uint8), codes, 33)
    assert offsets.tolist() == [0] * (queries + 1)
    assert distances.shape == indices.shape == (0,)
    assert_equals_operators(np.zeros((queries, 4), np.uint8), codes, None, 2)


@pytest.mark.parametrize("radius", (0, 1, 32, 33, 10**30))
def test_radius(radius):
    """Below the radius, not at it; one past all distances finds every code, however large."""
    codes = np.concatenate([random_codes(9, 4), np.zeros((1, 4), np.uint8), np.full((1, 4), 255, np.uint8)])
    distances = ekn.hamming_distance(codes, codes)
    assert 32 in distances
    offsets, near, indices = ekn.hamming_range(codes, codes, radius)
    rows, columns = np.nonzero(distances < radius)
    assert np.array_equal(indices, columns)
    assert np.array_equal(near, distances[rows, columns])
    assert np.array_equal(offsets, np.searchsorted(rows, np.arange(12)))


@pytest.mark.parametrize("queries", (1, 40))
@pytest.mark.parametrize(
    "view",
    (
        lambda rows: rows[:, :9],
        lambda rows: rows[::3],
        lambda rows: rows[::-1, 3:],
        lambda rows: rows[:, ::2],
        lambda rows: np.broadcast_to(rows[1], rows.shape),
        lambda rows: np.asfortranarray(rows),
        lambda rows: rows[:, :1],
    ),
    ids=("prefix", "every third", "backwards", "every second byte", "one row", "columns", "one byte"),
)
def test_views(view, queries):
    """Strides of either side mean what they say, and read-only memory will do."""
    codes, asked = view(random_codes(20_000, 24)), view(random_codes(3 * queries, 24))
    codes.flags.writeable = asked.flags.writeable = False
    assert_equals_operators(asked, codes, None, 2)


def test_unaligned_floats():
    x = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    unaligned = np.frombuffer(b"." + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned
    assert np.array_equal(ekn.pack_bits(unaligned), np.packbits(x > 0, axis=1))


@limits_memory
def test_memory_maps_are_read_in_place(tmp_path):
    """A mapped file and a prefix of its bytes are searched where there is no memory for a copy of either."""
    path, rows = tmp_path / "codes", 1 << 22
    with open(path, "wb") as file:
        file.truncate(rows * 32)  # 128 MiB of zeros that take no room on the disk
        file.seek((rows - 5) * 32)
        file.write(b"\xff")
    script = f"""
import resource
codes = np.memmap({str(path)!r}, np.uint8, "r", shape=({rows}, 32))
queries = np.full((1, 32), 255, np.uint8)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (24 << 20), resource.RLIM_INFINITY))
for width in (32, 8):
    part = codes[:, :width]
    try:
        np.array(part)
        print("room for a copy")
    except MemoryError:
        pass
    arguments = queries[:, :width], part
    print(ekn.hamming_topk(*arguments, 2, num_threads=1)[1].tolist(), end=" ")
    print(ekn.hamming_range(*arguments, 8 * width - 7, num_threads=1)[2].tolist(), end=" ")
    print(ekn.hamming_distance(arguments[0], part[-5:], num_threads=1).tolist())
    try:
        ekn.hamming_distance(*[array[:, ::2] for array in arguments], num_threads=1)
        print("no copy of bytes that are not dense")
    except MemoryError:
        pass
"""
    expected = [
        f"[[{rows - 5}, 0]] [{rows - 5}] [[{8 * width - 8}, {', '.join(4 * [str(8 * width)])}]]" for width in (32, 8)
    ]
    assert run_without_torch(script).split("\n") == expected


@pytest.fixture(scope="module")
def long_call():
    """A call that takes a while, so that other things can be seen to happen meanwhile."""
    codes, queries, taken = random_codes(100_000, 64), 128, 0.0
    while taken < 0.2:
        queries *= 2
        asked = random_codes(queries, 64)
        start = time.thread_time()  # what others take of the processor is not the call's
        ekn.hamming_range(asked, codes, 1, num_threads=1)
        taken = time.thread_time() - start
    return lambda: ekn.hamming_range(asked, codes, 1, num_threads=1)


def test_other_threads_run_during_a_call(long_call):
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.002):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        long_call()
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    # a call that held the lock would let none through but at its very ends
    margin = (end - start) / 10
    assert sum(start + margin < moment < end - margin for moment in ticks) >= 5


def test_an_interrupt_is_raised_after_the_call(long_call):
    codes = random_codes(50, 8)
    expected = ekn.hamming_topk(codes, codes, 3)
    timer = threading.Timer(0.03, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        long_call()
    timer.join()
    assert np.array_equal(ekn.hamming_topk(codes, codes, 3), expected)


@limits_memory
def test_where_threads_cannot_be_started():
    """Each thread wants megabytes for its stack; without them the calling thread does all the work."""
    script = """
import resource
codes = np.random.default_rng(0).integers(0, 256, (100, 8), dtype=np.uint8)
alone = ekn.hamming_topk(codes, codes, 3, num_threads=1)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (20 << 20), resource.RLIM_INFINITY))
import threading
try:
    for _ in range(50):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    print("threads to spare")
except RuntimeError:
    pass
together = ekn.hamming_topk(codes, codes, 3, num_threads=100)
print(all(np.array_equal(*pair) for pair in zip(alone, together)), flush=True)
import os
os._exit(0)
"""
    assert run_without_torch(script) == "True"


BAD_INPUT = {
    "queries dtype": lambda make: (make((1, 2), "int8"), make((1, 2)), {}),
    "queries rank": lambda make: (make((2,)), make((1, 2)), {}),
    "codes dtype": lambda make: (make((1, 2)), make((1, 2), "float32"), {}),
    "width": lambda make: (make((1, 2)), make((1, 3)), {}),
    "allowed size": lambda make: (make((1, 2)), make((9, 2)), {"allowed": make((1,))}),
    "allowed dtype": lambda make: (make((1, 2)), make((9, 2)), {"allowed": make((2,), "int32")}),
    "allowed rank": lambda make: (make((1, 2)), make((9, 2)), {"allowed": make((2, 1))}),
    "number": lambda make: (make((1, 2)), make((9, 2)), {"number": -1}),
}


@pytest.mark.parametrize(
    ("op", "case"),
    [
        *(("hamming_distance", case) for case in ("queries dtype", "queries rank", "codes dtype", "width")),
        *((op, case) for op in ("hamming_topk", "hamming_range") for case in BAD_INPUT),
    ],
)
def test_bad_input_is_refused_as_by_the_operators(op, case):
    said = []
    for module, make in (
        (ekn, lambda shape, dtype="uint8": np.zeros(shape, dtype)),
        (ek, lambda shape, dtype="uint8": torch.zeros(shape, dtype=getattr(torch, dtype))),
    ):
        queries, codes, options = BAD_INPUT[case](make)
        number = options.pop("number", 1)
        arguments = () if op == "hamming_distance" else (number,)
        with pytest.raises(ValueError) as error:
            getattr(module, op)(queries, codes, *arguments, **options)
        said.append(str(error.value).replace("tensor", "array"))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ekn.pack_bits(np.zeros((2, 2))), "pack_bits: x must be a float32 or float16 array"),
        (lambda: ekn.pack_bits(np.zeros(2, np.float32)), "pack_bits: x must be a float32 or float16 array"),
        (lambda: ekn.pack_bits(np.zeros((2, 2), ">f4")), "pack_bits: x must be a float32 or float16 array"),
        (
            lambda: ekn.pack_bits(np.zeros((2, 2), np.float32), num_threads=-1),
            "pack_bits: num_threads must be at least 0, got -1",
        ),
        (
            lambda: ekn.hamming_topk(np.zeros((1, 2), np.uint8), np.zeros((1, 2), np.uint8), 1, num_threads=-2),
            "hamming_topk: num_threads must be at least 0, got -2",
        ),
        (
            lambda: ekn.hamming_range(np.zeros((1, 2), np.uint8), np.zeros((1, 2), np.uint8), 1.5),
            "hamming_range: radius must be an integer of at least 0, got 1.5",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
