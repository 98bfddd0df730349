"""examples/pretrain.py --streaming, as users run it: killed and resumed, on several processes, and bad input."""

import json
from pathlib import Path

import datasets
import pytest
from test_examples import (
    EXAMPLES,
    PRETRAIN,
    assert_same_weights,
    figures,
    log_lines,
    run,
    run_and_kill,
    run_on_two_processes,
    step_of,
)

from personvit_hf.checkpointing import latest_checkpoint

SETTINGS = PRETRAIN | {"streaming": True, "num_workers": 2, "save_epochs": 5 / 6}
STEPS_PER_EPOCH = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """50 of the demo's pictures in three files of row groups of 7."""
    folder = tmp_path_factory.mktemp("shards")
    rows = datasets.Dataset.from_parquet(str(EXAMPLES / "data" / "unlabelled-00000-of-00001.parquet"))
    for file, start in enumerate(range(0, 50, 20)):
        part = rows.select(range(start, min(start + 20, 50))).select_columns("image")
        part.to_parquet(folder / f"train-{file}.parquet", batch_size=7)
    return folder


def test_streaming_that_was_killed_resumes_bit_for_bit(shards, tmp_path):
    settings = SETTINGS | {"data": shards, "epochs": 15}
    run("pretrain.py", output_dir=tmp_path / "unbroken", **settings)
    assert len([line for line in log_lines(tmp_path / "unbroken") if "loss" in line]) == 15 * STEPS_PER_EPOCH
    killed = tmp_path / "killed"
    run_and_kill("pretrain.py", after_step=10, output_dir=killed, **settings)
    assert step_of(latest_checkpoint(killed / "checkpoints")) % STEPS_PER_EPOCH > 0  # in mid-epoch
    run("pretrain.py", output_dir=killed, resume_from="latest", **settings)
    assert figures(killed) == figures(tmp_path / "unbroken")
    assert_same_weights(killed, tmp_path / "unbroken")


def test_resuming_in_another_order_is_refused(shards, tmp_path):
    settings = SETTINGS | {"data": shards, "output_dir": tmp_path, "epochs": 1}
    run("pretrain.py", **settings)
    with pytest.raises(ValueError, match="made with num_workers 2 .now 1., in another order"):
        run("pretrain.py", **settings | {"num_workers": 1}, resume_from="latest")
    with pytest.raises(ValueError, match="this checkpoint does not fit the run"):
        run("pretrain.py", **settings | {"streaming": False}, resume_from="latest")


def test_folder_of_loose_images_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no parquet and no tar file.*data prepare"):
        run("pretrain.py", **SETTINGS | {"data": tmp_path, "output_dir": tmp_path / "out"})


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(shards, tmp_path):
    settings = SETTINGS | {"data": shards, "batch_size": 4, "epochs": 2}
    run_on_two_processes("pretrain.py", output_dir=tmp_path / "unbroken", **settings)
    run_on_two_processes("pretrain.py", output_dir=tmp_path / "resumed", **settings)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000010", "step-00000012"}
    run_on_two_processes(
        "pretrain.py", output_dir=tmp_path / "again", resume_from=checkpoints / "step-00000010", **settings
    )
    assert_same_weights(tmp_path / "again", tmp_path / "unbroken")
    assert json.loads((tmp_path / "unbroken" / "config.json").read_text())["model_type"] == "personvit"
