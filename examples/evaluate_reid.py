"""Scores a model on a labelled benchmark: mAP, mINP and CMC under the Market-1501 protocol.

    accelerate launch examples/evaluate_reid.py --model runs/finetune --data examples/data

The data set is a Market-1501 folder tree, or parquet or Hub data with the columns image, person_id and camera_id.
Several processes share its images. Settings come from flags, from a YAML file (`--config FILE`), or both.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from personvit_hf import load_reid_dataset
from personvit_hf.distributed import require_connected
from personvit_hf.files import require_writable
from personvit_hf.loading import load_embedder
from personvit_hf.reid_data import require_true_match
from personvit_hf.scripting import option, parse_arguments, score


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "Checkpoint folder or Hub name, fine-tuned or pre-trained."})
    data: str = field(metadata={"help": "Labelled data set with query and gallery."})
    output: str | None = option(None, "JSON file for the figures.")
    use_cameras: bool = option(True, "Tell a model that was trained with cameras each image's.")
    batch_size: int = option(64, "Images a forward pass.", least=1)
    num_workers: int = option(2, "Processes that load images.", least=0)


def main() -> None:
    args = parse_arguments(EvaluationArguments)
    accelerator = Accelerator()
    require_connected(accelerator)
    model, processor = load_embedder(args.model)
    dataset = load_reid_dataset(args.data, require_train=False)
    require_true_match(dataset, args.data)
    if args.output:
        require_writable(Path(args.output))
    result = score(
        model.to(accelerator.device),
        processor,
        dataset,
        args.use_cameras,
        args.batch_size,
        args.num_workers,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return

    num_queries, num_valid = len(dataset["query"]), result["num_valid_queries"]
    print(f"{args.model} on {args.data}: {num_valid} of {num_queries} queries have a match")
    for name in ("mAP", "mINP", "rank1", "rank5", "rank10"):
        print(f"{name:>7} {100 * result[name]:6.2f}")
    if args.output:
        figures = {name: value for name, value in result.items() if isinstance(value, int | float)}
        figures["cmc"] = result["cmc"].tolist()
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
