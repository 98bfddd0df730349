"""The scripts as users run them: what they write, how they resume, several processes, and bad input."""

import errno
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    checkpointing,
    distributed,
    embed_images,
    load_person_images,
    scripting,
    watching,
)
from personvit_hf.checkpointing import latest_checkpoint, list_checkpoints
from personvit_hf.schedules import warmup_cosine
from personvit_hf.scripting import parse_arguments, parse_overrides

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "patch_size": 8},
    **{"num_cls_prototypes": 64, "num_patch_prototypes": 32},
    **{"projection_hidden_size": 32, "projection_bottleneck_size": 16},
}
PRETRAIN = {
    **{"config_overrides": json.dumps(MODEL), "image_size": [32, 16], "local_size": [16, 8], "num_local_crops": 2},
    **{"epochs": 2, "batch_size": 8, "warmup_epochs": 0.5, "logging_steps": 1, "num_workers": 1, "save_epochs": 0},
}
FINETUNE = {
    **{"image_size": [32, 16], "padding": 2, "identities_per_batch": 3, "images_per_identity": 2, "epochs": 2},
    **{"optimizer": "adamw", "warmup_epochs": 1, "logging_steps": 1, "num_workers": 1, "save_epochs": 0},
}
NUM_UNLABELLED, STEPS_PER_EPOCH = 50, 6
NUM_PEOPLE, IMAGES_PER_PERSON = 9, 4


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Some of the demo's pictures: a folder of unlabelled ones, and a Market-1501 tree."""
    root = tmp_path_factory.mktemp("people")
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    for split in ("unlabelled", *folders):
        rows = datasets.Dataset.from_parquet(str(EXAMPLES / "data" / f"{split}-00000-of-00001.parquet"))
        rows = rows.cast_column("image", datasets.Image(decode=False))
        folder = root / "market" / folders[split] if split in folders else root / split
        folder.mkdir(parents=True)
        if split == "unlabelled":
            rows = rows.select(range(NUM_UNLABELLED))
        else:  # of few people, the same in query and gallery
            first = sorted({person for person in rows["person_id"] if person > 0})[:NUM_PEOPLE]
            rows = rows.filter(lambda person, first=first: person in {-1, 0, *first}, input_columns="person_id")
        seen: Counter = Counter()
        for i, row in enumerate(rows):
            seen[row["person_id"]] += 1
            if split == "train" and seen[row["person_id"]] > IMAGES_PER_PERSON:
                continue
            name = f"{i:05d}.jpg"
            if split in folders:
                name = f"{row['person_id']:04d}_c{row['camera_id'] + 1}_{name}".replace("-001", "-1")
            (folder / name).write_bytes(row["image"]["bytes"])
    return root


def as_flags(settings: dict) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def run(script: str, *flags: str, **settings) -> None:
    """The script in this process: importing its libraries takes seconds, and here they are."""
    argv, threads, on_stop = sys.argv, torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)  # as processes of their own have: sums depend on it
    if not torch.distributed.is_initialized():  # nothing left of a script before
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    sys.argv = [script, *flags, *as_flags(settings)]
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, on_stop)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def start(script: str, launcher: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(EXAMPLES / script), *as_flags(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_on_two_processes(script: str, **settings) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(script, launcher, **settings)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def run_and_kill(script: str, after_step: int, **settings) -> None:
    """Kills the script when it has saved a checkpoint of `after_step` steps or more."""
    checkpoints = Path(settings["output_dir"]) / "checkpoints"
    process = start(script, **settings)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if any(step_of(path) >= after_step for path in list_checkpoints(checkpoints)):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        pytest.fail(f"{script} ended before it was killed:\n{process.communicate()[0]}")
    process.stdout.close()  # not read to its end, which comes when the data workers notice


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def position(checkpoint: Path) -> dict:
    """Where the run stood."""
    return json.loads((checkpoint / "progress.json").read_text())["registered"][0][1]


def num_processes(checkpoint: Path) -> int:
    return json.loads((checkpoint / "progress.json").read_text())["num_processes"]


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path) -> list[dict]:
    """The run's log, without how fast it went."""
    speed = ("images_per_second", "data_wait_share")
    return [{name: value for name, value in line.items() if name not in speed} for line in log_lines(folder)]


def column(folder: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in log_lines(folder) if name in line])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pretrained(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run("pretrain.py", data=people / "unlabelled", output_dir=folder, **PRETRAIN)
    return folder


@pytest.fixture(scope="module")
def finetuned(people, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    run("finetune.py", data=people / "market", model_name_or_path=pretrained, output_dir=folder, **FINETUNE)
    return folder


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "evaluate_reid.py", "embed.py", "track.py"])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as exited:
        run(script, "--help")
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert "--config FILE" in text
    assert "--data" in text


@pytest.mark.parametrize("module", ["deep_sort_realtime", "motmetrics"])
def test_tracking_without_its_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "deep_sort_realtime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(ImportError, match=rf"{module} is not installed: pip install 'personvit-hf\[track\]'"):
        run("track.py", model="nowhere")


