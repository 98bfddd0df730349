"""The benchmarks run, and what they measure stays within what the README claims."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments) -> str:
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_loading_costs_about_what_stock_vit_costs():
    output = run("loading.py", "--runs", 5)
    assert float(re.search(r"after transformers: (\S+) s", output)[1]) < 0.3
    ratios = dict(re.findall(r"ViT-B, ([\w ]+): (\S+) of", output))
    assert float(ratios["time"]) < 1.2
    assert float(ratios["peak memory"]) < 1.1


@pytest.mark.slow
def test_exports_stay_close_to_the_model():
    output = run("export.py", "--data", ROOT / "examples" / "data", "--batch", 4, "--runs", 1)
    rows = re.findall(r"^\| (\S+) \|.*\| (\S+) \|$", output, flags=re.MULTILINE)
    limits = {"PyTorch": 0, "vit": 1e-5, "timm": 1e-5, "person.onnx": 1e-4, "half.onnx": 1e-4, "person.pt2": 1e-5}
    assert {name for name, _ in rows} == limits.keys()
    assert not {name: value for name, value in rows if float(value) > limits[name]}
