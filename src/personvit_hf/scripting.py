"""What the scripts share: settings from flags and a YAML file, a log of figures, and the score of a benchmark."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from argparse import Action
from collections.abc import Sequence
from dataclasses import field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedModel

from .configuration_personvit import PersonViTConfig
from .embedding import embed_images
from .files import read_yaml
from .person_images import split_broken
from .reid_retrieval.expansion import expand_queries, remove_camera_bias
from .reid_retrieval.ranking import evaluate_reid
from .reid_retrieval.reranking import rerank

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments")


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Settings of a script from its flags and, with `--config FILE`, from a YAML file; flags win over the file.

    A setting in the file is checked as its flag would be; one that is null counts as not given.

    Args:
        arguments_class: Dataclass with a field for each setting; its help texts are in the fields' metadata.
        argv: Command line without the program's name; None for the process's own.

    Returns:
        An instance of `arguments_class`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no mapping, or has a setting that the script doesn't; if there are several files;
            or if a number is not finite or outside what its `option` allows.
        SystemExit: for wrong flags or values, with a usage message (argparse).
    """
    # without abbreviations, or `--conf FILE` would be taken for `--config` and its file never read
    parser = _Parser(arguments_class, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it.")
    argv = list(sys.argv[1:] if argv is None else argv)
    path = _config_path(argv)
    if path is not None:
        settings = read_settings(path)
        unknown = sorted(set(settings) - {setting.name for setting in fields(arguments_class)})
        if unknown:
            raise ValueError(f"{path}: unknown settings {unknown}. See --help for those that exist.")
        for setting in fields(arguments_class):  # YAML takes a bare `no`, as of `mixed_precision`, for false
            if isinstance(settings.get(setting.name), bool) and "bool" not in str(setting.type):
                settings[setting.name] = "yes" if settings[setting.name] else "no"
        argv = _as_flags(settings) + argv
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    _check_ranges(arguments_class, namespace)
    return arguments_class(**namespace)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of settings.")
    return read_yaml(Path(path))


def parse_overrides(text: str) -> dict[str, Any]:
    """Settings of PersonViTConfig from the JSON of a script's `config_overrides`.

    Raises:
        ValueError: if it is not JSON, not an object, or has a setting that PersonViTConfig doesn't.
    """
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`config_overrides` is not JSON: {error}; got {text!r}.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f'`config_overrides` must be a JSON object such as {{"drop_path_rate": 0.2}}, got {text!r}.')
    known = PersonViTConfig()
    unknown = [name for name in overrides if not hasattr(known, name)]
    if unknown:
        raise ValueError(f"`config_overrides`: PersonViTConfig has no settings {unknown}.")
    return overrides


def default_attention(accelerator: Accelerator) -> str:
    """The faster attention to train with: eager in bf16 on a CPU, where sdpa's backward pass is slow; else sdpa."""
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return "eager" if slow else "sdpa"


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Has layers in training mode keep their input alone, and be computed again in the backward pass.

    This is transformers' own `gradient_checkpointing_enable`, by its newer name where there is one.
    """
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def collate(items: list[Any]) -> dict[str, Any]:
    """A batch of a training data set, whatever of it could be decoded.

    Args:
        items: Dicts of arrays with equal names and shapes, or `BrokenImage`s.

    Returns:
        `inputs`, the arrays stacked to tensors, and `broken`, the list of `BrokenImage`s. Other items of the batch
        stand in for broken ones, so that every process keeps its batch size.

    Raises:
        RuntimeError: if all of them are broken.
    """
    good, broken = split_broken(items)
    if not good:
        raise RuntimeError(f"A whole batch of {len(items)} images is broken; the first: {broken[0].reason}")
    filled = [good[i % len(good)] for i in range(len(items))]
    batch = {name: torch.from_numpy(np.stack([item[name] for item in filled])) for name in good[0]}
    return {"inputs": batch, "broken": broken}


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
            path.touch()
            # cut off in place: writing the file anew could lose it all on a full disk
            lines = path.read_bytes().splitlines(keepends=True) if step else []
            os.truncate(path, sum(map(len, takewhile(lambda line: _step_of(line) <= step, lines))))

    def write(self, step: int, **figures: float) -> None:
        """Adds a line; `step` counts optimizer steps."""
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, **figures}) + "\n")
            except OSError as error:  # a full disk; Python's own error doesn't name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.accelerator.log(figures, step=step)


def warn_long_warmup(warmup_epochs: float, epochs: int) -> None:
    """Warns of a warm-up that is longer than the run, which pre-training then cuts to the run's length."""
    if warmup_epochs > epochs:
        logger.warning(
            "`warmup_epochs` %g is more than `epochs` %d: the learning rate rises to its peak at the last step, and "
            "never falls. Lower `warmup_epochs`.",
            warmup_epochs,
            epochs,
        )


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


