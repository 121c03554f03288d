"""What nvcc made of the CUDA kernels: registers, no memory behind them, the instructions meant to be there; and that
torch 2.11, the oldest the library promises to load under, has every symbol that it wants.

Read from the built library by cuobjdump, which Triton's package brings; no GPU takes part.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from embedding_kernels import _library

LIBRARY = _library.CPU.path.with_name("_cuda.so")
SYMBOLS = Path(__file__).with_name("torch_2_11_cuda_symbols.txt")


@dataclass(frozen=True)
class Expected:
    """What holds for every instance of a kernel template. Instructions are patterns at the start of a name in SASS."""

    registers: int = 128  # what 512 threads a multiprocessor may have
    instructions: tuple[str, ...] = ()
    # of those instances whose template arguments match a pattern
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # registers that the warps keep which have tiles copied, and that those take which multiply; for Hopper alone
    split: tuple[int, int] | None = None


# accesses of 16 bytes
_READS, _WRITES = r"LDG\.E(\.\w+)*\.128", r"STG\.E(\.\w+)*\.128"
_WIDE = (_READS, _WRITES)
# template arguments of the instances that take 16 bytes at a time
_BY_COUNT, _BY_FLAG = r"\b(4|8|16)$", r"\btrue\b"
# a product on tensor cores of what asynchronous copies have brought to shared memory
_PRODUCT = ("HMMA", "LDSM", "LDGSTS")
# a product of warpgroups of what the copy engine has brought, its results on their way
_OF_WARPGROUPS = ("HGMMA", "UTMALDG")

KERNELS = {
    # anchor_scores
    "anchor_attention_kernel": Expected(168, (*_PRODUCT, _WRITES)),
    "mix_kernel": Expected(208, where={r"^[\w:]+, true": _WIDE}),
    "join_mix_kernel": Expected(64, where={_BY_COUNT: (_READS,)}),
    "scores_kernel": Expected(64, where={_BY_FLAG: (_READS,)}),
    "top_kernel": Expected(64),
    "products_kernel": Expected(128, where={_BY_FLAG: (_READS,)}),
    "weights_kernel": Expected(64),
    "view_gradient_kernel": Expected(128, where={_BY_FLAG: _WIDE}),
    "score_gradient_kernel": Expected(64, where={_BY_FLAG: _WIDE}),
    # attention
    "attention_kernel": Expected(255, (*_PRODUCT, *_WIDE)),
    "attention_gradient_kernel": Expected(255, _PRODUCT),
    "attention_hopper_kernel": Expected(168, (*_OF_WARPGROUPS, "UTMASTG"), split=(40, 232)),
    "attention_gradient_hopper_kernel": Expected(168, _OF_WARPGROUPS, split=(40, 232)),
    "attention_bias_kernel": Expected(128, _PRODUCT),
    "attention_shares_kernel": Expected(64, (_READS,)),
    "attention_sum_tables_kernel": Expected(64),
    "attention_rotate_kernel": Expected(64, _WIDE),
    "merge_kernel": Expected(64, where={_BY_COUNT: _WIDE}),
    "merge_gradient_kernel": Expected(96, where={_BY_COUNT: _WIDE}),
    # hamming
    "pack_bits_kernel": Expected(32, ("VOTE", "BREV")),
    "scan_kernel": Expected(168, ("LDGSTS",), where={"Product": ("BMMA", "LDSM"), "FewQueries": ("POPC",)}),
    "hamming_hopper_kernel": Expected(168, (r"BGMMA\.64x256x256\.AND\.POPC", "UTMALDG"), split=(56, 224)),
    "lay_queries_kernel": Expected(64, ("REDUX",)),
    "bound_kernel": Expected(64),
    "offset_kernel": Expected(64),
    "order_kernel": Expected(64),
    "place_kernel": Expected(64),
    "rank_kernel": Expected(64),
    "score_kernel": Expected(128, where={r"(Int8|[Ff]loat\w*), (4|8|16)$": (_READS,)}),
    # latent_attention
    "softmax_kernel": Expected(128, where={_BY_COUNT: _WIDE}),
    "softmax_gradient_kernel": Expected(128, where={_BY_COUNT: _WIDE}),
    "gated_pool_kernel": Expected(128, where={_BY_COUNT: _WIDE}),
    "gated_gradient_kernel": Expected(128, where={_BY_COUNT: _WIDE}),
    "join_spans_kernel": Expected(64, where={_BY_COUNT: (_READS,)}),
    "scale_kernel": Expected(64),
    "sum_rows_kernel": Expected(64, where={_BY_COUNT: _WIDE}),
    "weight_gradient_kernel": Expected(64, where={_BY_FLAG: (_READS,)}),  # pooling's too
    # norm
    "norm_kernel": Expected(128, where={_BY_FLAG: _WIDE}),
    "norm_gradient_kernel": Expected(128, where={_BY_FLAG: _WIDE}),
    "add_parts_kernel": Expected(64),
    "copy_rows_kernel": Expected(64, where={"Words4": _WIDE}),
    "return_gradients_kernel": Expected(64, where={_BY_FLAG: _WIDE}),
    "shifts_kernel": Expected(32),
    "tables_kernel": Expected(32),
    # pooling, and padding
    "pool_kernel": Expected(96, where={_BY_FLAG: (_READS,)}),
    "join_parts_kernel": Expected(64, where={_BY_FLAG: (_READS,)}),
    "finish_vectors_kernel": Expected(64, where={_BY_FLAG: _WIDE}),
    "vector_gradient_kernel": Expected(64),
    "row_gradient_kernel": Expected(64, where={_BY_FLAG: _WIDE}),
    "max_gradient_kernel": Expected(96, where={_BY_FLAG: (_READS,)}),
    "join_max_gradient_kernel": Expected(64, where={_BY_FLAG: (_READS,)}),
    "places_kernel": Expected(64, ("POPC",)),
    "starts_kernel": Expected(32),
}

# additions of floats in no fixed order, and the exchange by which one is made where there is no instruction for it;
# memory behind the registers
FORBIDDEN = r"(RED|ATOM[GS]?)\.(.*(F16|BF16|F32|F64)|.*CAS)|LDL|STL"


@dataclass(repr=False)
class Kernel:
    """One instance of a kernel template for one architecture."""

    architecture: str
    name: str
    arguments: str  # of the template
    registers: int
    stack: int
    local: int
    instructions: frozenset[str]
    split: tuple[tuple[str, int], ...]  # USETMAXREG's instructions and numbers
    touched: tuple[str, ...]  # instructions, of products under way

    def __repr__(self) -> str:
        return f"{self.name}<{self.arguments}> for {self.architecture}"


def name_and_arguments(demangled: str) -> tuple[str, str]:
    """Name without namespaces, and template arguments, of a demangled function."""
    text = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    head = re.match(r"[\w:]+", text)
    assert head, demangled
    name, rest = head.group().rsplit("::", 1)[-1], text[head.end() :]
    if not rest.startswith("<"):
        return name, ""
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "<") - (character == ">" and rest[place - 1] != "-")
        if depth == 0:
            return name, rest[1:place]
    raise AssertionError(demangled)


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);", re.M)


def touched_under_way(body: str) -> tuple[str, ...]:
    """Instructions that use sums, or overwrite factors, of a warpgroup's products before these are waited for. In the
    order of the listing: what is under way at the end of a loop is not followed to its beginning."""
    touched = []
    commits: list[tuple[set[int], set[int]]] = [(set(), set())]  # sums and factors; the last one is open
    for name, operands in _INSTRUCTION.findall(body):
        if product := re.match(r"[HB]GMMA\.64x(\d+)x", name):
            first, left = (re.match(r"R(\d+)", operand.strip()) for operand in operands.split(",")[:2])
            assert first, operands
            commits[-1][0].update(range(int(first[1]), int(first[1]) + int(product[1]) // 2))
            if left:
                commits[-1][1].update(range(int(left[1]), int(left[1]) + 4))
            if "gsb0" in operands:
                commits.append((set(), set()))
        elif name.startswith("WARPGROUP.DEPBAR"):
            commits = commits[-1 - int(operands.rsplit("0x", 1)[1], 16) :]
        elif any(sums for sums, _ in commits):
            used = {int(register) for register in re.findall(r"\bR(\d+)\b", operands)}
            written = re.match(r"(?:U?PT?\w*, )?R(\d+)\b", "" if name.startswith(("ST", "SYNCS", "BAR")) else operands)
            wide = 4 if ".128" in name else 2 if re.search(r"\.64|WIDE", name) else 1
            results = set(range(int(written[1]), int(written[1]) + wide)) if written else set()
            if any((used | results) & sums or results & factors for sums, factors in commits):
                touched.append(f"{name} {operands}".strip())
    return tuple(touched)


def _cuobjdump(what: str) -> Iterator[tuple[str, str]]:
    """(architecture, listing) of the library's parts."""
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([program, what, LIBRARY], capture_output=True, text=True, check=True)
    for part in done.stdout.split("Fatbin elf code:")[1:]:
        found = re.search(r"^arch = (\w+)", part, re.M)
        assert found, part[:300]
        yield found.group(1), part


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the library, with what both listings say of it."""
    if not LIBRARY.exists():
        pytest.skip("the CUDA library was not built")
    if shutil.which("c++filt") is None:
        pytest.skip("binutils are not installed")
    usage = {}
    for architecture, listing in _cuobjdump("--dump-resource-usage"):
        for function, *numbers in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing
        ):
            usage[architecture, function] = tuple(map(int, numbers))
    code, split, touched = {}, {}, {}
    for architecture, listing in _cuobjdump("--dump-sass"):
        for body in listing.split("Function : ")[1:]:
            instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", body, re.M)
            key = architecture, body.split(maxsplit=1)[0]
            code[key] = frozenset(instructions)
            counts = re.findall(r"USETMAXREG\.(\w+)\.\w+ (?:UP\w+, )?(0x[0-9a-f]+)", body)
            split[key] = tuple((kind, int(count, 16)) for kind, count in counts)
            touched[key] = touched_under_way(body)
    assert usage.keys() == code.keys()
    found = []
    for (architecture, function), name in zip(usage, _demangled([key[1] for key in usage]), strict=True):
        key = architecture, function
        found.append(Kernel(architecture, *name_and_arguments(name), *usage[key], code[key], split[key], touched[key]))
    return tuple(found)


def instances(name: str) -> list[Kernel]:
    return [kernel for kernel in kernels() if kernel.name == name]


def missing(kernel: Kernel, expected: Expected) -> list[str]:
    """Patterns of instructions that an instance should hold and does not."""
    wanted = list(expected.instructions)
    for pattern, more in expected.where.items():
        if re.search(pattern, kernel.arguments):
            wanted += more
    return [mark for mark in wanted if not any(re.match(mark, held) for held in kernel.instructions)]


def test_every_kernel_of_the_library_has_its_row():
    unknown = sorted({kernel.name for kernel in kernels()} - set(KERNELS))
    worst = {name: max(kernel.registers for kernel in instances(name)) for name in unknown}
    assert not unknown, f"kernels without a row in this file, with the registers they take: {worst}"


def test_every_architecture_is_in_the_library():
    built = {int("".join(filter(str.isdigit, kernel.architecture))) for kernel in kernels()}
    assert built == set(_library.built_cuda_architectures())


@pytest.mark.parametrize("name", KERNELS)
def test_registers_hold_everything(name):
    found = instances(name)
    assert found, f"the library has no {name}"
    for kernel in found:
        assert (kernel.stack, kernel.local) == (0, 0), kernel
        assert kernel.registers <= KERNELS[name].registers, kernel
        assert not [held for held in kernel.instructions if re.match(FORBIDDEN, held)], kernel


@pytest.mark.parametrize("name", KERNELS)
def test_instructions_are_where_they_belong(name):
    found = instances(name)
    for kernel in found:
        assert not missing(kernel, KERNELS[name]), kernel
    for pattern in KERNELS[name].where:
        # a pattern that no instance matches would demand nothing
        assert any(re.search(pattern, kernel.arguments) for kernel in found), pattern


@pytest.mark.parametrize("name", [name for name, expected in KERNELS.items() if expected.split])
def test_registers_are_split_as_designed(name):
    keep, take = KERNELS[name].split
    for kernel in instances(name):
        # a block of three warpgroups has what it was launched with: who asks for more waits for ever
        assert keep + 2 * take <= 3 * kernel.registers, kernel
        assert kernel.architecture == "sm_90a", kernel
        assert set(kernel.split) == {("DEALLOC", keep), ("TRY_ALLOC", take)}, kernel


@pytest.mark.parametrize("name", [name for name, expected in KERNELS.items() if expected.split])
def test_products_under_way_are_left_alone(name):
    for kernel in instances(name):
        assert not kernel.touched, kernel


def test_what_touches_products_under_way_would_be_found():
    listing = """
        /*0010*/                   FADD R24, R24, R1 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4].tnspB, R24 ;
        /*0030*/              @!P0 MOV R4, R1 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R64, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0060*/                   FADD R0, R4, R55 ;
        /*0070*/                   LDS.128 R8, [R1] ;
        /*0080*/                   STS [R3], R8 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00a0*/                   FADD R4, R4, R55 ;
        /*00b0*/                   SHFL.BFLY PT, R127, R0, 0x1, 0x1f ;
        /*00c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00d0*/                   FADD R127, R64, R24 ;
    """
    assert touched_under_way(listing) == (
        "MOV R4, R1",
        "FADD R0, R4, R55",
        "LDS.128 R8, [R1]",
        "SHFL.BFLY PT, R127, R0, 0x1, 0x1f",
    )


def test_what_is_forbidden_would_be_found():
    for wrong in ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD.F16x2.RN.STRONG.GPU", "ATOMS.CAST.SPIN", "LDL.LU"):
        assert re.match(FORBIDDEN, wrong), wrong
    for fine in ("REDUX.SUM", "RED.E.ADD.STRONG.GPU", "ATOMS.ADD", "ATOMG.E.ADD.64.STRONG.GPU", "LDG.E.128"):
        assert not re.match(FORBIDDEN, fine), fine


def test_names_are_split_as_the_compiler_writes_them():
    assert name_and_arguments("void a::(anonymous namespace)::f<b::C<1>, (bool)1>(b::C<1> const*, int)") == (
        "f",
        "b::C<1>, (bool)1",
    )
    assert name_and_arguments("a::(anonymous namespace)::g(int)") == ("g", "")


@pytest.mark.parametrize("library", ("_cpu.so", "_cuda.so"))
def test_torch_2_11_has_every_symbol(library):
    path = LIBRARY.with_name(library)
    if not path.exists():
        pytest.skip(f"{library} was not built")
    if shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r"^ +U ((?:aoti_torch_|torch_)\w+)", listing, re.M))
    there = {line for line in SYMBOLS.read_text().splitlines() if not line.startswith("#")}
    assert len(wanted) > 10
    assert not wanted - there
