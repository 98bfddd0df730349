"""The whole road on the pictures in examples/data: pre-train, fine-tune, evaluate, AutoModel, ranked retrievals.

    python examples/demo.py --output_dir runs/demo

Takes a few minutes on two CPU cores and downloads nothing.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoModel, set_seed

from personvit_hf import PersonViTForReID, PersonViTModel, load_reid_dataset
from personvit_hf.person_images import PersonImages
from personvit_hf.scripting import embed_benchmark, option, parse_arguments, score
from personvit_hf.search import rank_benchmark
from personvit_hf.visualization import draw_rankings, save_figure

EXAMPLES = Path(__file__).resolve().parent
NUM_ROWS, NUM_COLUMNS = 8, 10


@dataclass
class DemoArguments:
    output_dir: str = option("runs/demo", "Where everything is written; emptied first.")
    data: str = option(str(EXAMPLES / "data"), "Data set with unlabelled and labelled pictures.")


def run(script: str, recipe: str, *flags: str) -> None:
    """Runs an example with a recipe, as a user would."""
    command = [sys.executable, str(EXAMPLES / script), "--config", str(EXAMPLES / "recipes" / recipe), *flags]
    # One thread for so small a model, and the other core for loading: threads that wait for each other on busy cores
    # make a step many times slower.
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)


def main() -> None:
    args = parse_arguments(DemoArguments)
    output_dir = Path(args.output_dir)
    shutil.rmtree(output_dir, ignore_errors=True)
    pretrained, finetuned = output_dir / "pretrained", output_dir / "finetuned"

    run("pretrain.py", "demo_pretrain.yaml", "--data", args.data, "--output_dir", str(pretrained))
    run(
        "finetune.py",
        "demo_finetune.yaml",
        *("--data", args.data, "--output_dir", str(finetuned), "--model_name_or_path", str(pretrained)),
    )

    set_seed(0)  # of the random model
    # Three models on people that none of them was trained with
    dataset = load_reid_dataset(args.data)
    models = {
        "random": (PersonViTModel(AutoConfig.from_pretrained(pretrained)), pretrained),
        "pre-trained, no labels": (AutoModel.from_pretrained(pretrained), pretrained),
        "fine-tuned": (PersonViTForReID.from_pretrained(finetuned), finetuned),
    }
    rows = []
    for name, (model, folder) in models.items():
        result = score(model, AutoImageProcessor.from_pretrained(folder), dataset)
        rows.append(f"{name:<24}{100 * result['mAP']:>6.1f}{100 * result['rank1']:>9.1f}")

    # Features through AutoModel, as an application would get them
    model = AutoModel.from_pretrained(finetuned)
    columns = embed_benchmark(model, AutoImageProcessor.from_pretrained(finetuned), dataset)
    picture = output_dir / "retrievals.png"
    query, gallery = PersonImages(dataset["query"]), PersonImages(dataset["gallery"])
    chosen = np.linspace(0, len(query) - 1, NUM_ROWS).round().astype(int)
    save_figure(
        draw_rankings([query[i] for i in chosen], gallery, *rank_benchmark(columns, chosen, NUM_COLUMNS)), picture
    )

    print(f"\n{'model':<24}{'mAP':>6}{'Rank-1':>9}", *rows, sep="\n")
    print(f"\nRanked retrievals: {picture}")
    print("blue: query; green: same person; red: another; faded: same person, same camera, which counts for nothing")


if __name__ == "__main__":
    main()
