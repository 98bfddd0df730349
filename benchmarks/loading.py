"""How long loading takes, against transformers' own ViT and against transformers alone.

    python benchmarks/loading.py

Each figure is of a process of its own. Ours and theirs run in turn, so that both see the same machine, and the ratio
is the median of the pairs' ratios: absolute times mean little on a shared machine. The models are ViT-B with random
weights in float32, in folders that both have just read once.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

IMPORT = """
import time
start = time.perf_counter()
import {modules}
print(time.perf_counter() - start, 0)
"""
# In another process, since a child's peak memory starts at its parent's. The ViT has a pooler that ours lacks.
WRITE = """
from transformers import ViTConfig, ViTModel
from personvit_hf import PersonViTConfig, PersonViTModel
PersonViTModel(PersonViTConfig.from_preset("base")).save_pretrained({folder!r} + "/personvit")
ViTModel(ViTConfig(image_size=[256, 128])).save_pretrained({folder!r} + "/vit")
"""
# Peak memory is told with and without the libraries, which take half a gigabyte themselves.
LOAD = """
import resource, time, torch
from transformers import AutoModel, ViTModel, modeling_utils
import personvit_hf
torch.set_num_threads(1)
personvit_hf.PersonViTModel
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
start = time.perf_counter()
model = AutoModel.from_pretrained({folder!r})
seconds = time.perf_counter() - start
sum(parameter.sum() for parameter in model.parameters())  # weights are read from the file when they are first used
print(seconds, peak(), peak() - before)
"""


def measure(code: str) -> list[float]:
    """The numbers that a fresh process prints."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(number) for number in process.stdout.split()]


def measure_pairs(ours: str, theirs: str, runs: int) -> list[tuple[list[float], list[float]]]:
    """(ours, theirs) of each run, after one that isn't counted."""
    return [(measure(ours), measure(theirs)) for _ in range(runs + 1)][1:]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="Pairs of each figure.")
    runs = parser.parse_args().runs

    pairs = measure_pairs(
        IMPORT.format(modules="transformers, personvit_hf"), IMPORT.format(modules="transformers"), runs
    )
    added = statistics.median(ours[0] - theirs[0] for ours, theirs in pairs)
    print(f"import personvit_hf after transformers: {added:+.3f} s (median of {runs} pairs)")

    with tempfile.TemporaryDirectory() as folder:
        measure(WRITE.format(folder=folder))
        ours, theirs = (LOAD.format(folder=f"{folder}/{name}") for name in ("personvit", "vit"))
        pairs = measure_pairs(ours, theirs, runs)
    for index, (what, unit) in enumerate((("time", "s"), ("peak memory", "MiB"), ("peak memory added", "MiB"))):
        ratio = statistics.median(ours[index] / theirs[index] for ours, theirs in pairs)
        absolute = [statistics.median(pair[which][index] for pair in pairs) for which in (0, 1)]
        print(
            f"AutoModel.from_pretrained of ViT-B, {what}: {ratio:.2f} of ViTModel's "
            f"({absolute[0]:.2f} {unit} against {absolute[1]:.2f} {unit}, medians of {runs} pairs)"
        )


if __name__ == "__main__":
    main()
