"""How fast one core turns image files into pre-training batches, and how many cores keep a GPU busy.

Both pipelines read the same rows and end in stacked batches of two global and the local crops, with the same masks:

- ours: the loader of examples/pretrain.py, whose batches stay uint8 (`normalize` is left to the training device);
- PIL: what DINO-like code usually does, torchvision's transforms on PIL images, one crop after the other.

They take turns, batch by batch, in one process with one thread. A figure is the median over rounds; images per second
are given by processor time, which other programs on the machine hardly touch, and by the clock.

    python benchmarks/data.py --data my_crops/ --steps_per_second 4 --gpu_batch_size 256
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from personvit_hf import PersonViTConfig, PersonViTImageProcessor
from personvit_hf.augmentation import MultiCrop
from personvit_hf.masking import PretrainingCrops
from personvit_hf.scripting import option, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from pretrain import PretrainArguments, build_dataloader  # noqa: E402


@dataclass
class DataBenchmarkArguments:
    data: str = option(str(ROOT / "examples" / "data"), "Images, as for `--data` of examples/pretrain.py.")
    batch_size: int = option(32, "Images in a batch.", least=1)
    rounds: int = option(7, "Batches of each pipeline; figures are medians over them.", least=1)
    steps_per_second: float = option(2.0, "Optimizer steps of the GPU per second ...", above=0)
    gpu_batch_size: int = option(256, "... with this many images in each.", least=1)
    seed: int = option(0, "Seed of both pipelines.")


class RandomBlur:
    """Gaussian blur of a PIL image, with a given probability and a standard deviation drawn from `sigma`."""

    def __init__(self, probability: float, sigma: tuple[float, float]):
        self.probability, self.sigma = probability, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1) >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self.sigma).item()))


def pil_transforms(settings: MultiCrop, normalized: bool) -> list[Callable[[Image.Image], torch.Tensor]]:
    """The same recipe by torchvision on PIL images: one transform for each of the three kinds of crops.

    Args:
        settings: Sizes, ranges and probabilities.
        normalized: Whether crops end as normalised float32, as usual, or as uint8 tensors.
    """
    s = settings
    processor = PersonViTImageProcessor()
    end = [transforms.PILToTensor()]
    if normalized:
        end = [transforms.ToTensor(), transforms.Normalize(processor.image_mean, processor.image_std)]

    def transform(size, scale, blur_probability, solarize_probability):
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale, s.aspect_ratio, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(s.flip_probability),
                transforms.RandomApply(
                    [transforms.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)], p=s.jitter_probability
                ),
                transforms.RandomGrayscale(s.grayscale_probability),
                RandomBlur(blur_probability, s.blur_sigma),
                transforms.RandomSolarize(128, solarize_probability),
                *end,
            ]
        )

    first, second, local = s.blur_probabilities
    return [
        transform(s.global_size, s.global_scale, first, 0.0),
        transform(s.global_size, s.global_scale, second, s.solarize_probability),
        transform(s.local_size, s.local_scale, local, 0.0),
    ]


class PilCrops(Dataset):
    """Crops by PIL and torchvision, and the masks of `ours`, from the rows of `ours`."""

    def __init__(self, ours: PretrainingCrops, normalized: bool, seed: int):
        self.rows, self.augment, self.masking = ours.images.rows, ours.augment, ours.masking
        self.first, self.second, self.local = pil_transforms(ours.augment, normalized)
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        row = self.rows[key % len(self.rows)]["image"]
        content = row["bytes"]
        if content is None:
            content = Path(row["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            image = file.convert("RGB")
        crops = {"global_pixel_values": torch.stack([self.first(image), self.second(image)])}
        if self.augment.num_local_crops:
            crops["local_pixel_values"] = torch.stack([self.local(image) for _ in range(self.augment.num_local_crops)])
        masks = np.stack([self.masking(self.rng).ravel() for _ in range(2)])
        return crops | {"bool_masked_pos": torch.from_numpy(masks)}


def endless(loader: DataLoader) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    while True:
        yield from loader


def measure(loaders: dict[str, DataLoader], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(processor seconds, clock seconds) for each batch of each loader; one batch of each goes ahead unmeasured."""
    batches = {name: endless(loader) for name, loader in loaders.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for round_ in range(rounds + 1):
        for name, iterator in batches.items():
            cpu, clock = time.process_time(), time.perf_counter()
            next(iterator)
            if round_:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    return seconds


def main() -> None:
    args = parse_arguments(DataBenchmarkArguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(args.seed)
    settings = PretrainArguments(
        data=args.data, output_dir="", batch_size=args.batch_size, num_workers=0, seed=args.seed
    )
    ours = build_dataloader(settings, PersonViTConfig())
    loaders = {"ours, uint8": ours}
    for name, normalized in (("PIL, uint8", False), ("PIL, normalised floats", True)):
        crops = PilCrops(ours.dataset, normalized, args.seed)
        loaders[name] = DataLoader(crops, args.batch_size, shuffle=True, drop_last=True)
    seconds = measure(loaders, args.rounds)

    augment = ours.dataset.augment
    print(
        f"{len(ours.dataset)} images of {args.data}; crops 2 x {augment.global_size} and "
        f"{augment.num_local_crops} x {augment.local_size}; medians of {args.rounds} batches of {args.batch_size}, "
        "one thread"
    )
    print(f"{'':24}{'images/s of a core':>20}{'by the clock':>14}{'ours is faster by (range)':>32}")
    rates = {}
    for name, times in seconds.items():
        cpu, clock = (args.batch_size / median(column) for column in zip(*times, strict=True))
        rates[name] = cpu
        ratios = [theirs[0] / mine[0] for theirs, mine in zip(times, seconds["ours, uint8"], strict=True)]
        faster = f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name:24}{cpu:20.0f}{clock:14.0f}{faster:>32}")
    needed = args.steps_per_second * args.gpu_batch_size
    print(f"A GPU that takes {args.steps_per_second:g} steps of {args.gpu_batch_size} images per second is fed by:")
    for name, rate in rates.items():
        print(f"{name:24}{needed / rate:>7.1f} cores")


if __name__ == "__main__":
    main()
