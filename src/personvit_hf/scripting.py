"""What the scripts share: settings from flags and a YAML file, a log of figures, and the score of a benchmark."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import yaml
from accelerate import Accelerator
from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedModel

from .embedding import embed_images
from .reid_retrieval.ranking import evaluate_reid

Arguments = TypeVar("Arguments")


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Settings of a script from its flags and, with `--config FILE`, from a YAML file; flags win over the file.

    Args:
        arguments_class: Dataclass with a field for each setting; its help texts are in the fields' metadata.
        argv: Command line without the program's name; None for the process's own.

    Returns:
        An instance of `arguments_class`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no mapping, or has a setting that the script doesn't.
        SystemExit: for wrong flags, with a usage message (argparse).
    """
    parser = HfArgumentParser(arguments_class)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it.")
    argv = list(sys.argv[1:] if argv is None else argv)
    path = _config_path(argv)
    if path is not None:
        settings = read_settings(path)
        known = {action.dest: action for action in parser._actions}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{path}: unknown settings {unknown}. See --help for those that exist.")
        for name in settings:
            known[name].required = False
        parser.set_defaults(**settings)
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    return arguments_class(**namespace)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`--config` {path}: no such file.")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected lines `setting: value`, found {type(settings).__name__}.")
    return settings


class MetricsLog:
    """Figures of a run, one JSON object a line, and to Accelerate's trackers if the script uses any.

    Args:
        path: The file; lines after `step` are dropped first, so that a resumed run leaves one line a step.
        accelerator: The run's accelerator; only its main process writes.
        step: Optimizer steps already done.
    """

    def __init__(self, path: Path, accelerator: Accelerator, step: int = 0):
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if path.exists() and step:
                kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            path.write_text("".join(kept))

    def write(self, step: int, **figures: float) -> None:
        """Adds a line; `step` counts optimizer steps."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log(figures, step=step)


def require_finite(step: int, output_dir: str | Path, **losses: float) -> None:
    """Stops a run whose loss is no number before anything is saved from it.

    Raises:
        FloatingPointError: naming the loss and what to do.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"`{name}` is {value} after step {step}: training has diverged. Checkpoints in {output_dir} are from "
                "before. Resume from one with a lower learning rate, a smaller `clip_gradients` or without fp16."
            )


def score(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.DatasetDict,
    use_cameras: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Embeds a benchmark's query and gallery and ranks them.

    Args:
        model: PersonViTModel or PersonViTForReID.
        processor: The model's own image processor.
        dataset: What `load_reid_dataset` returns.
        use_cameras: Whether the model is told each image's camera (SIE).
        batch_size: Images a forward pass.
        num_workers: Processes that decode and resize.

    Returns:
        What `evaluate_reid` returns: mAP, mINP, cmc, rank1 and so on.
    """
    columns: dict[str, Any] = {}
    for split in ("query", "gallery"):
        rows = dataset[split]
        cameras = np.array(rows["camera_id"])
        columns[f"{split}_embeddings"] = embed_images(
            model, processor, rows, cameras if use_cameras else None, batch_size, num_workers
        )
        columns[f"{split}_person_ids"] = np.array(rows["person_id"])
        columns[f"{split}_camera_ids"] = cameras
    return evaluate_reid(**columns)


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the help text of its flag."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _config_path(argv: list[str]) -> str | None:
    for position, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _step_of(line: str) -> float:
    """The step of a log line; a line that a crash cut short counts as after every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