@pytest.mark.parametrize("recipe", sorted(path.name for path in (EXAMPLES / "recipes").glob("*.yaml")))
def test_recipes_are_settings_of_their_script(recipe):
    script, arguments = ("pretrain.py", "PretrainArguments")
    if "finetune" in recipe:
        script, arguments = ("finetune.py", "FinetuneArguments")
    arguments_class = runpy.run_path(str(EXAMPLES / script))[arguments]
    flags = ["--config", str(EXAMPLES / "recipes" / recipe), "--data", "data", "--output_dir", "out"]
    args = parse_arguments(arguments_class, flags)
    assert args.data == "data"
    config = PersonViTConfig.from_preset(args.preset, **parse_overrides(args.config_overrides))
    assert config.patch_grid(*args.image_size)
    assert 0 <= args.warmup_epochs <= args.epochs


# What the scripts write


def test_pretraining_gives_the_teacher_to_auto_model(pretrained):
    assert {path.name for path in pretrained.iterdir()} >= {"config.json", "arguments.yaml", "modeling_personvit.py"}
    assert not (pretrained / "checkpoints").exists()
    backbone = AutoModel.from_pretrained(pretrained).state_dict()
    model = PersonViTForPreTraining.from_pretrained(pretrained)
    teacher, student = model.personvit.state_dict(), model.student.state_dict()
    stored = weights(pretrained)
    assert set(backbone) == set(teacher)
    for name, weight in backbone.items():
        assert torch.equal(weight, teacher[name])
        assert torch.equal(weight, stored[f"personvit.{name}"])
    assert not torch.equal(teacher["layers.1.mlp.fc1.weight"], student["layers.1.mlp.fc1.weight"])
    processor = AutoImageProcessor.from_pretrained(pretrained)
    assert (processor.size["height"], processor.size["width"]) == (32, 16)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_pretraining_logs_every_step_with_its_schedules(pretrained):
    steps = 2 * STEPS_PER_EPOCH
    assert column(pretrained, "step").tolist() == list(range(1, steps + 1))
    assert column(pretrained, "epoch").tolist() == [0] * STEPS_PER_EPOCH + [1] * STEPS_PER_EPOCH
    losses = column(pretrained, "loss")
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, column(pretrained, "dino_loss") + column(pretrained, "mim_loss"), rtol=1e-6)
    momentum = [warmup_cosine(step, total_steps=steps, base=0.996, final=1.0) for step in range(steps)]
    assert column(pretrained, "teacher_momentum").tolist() == momentum
    decay = [warmup_cosine(step, total_steps=steps, base=0.04, final=0.4) for step in range(steps)]
    assert column(pretrained, "weight_decay").tolist() == decay
    peak = {"base": 5e-4 * 8 / 256, "final": 1e-6, "warmup_steps": STEPS_PER_EPOCH // 2}
    assert column(pretrained, "learning_rate").tolist() == [
        warmup_cosine(step, total_steps=steps, **peak) for step in range(steps)
    ]


def test_settings_of_a_run_give_it_again_and_flags_win(people, pretrained, tmp_path):
    settings = yaml.safe_load((pretrained / "arguments.yaml").read_text())
    assert settings["data"] == str(people / "unlabelled")
    assert settings["image_size"] == [32, 16]
    run("pretrain.py", config=pretrained / "arguments.yaml", output_dir=tmp_path / "again")
    assert figures(tmp_path / "again") == figures(pretrained)
    assert_same_weights(tmp_path / "again", pretrained)
    run("pretrain.py", config=pretrained / "arguments.yaml", output_dir=tmp_path / "other", epochs=1, seed=1)
    assert column(tmp_path / "other", "step").tolist() == list(range(1, STEPS_PER_EPOCH + 1))
    assert column(tmp_path / "other", "loss")[0] != column(pretrained, "loss")[0]


def test_pretraining_warns_of_a_warmup_that_is_longer_than_the_run(people, tmp_path, caplog):
    settings = PRETRAIN | {"data": people / "unlabelled", "num_local_crops": 0, "epochs": 1, "warmup_epochs": 2.5}
    run("pretrain.py", output_dir=tmp_path, **settings)
    rates = column(tmp_path, "learning_rate")
    assert rates[-1] == rates.max() == pytest.approx(5e-4 * 8 / 256)
    assert caplog.text.count("`warmup_epochs` 2.5 is more than `epochs` 1") == 1


def test_pretraining_watches_its_teacher(people, pretrained, tmp_path):
    settings = {**PRETRAIN, "data": people / "unlabelled", "watch_steps": 3, "logging_steps": 12}
    run("pretrain.py", output_dir=tmp_path, **settings, report_to="tensorboard", eval_data=people / "market")
    assert column(tmp_path, "step").tolist() == [3, 6, 9, 12, 12]
    names = {"feature_std", "effective_rank", "teacher_entropy", "teacher_kl_to_uniform", "gradient_norm"}
    names |= {"center_norm", "patch_center_norm", "data_wait_share", "images_per_second"}
    assert all(names <= line.keys() and all(map(np.isfinite, line.values())) for line in log_lines(tmp_path)[:4])
    assert_same_weights(tmp_path, pretrained)  # watching changes nothing

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "personvit-pretrain")).Reload()
    assert [event.step for event in events.Scalars("effective_rank")] == [3, 6, 9, 12]
    assert events.Scalars("mAP")[0].value == pytest.approx(column(tmp_path, "mAP")[0])


