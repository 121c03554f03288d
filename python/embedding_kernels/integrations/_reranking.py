"""What the adapters of `MultiViewReranker` share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models import MultiViewReranker


def load_reranker(op: str, model: str | Path | MultiViewReranker, options: Mapping[str, Any]) -> MultiViewReranker:
    """The reranker itself, or that of a directory or a Hub name, loaded with those ``options`` that are not None."""
    options = {name: value for name, value in options.items() if value is not None}
    if not isinstance(model, MultiViewReranker):
        return MultiViewReranker.from_pretrained(model, **options)
    if options:
        raise ValueError(f"{op}: options are for a model to load, got a MultiViewReranker and {', '.join(options)}")
    return model


def best_first(scores: np.ndarray) -> list[int]:
    """Places by falling score; what is equal stays in the order given."""
    return np.argsort(-scores, kind="stable").tolist()


def titled(text: Any, fields: Mapping[str, Any], title_key: str | None) -> Any:
    """A passage for `MultiViewReranker`: the text, behind the title that ``fields`` may hold under ``title_key``."""
    title = None if title_key is None else fields.get(title_key)
    return {"title": title, "text": text} if title else text
