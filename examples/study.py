"""Repeats the paper's findings in small: what each loss, more data and more training give, and how robust it is.

    python examples/study.py --data DATA --output_dir runs/study --parts objective epochs data robustness

Each model is pre-trained and fine-tuned by the scripts beside this one, once for each seed, and scored without labels
(zero-shot) and after fine-tuning. A killed study goes on where it was; several at once, with other parts or seeds, may
share an output folder. `--split validation` scores on half of the training people, which is what settings are chosen
on; `--split test` on query and gallery, once. The output folder holds `study.md` (tables: mean and spread over the
seeds), `plots/` and each model's own run.

Parts: `objective` (paper's Table 4: DINO + MIM, DINO alone, MIM alone; at equal steps and at equal time), `epochs`
(Fig. 3: one long pre-training on little data, on the way), `data` (Table 5: 10, 30 and 100% of the pictures at equal
steps, 30% chosen by CFS), `robustness` (hidden, shifted and covered queries; the models of `objective`), and, when
asked for, `recipe` (single settings of the recipe changed, zero-shot).
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from PIL import Image

from personvit_hf import load_person_images, load_reid_dataset
from personvit_hf.checkpointing import list_checkpoints
from personvit_hf.files import written_aside
from personvit_hf.loading import load_embedder
from personvit_hf.scripting import option, parse_arguments, read_settings, score

EXAMPLES = Path(__file__).resolve().parent
PARTS = ("objective", "epochs", "data", "robustness", "recipe")
MASKS = {"mask_ratios": [0.0, 0.3], "mask_ratio_spreads": [0.0, 0.2]}
# each without what serves the other alone: masks, or local crops and the KoLeo loss of [CLS] features
OBJECTIVES = {
    "DINO + MIM": {"config_overrides": {"mim_loss_weight": 1.0}, **MASKS},
    "DINO alone": {
        "config_overrides": {"mim_loss_weight": 0.0},
        "mask_ratios": [0.0],
        "mask_ratio_spreads": [0.0],
    },
    "MIM alone": {
        "config_overrides": {"mim_loss_weight": 1.0, "dino_loss_weight": 0.0, "koleo_loss_weight": 0.0},
        "num_local_crops": 0,
        **MASKS,
    },
}
SHIFTS = (0.1, 0.2)
COVERED = (0.2, 0.4)
CHANGES = {
    "the recipe": {},
    "no KoLeo loss": {"config_overrides": {"koleo_loss_weight": 0.0}},
    "bottleneck of 256": {"config_overrides": {"projection_bottleneck_size": 256}},
    "8192 prototypes": {"config_overrides": {"num_cls_prototypes": 8192, "num_patch_prototypes": 8192}},
    "temperatures 0.1, 0.04, 0.07": {
        "config_overrides": {"student_temperature": 0.1},
        "teacher_temperature": 0.04,
        "warmup_teacher_temperature": 0.04,
        "teacher_patch_temperature": 0.07,
    },
    "teacher's momentum from 0.996 to 1": {"teacher_momentum": 0.996, "final_teacher_momentum": 1.0},
    "teacher's momentum rises to 1": {"final_teacher_momentum": 1.0},
    "half the learning rate": {"learning_rate": 0.0028},
    "twice the learning rate": {"learning_rate": 0.0112},
    "no local crops": {"num_local_crops": 0},
    "8 local crops": {"num_local_crops": 8},
    "MIM, too": OBJECTIVES["DINO + MIM"],
    "global crops from 0.2": {"global_scale": [0.2, 1.0]},
    "global crops from 0.7": {"global_scale": [0.7, 1.0]},
    "crops of one aspect": {"aspect_ratio": [0.5, 0.5]},
    "usual grey, solarized and hue": {"grayscale_probability": 0.2, "solarize_probability": 0.2, "hue": 0.1},
    "no colour jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
}


@dataclass
class StudyArguments:
    data: str = field(metadata={"help": "Data set with unlabelled and labelled pictures."})
    output_dir: str = field(metadata={"help": "Where everything is written, and found again by the next call."})
    parts: list[str] = option(list(PARTS[:-1]), f"Some of {', '.join(PARTS)}.")
    seeds: list[int] = option([0, 1, 2], "One model of each kind for each of these.")
    split: str = option("validation", "validation (half of the training people) or test (query and gallery).")
    check_data: str | None = option(
        None, "Another labelled data set, on which the models of `objective` are tried too."
    )
    pretrain_config: str = option(str(EXAMPLES / "recipes" / "pretrain_small.yaml"), "Recipe of pretrain.py.")
    finetune_config: str = option(str(EXAMPLES / "recipes" / "finetune_small.yaml"), "Recipe of finetune.py.")
    pretrain_epochs: int | None = option(None, "Epochs on all pictures; None for the recipe's.")
    finetune_epochs: int | None = option(None, "Epochs of fine-tuning on `data`; None for the recipe's.")
    random_learning_rate: float | None = option(
        None, "Rate of fine-tuning from random weights; None for the recipe's."
    )
    small_share: float = option(0.1, "Share of the pictures that part `epochs` trains on.")
    epochs: list[int] = option([5, 10, 20, 40], "Its epochs after which the model is tried.")
    shares: list[float] = option([0.1, 0.3, 1.0], "Shares of the pictures in part `data`.")
    cfs_share: float = option(0.3, "Of these, the one that is also chosen by CFS; 0 for none.")


@dataclass(frozen=True)
class Model:
    """One row of a part's table.

    Attributes:
        label: Its name there.
        folder: Of its runs, within the output folder.
        settings: For pretrain.py; None for random weights.
        share: Of the pictures, to pre-train on.
        by_cfs: Whether these are chosen by CFS, not at random.
        epoch: After which epoch it is taken from its run; None for the last one.
    """

    label: str
    folder: str
    settings: dict[str, Any] | None
    share: float = 1.0
    by_cfs: bool = False
    epoch: int | None = None


def main() -> None:
    args = parse_arguments(StudyArguments)
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown or args.split not in ("validation", "test"):
        raise ValueError(f"`parts` are {PARTS} and `split` is validation or test; got {unknown or args.split!r}.")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    labelled = labelled_data(args)
    rows = []
    for part in args.parts:
        for model in models_of(args, part):
            for seed in args.seeds:
                for kind, folder in trained(args, model, seed, labelled):
                    figures = scored(folder, labelled, args.split, robust=part == "robustness")
                    if args.check_data and part == "objective":
                        figures |= checked(args, folder, kind)
                    rows.append({"part": part, "variant": model.label, "kind": kind, "seed": seed, **figures})
                    if part == "recipe":
                        break  # zero-shot, the first, is all
        report(args, rows)


def models_of(args: StudyArguments, part: str) -> Iterator[Model]:
    """The models that a part compares."""
    recipe = read_settings(args.pretrain_config)
    epochs = args.pretrain_epochs or recipe["epochs"]
    whole = {
        label: Model(
            label, f"objective-{'-'.join(label.lower().replace('+', '').split())}", {"epochs": epochs} | change
        )
        for label, change in OBJECTIVES.items()
    }
    if part in ("objective", "robustness"):
        yield Model("random weights", "random", None)
        yield from whole.values()
    if part == "objective":
        for label in list(OBJECTIVES)[1:]:
            ratio = step_seconds(args, whole["DINO + MIM"]) / step_seconds(args, whole[label])
            same_time = max(1, round(epochs * ratio))
            if same_time != epochs:
                settings = whole[label].settings | {"epochs": same_time}
                yield Model(f"{label}, equal time", f"{whole[label].folder}-equal-time", settings)
    if part == "epochs":
        every = math.gcd(*args.epochs)
        settings = {"epochs": max(args.epochs), "save_epochs": every, "keep_checkpoints": max(args.epochs) // every}
        for epoch in sorted(args.epochs):
            yield Model(f"{epoch} epochs", "epochs", settings, args.small_share, epoch=epoch)
    if part == "recipe":
        for number, (label, change) in enumerate(CHANGES.items()):
            yield Model(label, f"recipe-{number}", {"epochs": epochs} | change)
    if part == "data":
        for share in args.shares:
            # equal steps: the fewer the pictures, the more often each is seen
            settings = {
                **{name: recipe[name] / share for name in ("warmup_epochs",) if name in recipe},
                **{name: round(recipe[name] / share) for name in ("warmup_temperature_epochs",) if name in recipe},
                "epochs": max(1, round(epochs / share)),
            }
            if share == 1:
                yield Model("100%", "data-1", {"epochs": epochs})
                continue
            yield Model(f"{share:.0%} at random", f"data-{share:g}", settings, share)
            if share == args.cfs_share:
                yield Model(f"{share:.0%} by CFS", f"data-{share:g}-cfs", settings, share, by_cfs=True)


def trained(args: StudyArguments, model: Model, seed: int, labelled: Path) -> Iterator[tuple[str, Path]]:
    """(zero-shot or fine-tuned, folder) of a model, trained now if it was not."""
    folder = Path(args.output_dir) / model.folder / f"seed-{seed}"
    changes: dict[str, Any] = {} if args.finetune_epochs is None else {"epochs": args.finetune_epochs}
    after = "" if model.epoch is None else f"-epoch-{model.epoch}"
    if model.settings is not None:
        data = chosen_by_cfs(args, model, seed, labelled) if model.by_cfs else unlabelled_data(args, model.share)
        # a collapse is a finding here
        changed = model.settings | {"seed": seed, "data": data, "stop_on_collapse": False}
        settings = merged(args.pretrain_config, changed)
        pretrained = run_once("pretrain.py", folder / "pretrained", settings)
        if model.epoch is not None:
            pretrained = as_it_was(
                pretrained, model.epoch // model.settings["save_epochs"], folder / f"pretrained{after}"
            )
        yield "zero-shot", pretrained
        changes["model_name_or_path"] = str(pretrained)
    elif args.random_learning_rate is not None:
        changes["learning_rate"] = args.random_learning_rate
    settings = merged(args.finetune_config, changes | {"seed": seed, "data": str(labelled)})
    yield "fine-tuned", run_once("finetune.py", folder / f"finetuned-{args.split}{after}", settings)


def as_it_was(run: Path, checkpoint: int, folder: Path) -> Path:
    """The model of a run's n-th checkpoint, as a folder that loads as the run's own does."""
    if not folder.is_dir():
        weights = list_checkpoints(run / "checkpoints")[checkpoint - 1] / "model.safetensors"
        with written_aside(folder) as partial:
            shutil.copytree(run, partial, ignore=shutil.ignore_patterns("checkpoints", "scores-*", "lock"))
            shutil.copyfile(weights, partial / "model.safetensors")
    return folder


def merged(recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe with some settings changed; of `config_overrides`, only those that are given."""
    base = read_settings(recipe)
    overrides = json.loads(base.get("config_overrides", "{}")) | settings.get("config_overrides", {})
    return base | settings | {"config_overrides": overrides}