def test_pretraining_that_collapses_is_named_and_stopped(people, tmp_path):
    collapsing = {"data": people / "unlabelled", "watch_steps": 2, "teacher_temperature": 50.0}
    collapsing |= {"warmup_teacher_temperature": 50.0, "config_overrides": json.dumps(MODEL | {"center_momentum": 1})}
    with pytest.raises(RuntimeError, match="collapsed at step 6: the teacher gives every prototype the same"):
        run("pretrain.py", output_dir=tmp_path / "stopped", **PRETRAIN | collapsing)
    assert column(tmp_path / "stopped", "teacher_entropy")[-1] == pytest.approx(np.log(64), abs=0.02)
    run("pretrain.py", output_dir=tmp_path / "regardless", stop_on_collapse="false", **PRETRAIN | collapsing)


def test_steps_that_are_no_numbers_are_skipped_and_counted(people, tmp_path, monkeypatch):
    settings = {**PRETRAIN, "data": people / "unlabelled", "watch_steps": 0}
    run("pretrain.py", output_dir=tmp_path / "checked", skip_nonfinite_steps=1, **settings)
    forward, calls = PersonViTForPreTraining.forward, []

    def broken_forward(self, global_pixel_values, **inputs):
        calls.append(None)
        broken = len(calls) in (3, 9)
        return forward(self, global_pixel_values * (float("nan") if broken else 1), **inputs)

    monkeypatch.setattr(PersonViTForPreTraining, "forward", broken_forward)
    run("pretrain.py", output_dir=tmp_path / "skipping", skip_nonfinite_steps=2, **settings)
    assert column(tmp_path / "skipping", "step").tolist() == [1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
    assert column(tmp_path / "skipping", "skipped_steps").tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert all(value.isfinite().all() for value in weights(tmp_path / "skipping").values())
    assert figures(tmp_path / "skipping")[:2] == figures(tmp_path / "checked")[:2]

    calls.clear()
    with pytest.raises(FloatingPointError, match="skip_nonfinite_steps"):
        run("pretrain.py", output_dir=tmp_path / "limit", skip_nonfinite_steps=1, **settings)
    calls.clear()
    with pytest.raises(FloatingPointError, match="`loss` is nan after step 3"):
        run("pretrain.py", output_dir=tmp_path / "stopped", **settings)


def test_a_run_stopped_at_a_skipped_step_is_saved_and_remembers_it(people, tmp_path, monkeypatch):
    settings = {**PRETRAIN, "data": people / "unlabelled", "output_dir": tmp_path, "skip_nonfinite_steps": 1}
    forward, calls = PersonViTForPreTraining.forward, []

    def broken_forward(self, global_pixel_values, **inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        broken = len(calls) in (3, 5)
        return forward(self, global_pixel_values * (float("nan") if broken else 1), **inputs)

    monkeypatch.setattr(PersonViTForPreTraining, "forward", broken_forward)
    with pytest.raises(SystemExit):
        run("pretrain.py", **settings)
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert all(value.isfinite().all() for value in load_file(saved / "model.safetensors").values())
    with pytest.raises(FloatingPointError, match="after step 4, and `skip_nonfinite_steps` 1"):
        run("pretrain.py", **settings, resume_from="latest")


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(people, tmp_path, monkeypatch):
    settings = {**PRETRAIN, "data": people / "unlabelled", "output_dir": tmp_path, "save_epochs": 0.5, "epochs": 1}
    forward, calls = PersonViTForPreTraining.forward, []

    def broken_backward(self, **inputs):
        outputs = forward(self, **inputs)
        calls.append(None)
        if len(calls) == 3:  # the step of the first checkpoint
            outputs.loss.register_hook(lambda gradient: gradient * torch.nan)
        return outputs

    monkeypatch.setattr(PersonViTForPreTraining, "forward", broken_backward)
    with pytest.raises(FloatingPointError, match="`gradient_norm` is nan after step 3"):
        run("pretrain.py", **settings)
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_weight_decay_may_start_at_zero(people, tmp_path):
    settings = PRETRAIN | {"weight_decay": 0.0, "learning_rate": 1.0}
    for name, final in (("none", 0.0), ("some", 0.4)):
        run(
            "pretrain.py", data=people / "unlabelled", output_dir=tmp_path / name, **settings, final_weight_decay=final
        )
    norms = [weights(tmp_path / name)["student_head.mlp.2.weight"].norm() for name in ("none", "some")]
    assert norms[1] < norms[0]


def test_finetuning_writes_a_reid_model_and_its_results(people, pretrained, finetuned):
    model = PersonViTForReID.from_pretrained(finetuned)
    assert model.config.num_labels == NUM_PEOPLE
    names = sorted({int(path.name[:4]) for path in (people / "market" / "bounding_box_train").iterdir()})
    assert model.config.id2label == {label: str(person) for label, person in enumerate(names)}
    teacher, tuned = weights(pretrained), weights(finetuned)
    for name in ("personvit.embeddings.patch_embeddings.projection.weight", "personvit.layers.0.mlp.fc1.weight"):
        distance = (teacher[name] - tuned[name]).norm() / teacher[name].norm()
        assert 0 < distance < 0.2  # it set out from the teacher
    losses = column(finetuned, "loss")
    assert len(losses) >= 2 * (STEPS_PER_EPOCH - 1)
    np.testing.assert_allclose(losses, column(finetuned, "id_loss") + column(finetuned, "triplet_loss"), rtol=1e-6)
    assert set(column(finetuned, "epoch")) == {0, 1}
    assert list(AutoImageProcessor.from_pretrained(finetuned).image_mean) == [0.5, 0.5, 0.5]


def test_evaluation_gives_the_results_of_finetuning(people, pretrained, finetuned, tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    run("evaluate_reid.py", model=finetuned, data=people / "market", output=output, num_workers=0)
    found, expected = json.loads(output.read_text()), json.loads((finetuned / "results.json").read_text())
    assert {name: found[name] for name in expected} == expected
    assert found["cmc"][0] == found["rank1"]
    text = capsys.readouterr().out
    assert "27 of 27 queries have a match" in text
    assert f"mAP {100 * expected['mAP']:6.2f}" in text

    run("evaluate_reid.py", model=pretrained, data=people / "market", output=output, num_workers=0)
    assert json.loads(output.read_text())["mAP"] != expected["mAP"]


def test_two_processes_share_the_images_that_they_embed(people, finetuned, tmp_path):
    output = run_on_two_processes("evaluate_reid.py", model=finetuned, data=people / "market", num_workers=0)
    expected = json.loads((finetuned / "results.json").read_text())
    assert output.count("27 of 27 queries have a match") == 1  # by the main process
    assert f"mAP {100 * expected['mAP']:6.2f}" in output
    settings = {"model": finetuned, "data": people / "unlabelled", "num_workers": 0}
    run_on_two_processes("embed.py", output=tmp_path / "two.npz", **settings)
    run("embed.py", output=tmp_path / "one.npz", **settings)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(two["names"], one["names"])
        np.testing.assert_allclose(two["embeddings"], one["embeddings"], rtol=0, atol=1e-6)


def test_embedding_writes_vectors_and_names(people, finetuned, tmp_path):
    output = tmp_path / "new" / "features.bin"
    run("embed.py", model=finetuned, data=people / "unlabelled", output=output, num_workers=0, batch_size=16)
    with np.load(output) as found:
        assert found["embeddings"].shape == (NUM_UNLABELLED, 32)
        assert found["embeddings"].dtype == np.float32
        assert found["names"].tolist() == sorted(str(path) for path in (people / "unlabelled").iterdir())
        model, processor = AutoModel.from_pretrained(finetuned), AutoImageProcessor.from_pretrained(finetuned)
        expected = embed_images(model, processor, load_person_images(people / "unlabelled"))
        np.testing.assert_allclose(found["embeddings"], expected, atol=1e-6)


def test_cameras_as_side_information(people, pretrained, tmp_path):
    settings = FINETUNE | {"data": people / "market", "output_dir": tmp_path, "model_name_or_path": pretrained}
    run("finetune.py", "--use_cameras", **settings)
    assert weights(tmp_path)["personvit.embeddings.side_embeddings"].shape == (6, 1, 32)
    for flags, same in (([], True), (["--no_use_cameras"], False)):
        output = tmp_path / "figures.json"
        run("evaluate_reid.py", *flags, model=tmp_path, data=people / "market", output=output, num_workers=0)
        results = json.loads((tmp_path / "results.json").read_text())
        assert (json.loads(output.read_text())["mAP"] == results["mAP"]) == same


def test_pretraining_leaves_the_cameras_of_a_fine_tuned_model(people, tmp_path):
    """It would never train their embeddings, and its teacher would be scored with them."""
    sizes = {**MODEL, "image_size": [32, 16]}
    PersonViTForReID(PersonViTConfig(**sizes, num_cameras=6, num_labels=3)).save_pretrained(tmp_path / "reid")
    settings = PRETRAIN | {"data": people / "unlabelled", "model_name_or_path": tmp_path / "reid", "epochs": 1}
    overrides = ({}, 0), ({"num_cameras": 6}, 6)
    for given, cameras in overrides:
        out = tmp_path / f"{cameras}"
        run("pretrain.py", output_dir=out, **settings | {"config_overrides": json.dumps(given)})
        assert json.loads((out / "config.json").read_text())["num_cameras"] == cameras
        assert ("personvit.embeddings.side_embeddings" in weights(out)) == bool(cameras)


def test_fine_tuned_model_goes_on_with_other_people(people, finetuned, tmp_path):
    shutil.copytree(people / "market", tmp_path / "market")
    for path in (tmp_path / "market" / "bounding_box_train").glob("0001_*"):
        path.unlink()
    settings = FINETUNE | {
        "data": tmp_path / "market",
        "output_dir": tmp_path / "out",
        "epochs": 1,
        "warmup_epochs": 0,
    }
    run("finetune.py", model_name_or_path=finetuned, **settings)
    assert weights(tmp_path / "out")["classifier.weight"].shape == (NUM_PEOPLE - 1, 32)


# Resuming


def test_pretraining_that_was_killed_resumes_bit_for_bit(people, tmp_path):
    settings = PRETRAIN | {
        **{"data": people / "unlabelled", "eval_data": people / "market", "eval_epochs": 3},
        **{"epochs": 15, "save_epochs": 5 / 6},  # every 5 of 6 steps: nearly always in mid-epoch
    }
    run("pretrain.py", output_dir=tmp_path / "unbroken", **settings)
    killed = tmp_path / "killed"
    run_and_kill("pretrain.py", after_step=10, output_dir=killed, **settings)
    checkpoint = latest_checkpoint(killed / "checkpoints")
    progress = position(checkpoint)
    assert progress["step"] == step_of(checkpoint) < 15 * STEPS_PER_EPOCH
    assert progress["samples"] == 8 * (progress["step"] % STEPS_PER_EPOCH) > 0  # in mid-epoch
    before = {line["step"]: line for line in log_lines(killed) if "loss" in line}

    run("pretrain.py", output_dir=killed, resume_from="latest", **settings)
    assert figures(killed) == figures(tmp_path / "unbroken")
    assert_same_weights(killed, tmp_path / "unbroken")
    # the steps before the checkpoint were not done again: their lines still tell how fast they went
    after = {line["step"]: line for line in log_lines(killed) if "loss" in line}
    assert all((before[step] == after[step]) == (step <= progress["step"]) for step in before)
    last = f"checkpoints/step-{15 * STEPS_PER_EPOCH:08d}"
    assert_same_weights(killed / last, tmp_path / "unbroken" / last)


def test_finetuning_that_was_killed_resumes_bit_for_bit(people, pretrained, tmp_path):
    settings = FINETUNE | {
        **{"data": people / "market", "model_name_or_path": pretrained},
        **{"epochs": 12, "save_epochs": 2, "eval_epochs": 2},
    }
    run("finetune.py", output_dir=tmp_path / "unbroken", **settings)
    killed = tmp_path / "killed"
    run_and_kill("finetune.py", after_step=15, output_dir=killed, **settings)
    progress = position(latest_checkpoint(killed / "checkpoints"))
    assert 0 < progress["epoch"] < 12
    before = {line["step"]: line for line in log_lines(killed) if "loss" in line}

    run("finetune.py", output_dir=killed, resume_from="latest", **settings)
    assert figures(killed) == figures(tmp_path / "unbroken")
    assert_same_weights(killed, tmp_path / "unbroken")
    assert (killed / "results.json").read_text() == (tmp_path / "unbroken" / "results.json").read_text()
    after = {line["step"]: line for line in log_lines(killed) if "loss" in line}
    assert all((before[step] == after[step]) == (step <= progress["step"]) for step in before)


def test_full_disk_loses_nothing_that_was_saved(people, pretrained, tmp_path, monkeypatch):
    settings = PRETRAIN | {"data": people / "unlabelled", "output_dir": tmp_path, "save_epochs": 4 / 6}
    write_manifest = checkpointing.write_manifest

    def write_until_the_disk_is_full(folder):
        write_manifest(folder)
        if "step-00000004" not in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing, "write_manifest", write_until_the_disk_is_full)
    with pytest.raises(OSError, match="step-00000008: .*No space left on device.*step-00000004"):
        run("pretrain.py", **settings)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    run("pretrain.py", **settings, resume_from="latest")
    assert_same_weights(tmp_path, pretrained)  # which never saved on its way


def test_finished_run_resumes_to_itself(people, finetuned, pretrained, tmp_path):
    settings = FINETUNE | {"data": people / "market", "output_dir": tmp_path, "save_epochs": 1}
    run("finetune.py", model_name_or_path=pretrained, **settings)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2
    before = contents(tmp_path)
    run("finetune.py", model_name_or_path=pretrained, **settings, resume_from="latest")
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"arguments.yaml"}  # it was told to resume
    assert_same_weights(tmp_path, finetuned)


def test_checkpointed_layers_train_the_same_model(people, pretrained, finetuned, tmp_path):
    flags = {"gradient_checkpointing": True, "num_workers": 0}
    run("pretrain.py", output_dir=tmp_path / "p", **PRETRAIN | flags | {"data": people / "unlabelled"})
    assert_same_weights(tmp_path / "p", pretrained)
    settings = FINETUNE | flags | {"data": people / "market", "model_name_or_path": pretrained}
    run("finetune.py", output_dir=tmp_path / "f", **settings)
    assert_same_weights(tmp_path / "f", finetuned)


# Several processes, and batches in parts


def test_pretraining_on_two_processes_equals_one_with_their_batches(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "drop_path_rate": 0.0, "save_epochs": 1}
    run("pretrain.py", output_dir=tmp_path / "one", **settings)
    run_on_two_processes("pretrain.py", output_dir=tmp_path / "two", **settings | {"batch_size": 4})
    saved = latest_checkpoint(tmp_path / "two" / "checkpoints")
    assert num_processes(saved) == 2  # that knew of each other
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_accumulated_gradients_equal_those_of_one_batch(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "drop_path_rate": 0.0}
    run("pretrain.py", output_dir=tmp_path / "one", **settings)
    parts = settings | {"batch_size": 4, "gradient_accumulation_steps": 2}
    run("pretrain.py", output_dir=tmp_path / "parts", **parts)
    assert_same_training(tmp_path / "one", tmp_path / "parts")


def assert_same_training(first: Path, second: Path) -> None:
    names = ["step", "epoch", "learning_rate", "weight_decay", "teacher_momentum", "loss", "dino_loss", "mim_loss"]
    for name in names:
        np.testing.assert_allclose(column(first, name), column(second, name), rtol=1e-5, err_msg=name)
    a, b = weights(first), weights(second)
    assert a["center"].abs().max() > 0
    for name in a:
        if name.endswith("qkv_proj.bias"):
            # the keys' bias changes no attention: its gradient is rounding noise, which AdamW makes steps of
            a[name][32:64] = b[name][32:64] = 0
    assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("regional", ["False", "True"])
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_a_compiled_run_saves_what_any_run_resumes_from(people, tmp_path, monkeypatch, script, regional):
    settings = {
        "pretrain.py": PRETRAIN | {"data": people / "unlabelled"},
        "finetune.py": FINETUNE | {"data": people / "market", "config_overrides": PRETRAIN["config_overrides"]},
    }[script] | {"drop_path_rate": 0.0, "epochs": 1, "save_epochs": 1}
    run(script, output_dir=tmp_path / "plain", **settings)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as `accelerate launch --dynamo_backend` sets it
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    run(script, output_dir=tmp_path / "compiled", **settings)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    torch.compiler.reset()
    plain, compiled = (latest_checkpoint(tmp_path / name / "checkpoints") for name in ("plain", "compiled"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert load_file(plain / file).keys() == load_file(compiled / file).keys()
    np.testing.assert_allclose(column(tmp_path / "plain", "loss"), column(tmp_path / "compiled", "loss"), rtol=1e-3)
    run(script, output_dir=tmp_path / "compiled", resume_from="latest", **settings | {"epochs": 2})
    assert column(tmp_path / "compiled", "epoch").max() == 1


def test_the_last_part_of_an_epoch_is_a_step_too(people, tmp_path):
    settings = PRETRAIN | {"batch_size": 7, "gradient_accumulation_steps": 2, "save_epochs": 1}
    settings |= {"final_teacher_momentum": 0.997}
    run("pretrain.py", data=people / "unlabelled", output_dir=tmp_path, **settings)  # 7 batches: 2 + 2 + 2 + 1
    assert column(tmp_path, "step").tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    momentum = [warmup_cosine(step, total_steps=8, base=0.996, final=0.997) for step in range(8)]
    assert column(tmp_path, "teacher_momentum").tolist() == momentum
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [4, 8]


def test_finetuning_logs_the_mean_of_a_steps_batches(people, pretrained, tmp_path):
    still = FINETUNE | {"data": people / "market", "model_name_or_path": pretrained, "learning_rate": 0.0, "epochs": 1}
    still |= {"drop_path_rate": 0.0, "num_workers": 0}  # so all batches meet the same weights
    run("finetune.py", output_dir=tmp_path / "one", **still)
    run("finetune.py", output_dir=tmp_path / "parts", **still, gradient_accumulation_steps=4)
    for name in ("loss", "id_loss", "triplet_loss", "accuracy"):
        ones = column(tmp_path / "one", name)
        assert len(ones) in (5, 6)  # so the last step has one or two batches
        expected = [ones[:4].mean(), ones[4:].mean()]
        np.testing.assert_allclose(column(tmp_path / "parts", name), expected, rtol=1e-5)


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_images_per_second_are_those_of_training(people, tmp_path, monkeypatch, script):
    data, settings = people / "unlabelled", PRETRAIN | {"eval_data": people / "market", "eval_epochs": 1}
    if script == "finetune.py":
        data, settings = people / "market", FINETUNE | {"eval_epochs": 1, "config_overrides": json.dumps(MODEL)}
    evaluate, waited = scripting.score, []

    def slow_score(*arguments, **options):
        waited.append(1000)
        return evaluate(*arguments, **options)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(waited))
    monkeypatch.setattr(watching, "time", clock)
    monkeypatch.setattr(scripting, "score", slow_score)
    run(script, data=data, output_dir=tmp_path, **settings | {"num_workers": 0})
    seen = 2 * 8 * STEPS_PER_EPOCH if script == "pretrain.py" else 6 * len(column(tmp_path, "loss"))
    assert len(waited) >= 2
    assert column(tmp_path, "images_per_second")[-1] > seen / 1000


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_workers_load_what_is_scored_too(people, tmp_path, monkeypatch, script):
    data, settings = people / "unlabelled", PRETRAIN | {"eval_data": people / "market", "eval_epochs": 1}
    if script == "finetune.py":
        data, settings = people / "market", FINETUNE | {"eval_epochs": 1, "config_overrides": json.dumps(MODEL)}
    embed, workers = scripting.embed_images, []

    def noting(*arguments, **options):
        workers.append(options["num_workers"])
        return embed(*arguments, **options)

    monkeypatch.setattr(scripting, "embed_images", noting)
    run(script, data=data, output_dir=tmp_path, **settings | {"epochs": 1, "warmup_epochs": 0})
    assert len(workers) >= 2 and set(workers) == {1}


def test_steps_that_fp16s_scaler_leaves_out_do_not_count(people, tmp_path, monkeypatch):
    make = distributed.make_accelerator

    def make_with_scaler(*arguments):
        accelerator = make(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows, until it has shrunk
        accelerator.unscale_gradients = lambda optimizer: accelerator.scaler.unscale_(optimizer.optimizer)
        return accelerator

    monkeypatch.setattr(distributed, "make_accelerator", make_with_scaler)
    settings = PRETRAIN | {"data": people / "unlabelled", "skip_nonfinite_steps": 1, "num_workers": 0}
    run("pretrain.py", output_dir=tmp_path / "overflow", **settings)
    losses = column(tmp_path / "overflow", "loss")
    assert len(losses) == 2 * STEPS_PER_EPOCH and np.isfinite(losses).all()
    assert not column(tmp_path / "overflow", "skipped_steps").any()

    forward = PersonViTForPreTraining.forward

    def broken_forward(self, global_pixel_values, **inputs):
        return forward(self, global_pixel_values * float("nan"), **inputs)

    monkeypatch.setattr(PersonViTForPreTraining, "forward", broken_forward)
    with pytest.raises(FloatingPointError, match="after step 1, and `skip_nonfinite_steps` 1"):
        run("pretrain.py", output_dir=tmp_path / "broken", **settings)


def test_finetuning_on_two_processes(people, pretrained, tmp_path):
    settings = FINETUNE | {"data": people / "market", "model_name_or_path": pretrained, "save_epochs": 1}
    run_on_two_processes("finetune.py", output_dir=tmp_path, **settings)
    assert num_processes(latest_checkpoint(tmp_path / "checkpoints")) == 2
    losses = column(tmp_path, "loss")
    assert len(losses) in (4, 5, 6)  # 5 or 6 batches an epoch, two at a time
    assert np.isfinite(losses).all()
    assert 0 < json.loads((tmp_path / "results.json").read_text())["mAP"] <= 1


# Bad input


@pytest.mark.parametrize(
    "script, settings",
    [
        ("pretrain.py", PRETRAIN | {"output_dir": "out"}),
        ("finetune.py", FINETUNE | {"output_dir": "out", "config_overrides": json.dumps(MODEL)}),
    ],
)
def test_data_folder_that_is_missing_or_empty(script, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        run(script, data="no_such_folder", **settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: "):
        run(script, data="empty", **settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_broken_images(people, tmp_path) -> Path:
    folder = tmp_path / "with_broken"
    folder.mkdir()
    for path in (people / "unlabelled").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "00007b.jpg").write_bytes(b"no image")
    (folder / "00030b.jpg").write_bytes((people / "unlabelled" / "00030.jpg").read_bytes()[:300])
    return folder


def test_some_broken_images_are_skipped_and_counted(with_broken_images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        settings = PRETRAIN | {"data": with_broken_images, "max_broken_share": 0.05}
        run("pretrain.py", output_dir=tmp_path / "out", **settings)
    for name in ("00007b.jpg", "00030b.jpg"):
        assert caplog.text.count(name) == 1
    assert "of 48 images were broken and skipped" in caplog.text
    assert len(log_lines(tmp_path / "out")) == 2 * STEPS_PER_EPOCH


def test_too_many_broken_images_stop_the_run(with_broken_images, tmp_path):
    with pytest.raises(RuntimeError, match="of 48 images are broken, more than the share of 0.01") as caught:
        run("pretrain.py", data=with_broken_images, output_dir=tmp_path / "out", **PRETRAIN | {"num_workers": 0})
    assert "b.jpg" in str(caught.value)


@pytest.mark.parametrize(
    "script, wrong, message",
    [
        ("pretrain.py", {"image_size": [30, 16]}, "30x16 pixels .*patch_size=8"),
        ("pretrain.py", {"image_size": [32]}, "`image_size`"),
        ("pretrain.py", {"local_size": [16, 9]}, "16x9 pixels .*patch_size=8"),
        ("pretrain.py", {"batch_size": 51}, "unlabelled has 50 images, fewer than `batch_size` 51"),
        ("pretrain.py", {"preset": "huge"}, "huge"),
        ("pretrain.py", {"config_overrides": "{patch_size: 8}"}, "`config_overrides` is not JSON"),
        ("pretrain.py", {"config_overrides": '{"pach_size": 8}'}, "pach_size"),
        ("finetune.py", {"image_size": [32, 17]}, "32x17 pixels .*patch_size=8"),
        ("finetune.py", {"optimizer": "lion"}, "`optimizer` must be sgd or adamw, got 'lion'"),
        (
            "finetune.py",
            {"identities_per_batch": 10},
            "market has 9 people in train, fewer than `identities_per_batch`",
        ),
        ("finetune.py", {"warmup_epochs": 20}, "`warmup_epochs` 20 is more than `epochs` 2"),
    ],
)
def test_settings_that_can_not_work(people, tmp_path, script, wrong, message):
    data, settings = people / "unlabelled", PRETRAIN
    if script == "finetune.py":
        data, settings = people / "market", FINETUNE | {"config_overrides": json.dumps(MODEL)}
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        run(script, data=data, output_dir=tmp_path / "out", **settings | wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_data_that_can_not_be_scored(people, tmp_path, script):
    for path in (people / "market").rglob("*.jpg"):
        copy = tmp_path / "one_camera" / path.parent.name / re.sub(r"_c\d", "_c1", path.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    settings = {"data": people / "unlabelled", "eval_data": tmp_path / "one_camera", **PRETRAIN}
    if script == "finetune.py":
        settings = {"data": tmp_path / "one_camera", "config_overrides": json.dumps(MODEL), **FINETUNE}
    with pytest.raises(ValueError, match="one_camera can't be scored: none of the .* queries has a true match"):
        run(script, output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_data_for_evaluation_alone(people, finetuned, tmp_path):
    for folder in ("query", "bounding_box_test"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / folder).symlink_to(people / "market" / folder)
    settings = {"data": tmp_path / "tests", "num_workers": 0}
    run("evaluate_reid.py", model=finetuned, output=tmp_path / "e.json", **settings)
    assert json.loads((tmp_path / "e.json").read_text())["mAP"] == pytest.approx(
        json.loads((finetuned / "results.json").read_text())["mAP"]
    )
    with pytest.raises(FileNotFoundError, match="tests: no split train; found query, gallery"):
        run("finetune.py", output_dir=tmp_path / "out", **FINETUNE | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["evaluate_reid.py", "embed.py"])
def test_an_output_that_is_a_folder_is_told_before(people, finetuned, tmp_path, monkeypatch, script):
    monkeypatch.setattr("personvit_hf.embed_images", None)
    monkeypatch.setattr(scripting, "embed_images", None)
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        run(script, model=finetuned, data=people / "market", output=tmp_path)


def test_unknown_settings_in_a_file(people, tmp_path):
    (tmp_path / "settings.yaml").write_text("epoch: 3\n")
    with pytest.raises(ValueError, match=r"settings\.yaml: unknown settings \['epoch'\]"):
        run("pretrain.py", config=tmp_path / "settings.yaml", data=people / "unlabelled", output_dir=tmp_path / "out")


def test_a_loss_that_is_no_number_stops_before_anything_is_saved(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "output_dir": tmp_path, "epochs": 1, "save_epochs": 1}
    run("pretrain.py", **settings)
    before = contents(tmp_path / "checkpoints")
    diverging = settings | {"epochs": 3, "learning_rate": 1e30, "logging_steps": 5, "save_epochs": 0.5}
    diverging["num_workers"] = 0
    with pytest.raises(FloatingPointError, match="`loss` is nan after step 9: training has diverged") as caught:
        run("pretrain.py", **diverging, resume_from="latest")
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path / "checkpoints") == before
    assert column(tmp_path, "step").tolist() == list(range(1, STEPS_PER_EPOCH + 1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_that_overflows_in_fp16_leaves_no_trace(optimizer):
    script = runpy.run_path(str(EXAMPLES / "finetune.py"))
    args = script["FinetuneArguments"](data="", output_dir="", optimizer=optimizer)
    model = PersonViTForReID(PersonViTConfig(**MODEL, image_size=[32, 16], num_labels=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu")
    trained = script["build_optimizer"](args, model, scaler)
    scaler.scale(sum(parameter.sum() for parameter in model.parameters()) * torch.inf).backward()
    scaler.step(trained)
    scaler.update()
    assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    states = [value for state in trained.state.values() for value in state.values() if value is not None]
    assert all((value == 0).all() for value in states)


def test_finetuning_that_diverges_stops(people, pretrained, tmp_path):
    settings = FINETUNE | {"learning_rate": 1e30, "save_epochs": 1, "logging_steps": 1000, "num_workers": 0}
    with pytest.raises(FloatingPointError, match="`loss` is nan after step"):
        run("finetune.py", data=people / "market", model_name_or_path=pretrained, output_dir=tmp_path, **settings)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_resuming_what_can_not_be_resumed(people, pretrained, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "output_dir": tmp_path, "epochs": 1, "save_epochs": 1}
    run("pretrain.py", **settings)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="step-00000006.*--resume_from latest"):
        run("pretrain.py", **settings)
    with pytest.raises(FileNotFoundError, match="`resume_from` .*step-00000099"):
        run("pretrain.py", **settings, resume_from=tmp_path / "checkpoints" / "step-00000099")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        run("pretrain.py", **settings, resume_from=pretrained)
    deeper = json.dumps(MODEL | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="step-00000006: this checkpoint does not fit the run"):
        run("pretrain.py", **settings | {"config_overrides": deeper}, resume_from="latest")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("script, data", [("pretrain.py", "unlabelled"), ("finetune.py", "market")])
def test_model_of_another_architecture(people, tmp_path, script, data):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    settings = PRETRAIN if script == "pretrain.py" else FINETUNE
    with pytest.raises(ValueError, match="vit: a checkpoint of another architecture, model_type 'vit'"):
        run(
            script,
            data=people / data,
            model_name_or_path=tmp_path / "vit",
            output_dir=tmp_path / "out",
            **settings | {"config_overrides": "{}"},
        )


@pytest.mark.parametrize("script", ["finetune.py", "evaluate_reid.py", "embed.py"])
def test_model_that_is_not_there(people, tmp_path, script):
    settings = {"model": tmp_path / "nowhere", "output": tmp_path / "out", "num_workers": 0}
    if script == "finetune.py":
        settings = FINETUNE | {"model_name_or_path": tmp_path / "nowhere", "output_dir": tmp_path / "out"}
    with pytest.raises(FileNotFoundError, match="nowhere: neither folder nor Hub name of a checkpoint"):
        run(script, data=people / "market", **settings)
    assert not (tmp_path / "out").exists()
