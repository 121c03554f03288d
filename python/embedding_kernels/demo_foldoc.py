"""A dictionary of computing searched by meaning, with a language model that nobody trained for it.

SmolLM2-135M reads each entry inside the sentence ``This text: "..." means in one word: "``, and the hidden state from
which it would predict that word is the entry's vector (Jiang et al., "Scaling Sentence Embeddings with Large Language
Models", 2024). The mean over an entry's tokens, the other choice, finds far less: `measure` tells how much.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import _host
from ._files import exclusive, remove_partial, whole_directory
from .demo_data import MissingDemoPackageError, default_cache, hash_of_files, smollm2_directory
from .dictd import Entry, entries
from .index import BinaryIndex
from .models import Embedder

FOLDOC = Path("/usr/share/dictd/foldoc.index")
RESCORE_MULTIPLIER = 4
POOLINGS = ("lasttoken", "mean")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BEFORE, _AFTER = 'This text: "', '" means in one word: "'
_SLACK = 4  # tokens that may be cut otherwise once a text stands between quotation marks


@dataclass(frozen=True)
class FoldocOptions:
    """What `embedding-kernels foldoc` is told."""

    queries: tuple[str, ...] = ()
    dictionary: Path | None = None
    limit: int | None = None
    top: int = 5
    measure: int | None = None
    pooling: str = "lasttoken"
    dtype: str = "auto"
    max_seq_length: int = 128
    cache: Path | None = None
    model: Path | None = None


def run(options: FoldocOptions, console: Console) -> dict[str, float]:
    """Embed the dictionary, or read what an earlier run kept, then measure or answer queries.

    Returns:
        What `measure` found; empty where it was not asked for.

    Raises:
        MissingDemoPackageError: the dictionary or the model's package is not installed.
        ValueError: bad options, a damaged dictionary.
    """
    _check(options)
    found = _evenly(entries(_dictionary(options.dictionary)), options.limit)

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    model = options.model or smollm2_directory(options.cache, say)
    encoder = OneWordEncoder if options.pooling == "lasttoken" else TextEncoder
    search = DictionarySearch.kept(options, model, encoder(_embedder(options, model)), found, say)
    if options.measure is not None:
        results = measure(search, options.measure)
        _print_measured(results, search, options, console)
        return results
    for query in options.queries:
        _print_hits(query, search, options.top, console)
    if not options.queries:
        _converse(search, options.top, console)
    return {}


def _check(options: FoldocOptions) -> None:
    for name, least in (("limit", 2), ("top", 1), ("measure", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"foldoc: {name} must be at least {least}, got {value}")
    if options.pooling not in POOLINGS:
        raise ValueError(f"foldoc: pooling must be one of {', '.join(POOLINGS)}, got {options.pooling!r}")
    if options.dtype not in ("auto", *DTYPES):
        raise ValueError(f"foldoc: dtype must be one of auto, {', '.join(DTYPES)}, got {options.dtype!r}")
    if not find_spec("gguf") and options.model is None:
        raise MissingDemoPackageError("the demo needs the package 'gguf', which is not installed: pip install gguf")


def _dictionary(path: Path | None) -> Path:
    if path is None and not FOLDOC.is_file():
        raise MissingDemoPackageError(
            f"the dictionary {FOLDOC} is not installed: apt install dict-foldoc (Debian, Ubuntu), or name the .index "
            "of a dictionary in the dictd format with --dictionary PATH"
        )
    return path or FOLDOC


def _evenly(found: list[Entry], limit: int | None) -> list[Entry]:
    if limit is None or limit >= len(found):
        return found
    return [found[row] for row in np.linspace(0, len(found) - 1, limit).astype(int)]


def _embedder(options: FoldocOptions, model: Path) -> Embedder:
    if options.dtype != "auto":
        dtype = DTYPES[options.dtype]
    else:
        # bfloat16 is several times as fast as float32 where there are instructions for it
        fast = torch.cuda.is_available() or _host.isa() in ("avx512", "amx")
        dtype = torch.bfloat16 if fast else torch.float32
    return Embedder.from_pretrained(model, dtype=dtype, pooling=options.pooling, max_seq_length=options.max_seq_length)


# --- vectors --------------------------------------------------------------------------------------------------------


def title(entry: Entry) -> str:
    """The entry's first headword as printed, which is the first line of its text."""
    return entry.text.split("\n", 1)[0]


