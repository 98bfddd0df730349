"""Cards of models and data sets, filled from what a run has written. Paths of this machine stay out of them.

The texts are Jinja templates in the folder `hub_cards`. Names of data and models come from command lines and files of
others: they go into the YAML by its own writer, into Markdown as plain inline code, into commands quoted.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .files import read_json, read_yaml
from .reid_data import num_valid_queries

CARD_FILE, ENVIRONMENT_FILE, SETTINGS_FILE = "README.md", "environment.json", "arguments.yaml"
BEST_FILE = "best.json"  # beside a model that `keep_best` chose
MARKER = (
    "Written by personvit-hf, and anew with each save or push. Delete this line and the card stays as you edit it."
)
# settings that name a place of this machine; what they say is told by the rest of the card
PLACES = ("data", "eval_data", "model_name_or_path", "output_dir", "resume_from")
FIGURES = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
ARCHITECTURES = ("PersonViTModel", "PersonViTForPreTraining", "PersonViTForReID")
TAGS = ["personvit", "person-re-identification", "image-retrieval", "arxiv:2408.05398"]
DATA_NOTES = {
    "duke": "This card names data of DukeMTMC, which its authors withdrew in 2019: nobody in it had been asked.",
    "luperson": "This card names LUPerson, which is for research only.",
}


def published_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's `arguments.yaml` without the places of this machine; empty if there are none.

    Raises:
        ValueError: if the file is not a YAML mapping.
    """
    settings = read_yaml(folder / SETTINGS_FILE)
    known = {name: value for name, value in settings.items() if name not in PLACES and not name.startswith("hub_")}
    return {name: value for name, value in known.items() if not _names_a_place(value)}


def write_card(folder: str | Path, repo_id: str | None = None, license: str = "other") -> Path:
    """Writes `README.md` beside a saved model. A card that somebody has made their own stays as it is.

    Args:
        folder: What `save_pretrained` of a model and of its image processor wrote. What the training scripts write
            beside it (arguments.yaml, metrics.jsonl, results.json, environment.json), and codecarbon's emissions.csv,
            is told if it is there.
        repo_id: The model's name on the Hub, for its own instructions; None for the folder's name.
        license: Identifier of the weights' licence, as the Hub lists them. "other" leaves it to the training data's
            terms.

    Returns:
        The card's path.

    Raises:
        FileNotFoundError: if config.json or preprocessor_config.json is not in the folder.
        ValueError: if one of the files can't be read, or the model is none of PersonViT.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file() or MARKER in path.read_text(encoding="utf-8", errors="replace"):
        model_card(folder, repo_id, license).save(path)
    return path


@dataclass(frozen=True)
class SavedModel:
    """What the files beside a model tell about it.

    Args:
        folder: Where they are.
        config, processor: config.json and preprocessor_config.json.
        settings: arguments.yaml, or empty.
        record: What `hub.RunPublisher` wrote to environment.json, or empty.
        log: The lines of metrics.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    processor: dict[str, Any]
    settings: dict[str, Any]
    record: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> SavedModel:
        """Reads them; the errors are those of `write_card`."""
        needed = [folder / name for name in ("config.json", "preprocessor_config.json")]
        for path in needed:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file. Save model and image processor to this folder.")
        config, processor = map(read_json, needed)
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{folder}: a card is for one of {', '.join(ARCHITECTURES)}; this is {architecture}.")
        record = read_json(folder / ENVIRONMENT_FILE)
        settings = read_yaml(folder / SETTINGS_FILE)
        return cls(folder, config, processor, settings, record, _read_log(folder, settings))

    @property
    def architecture(self) -> str:
        """The class that was saved."""
        return self.config["architectures"][0]

    @property
    def reid(self) -> bool:
        """Whether it was trained to tell people apart."""
        return self.architecture == "PersonViTForReID"

    @property
    def benchmark(self) -> str:
        """The setting that names the labelled data it was scored on."""
        return "data" if self.reid else "eval_data"

    def hub_id(self, setting: str) -> str | None:
        """The data set's or model's name on the Hub, if it was taken from there."""
        return self.record.get("hub_ids", {}).get(setting)

    def short_name(self, setting: str) -> str | None:
        """The name on the Hub, else the last part of a path; None if nothing was named."""
        name = self.settings.get(setting)
        if self.hub_id(setting) or not isinstance(name, str):
            return self.hub_id(setting)
        parts = [part for part in re.split(r"[/\\]", name) if part.strip(". ~")]
        return _plain(parts[-1]) if parts else None


