"""Exported models against PyTorch: size, speed and difference, for README's table of runtimes.

    python benchmarks/export.py --data examples/data

The runtimes and the model itself take turns at one batch in one process, so that all see the same machine; the ratio
of speeds is the median of the rounds' ratios. The model is a ViT-S/16 of random, spread-out weights.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import onnxruntime
import timm
import torch
from transformers import AutoModel

from personvit_hf import PersonViTConfig, PersonViTImageProcessor, PersonViTModel
from personvit_hf.export import export_onnx, export_timm, export_torch, export_vit

Embed = Callable[[torch.Tensor], torch.Tensor]


def make_model() -> PersonViTModel:
    """A ViT-S/16 whose weights are spread out, so that rounding shows as it would in a trained one."""
    torch.manual_seed(0)
    model = PersonViTModel(PersonViTConfig.from_preset("small")).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(features, dim=-1)


def onnx_runtime(file: Path, threads: int) -> Embed:
    """Pixels to embeddings by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options)
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def export_all(model: PersonViTModel, folder: Path, threads: int) -> dict[str, tuple[Path, Embed]]:
    """File or folder, and what runs it, of each runtime."""
    processor = PersonViTImageProcessor()
    paths = {name: folder / name for name in ("vit", "timm", "person.onnx", "half.onnx", "person.pt2")}
    export_vit(model, processor, paths["vit"])
    export_timm(model, processor, paths["timm"])
    export_onnx(model, processor, paths["person.onnx"])
    export_onnx(model, processor, paths["half.onnx"], half=True)
    export_torch(model, processor, paths["person.pt2"])
    vit = AutoModel.from_pretrained(paths["vit"])
    in_timm = timm.create_model(f"local-dir:{paths['timm']}", pretrained=True).eval()
    runners = {
        "vit": lambda pixels: normalized(vit(pixels).last_hidden_state[:, 0]),
        "timm": lambda pixels: normalized(in_timm(pixels)),
        "person.onnx": onnx_runtime(paths["person.onnx"], threads),
        "half.onnx": onnx_runtime(paths["half.onnx"], threads),
        "person.pt2": torch.export.load(paths["person.pt2"]).module(),
    }
    return {name: (path, runners[name]) for name, path in paths.items()}


def time_rounds(runners: dict[str, Embed], pixels: torch.Tensor, runs: int) -> dict[str, list[float]]:
    """Seconds of each runner in each round; one round that isn't counted comes first."""
    seconds = {name: [] for name in runners}
    for _ in range(runs + 1):
        for name, embed in runners.items():
            start = time.perf_counter()
            embed(pixels)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


@torch.no_grad()
def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Folder with gallery*.parquet, a column `image`.")
    parser.add_argument("--crops", type=int, default=64, help="Images that the difference is measured on.")
    parser.add_argument("--batch", type=int, default=16, help="Images a batch.")
    parser.add_argument("--runs", type=int, default=9, help="Rounds.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of each runtime.")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)

    rows = datasets.load_dataset("parquet", data_files=f"{args.data}/gallery*.parquet", split="train")
    images = [row["image"].convert("RGB") for row in rows.select(range(min(args.crops, len(rows))))]
    pixels = PersonViTImageProcessor()(images=images, return_tensors="pt").pixel_values
    model = make_model()

    def reference(batch: torch.Tensor) -> torch.Tensor:
        return normalized(model(batch).pooler_output)

    with tempfile.TemporaryDirectory() as folder:
        exported = export_all(model, Path(folder), args.threads)
        runners = {"PyTorch": reference} | {name: embed for name, (_, embed) in exported.items()}
        embeddings = {
            name: torch.cat([embed(part) for part in pixels.split(args.batch)]) for name, embed in runners.items()
        }
        seconds = time_rounds(runners, pixels[: args.batch], args.runs)
        sizes = {name: f"{size_of(path) / 2**20:.1f}" for name, (path, _) in exported.items()}

    print(f"{len(pixels)} crops, batches of {args.batch}, {args.threads} thread(s), medians of {args.runs} rounds\n")
    print("| | size, MiB | images/s | speed against PyTorch | largest difference |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        speed = args.batch / statistics.median(times)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times, seconds["PyTorch"], strict=True))
        difference = (embeddings[name] - embeddings["PyTorch"]).abs().max().item()
        print(f"| {name} | {sizes.get(name, '')} | {speed:.1f} | {ratio:.2f} | {difference:.0e} |")


if __name__ == "__main__":
    main()
