"""The study: what it compares, how it splits, goes on and sums up; end to end with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import pretrain  # noqa: E402
import study  # noqa: E402

from personvit_hf import PersonViTConfig  # noqa: E402

MODEL = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "patch_size": 8},
    **{"num_cls_prototypes": 64, "num_patch_prototypes": 32},
    **{"projection_hidden_size": 32, "projection_bottleneck_size": 16},
}


@pytest.fixture
def args(tmp_path) -> study.StudyArguments:
    recipes = {
        "pretrain": {
            **{"config_overrides": json.dumps(MODEL), "image_size": [32, 16], "local_size": [16, 8], "epochs": 2},
            **{"num_local_crops": 1, "batch_size": 32, "warmup_epochs": 0.5, "num_workers": 0, "save_epochs": 0},
            "logging_steps": 1,
        },
        "finetune": {
            **{"config_overrides": json.dumps(MODEL), "image_size": [32, 16], "padding": 2, "epochs": 1},
            **{"identities_per_batch": 8, "images_per_identity": 2, "num_workers": 0, "warmup_epochs": 1},
        },
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return study.StudyArguments(
        data=str(EXAMPLES / "data"),
        output_dir=str(tmp_path / "study"),
        seeds=[0],
        pretrain_config=str(tmp_path / "pretrain.yaml"),
        finetune_config=str(tmp_path / "finetune.yaml"),
    )


def test_a_recipe_keeps_the_rest_of_its_overrides(args):
    settings = study.merged(args.pretrain_config, {"epochs": 7, "config_overrides": {"mim_loss_weight": 0.0}})
    assert settings["epochs"] == 7 and settings["batch_size"] == 32
    assert settings["config_overrides"] == MODEL | {"mim_loss_weight": 0.0}


def test_settings_are_chosen_on_other_people_than_they_are_reported_on(args):
    folder = study.labelled_data(args)
    parts = {
        name: datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("train", "query", "gallery")
    }
    people = {name: set(rows["person_id"]) for name, rows in parts.items()}
    assert people["query"] == people["gallery"] and not people["query"] & people["train"]
    test = study.load_reid_dataset(args.data)
    assert not (people["query"] | people["train"]) & set(test["query"]["person_id"])
    assert sum(map(len, parts.values())) == len(test["train"])
    pairs = list(zip(parts["query"]["person_id"], parts["query"]["camera_id"], strict=True))
    assert len(pairs) == len(set(pairs))
    args.split = "test"
    assert study.labelled_data(args) == Path(args.data)


def test_fewer_pictures_lie_within_more_and_are_seen_more_often(args):
    args.output_dir = str(Path(args.output_dir) / "x")
    few, more = (datasets.Dataset.from_parquet(study.unlabelled_data(args, share)) for share in (0.1, 0.3))
    bytes_of = [
        {row["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False))["image"]}
        for rows in (few, more)
    ]
    assert len(few) == 40 and len(more) == 120 and bytes_of[0] <= bytes_of[1]
    assert [model.settings["epochs"] for model in study.models_of(args, "data")] == [20, 7, 7, 2]


def test_every_change_is_one_of_a_setting_that_there_is():
    for change in (*study.OBJECTIVES.values(), *study.CHANGES.values()):
        assert all(hasattr(pretrain.PretrainArguments(data="", output_dir=""), name) for name in change)
        assert all(hasattr(PersonViTConfig(), name) for name in change.get("config_overrides", {}))


def test_a_model_on_the_way_is_that_of_its_epoch(tmp_path):
    run = tmp_path / "pretrained"
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_text(f"after {step}")
    (run / "model.safetensors").write_text("the end")
    (run / "config.json").write_text("{}")
    folder = study.as_it_was(run, 2, tmp_path / "pretrained-epoch-4")
    assert (folder / "model.safetensors").read_text() == "after 20"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_equal_time_follows_the_steps_of_the_logs(args, monkeypatch):
    seconds = {"DINO + MIM": 0.6, "DINO alone": 0.6, "MIM alone": 0.3}
    monkeypatch.setattr(study, "step_seconds", lambda args, model: seconds[model.label])
    models = {model.label: model.settings for model in study.models_of(args, "objective")}
    assert models["MIM alone, equal time"]["epochs"] == 4 and "DINO alone, equal time" not in models


def test_equal_time_is_one_epoch_at_least(args, monkeypatch):
    monkeypatch.setattr(study, "step_seconds", lambda args, model: 1.0 if model.label == "DINO + MIM" else 5.0)
    models = [model for model in study.models_of(args, "objective") if "equal time" in model.label]
    assert [model.settings["epochs"] for model in models] == [1, 1]


def test_too_few_steps_to_time_one(args, monkeypatch, tmp_path):
    model = next(model for model in study.models_of(args, "robustness") if model.settings)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 9.0}\n')
    monkeypatch.setattr(study, "run_once", lambda *arguments: tmp_path)
    with pytest.raises(ValueError, match="examples/data has pictures for 1 steps of `batch_size` 32, too few to time"):
        study.step_seconds(args, model)


def test_a_run_is_not_repeated_and_never_mixed_with_another(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **kwargs: calls.append(command))
    for _ in range(2):
        study.run_once("pretrain.py", tmp_path / "a", {"seed": 0})
    assert len(calls) == 1
    with pytest.raises(ValueError, match="other settings"):
        study.run_once("pretrain.py", tmp_path / "a", {"seed": 1})


def test_a_failed_run_is_tried_again(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(study.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            study.run_once("pretrain.py", tmp_path / "a", {})


def test_a_shifted_box_shows_the_same_person_elsewhere():
    picture = np.arange(20 * 10 * 3, dtype=np.uint8).reshape(20, 10, 3)
    found = study.shifted([picture], 0, 0.2)
    assert found.shape == picture.shape
    overlaps = [
        (found[max(dy, 0) : 20 + min(dy, 0), max(dx, 0) : 10 + min(dx, 0)]
         == picture[max(-dy, 0) : 20 + min(-dy, 0), max(-dx, 0) : 10 + min(-dx, 0)]).all()
        for dy in (-4, 4) for dx in (-2, 2)
    ]  # fmt: skip
    assert sum(overlaps) == 1


@pytest.mark.parametrize("index", range(6))
def test_a_covered_picture_shows_another_one_at_an_edge(index):
    pictures = [np.full((20, 10, 3), value, np.uint8) for value in range(6)]
    found = study.covered(pictures, index, 0.4)
    hidden = (found != index).all(-1)
    assert hidden.mean() == pytest.approx(0.4) and len(np.unique(found[hidden])) == 1
    assert (hidden.all(0) | ~hidden.any(0)).all() or (hidden.all(1) | ~hidden.any(1)).all()  # whole rows or columns
    assert hidden[-1].any() and (pictures[index] == index).all()


def test_disturbed_queries_keep_whose_they_are():
    images = [Image.fromarray(np.full((20, 10, 3), value, np.uint8)) for value in range(2)]
    rows = datasets.Dataset.from_dict({"image": images, "person_id": [3, 4], "camera_id": [1, 2]})
    queries = dict(study.disturbed(rows.cast_column("image", datasets.Image())))
    assert list(queries) == ["shifted 10%", "shifted 20%", "covered 20%", "covered 40%"]
    assert all(changed["person_id"] == [3, 4] and changed["camera_id"] == [1, 2] for changed in queries.values())


def test_the_summary_is_the_mean_and_spread_of_the_seeds():
    rows = [
        {"part": "data", "variant": "a", "kind": "zero-shot", "seed": seed, "mAP": m}
        for seed, m in enumerate((0.1, 0.2, 0.3))
    ]
    mean, spread = study.summary(rows)["a", "zero-shot"]["mAP"]
    assert mean == pytest.approx(20) and spread == pytest.approx(10)


@pytest.mark.parametrize("wrong", [{"parts": ["objectives"]}, {"split": "train"}])
def test_an_unknown_part_or_split_is_an_error(args, wrong, monkeypatch):
    flags = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in wrong.items()]
    monkeypatch.setattr(sys, "argv", ["study.py", "--data", args.data, "--output_dir", args.output_dir, *flags])
    with pytest.raises(ValueError, match="objectives|train"):
        study.main()


@pytest.mark.slow
def test_end_to_end(args):
    flags = [
        f"--{name}={getattr(args, name)}" for name in ("data", "output_dir", "pretrain_config", "finetune_config")
    ]
    command = [
        sys.executable,
        EXAMPLES / "study.py",
        *flags,
        "--seeds",
        "0",
        "--parts",
        *study.PARTS[:-1],
        "--check_data",
        args.data,
    ]
    command += ["--pretrain_epochs", "1", "--epochs", "1", "2", "--shares", "0.3", "1"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    report = (Path(args.output_dir) / "study.md").read_text()
    assert all(f"## {part}" in report for part in study.PARTS[:-1]) and "mAP, covered 40%" in report
    assert "mAP, check data" in report and "| 30% by CFS | fine-tuned |" in report
    assert len(list((Path(args.output_dir) / "plots").iterdir())) == len(study.PARTS) - 1
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "pretrain.py ->" not in again.stdout
    assert (Path(args.output_dir) / "study.md").read_text() == report
