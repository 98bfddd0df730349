"""Memory and speed of a stream: does a million rows take more than ten thousand, and how fast does the first core go?

It writes tables of tiny images to a temporary folder, streams an epoch of each through the loader of
examples/pretrain.py (one process without workers, so that all its memory is in it), and prints the resident memory
after the first part of the stream and at its end.

    python benchmarks/streaming.py --rows 10000 1000000
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers import HfArgumentParser

from personvit_hf.shards import load_person_stream
from personvit_hf.streaming import PersonStream, stream_loader

GROUP_ROWS = 500  # as `personvit data prepare` writes them
FILE_ROWS = 10_000


@dataclass
class StreamingBenchmarkArguments:
    rows: list[int] = field(default_factory=lambda: [10_000, 1_000_000], metadata={"help": "Sizes of the tables."})
    batch_size: int = field(default=64, metadata={"help": "Images in a batch."})
    window_rows: int = field(default=4096, metadata={"help": "Images held and mixed."})
    folder: str | None = field(default=None, metadata={"help": "Measure this folder alone; for its own use."})


def write_table(folder: Path, num_rows: int) -> None:
    """Parquet files of 16x8 JPEGs, of which there are a thousand different ones."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(1000):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(content, "JPEG")
        pictures.append(content.getvalue())
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    for file, start in enumerate(range(0, num_rows, FILE_ROWS)):
        with pq.ParquetWriter(folder / f"train-{file:05}.parquet", schema) as writer:
            for group in range(start, min(start + FILE_ROWS, num_rows), GROUP_ROWS):
                rows = range(group, min(group + GROUP_ROWS, num_rows))
                images = [{"bytes": pictures[row % 1000], "path": f"{row:07}.jpg"} for row in rows]
                writer.write_table(pa.Table.from_pydict({"image": images}, schema))


def corner(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stands for the augmentation, whose memory doesn't depend on the data."""
    return image[0, 0] + rng.integers(2, dtype=np.uint8)


def measure(folder: Path, batch_size: int, window_rows: int) -> None:
    """Streams one epoch; prints rows, rows/s, and MiB of memory: highest of the first 9,000 rows, of all."""
    process = psutil.Process()
    started = time.perf_counter()
    images = load_person_stream(folder)
    stream = PersonStream(images, corner, batch_size, window_rows=window_rows)
    begin, early, peak, seen = time.perf_counter(), 0, 0, 0
    for batch, items in enumerate(stream_loader(stream, len), start=1):
        seen += items
        if batch % 10 == 0:
            peak = max(peak, process.memory_info().rss)
            early = peak if seen <= 9000 else early
    seconds = time.perf_counter() - begin
    print(f"{seen} {seen / seconds:.0f} {early / 2**20:.1f} {peak / 2**20:.1f} {begin - started:.2f}")


def main() -> None:
    args = HfArgumentParser(StreamingBenchmarkArguments).parse_args_into_dataclasses()[0]
    if min(*args.rows, args.batch_size, args.window_rows, 10**9) < 1:
        raise ValueError("`rows`, `batch_size` and `window_rows` must be positive.")
    if args.folder:
        measure(Path(args.folder), args.batch_size, args.window_rows)
        return
    print(f"{'rows':>10}{'rows/s':>10}{'MiB, first 9,000':>20}{'MiB, highest':>16}{'s to open':>12}")
    peaks = []
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_table(Path(folder), num_rows)
            command = [sys.executable, __file__, "--folder", folder, "--batch_size", str(args.batch_size)]
            command += ["--window_rows", str(args.window_rows)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # a fresh process
        seen, rate, early, peak, opened = output.split()
        peaks.append(float(peak))
        print(f"{seen:>10}{rate:>10}{early:>20}{peak:>16}{opened:>12}")
    print(f"Memory at {args.rows[-1]} rows against {args.rows[0]}: {100 * (peaks[-1] / peaks[0] - 1):+.1f}%")


if __name__ == "__main__":
    main()