def run_once(script: str, folder: Path, settings: dict[str, Any]) -> Path:
    """Runs a script into `folder` unless it has been, or goes on with what was interrupted.

    Raises:
        ValueError: if the folder was made with other settings.
        CalledProcessError: if the script fails.
    """
    done, config = folder / "done", folder / "study.json"
    text = json.dumps(settings, indent=2, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if config.is_file() and config.read_text() != text:
            raise ValueError(f"{folder} was made with other settings (its study.json): choose another `output_dir`.")
        if not done.is_file():
            config.write_text(text)
            print(f"{script} -> {folder}", flush=True)
            command = [sys.executable, str(EXAMPLES / script), "--config", str(config), "--output_dir", str(folder)]
            # one thread for small models: see demo.py
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            subprocess.run([*command, "--resume_from", "latest"], check=True, env=environment)
            done.touch()
    return folder


def step_seconds(args: StudyArguments, model: Model) -> float:
    """Seconds of one of a model's steps, by the log of up to 30.

    Raises:
        ValueError: if there are pictures for less than two steps.
    """
    batch_size = read_settings(args.pretrain_config)["batch_size"]
    share = min(1.0, 30 * batch_size / len(load_person_images(args.data)))
    settings = model.settings | {"epochs": 1, "save_epochs": 0, "logging_steps": 1, "num_workers": 0, "seed": 0}
    settings = merged(args.pretrain_config, settings | {"data": unlabelled_data(args, share)})
    folder = run_once("pretrain.py", Path(args.output_dir) / "timing" / model.folder, settings)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # what is logged is the mean since the start
    ends = [batch_size * line["step"] / line["images_per_second"] for line in lines if "images_per_second" in line]
    if len(ends) < 2:
        raise ValueError(
            f"{args.data} has pictures for {len(ends)} steps of `batch_size` {batch_size}, too few to time one for "
            "part objective (at least 2): give more pictures, or lower `batch_size` in a copy of `pretrain_config`."
        )
    return statistics.median(np.diff(ends))


def unlabelled_data(args: StudyArguments, share: float) -> str:
    """The pictures to pre-train on, or a parquet file with a part of them; the smaller part lies within the larger."""
    if share == 1:
        return args.data
    path = Path(args.output_dir) / "data" / f"unlabelled-{share:g}.parquet"
    if not path.is_file():
        rows = load_person_images(args.data)
        order = np.random.default_rng(0).permutation(len(rows))
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as partial:
            rows.select(np.sort(order[: round(share * len(rows))])).to_parquet(partial)
    return str(path)


def chosen_by_cfs(args: StudyArguments, model: Model, seed: int, labelled: Path) -> str:
    """The index of the pictures with the lowest scores by this seed's models, before and after fine-tuning."""
    path = Path(args.output_dir) / "data" / f"unlabelled-{model.share:g}-cfs-seed-{seed}.parquet"
    both = next(other for other in models_of(args, "robustness") if other.label == "DINO + MIM")
    generic, adapted = (folder for _, folder in trained(args, both, seed, labelled))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "personvit_hf.cli", "data", "select", args.data, "--out", str(path)]
        models = ["--generic", str(generic), "--adapted", str(adapted)]
        subprocess.run([*command, "--by", "cfs", "--keep", str(model.share), *models], check=True)
    return str(path)


