"""Runs that are killed, stopped, or run out of disk: they always go on, bit for bit on a CPU."""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
from process_runs import finish, start, start_ranks, wait_for
from test_examples import (
    FINETUNE,
    MODEL,
    PRETRAIN,
    STEPS_PER_EPOCH,
    assert_same_training,
    assert_same_weights,
    figures,
    log_lines,
    num_processes,
    people,
    position,
    run,
    step_of,
)

from personvit_hf import scripting
from personvit_hf.checkpointing import PARTIAL_SUFFIX, latest_checkpoint, list_checkpoints
from personvit_hf.preemption import STOPPED_EXIT_CODE

__all__ = ["people"]  # a fixture

PRETRAIN = PRETRAIN | {"num_workers": 0}
FINETUNE = FINETUNE | {"num_workers": 0, "config_overrides": json.dumps(MODEL)}


def last_logged(folder) -> int:
    """The last step of which the log has a whole line."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def kill_at_random(people, tmp_path, kills: int, epochs: int, longest: float) -> dict[str, int]:
    """Kills and resumes a run that saves at each step, and compares it with an unbroken one."""
    settings = PRETRAIN | {"data": people / "unlabelled", "epochs": epochs, "save_epochs": 1 / STEPS_PER_EPOCH}
    settings |= {"resume_from": "latest"}
    run("pretrain.py", output_dir=tmp_path / "unbroken", **settings | {"save_epochs": 0})
    killed, rng = tmp_path / "killed", random.Random(0)
    found = {"kills": 0, "kills while saving": 0, "steps lost at most": 0}
    while found["kills"] < kills:
        process = start("pretrain.py", tmp_path / "output", output_dir=killed, **settings)
        before = last_logged(killed)
        assert wait_for(lambda before=before: last_logged(killed) > before, process), (tmp_path / "output").read_text()
        time.sleep(rng.uniform(0, longest))
        process.kill()
        assert finish(process) == -signal.SIGKILL, "it ended before it was killed"
        found["kills"] += 1
        found["kills while saving"] += any((killed / "checkpoints").glob(f"*{PARTIAL_SUFFIX}"))
        lost = last_logged(killed) - step_of(latest_checkpoint(killed / "checkpoints"))
        found["steps lost at most"] = max(found["steps lost at most"], lost)
    assert finish(start("pretrain.py", tmp_path / "output", output_dir=killed, **settings)) == 0
    assert figures(killed) == figures(tmp_path / "unbroken")
    assert_same_weights(killed, tmp_path / "unbroken")
    return found


def test_killed_at_random_moments(people, tmp_path):
    found = kill_at_random(people, tmp_path, kills=2, epochs=8, longest=0.1)
    assert found["steps lost at most"] <= 1


@pytest.mark.slow
def test_killed_at_twenty_random_moments(people, tmp_path):
    found = kill_at_random(people, tmp_path, kills=20, epochs=40, longest=0.3)
    warnings.warn(str(found), stacklevel=1)  # pytest lists it
    assert found["steps lost at most"] <= 1
    assert found["kills while saving"] > 0


def loaders(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("script", ["pretrain.py", pytest.param("finetune.py", marks=pytest.mark.slow)])
def test_sigterm_saves_at_the_next_step_and_the_run_goes_on(people, tmp_path, script):
    settings = PRETRAIN | {"data": people / "unlabelled", "epochs": 6, "num_workers": 1}
    if script == "finetune.py":
        settings = FINETUNE | {"data": people / "market", "epochs": 6, "num_workers": 1}
    run(script, output_dir=tmp_path / "unbroken", **settings)
    stopped = tmp_path / "stopped"
    process = start(script, tmp_path / "output", output_dir=stopped, **settings)
    assert wait_for(lambda: last_logged(stopped) >= 3, process)
    (loader,) = loaders(process)
    for pid in (process.pid, loader, process.pid):  # a whole job is told, and once more by its launcher
        os.kill(pid, signal.SIGTERM)
    assert finish(process, seconds=30) == STOPPED_EXIT_CODE == 143, (tmp_path / "output").read_text()
    saved = latest_checkpoint(stopped / "checkpoints")  # the first, for `save_epochs` is 0
    assert 3 <= step_of(saved) == last_logged(stopped)
    assert "`--resume_from latest` goes on" in (tmp_path / "output").read_text()
    assert not (stopped / "model.safetensors").exists()
    run(script, output_dir=stopped, resume_from="latest", **settings)
    assert figures(stopped) == figures(tmp_path / "unbroken")
    assert_same_weights(stopped, tmp_path / "unbroken")


@pytest.mark.parametrize("steps", [STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH])
def test_sigterm_at_an_epochs_end(people, tmp_path, monkeypatch, steps):
    settings = PRETRAIN | {"data": people / "unlabelled", "eval_data": people / "market", "eval_epochs": 1}
    run("pretrain.py", output_dir=tmp_path / "unbroken", **settings)
    write = scripting.MetricsLog.write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if step == steps and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scripting.MetricsLog, "write", write_and_stop)
    with pytest.raises(SystemExit) as stopped:
        run("pretrain.py", output_dir=tmp_path / "stopped", **settings)
    monkeypatch.undo()
    assert stopped.value.code == STOPPED_EXIT_CODE
    saved = position(latest_checkpoint(tmp_path / "stopped" / "checkpoints"))
    assert (saved["epoch"], saved["samples"]) == (0, 8 * steps)
    run("pretrain.py", output_dir=tmp_path / "stopped", resume_from="latest", **settings)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")
    assert_same_weights(tmp_path / "stopped", tmp_path / "unbroken")


def test_sigterm_to_one_of_two_processes_stops_both(people, tmp_path):
    settings = PRETRAIN | {
        "data": people / "unlabelled",
        "epochs": 60,
        "batch_size": 4,
        "output_dir": tmp_path / "out",
    }
    processes = start_ranks("pretrain.py", tmp_path / "output", **settings)
    assert wait_for(lambda: last_logged(tmp_path / "out") >= 3, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [STOPPED_EXIT_CODE] * 2
    saved = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert num_processes(saved) == 2
    assert step_of(saved) == last_logged(tmp_path / "out")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_one_of_two_processes_is_gone_the_other_ends_with_an_error(people, tmp_path, how):
    settings = PRETRAIN | {"data": people / "unlabelled", "epochs": 500, "batch_size": 4, "save_epochs": 1}
    settings["timeout_minutes"] = 0.25  # is what ends the waiting for a process that is there and does nothing
    processes = start_ranks("pretrain.py", tmp_path / "output", output_dir=tmp_path / "out", **settings)
    assert wait_for(lambda: last_logged(tmp_path / "out") >= 3, processes[0])
    started = time.monotonic()
    os.kill(processes[1].pid, how)
    try:
        assert finish(processes[0], seconds=60) == 1
    finally:
        processes[1].kill()
    assert time.monotonic() - started < 60
    assert "Error" in (tmp_path / "output.0").read_text()


def test_full_disk_ends_both_of_two_processes_with_an_error(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "batch_size": 4, "save_epochs": 1}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("a file where the folder should be")
    processes = start_ranks("pretrain.py", tmp_path / "output", output_dir=tmp_path / "out", **settings)
    assert [finish(process, seconds=60) for process in processes] == [1, 1]
    for rank in range(2):
        assert "step-00000006: the checkpoint could not be written" in (tmp_path / f"output.{rank}").read_text()


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "output_dir": tmp_path, "save_epochs": 0.5}
    run("pretrain.py", **settings)
    before, weights = figures(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    (newest / "optimizer.safetensors").write_bytes(b"")
    run("pretrain.py", **settings, resume_from="latest")
    assert figures(tmp_path) == before
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert list_checkpoints(tmp_path / "checkpoints")[-1] == newest


def test_a_branch_off_an_earlier_checkpoint_is_what_goes_on(people, tmp_path, monkeypatch):
    settings = PRETRAIN | {"data": people / "unlabelled", "save_epochs": 1, "keep_checkpoints": 9, "epochs": 3}
    run("pretrain.py", output_dir=tmp_path, **settings)
    checkpoints, branch = tmp_path / "checkpoints", settings | {"learning_rate": 1e-3}
    first, *later = list_checkpoints(checkpoints)
    run("pretrain.py", output_dir=tmp_path / "unbroken", resume_from=first, **branch)
    assert list_checkpoints(checkpoints) == [first, *later], "they are another run's"

    write = scripting.MetricsLog.write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if step == STEPS_PER_EPOCH + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scripting.MetricsLog, "write", write_and_stop)
    with pytest.raises(SystemExit):
        run("pretrain.py", output_dir=tmp_path, resume_from=first, **branch)
    monkeypatch.undo()
    run("pretrain.py", output_dir=tmp_path, resume_from="latest", **branch)
    # the other folder's log begins where that run did
    assert [line for line in figures(tmp_path) if line["step"] > STEPS_PER_EPOCH] == figures(tmp_path / "unbroken")
    assert_same_weights(tmp_path, tmp_path / "unbroken")
    assert sorted(checkpoints.glob("*.left")) == [path.with_name(path.name + ".left") for path in later]


# The same run with other processes and batches


def test_a_run_moves_between_process_counts_and_batch_sizes(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "drop_path_rate": 0.0, "save_epochs": 0.5}
    run("pretrain.py", output_dir=tmp_path / "unbroken", **settings)
    moved = tmp_path / "moved"
    processes = start_ranks(
        *("pretrain.py", tmp_path / "output"),
        environment={"STOP_AFTER": "4"},
        **settings | {"output_dir": moved, "batch_size": 4},
    )
    assert [finish(process) for process in processes] == [STOPPED_EXIT_CODE] * 2
    saved = latest_checkpoint(moved / "checkpoints")
    assert (step_of(saved), position(saved)["samples"]) == (5, 40)
    again = settings | {"output_dir": moved, "resume_from": "latest"}
    run("pretrain.py", **again | {"batch_size": 4, "gradient_accumulation_steps": 2})
    assert_same_training(tmp_path / "unbroken", moved)


@pytest.mark.parametrize(
    "script, change",
    [
        ("pretrain.py", {"batch_size": 4}),
        ("pretrain.py", {"gradient_accumulation_steps": 2}),
        ("finetune.py", {"identities_per_batch": 2}),
        ("finetune.py", {"gradient_accumulation_steps": 2}),
    ],
)
def test_another_number_of_images_a_step_is_refused(people, tmp_path, script, change):
    data, settings = people / "unlabelled", PRETRAIN
    if script == "finetune.py":
        data, settings = people / "market", FINETUNE
    settings = settings | {"data": data, "output_dir": tmp_path, "epochs": 1, "warmup_epochs": 0, "save_epochs": 1}
    run(script, **settings)
    lines = log_lines(tmp_path)
    with pytest.raises(ValueError, match="does not fit the run: it counts in other units: .*, now "):
        run(script, **settings | change | {"epochs": 2}, resume_from="latest")
    assert log_lines(tmp_path) == lines


def test_the_best_model_is_what_a_run_exports(people, tmp_path):
    settings = PRETRAIN | {"data": people / "unlabelled", "eval_data": people / "market", "eval_epochs": 1}
    settings |= {"epochs": 6, "output_dir": tmp_path, "learning_rate": 0.05, "save_epochs": 1}
    run("pretrain.py", "--keep_best", **settings)
    scores = [line["mAP"] for line in log_lines(tmp_path) if "mAP" in line]
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best == {"step": STEPS_PER_EPOCH * (1 + scores.index(max(scores))), "score": max(scores)}
    assert_same_weights(tmp_path, tmp_path / "best")
    assert scores.index(max(scores)) < 5, "this run's last model is its best: no test"
    run("evaluate_reid.py", model=tmp_path, data=people / "market", output=tmp_path / "e.json", num_workers=0)
    assert json.loads((tmp_path / "e.json").read_text())["mAP"] == max(scores)

    # a branch of it, here or in another folder, exports its own best: nothing of what it left behind
    for output_dir in (tmp_path, tmp_path / "branch"):
        last = tmp_path / "checkpoints" / f"step-{6 * STEPS_PER_EPOCH:08d}"
        changes = {"output_dir": output_dir, "epochs": 7, "learning_rate": 0.0, "keep_checkpoints": 9}
        (tmp_path / "best" / "best.json").write_text('{"step": 1, "score": 2.0}')
        run("pretrain.py", "--keep_best", **settings | changes, resume_from=last)
        score = [line["mAP"] for line in log_lines(output_dir) if "mAP" in line][-1]
        assert json.loads((output_dir / "best.json").read_text()) == {"step": 7 * STEPS_PER_EPOCH, "score": score}
        assert_same_weights(output_dir, output_dir / "best")
    with pytest.raises(ValueError, match="`keep_best` needs `eval_data`"):
        run("pretrain.py", "--keep_best", data=people / "unlabelled", output_dir=tmp_path / "other", **PRETRAIN)


def test_fine_tuning_keeps_a_best_model_though_scored_at_the_end_alone(people, tmp_path):
    settings = FINETUNE | {"data": people / "market", "output_dir": tmp_path, "eval_epochs": 50, "save_epochs": 0}
    for seed in (0, 1):  # again into the same folder: its result is not the first one's
        run("finetune.py", "--keep_best", **settings, seed=seed)
        last = log_lines(tmp_path)[-1]
        assert json.loads((tmp_path / "best.json").read_text()) == {"step": last["step"], "score": last["mAP"]}
        assert json.loads((tmp_path / "results.json").read_text())["mAP"] == last["mAP"]
    assert [line for line in log_lines(tmp_path) if "loss" in line][-1]["step"] == last["step"]