def model_card(folder: str | Path, repo_id: str | None = None, license: str = "other") -> ModelCard:
    """The card that `write_card` writes; its arguments and errors are the same."""
    saved = SavedModel.read(Path(folder))
    name = _plain(repo_id or saved.folder.resolve().name)
    figures, num_queries = _figures(saved)
    card_data = ModelCardData(
        license=license,
        license_name="terms-of-the-training-data" if license == "other" else None,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=TAGS if saved.reid else [*TAGS, "self-supervised-learning"],
        base_model=saved.hub_id("model_name_or_path"),
        base_model_relation="finetune" if saved.hub_id("model_name_or_path") else None,
        datasets=[saved.hub_id("data")] if saved.hub_id("data") else None,
        metrics=["mAP"] if figures else None,
        co2_eq_emissions=_emissions(saved),
        model_name=name.split("/")[-1] if figures else None,
        eval_results=_eval_results(saved, figures) or None,
    )
    data_names = f"{saved.short_name('data')} {saved.short_name('eval_data')}".lower()
    return _render(
        "reid_model.md" if saved.reid else "pretrained_model.md",
        ModelCard,
        card_data,
        **_usage(saved, name),
        base_model=_code(saved.short_name("model_name_or_path")),
        data=_code(saved.short_name("data")),
        losses=_losses(saved.config),
        benchmark=_code(saved.short_name(saved.benchmark)),
        unfinished=bool(saved.record.get("unfinished")),
        step=_code(saved.log[-1].get("step")) if saved.log else "unknown",
        figures={FIGURES[key]: f"{100 * value:.2f}" for key, value in figures.items()},
        num_valid_queries=num_queries,
        training=_training(saved, card_data),
        settings=_indented_yaml(published_settings(saved.folder)),
        data_notes=[note for word, note in DATA_NOTES.items() if word in data_names],
        license=license,
    )


def dataset_card(
    dataset: Any, repo_id: str, license: str = "other", source: str | None = None, pretty_name: str | None = None
) -> DatasetCard:
    """The card of a labelled data set, for `dataset_card(...).push_to_hub(repo_id)` after `dataset.push_to_hub`.

    Args:
        dataset: What `load_reid_dataset` returns.
        repo_id: Its name on the Hub.
        license: Identifier of its licence, as the Hub lists them.
        source: Who took the pictures, where, and whether the people in them agreed; Markdown.
        pretty_name: Its name in words; None for the last part of `repo_id`.

    Raises:
        ValueError: if `repo_id` is no name of the Hub.
    """
    validate_repo_id(repo_id)
    rows = {split: (list(rows["person_id"]), list(rows["camera_id"])) for split, rows in dataset.items()}
    people = {split: {person for person in ids if person > 0} for split, (ids, _) in rows.items()}
    table = [
        (split, len(ids), len(people[split]), len(set(cameras)), ids.count(0), ids.count(-1))
        for split, (ids, cameras) in rows.items()
    ]
    total = sum(row[1] for row in table)
    name = pretty_name or repo_id.split("/")[-1]
    card_data = DatasetCardData(
        license=license,
        pretty_name=_plain(name),
        task_categories=["image-feature-extraction"],
        tags=["person-re-identification"],
        size_categories=next(text for limit, text in SIZE_CATEGORIES if total < limit),
        configs=[
            {"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"} for split in rows]}
        ],
    )
    features = dataset["query"].features.items()
    return _render(
        "dataset.md",
        DatasetCard,
        card_data,
        name=_code(name),
        repo_id=repo_id,
        splits=table,
        valid_queries=num_valid_queries(dataset),
        trains="train" in rows,
        shared_people=len(people.get("train", set()) & people["gallery"]),
        other_columns={
            _code(column): _code(getattr(feature, "dtype", type(feature).__name__))
            for column, feature in features
            if column not in ("image", "person_id", "camera_id")
        },
        source=source,
        data_notes=[note for word, note in DATA_NOTES.items() if word in name.lower()],
        license=license,
    )


SIZE_CATEGORIES = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")]
SIZE_CATEGORIES += [(1e8, "10M<n<100M"), (float("inf"), "100M<n<1B")]