def plain_text(entry: Entry) -> str:
    """The entry as one paragraph, without the braces around cross-references and the date at the end."""
    flat = re.sub(r"\s+", " ", re.sub(r"[{}]", "", entry.text))
    return re.sub(r" \(\d{4}-\d\d-\d\d\)$", "", flat)


class TextEncoder:
    """Vectors of texts as they are."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def __call__(self, texts: Sequence[str], show_progress_bar: bool | None = None) -> np.ndarray:
        """float32 ``[N, D]``."""
        return self.embedder.encode(texts, show_progress_bar=show_progress_bar)


class OneWordEncoder(TextEncoder):
    """Vectors of texts inside the sentence that asks for one word.

    Raises:
        ValueError: the embedder's ``max_seq_length`` leaves no room for the text.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(embedder)
        frame = len(embedder.tokenizer(_BEFORE + _AFTER)["input_ids"]) + _SLACK
        self._room = (embedder.max_seq_length or embedder.tokenizer.model_max_length) - frame
        if self._room < 1:
            raise ValueError(f"foldoc: max_seq_length must be at least {frame + 1}, got {embedder.max_seq_length}")

    def __call__(self, texts: Sequence[str], show_progress_bar: bool | None = None) -> np.ndarray:
        """float32 ``[N, D]``."""
        return super().__call__([f"{_BEFORE}{text}{_AFTER}" for text in self._shortened(texts)], show_progress_bar)

    def _shortened(self, texts: Sequence[str]) -> list[str]:
        """Texts cut to the tokens there is room for, so that the end of the sentence is never cut off."""
        if not texts:
            return []
        tokenized = self.embedder.tokenizer(
            list(texts),
            truncation=True,
            max_length=self._room,
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        ends = [spans[-1][1] if spans else 0 for spans in tokenized["offset_mapping"]]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]


# --- the index ------------------------------------------------------------------------------------------------------


