import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "preparing.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_prints_rates():
    process = run("--images", "30", "--rounds", "1")
    assert process.returncode == 0, process.stderr
    rows = process.stdout.splitlines()[2:]
    assert [row[:26].strip() for row in rows] == ["folder", ".zip", ".tar", "imagefolder of datasets"]
    assert all(float(row[26:36]) > 0 for row in rows)


@pytest.mark.slow
def test_numbers_must_be_positive():
    process = run("--images", "0")
    assert process.returncode == 1 and "`images` must be a finite number, at least 1; got 0" in process.stderr