def _render(template: str, card_class: type, card_data: CardData, **values: Any) -> Any:
    folder = Path(__file__).with_name("hub_cards")  # where a wheel has it
    if not folder.is_dir():  # in a checkout it stands at the top
        folder = Path(__file__).resolve().parents[2] / "hub_cards"
    environment = Environment(
        loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = environment.get_template(template).render(card_data=card_data.to_yaml(), marker=MARKER, **values)
    return card_class(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")


def _losses(config: dict[str, Any]) -> str:
    """What pre-training learned from: the losses that counted."""
    weights = {"self-distillation": "dino_loss_weight", "masked image modelling": "mim_loss_weight"}
    counted = [name for name, key in weights.items() if config.get(key, 1.0) > 0]  # 1.0: PersonViTConfig's default
    return " and ".join(counted) or "recipe"  # with neither KoLeo's loss is left, which isn't PersonViT's


def _usage(saved: SavedModel, name: str) -> dict[str, Any]:
    """What the card's instructions name."""
    config, size = saved.config, saved.processor["size"]
    after_neck = saved.reid and config.get("neck_feature") == "after"
    command = ["python", "examples/evaluate_reid.py", "--model", name]
    command += ["--data", saved.short_name(saved.benchmark) or "DATA"]
    return {
        "name": _code(name.split("/")[-1]),
        "checkpoint": name,
        "shape": " ({hidden_size} wide, {num_hidden_layers} deep, patches of {patch_size} pixels)".format(**config),
        "hidden_size": config["hidden_size"],
        "num_labels": len(config.get("id2label", {})),
        "num_cameras": config.get("num_cameras", 0),
        "has_student": saved.architecture == "PersonViTForPreTraining",
        "auto_class": "AutoModelForImageClassification" if after_neck else "AutoModel",
        "feature": "embeddings" if after_neck else "pooler_output",
        "height": size["height"],
        "width": size["width"],
        "image_mean": saved.processor["image_mean"],
        "image_std": saved.processor["image_std"],
        "evaluation_command": shlex.join(command),
    }


def _figures(saved: SavedModel) -> tuple[dict[str, float], int | None]:
    """The figures of a run, as fractions: a ReID model's results, or the last score of a pre-trained teacher."""
    path = saved.folder / ("results.json" if saved.reid else "metrics.jsonl")
    scored = [line for line in saved.log if "mAP" in line]
    found = read_json(path) if saved.reid else (scored[-1] if scored else {})
    figures = {name: found[name] for name in FIGURES if name in found}
    wrong = [name for name, value in figures.items() if not isinstance(value, int | float) or not 0 <= value <= 1]
    if wrong:
        raise ValueError(f"{path}: `{wrong[0]}` must be a fraction from 0 to 1, found {figures[wrong[0]]!r}.")
    queries = found.get("num_valid_queries")
    return figures, queries if isinstance(queries, int) else None


def _eval_results(saved: SavedModel, figures: dict[str, float]) -> list[EvalResult]:
    benchmark = saved.short_name(saved.benchmark) or "unnamed"
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Person re-identification",
            dataset_type=saved.hub_id(saved.benchmark) or re.sub(r"[^\w.-]+", "-", benchmark).lower(),
            dataset_name=benchmark,
            dataset_split="gallery",
            metric_type=name,
            metric_name=FIGURES[name],
            metric_value=round(100 * value, 2),
        )
        for name, value in figures.items()
    ]


def _training(saved: SavedModel, card_data: ModelCardData) -> dict[str, str]:
    """Rows of the card's table, of what is known."""
    losses = [line for line in saved.log if isinstance(line.get("loss"), float)]
    hardware, emissions = saved.record.get("hardware", {}), card_data.get("co2_eq_emissions")
    rows = {
        "data": saved.short_name("data"),
        "started from": saved.short_name("model_name_or_path"),
        "epochs": saved.settings.get("epochs"),
        "optimizer steps": losses and losses[-1].get("step"),
        "loss at the end": losses and f"{losses[-1]['loss']:.4f}",
        "hardware": hardware and "{device} ({machine}), processes: {processes}".format(**hardware),
        "versions": ", ".join(f"{name} {text}" for name, text in saved.record.get("versions", {}).items()),
        "CO2, measured by codecarbon": emissions and f"{emissions['emissions']:.3g} g",
    }
    return {name: f"`{_code(value)}`" for name, value in rows.items() if value}


def _emissions(saved: SavedModel) -> dict[str, Any] | None:
    """What codecarbon measured, in the Hub's form; None if nobody measured."""
    path = saved.folder / "emissions.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="") as file:
            # the last row of each run tells its sum so far, in kg
            kilograms = {row["run_id"]: float(row["emissions"]) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not codecarbon's: expected columns run_id and emissions: {error}.") from error
    return {
        "emissions": round(1000 * sum(kilograms.values()), 3),
        "source": "codecarbon",
        "training_type": "fine-tuning" if saved.reid else "pre-training",
        "hardware_used": _plain(saved.record.get("hardware", {}).get("device", "not recorded")),
    }


def _read_log(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to the saved model; one that a crash cut short is left out."""
    path, lines = folder / "metrics.jsonl", []
    last = read_json(folder / BEST_FILE).get("step") if settings.get("keep_best") else None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    lines = [line for line in lines if isinstance(line, dict)]
    if not isinstance(last, int):
        return lines
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= last]


def _names_a_place(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_names_a_place, value))
    return isinstance(value, str) and bool(re.search(r"(^|[\s\"'=:])(/|~|[A-Za-z]:[\\/]|\\\\)|\.\./", value))


def _plain(text: Any) -> str:
    """One line without control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", str(text)).split())[:200]


def _code(text: Any) -> str:
    """What can stand between backticks, in a table too."""
    return _plain("" if text is None else text).replace("`", "'").replace("|", "/")


def _indented_yaml(settings: dict[str, Any]) -> str:
    """A code block of which no line can break out."""
    lines = yaml.safe_dump(settings, sort_keys=False, width=sys.maxsize).splitlines() if settings else []
    return "\n".join(f"    {line}" for line in lines)