class DictionarySearch:
    """Entries of a dictionary, searched by the bits of their vectors and put in order by the vectors.

    A language model's vectors share a large mean, and a few of their dimensions outweigh all others. Each dimension is
    therefore centred and scaled by its mean and spread over the entries, for queries too.

    Args:
        encode: texts to vectors.
        found: the entries.
        index: their vectors, in the same order.
        centre, spread: float32 ``[D]``.
    """

    def __init__(
        self, encode: TextEncoder, found: list[Entry], index: BinaryIndex, centre: np.ndarray, spread: np.ndarray
    ) -> None:
        self.encode = encode
        self.entries = found
        self.index = index
        self._centre, self._spread = centre, spread

    @classmethod
    def built(cls, encode: TextEncoder, found: list[Entry]) -> DictionarySearch:
        """Encode the entries."""
        vectors = encode([plain_text(entry) for entry in found], show_progress_bar=True)
        centre, spread = vectors.mean(axis=0), vectors.std(axis=0) + np.float32(1e-6)
        index = BinaryIndex(rescore_vectors="float16")
        index.add(_normalized(vectors, centre, spread))
        return cls(encode, found, index, centre, spread)

    @classmethod
    def kept(
        cls, options: FoldocOptions, model: Path, encode: TextEncoder, found: list[Entry], say: Callable[[str], None]
    ) -> DictionarySearch:
        """What an earlier run with the same model, entries and options kept, else built and kept; ``say`` is told."""
        folder = (options.cache or default_cache()) / f"dictionary-{_key(options, model, encode, found)}"

        with exclusive(folder.with_suffix(".lock"), lambda: say(f"Waiting for another process to write {folder}")):
            if (folder / "index").is_dir():
                try:
                    search = cls.load(folder, encode, found)
                except (ValueError, OSError) as error:
                    say(f"{error}: written anew")
                    shutil.rmtree(folder)
                else:
                    say(f"{len(found):,} entries read from {folder}")
                    return search
            say(f"{encode.embedder}\n{len(found):,} entries to encode")
            search = cls.built(encode, found)
            remove_partial(folder)
            search.save(folder)
        return search

    def save(self, folder: Path) -> None:
        """Keep the index in a new directory, whole or not at all."""
        from safetensors.numpy import save_file

        with whole_directory(folder) as partial:
            self.index.save(partial / "index")
            save_file({"centre": self._centre, "spread": self._spread}, partial / "scale.safetensors")

    @classmethod
    def load(cls, folder: Path, encode: TextEncoder, found: list[Entry]) -> DictionarySearch:
        """Read what `save` wrote; ValueError or OSError where it is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        index = BinaryIndex.load(folder / "index")
        try:
            scale = load_file(folder / "scale.safetensors")
            centre, spread = scale["centre"], scale["spread"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{folder / 'scale.safetensors'} is damaged ({error})") from error
        if len(index) != len(found):
            raise ValueError(f"{folder} must hold {len(found)} entries, got {len(index)}")
        return cls(encode, found, index, centre, spread)

    def vectors(self, queries: Sequence[str], show_progress_bar: bool | None = None) -> np.ndarray:
        """Vectors of queries, float32 ``[Q, D]``, centred, scaled and of length 1."""
        return _normalized(self.encode(queries, show_progress_bar), self._centre, self._spread)

    def search(self, query: str, k: int) -> list[tuple[float, Entry]]:
        """The best entries, at most ``k``, with their cosines."""
        scores, rows = self.index.search(self.vectors([query]), k, RESCORE_MULTIPLIER)
        pairs = zip(scores[0], rows[0], strict=True)
        return [(float(score), self.entries[row]) for score, row in pairs if row >= 0]


def _normalized(vectors: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    scaled = (vectors - centre) / spread
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)


def _key(options: FoldocOptions, model: Path, encode: TextEncoder, found: list[Entry]) -> str:
    digest = hash_of_files(model)
    frame = (_BEFORE, _AFTER) if isinstance(encode, OneWordEncoder) else ()
    settings = (options.pooling, str(encode.embedder.dtype), options.max_seq_length, *frame)
    digest.update(json.dumps(settings).encode())
    for entry in found:
        digest.update(plain_text(entry).encode() + b"\0")
    return digest.hexdigest()[:20]


# --- what it finds --------------------------------------------------------------------------------------------------


def measure(search: DictionarySearch, count: int) -> dict[str, float]:
    """Search for the titles of ``count`` entries drawn by lot: how many find their entry.

    Returns:
        The share of queries whose entry comes first or among the first ten, by all vectors ("float@1", "float@10"), by
        bits, and by bits with rescoring ("rescored@1", ...).
    """
    total = len(search.entries)
    truth = np.array(sorted(random.Random(0).sample(range(total), min(count, total))))
    queries = search.vectors([title(search.entries[row]) for row in truth], show_progress_bar=True)
    multipliers = {"float": -(-total // 10), "bits": None, "rescored": RESCORE_MULTIPLIER}
    results = {}
    for name, multiplier in multipliers.items():
        _, rows = search.index.search(queries, 10, multiplier)
        for k in (1, 10):
            results[f"{name}@{k}"] = float((rows[:, :k] == truth[:, None]).any(axis=1).mean())
    return results


def _print_measured(
    results: dict[str, float], search: DictionarySearch, options: FoldocOptions, console: Console
) -> None:
    asked = min(options.measure or 0, len(search.entries))
    table = Table(title=f"Titles that find their own entry, {asked:,} among {len(search.entries):,}")
    for column in ("search", "first", "among the first ten"):
        table.add_column(column, justify="left" if column == "search" else "right")
    names = {"float": "all vectors", "bits": "bits", "rescored": f"bits, {RESCORE_MULTIPLIER} × as many rescored"}
    for name, words in names.items():
        table.add_row(words, f"{results[f'{name}@1']:.3f}", f"{results[f'{name}@10']:.3f}")
    console.print(table)


def _print_hits(query: str, search: DictionarySearch, top: int, console: Console) -> None:
    table = Table(title=escape(query), title_justify="left", show_lines=True)
    table.add_column("cosine", justify="right")
    table.add_column("entry", style="bold", max_width=30)
    table.add_column("text")
    for score, entry in search.search(query, top):
        # the headwords stand first in the text, each on a line
        body = plain_text(entry)[len(title(entry)) :].strip()
        table.add_row(f"{score:.3f}", escape(title(entry)), escape(textwrap.shorten(body, 200, placeholder=" …")))
    console.print(table)


def _converse(search: DictionarySearch, top: int, console: Console) -> None:
    """Answer lines of the standard input, up to an empty one or its end."""
    console.print("What are you looking for? An empty line ends.")
    while True:
        try:
            query: Any = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if not query:
            return
        _print_hits(query, search, top, console)
