"""Progress bars: on long work only, unless asked for."""

from __future__ import annotations

import logging
import sys
from typing import Any

_DELAY = 2.0  # seconds before a bar that nobody asked for appears


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def progress_bar(what: str, total: int, unit: str, show: bool | None, logger: logging.Logger) -> Any:
    """A tqdm bar. ``show=None``: at once when ``logger`` is at INFO or DEBUG, late in a terminal, else never."""
    if show is None and logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG):
        show = True
    if show is False or (show is None and not sys.stderr.isatty()):
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:  # an extra: `BinaryIndex` needs only torch and NumPy
        return _NoBar()
    return tqdm(desc=what, total=total, unit=unit, delay=0 if show else _DELAY)