def labelled_data(args: StudyArguments) -> Path:
    """The data set itself, or with `split` validation one whose query and gallery are half of the training people."""
    if args.split == "test":
        return Path(args.data)
    folder = Path(args.output_dir) / "data" / "validation"
    if not (folder / "query.parquet").is_file():
        rows = load_reid_dataset(args.data)["train"]
        persons, cameras = np.array(rows["person_id"]), np.array(rows["camera_id"])
        people = np.unique(persons[persons > 0])
        held_out = np.isin(persons, people[len(people) // 2 :])
        # the first picture of each person and camera asks for the others
        _, first = np.unique(np.stack([persons, cameras]), axis=1, return_index=True)
        query = np.isin(np.arange(len(rows)), first) & held_out
        folder.mkdir(parents=True, exist_ok=True)
        for name, chosen in (("train", ~held_out), ("gallery", held_out & ~query), ("query", query)):
            with written_aside(folder / f"{name}.parquet") as partial:
                rows.select(np.flatnonzero(chosen)).to_parquet(partial)
    return folder


def scored(folder: Path, labelled: Path, split: str, robust: bool) -> dict[str, float]:
    """mAP and Rank-1 of a model; with `robust` also mAP of disturbed queries. Kept in the folder."""
    path = folder / f"scores-{split}{'-robust' if robust else ''}.json"
    if not path.is_file():
        dataset = load_reid_dataset(str(labelled))
        model, processor = load_embedder(str(folder))
        result = score(model, processor, dataset)
        figures = {"mAP": result["mAP"], "Rank-1": result["rank1"]}
        if robust:
            groups = result.get("by_group", {}).get("occlusion", [])
            groups = [group for group in groups if group["num_valid_queries"] >= 20]
            figures |= {f"mAP, occluded {group['occlusion']}": group["mAP"] for group in groups}
            for name, queries in disturbed(dataset["query"]):
                result = score(model, processor, datasets.DatasetDict({**dataset, "query": queries}))
                figures[f"mAP, {name}"] = result["mAP"]
        with written_aside(path, overwrite=True) as partial:
            partial.write_text(json.dumps(figures))
    return json.loads(path.read_text())


def checked(args: StudyArguments, folder: Path, kind: str) -> dict[str, float]:
    """mAP on `check_data` of a pre-trained model, or of one fine-tuned on it in the place of this fine-tuned one."""
    rows = load_reid_dataset(args.check_data)["train"]
    people = {person for person in rows["person_id"] if person > 0}
    if kind == "fine-tuned":
        settings = json.loads((folder / "study.json").read_text()) | {"data": args.check_data}
        recipe = read_settings(args.finetune_config)
        settings |= {
            "epochs": recipe["epochs"],
            "identities_per_batch": min(recipe["identities_per_batch"], len(people)),
        }
        folder = run_once("finetune.py", folder.with_name("finetuned-check"), settings)
    return {"mAP, check data": scored(folder, Path(args.check_data), "check", robust=False)["mAP"]}


def disturbed(rows: datasets.Dataset) -> Iterator[tuple[str, datasets.Dataset]]:
    """Queries with what disturbs them: boxes that miss the person, and other people before them."""
    pictures = [np.array(row["image"].convert("RGB")) for row in rows]
    kept = {name: rows[name] for name in rows.column_names if name != "image"}
    for word, shares, change in (("shifted", SHIFTS, shifted), ("covered", COVERED, covered)):
        for share in shares:
            images = [Image.fromarray(change(pictures, index, share)) for index in range(len(pictures))]
            yield f"{word} {share:.0%}", datasets.Dataset.from_dict({"image": images, **kept})


def shifted(pictures: list[np.ndarray], index: int, share: float) -> np.ndarray:
    """A picture whose box missed the person by `share` of its height and width, in a direction of its own."""
    picture = pictures[index]
    height, width = picture.shape[:2]
    signs = np.random.default_rng(index).choice([-1, 1], 2)
    left, top = (round(sign * share * side) for sign, side in zip(signs, (width, height), strict=True))
    pixels = np.pad(picture, ((abs(top),) * 2, (abs(left),) * 2, (0, 0)), mode="edge")
    top, left = abs(top) + top, abs(left) + left
    return pixels[top : top + height, left : left + width]


def covered(pictures: list[np.ndarray], index: int, share: float) -> np.ndarray:
    """A picture of which `share`, at its left, right or lower edge, shows the same place of another picture."""
    rng = np.random.default_rng(index)
    other = pictures[(index + rng.integers(1, max(2, len(pictures)))) % len(pictures)]
    height, width = pictures[index].shape[:2]
    other = np.array(Image.fromarray(other).resize((width, height)))
    rows, columns = round(share * height), round(share * width)
    hidden = (np.s_[:, :columns], np.s_[:, width - columns :], np.s_[height - rows :])[rng.integers(3)]
    picture = pictures[index].copy()
    picture[hidden] = other[hidden]
    return picture


def report(args: StudyArguments, rows: list[dict[str, Any]]) -> None:
    """Writes study.md and the plots."""
    lines = [f"# Study: {args.split}", "", f"Mean and standard deviation over seeds {args.seeds}; per cent.", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        table = summary([row for row in rows if row["part"] == part])
        names = list(dict.fromkeys(name for figures in table.values() for name in figures))
        lines += [f"## {part}", "", f"| model | | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
        for (variant, kind), figures in table.items():
            cells = [
                f"{mean:.1f} +- {spread:.1f}" for mean, spread in (figures.get(name, (np.nan,) * 2) for name in names)
            ]
            lines.append(f"| {variant} | {kind} | {' | '.join(cells)} |")
        lines.append("")
        plot(Path(args.output_dir) / "plots", part, table, names)
    (Path(args.output_dir) / "study.md").write_text("\n".join(lines))
    print("\n".join(lines), flush=True)


def summary(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(mean, standard deviation) in per cent of each figure by (variant, kind)."""
    table: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for key in dict.fromkeys((row["variant"], row["kind"]) for row in rows):
        runs = [row for row in rows if (row["variant"], row["kind"]) == key]
        names = [name for name in runs[0] if name not in ("part", "variant", "kind", "seed")]
        values = {name: [100 * run[name] for run in runs] for name in names}
        table[key] = {
            name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in values.items()
        }
    return table


def plot(folder: Path, part: str, table: dict, names: list[str]) -> None:
    """A picture of a part: mAP by model; for `robustness`, each model's mAP by disturbance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    colors = {variant: f"C{i}" for i, variant in enumerate(dict.fromkeys(variant for variant, _ in table))}
    kinds = sorted({kind for _, kind in table}, reverse=True)  # zero-shot first
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        found = {variant: figures for (variant, other), figures in table.items() if other == kind}
        if part == "robustness":
            shown = [name for name in names if name.startswith("mAP")]
            for variant, figures in found.items():
                values = [figures[name][0] for name in shown]
                axes.plot(range(len(shown)), values, marker="o", color=colors[variant], label=variant)
            axes.set_xticks(range(len(shown)), [name.removeprefix("mAP, ") for name in shown], rotation=45, ha="right")
        else:
            means, spreads = zip(*(figures["mAP"] for figures in found.values()), strict=True)
            axes.errorbar(range(len(found)), means, spreads, marker="o", capsize=3, linestyle="none")
            axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
        axes.set(title=kind, ylabel="mAP, %")
        axes.grid(axis="y", alpha=0.3)
    if part == "robustness":
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{part}.png", dpi=150)


if __name__ == "__main__":
    main()
