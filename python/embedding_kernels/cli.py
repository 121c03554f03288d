"""The command line: ``embedding-kernels demo``, ``embedding-kernels foldoc``, ``embedding-kernels doctor``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

from . import __version__

_INSTALL = 'pip install "embedding-kernels[demo]"'

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:  # the command line is not a dependency of the operators
    raise SystemExit(
        f"embedding-kernels: the command line needs {error.name}, which is not installed: {_INSTALL}"
    ) from error

app = typer.Typer(help="Fused kernels for text embedders and rerankers.", no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedding-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    limit: Annotated[int | None, typer.Option(help="Only the first N verses, and fewer queries.")] = None,
    output: Annotated[Path, typer.Option(help="Where the picture and the numbers go.")] = Path("demo-results"),
    cache: Annotated[
        Path | None, typer.Option(help="Where encoded verses are kept (default: the user's cache directory).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another model directory of at least 384 dimensions (default: MiniLM).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the queries and the timed sample.")] = 0,
) -> None:
    """Search 31,102 Bible verses as floats and as bits, beside sentence-transformers and FAISS."""
    with _one_line_errors():
        from .demo import DemoOptions, run

        report = run(DemoOptions(limit, output, cache, model, seed), Console())
    if not all(report["faiss"]["same_ids"].values()):
        raise typer.Exit(1)


@app.command()
def foldoc(
    queries: Annotated[
        list[str] | None, typer.Argument(help="What to look for (default: asks, line by line).", show_default=False)
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option(help="The .index of another dictionary of the dictd format (default: FOLDOC).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only N entries, taken evenly from all.")] = None,
    top: Annotated[int, typer.Option(help="Entries to print for each query.")] = 5,
    measure: Annotated[
        int | None, typer.Option(help="Instead: how many of N entries' titles, as queries, find their entry.")
    ] = None,
    pooling: Annotated[
        str, typer.Option(help="lasttoken, of a sentence that asks for one word, or mean, of the entry's tokens.")
    ] = "lasttoken",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto: bfloat16 where it is fast.")] = "auto",
    max_seq_length: Annotated[int, typer.Option(help="Tokens that are read of an entry.")] = 128,
    cache: Annotated[
        Path | None, typer.Option(help="Where the model and the index are kept (default: the user's cache directory).")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Another model directory (default: SmolLM2-135M).")] = None,
) -> None:
    """Search a dictionary of computing by meaning, with SmolLM2-135M."""
    with _one_line_errors():
        from .demo_foldoc import FoldocOptions, run

        asked = tuple(queries or ())
        options = FoldocOptions(asked, dictionary, limit, top, measure, pooling, dtype, max_seq_length, cache, model)
        run(options, Console())


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    from .demo_data import MissingDemoPackageError

    try:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # "Loading weights": 100 steps of a bar for half a second's work
        yield
    except (MissingDemoPackageError, ValueError, OSError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"the demo needs {error.name}, which is not installed: {_INSTALL}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)


@app.command()
def doctor() -> None:
    """Print what is active on this machine, and why the rest is not."""
    from .doctor import report

    console = Console()
    for section, rows in report():
        table = Table(title=section, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def main() -> None:
    """Entry point of the command ``embedding-kernels``."""
    app()


if __name__ == "__main__":
    main()
