"""The benchmark runs, and the two pipelines that it compares draw crops from the same distribution."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from personvit_hf.augmentation import MultiCrop

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "data.py"
DRAWS = 600
SMALLEST_P = 1e-3
STATISTICS = ("red", "green", "blue", "contrast", "colour", "sharpness", "brightest")
SETTINGS = MultiCrop(global_size=(64, 32), local_size=(64, 32), num_local_crops=1)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("data_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def person() -> np.ndarray:
    """Colours that tell the position of a crop.

    Without noise in its pixels: `resize` doesn't smooth where it shrinks by less than 1.6, and PIL does, so that
    noise stays about a fifth stronger (as "sharpness" shows).
    """
    smooth = cv2.resize(
        np.random.default_rng(3).random((12, 6, 3), dtype=np.float32), (64, 128), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(smooth * 230, 0, 255).astype(np.uint8)


def statistics(crops: np.ndarray) -> np.ndarray:
    """(crops, STATISTICS) of uint8 crops (crops, 3, height, width)."""
    pixels = crops.astype(np.float32)
    grey = pixels.mean(1)
    columns = [*pixels.mean((2, 3)).T, grey.std((1, 2)), pixels.std(1).mean((1, 2))]
    columns += [np.abs(np.diff(grey, axis=2)).mean((1, 2)), np.percentile(grey, 99, axis=(1, 2))]
    return np.stack(columns, 1)


def draw_ours(settings: MultiCrop, picture: np.ndarray) -> list[np.ndarray]:
    """Statistics of the first global, second global and local crops."""
    rng = np.random.default_rng(0)
    drawn = [np.concatenate(settings(picture, rng)) for _ in range(DRAWS)]
    return [statistics(crops) for crops in np.stack(drawn, 1)]


@pytest.fixture(scope="module")
def by_pil(benchmark, person) -> list[np.ndarray]:
    torch.manual_seed(0)
    image = Image.fromarray(person)
    transforms = benchmark.pil_transforms(SETTINGS, normalized=False)
    return [statistics(torch.stack([transform(image) for _ in range(DRAWS)]).numpy()) for transform in transforms]


def least_likely(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Smallest probability, over kinds of crops and statistics, of samples so far apart (Kolmogorov-Smirnov)."""
    return min(
        ks_2samp(a[:, i], b[:, i]).pvalue for a, b in zip(ours, theirs, strict=True) for i in range(len(STATISTICS))
    )


def test_crops_are_distributed_as_those_of_torchvision_on_pil(person, by_pil):
    assert least_likely(draw_ours(SETTINGS, person), by_pil) > SMALLEST_P


@pytest.mark.parametrize(
    "changes",
    [
        {"global_scale": (0.8, 1.0)},
        {"local_scale": (0.2, 0.4)},
        {"jitter_probability": 0.3},
        {"brightness": 0.1},
        {"grayscale_probability": 0.0},
        {"blur_probabilities": (0.4, 0.1, 0.5)},
        {"blur_sigma": (0.1, 0.8)},
        {"solarize_probability": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_that_comparison_tells_other_recipes_apart(person, by_pil, changes):
    assert least_likely(draw_ours(replace(SETTINGS, **changes), person), by_pil) < SMALLEST_P


def test_the_command_prints_rates_and_cores():
    process = run("--rounds", "2", "--batch_size", "4", "--steps_per_second", "3", "--gpu_batch_size", "100")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    rates = [float(line[24:44]) for line in lines[2:5]]
    assert min(rates) > 0
    assert lines[5].startswith("A GPU that takes 3 steps of 100 images")
    cores = [float(line.split()[-2]) for line in lines[6:9]]
    assert cores == pytest.approx([300 / rate for rate in rates], abs=0.06, rel=0.05)


@pytest.mark.parametrize("name", ["batch_size", "rounds", "steps_per_second", "gpu_batch_size"])
def test_sizes_must_be_positive(benchmark, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["data.py", f"--{name}", "0"])
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number, .*; got 0"):
        benchmark.main()
