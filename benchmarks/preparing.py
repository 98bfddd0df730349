"""How many images a second `personvit data prepare` turns into parquet, from a folder and from archives.

It writes copies of the given images to a temporary folder, a .zip and a .tar, prepares each in this process with one
thread, and beside them lets `datasets` do the nearest thing, imagefolder and to_parquet, which decodes nothing and so
finds no broken image.

    python benchmarks/preparing.py --data my_crops/ --images 6000
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import datasets

from personvit_hf import load_person_images
from personvit_hf.file_trees import read_address
from personvit_hf.preparing import prepare_dataset
from personvit_hf.scripting import option, parse_arguments

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class PreparingBenchmarkArguments:
    data: str = option(str(ROOT / "examples" / "data"), "Images to copy.")
    images: int = option(6000, "How many copies.", least=1)
    rounds: int = option(3, "Rounds, in which all take turns; figures are medians.", least=1)


def write_sources(data: str, num_images: int, root: Path) -> int:
    """The same files in root/folder, root/crops.zip and root/crops.tar; their bytes in all."""
    rows = load_person_images(data)
    size = 0
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "crops.zip", "w") as zipped, tarfile.open(root / "crops.tar", "w") as tarred:
        for index in range(num_images):
            image = rows[index % len(rows)]["image"]
            content = image["bytes"] if image["bytes"] is not None else read_address(image["path"])
            file = root / "folder" / f"{index:07}.jpg"
            file.write_bytes(content)
            zipped.write(file, file.name)
            tarred.add(file, file.name)
            size += len(content)
    return size


def by_datasets(folder: Path, out: Path) -> None:
    out.mkdir()
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(out / "cache"))
    table = datasets.table.embed_table_storage(rows.with_format("arrow")[:])
    datasets.Dataset(table).to_parquet(out / "train.parquet")


def main() -> None:
    args = parse_arguments(PreparingBenchmarkArguments)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = write_sources(args.data, args.images, root)
        work: dict[str, Callable[[Path], object]] = {
            "folder": lambda out: prepare_dataset(root / "folder", out),
            ".zip": lambda out: prepare_dataset(root / "crops.zip", out),
            ".tar": lambda out: prepare_dataset(root / "crops.tar", out),
            "imagefolder of datasets": lambda out: by_datasets(root / "folder", out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for round_ in range(args.rounds):
            for index, (name, run) in enumerate(work.items()):
                started = time.perf_counter()
                run(root / f"out-{round_}-{index}")
                seconds[name].append(time.perf_counter() - started)
    kib = size / args.images / 1024
    print(f"{args.images} images of {args.data}, {kib:.1f} KiB each, medians of {args.rounds} rounds")
    print(f"{'from':26}{'images/s':>10}{'MiB/s':>8}{'4.2 million take':>20}")
    for name, times in seconds.items():
        rate = args.images / median(times)
        print(f"{name:26}{rate:>10.0f}{size / median(times) / 2**20:>8.1f}{4.2e6 / rate / 60:>16.0f} min")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
