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


TINY_STEP = ["--preset", "tiny", "--image_size", 64, 32, "--local_size", 32, 16, "--prototypes", 64, "--batch", 2]


def test_pretraining_step_equals_the_plain_one_and_is_measured():
    output = run("train_step.py", *TINY_STEP, "--rounds", 1, "--precisions", "fp32", "--steps", "pretrain")
    assert float(re.search(r"^pretrain: \d+ outputs and gradients, within (\S+) of", output, re.MULTILINE)[1]) <= 1e-5
    phases = dict(re.findall(r"^\| ([\w ]+) \| \S+ \| (\d\S+) \|$", output, re.MULTILINE))
    seconds = {name: float(value) for name, value in phases.items() if "GFLOP" not in name and "share" not in name}
    assert len(seconds) == 8
    assert sum(seconds.values()) == pytest.approx(2 * seconds["whole"], abs=0.01)


@pytest.mark.slow
def test_all_training_steps_equal_the_plain_ones():
    output = run("train_step.py", *TINY_STEP, "--rounds", 1)
    differences = re.findall(r"^(\w+): \d+ outputs and gradients, within (\S+) of each other", output, re.MULTILINE)
    assert [kind for kind, _ in differences] == ["pretrain", "finetune", "embed"]
    assert all(float(difference) <= 1e-5 for _, difference in differences)
    assert len(re.findall(r"^peak memory, .*: plain \d+ MiB, ours \d+ MiB", output, re.MULTILINE)) == 2
    assert (
        len(re.findall(r"^checkpointed layers, .*: \S+ of the time; peak memory \d+ of \d+ MiB", output, re.MULTILINE))
        == 2
    )
