"""An index larger than what it may take of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = 10_000_000  # of 48 bytes


def measured(*arguments: str) -> dict[str, int]:
    script = Path(__file__).with_name("memory_of_search.py")
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(arguments[0], result)
    assert result["samples"] > 20
    return result


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_ten_million_codes(tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    built = measured("build", path, str(ROWS))
    assert built["private"] < 150, "one part of a million codes, not ten"
    for task in ("search", "compact", "search"):
        result = measured(task, path, str(ROWS))
        assert result["private"] < 80
        assert result["resident"] < 100
        assert result["left"] < 20
    assert len(list(Path(path).glob("segment-*"))) == 1
