import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "streaming.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table():
    process = run("--rows", "10000", "100000")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines[1:3]] == [9984, 99968]  # whole batches
    assert float(lines[3].split()[-1].rstrip("%")) < 5


@pytest.mark.slow
def test_sizes_must_be_positive():
    process = run("--rows", "0")
    assert process.returncode == 1 and "must be positive" in process.stderr