def embed_shared(
    accelerator: Accelerator | None,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: datasets.Dataset,
    camera_ids: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """`embed_images` by all processes of an accelerator, each a part; all call it, and all get the whole.

    Args:
        accelerator: None for this process alone.
        model: As in `embed_images`.
        processor: The model's own.
        images: Rows with a column `image`.
        camera_ids: (images,) or None.
        options: Go to `embed_images`.

    Returns:
        float32 (images, hidden).
    """
    if accelerator is None or accelerator.num_processes == 1:
        return embed_images(model, processor, images, camera_ids, **options)
    own = np.array_split(np.arange(len(images)), accelerator.num_processes)[accelerator.process_index]
    cameras = None if camera_ids is None else camera_ids[own]
    return np.concatenate(gather_object([embed_images(model, processor, images.select(own), cameras, **options)]))


def embed_benchmark(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.DatasetDict,
    use_cameras: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
) -> dict[str, np.ndarray]:
    """Embeds a benchmark's query and gallery; the arguments are those of `score`.

    Returns:
        Embeddings, person ids and camera ids by the argument names of `evaluate_reid`.
    """
    columns: dict[str, np.ndarray] = {}
    use_cameras = use_cameras and model.config.num_cameras > 0
    for split in ("query", "gallery"):
        rows = dataset[split]
        cameras = np.array(rows["camera_id"])
        cameras_told = cameras if use_cameras else None
        options = {"batch_size": batch_size, "num_workers": num_workers}
        columns[f"{split}_embeddings"] = embed_shared(accelerator, model, processor, rows, cameras_told, **options)
        columns[f"{split}_person_ids"] = np.array(rows["person_id"])
        columns[f"{split}_camera_ids"] = cameras
    return columns


def score(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.DatasetDict,
    use_cameras: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    reranked: bool = False,
    expand: int = 0,
    remove_bias: bool = False,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Embeds a benchmark's query and gallery and ranks them, without the gallery's junk images (person_id -1).

    Args:
        model: PersonViTModel or PersonViTForReID.
        processor: The model's own image processor.
        dataset: What `load_reid_dataset` returns.
        use_cameras: Whether a model that was trained with cameras (SIE) is told each image's.
        batch_size: Images a forward pass.
        num_workers: Processes that decode and resize.
        reranked: Whether to rank by `rerank`'s distances.
        expand: How many gallery images each query is averaged with first, see `expand_queries`; 0 for none.
        remove_bias: Whether each camera's mean is taken away first, see `remove_camera_bias`.
        accelerator: If given, its processes share the images, all call this, and the main one scores.
        options: Go to `evaluate_reid`. A column `occlusion` of the queries, labels or hidden shares, becomes one of
            its `query_groups`.

    Returns:
        What `evaluate_reid` returns: mAP, mINP, cmc, rank1 and so on. Nothing in other processes than the main one.
    """
    gallery_person_ids = np.array(dataset["gallery"]["person_id"])
    if (junk := gallery_person_ids == -1).any():  # no neighbours either, of what is re-ranked, expanded or centred
        dataset = datasets.DatasetDict({**dataset, "gallery": dataset["gallery"].select(np.flatnonzero(~junk))})
    columns = embed_benchmark(model, processor, dataset, use_cameras, batch_size, num_workers, accelerator)
    if accelerator is not None and not accelerator.is_main_process:
        return {}
    query, gallery = columns.pop("query_embeddings"), columns.pop("gallery_embeddings")
    if remove_bias:
        cameras = np.concatenate([columns["query_camera_ids"], columns["gallery_camera_ids"]])
        query, gallery = np.split(remove_camera_bias(np.concatenate([query, gallery]), cameras), [len(query)])
    if expand:
        query = expand_queries(query, gallery, expand)
    if "occlusion" in dataset["query"].column_names:
        labels = _occlusion_labels(list(dataset["query"]["occlusion"]))
        options |= {} if labels is None else {"query_groups": {"occlusion": labels}}
    if reranked:
        k1 = min(20, len(query) + len(gallery) - 1)  # fewer images have fewer neighbours
        distances = rerank(query, gallery, k1=k1, k2=min(6, k1 + 1))
        return evaluate_reid(distances=distances, **columns, **options)
    return evaluate_reid(query, gallery, **columns, **options)


def _occlusion_labels(values: list[Any]) -> list[Any] | None:
    """Labels as they are, hidden shares in four groups, "unknown" for None and NaN; None for anything else."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {int, bool} and None not in values:
        return values
    if kinds <= {str} or kinds <= {int, bool}:  # all as text, which sorts beside "unknown"
        return ["unknown" if value is None else str(value) for value in values]
    if kinds <= {int, float}:
        # compared in float32, as which shares are stored: there 0.1 is not 0.1
        shares = np.array([math.nan if value is None else value for value in values], np.float32)
        names = np.array(["0", "to 0.1", "to 0.3", "over 0.3"])
        groups = names[np.digitize(shares, np.float32([0, 0.1, 0.3]), right=True)]
        return np.where(np.isnan(shares), "unknown", groups).tolist()
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    logger.warning("The queries' column `occlusion` is passed over: it holds %s, neither labels nor shares.", names)
    return None


def option(
    default: Any, text: str, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> Any:
    """A dataclass field with a default and the help text of its flag.

    Numbers must be greater than `above`, and from `least` to `most`, where these are given; `parse_arguments` checks.
    """
    metadata = {"help": text, "range": (above, least, most)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, range: Any = None, **settings: Any) -> Action:
        """As argparse's own, which knows nothing of an `option`'s range."""
        return super().add_argument(*names, **settings)


def _check_ranges(arguments_class: type, values: dict[str, Any]) -> None:
    for setting in fields(arguments_class):
        above, least, most = setting.metadata.get("range", (-math.inf, -math.inf, math.inf))
        value = values[setting.name]
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float) or (above < number < math.inf and least <= number <= most):
                continue
            limits = {"above": above, "at least": least, "at most": most}
            wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
            raise ValueError(f"`{setting.name}` must be a finite number{wanted and ', ' + wanted}; got {number}.")


def _config_path(argv: list[str]) -> str | None:
    paths = []
    for position, argument in enumerate(argv):
        if argument.startswith("--config="):
            paths.append(argument.removeprefix("--config="))
        elif argument == "--config" and position + 1 < len(argv):
            paths.append(argv[position + 1])
    if len(paths) > 1:
        raise ValueError(
            f"`--config` is given {len(paths)} times ({', '.join(paths)}), but only one file can be read: put all "
            "settings into one, or give some as flags."
        )
    return paths[0] if paths else None


def _as_flags(settings: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _step_of(line: bytes) -> float:
    """The step of a log line; a line that a crash cut short counts as after every step."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
