"""The pre-training script on two processes, sharded in every way, gives what one process gives."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import LoggerType
from process_runs import finish, launch_environment, start_ranks
from test_examples import (
    FINETUNE,
    MODEL,
    PRETRAIN,
    as_flags,
    column,
    num_processes,
    people,
    position,
    run,
    step_of,
    weights,
)
from torch.testing import assert_close

from personvit_hf import distributed
from personvit_hf.checkpointing import latest_checkpoint
from personvit_hf.distributed import clip_gradients, make_accelerator, require_connected
from personvit_hf.preemption import STOPPED_EXIT_CODE

__all__ = ["people"]  # a fixture

STEPS, STOP = 20, 9  # 5 steps an epoch: it stops in mid-epoch
SETTINGS = PRETRAIN | {
    **{"batch_size": 10, "epochs": 4, "num_workers": 0, "drop_path_rate": 0.0, "freeze_last_layer_epochs": 1},
    **{"learning_rate": 0.05, "clip_gradients": 0.05, "mixed_precision": "no"},
}
CONFIGURATIONS = Path(__file__).resolve().parents[1] / "examples" / "accelerate_configs"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
BACKENDS = [pytest.param("ddp", 1e-5), pytest.param("fsdp2", 1e-4, marks=pytest.mark.slow)]
BACKENDS += [pytest.param(f"zero{stage}", 1e-4, marks=[pytest.mark.slow, needs_deepspeed]) for stage in (1, 2, 3)]
every_backend = pytest.mark.parametrize("backend, tolerance", BACKENDS)


@pytest.fixture(scope="module")
def alone(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(
        "pretrain.py",
        data=people / "unlabelled",
        output_dir=folder,
        save_epochs=4,
        **_without(SETTINGS, "save_epochs"),
    )
    return folder


def _without(settings: dict, name: str) -> dict:
    return {key: value for key, value in settings.items() if key != name}


def environment_of(backend: str, folder: Path) -> dict[str, str]:
    """What `accelerate launch` sets with our configuration files, and what a CPU needs beside it."""
    if backend == "ddp":
        return launch_environment(CONFIGURATIONS / "multi_gpu.yaml")
    if backend == "fsdp2":
        return launch_environment(CONFIGURATIONS / "fsdp2.yaml")
    environment = launch_environment(CONFIGURATIONS / f"deepspeed_{backend}.yaml")
    if backend == "zero3":  # else all parameters of so small a model would stay whole; now biases do
        config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}
        config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        (folder / "deepspeed.json").write_text(json.dumps(config))
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / "deepspeed.json")
    return environment | {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}


def run_on_two(backend: str, output: Path, expected: int = 0, stop_after: int = 0, **settings) -> None:
    environment = environment_of(backend, output.parent) | ({"STOP_AFTER": str(stop_after)} if stop_after else {})
    settings = SETTINGS | {"batch_size": 5} | settings
    _finish_both("pretrain.py", output, environment, expected, settings)


def _finish_both(script: str, output: Path, environment: dict[str, str], expected: int, settings: dict) -> None:
    processes = start_ranks(script, output.with_suffix(".log"), environment=environment, **settings)
    codes = [finish(process, seconds=300) for process in processes]
    assert codes == [expected] * 2, output.with_suffix(".0").read_text()[-5000:]


def assert_same(first: Path, second: Path, tolerance: float) -> None:
    a, b = (weights(folder) for folder in (first, second))
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == (torch.int64 if "num_batches" in name else torch.float32)
        if name.endswith("qkv_proj.bias"):
            # the keys' bias changes no attention: its gradient is rounding noise, which AdamW makes steps of
            a[name][32:64] = b[name][32:64] = 0
    assert_close(a, b, atol=tolerance, rtol=0)


def test_the_single_run_clips_and_freezes(people, alone, tmp_path):
    """Else the others would not be compared on it."""
    for name, change in (("unclipped", {"clip_gradients": 0}), ("thawed", {"freeze_last_layer_epochs": 0})):
        run("pretrain.py", data=people / "unlabelled", output_dir=tmp_path / name, **SETTINGS | change)
        with pytest.raises(AssertionError):
            assert_same(alone, tmp_path / name, 1e-3)


@every_backend
def test_twenty_steps_on_two_processes_give_the_weights_of_one(people, alone, tmp_path, backend, tolerance):
    out = tmp_path / "out"
    run_on_two(backend, out, data=people / "unlabelled", output_dir=out, save_epochs=4)
    assert column(out, "step")[-1] == STEPS
    assert_same(alone, out, tolerance)
    for checkpoint in (alone / "checkpoints", out / "checkpoints"):
        assert step_of(latest_checkpoint(checkpoint)) == STEPS
    newest = latest_checkpoint(out / "checkpoints")
    assert num_processes(newest) == 2
    stored = json.loads((newest / "progress.json").read_text())["distributed_type"]
    assert stored == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(backend, "DEEPSPEED")
    share = float(re.search(r"holds (\S+) of the teacher", (tmp_path / "out.0").read_text())[1])
    assert 0.4 < share < 0.7 if backend in ("fsdp2", "zero3") else share == 1.0
    torch.testing.assert_close(column(alone, "loss"), column(out, "loss"), rtol=1e-3, atol=0)


@pytest.mark.slow
@every_backend
def test_a_run_moves_to_one_process_and_back(people, alone, tmp_path, backend, tolerance):
    settings = {"data": people / "unlabelled", "output_dir": tmp_path / "out"}
    run_on_two(backend, tmp_path / "out", STOPPED_EXIT_CODE, stop_after=2, **settings)  # while frozen
    saved = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert position(saved)["samples"] == 10 * step_of(saved) < 50
    _stopped_alone(tmp_path, **settings)
    saved = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert (num_processes(saved), step_of(saved)) == (1, STOP)
    run_on_two(backend, tmp_path / "out", resume_from="latest", **settings)
    assert_same(alone, tmp_path / "out", tolerance)


def _stopped_alone(tmp_path: Path, **settings) -> None:
    environment = {"STOP_AFTER": str(STOP), "ACCELERATE_USE_CPU": "true"}
    (process,) = start_ranks(
        *("pretrain.py", tmp_path / "alone.log", 1, environment), **SETTINGS | settings, resume_from="latest"
    )
    assert finish(process) == STOPPED_EXIT_CODE


@pytest.mark.slow
@every_backend
def test_two_parts_of_a_batch_on_two_processes_give_the_weights_of_one(people, tmp_path, backend, tolerance):
    out = tmp_path / "out"
    # 12 batches of 4, of which the last 4 images of an epoch's 50 are not part; so compared with batches of 8
    parts = {"data": people / "unlabelled", "batch_size": 2, "gradient_accumulation_steps": 2}
    run_on_two(backend, out, output_dir=out, **parts)
    run("pretrain.py", output_dir=tmp_path / "one", **SETTINGS | {"data": people / "unlabelled", "batch_size": 8})
    assert_same(tmp_path / "one", out, tolerance)


def test_an_epochs_last_step_of_fewer_parts_has_the_gradient_of_their_images(people, tmp_path, monkeypatch):
    norms = {25: [], 50: []}
    for batch_size, parts in ((50, 1), (25, 4)):  # 50 images: the epoch's only step has 2 of 4 parts

        def clip_and_keep(*arguments, batch_size=batch_size):
            norm = clip_gradients(*arguments)
            norms[batch_size].append(norm.item())
            return norm

        monkeypatch.setattr(distributed, "clip_gradients", clip_and_keep)
        settings = SETTINGS | {"batch_size": batch_size, "gradient_accumulation_steps": parts, "epochs": 2}
        settings |= {"learning_rate": 0.05 * 50 / batch_size / parts, "data": people / "unlabelled"}
        run("pretrain.py", output_dir=tmp_path / str(batch_size), **settings)
    assert len(norms[25]) == 2
    assert norms[25] == pytest.approx(norms[50], rel=1e-3)


# What is not compared with one process


@pytest.fixture(scope="module")
def finetuned_by_two(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    finetune_on_two("ddp", people, folder / "out")
    return folder / "out"


def finetune_on_two(backend: str, people: Path, out: Path) -> None:
    settings = FINETUNE | {"data": people / "market", "output_dir": out, "num_workers": 0, "drop_path_rate": 0.0}
    settings |= {"config_overrides": json.dumps(MODEL), "eval_epochs": 1, "save_epochs": 1, "mixed_precision": "no"}
    _finish_both("finetune.py", out, environment_of(backend, out.parent), 0, settings)


@pytest.mark.parametrize("backend, tolerance", BACKENDS[1:])
def test_finetuning_gives_what_ddp_gives(people, finetuned_by_two, tmp_path, backend, tolerance):
    finetune_on_two(backend, people, tmp_path / "out")
    assert_same(finetuned_by_two, tmp_path / "out", tolerance)
    results = [json.loads((out / "results.json").read_text()) for out in (finetuned_by_two, tmp_path / "out")]
    assert results[0]["mAP"] == pytest.approx(results[1]["mAP"], abs=0.01)
    assert column(finetuned_by_two, "mAP") == pytest.approx(column(tmp_path / "out", "mAP"), abs=0.01)


@pytest.mark.slow
@every_backend
def test_in_bf16_the_teacher_stays_in_float32(people, alone, tmp_path, backend, tolerance):
    del tolerance
    out = tmp_path / "out"
    run_on_two(backend, out, data=people / "unlabelled", output_dir=out, mixed_precision="bf16")
    losses = column(alone, "loss"), column(out, "loss")
    assert not (losses[0][:5] == losses[1][:5]).any()  # it did compute in bf16
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=0.05)
    kept = ("personvit.layers", "center", "patch_center")
    teacher = {name: weight for name, weight in weights(out).items() if name.startswith(kept)}
    for name, weight in teacher.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), name


@needs_deepspeed
@pytest.mark.parametrize("precision, config", [("fp16", {}), ("no", {"bf16": {"enabled": True}})])
def test_deepspeed_modes_that_would_round_the_teacher_are_refused(tmp_path, monkeypatch, precision, config):
    config |= {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="a teacher in 16 bits stands still"):
        make_accelerator(tmp_path, precision, 1, None, 1.0)


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp_of_version_1_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match="FSDP of version 1 is not supported: set `fsdp_version: 2`"):
        make_accelerator(tmp_path, "no", 1, None, 1.0)


def test_processes_that_do_not_know_of_each_other_are_stopped(people, tmp_path):
    """Else both would train as the only one, and overwrite each other."""
    environment = launch_environment(CONFIGURATIONS / "multi_gpu.yaml")
    environment |= {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    out = tmp_path / "out"
    _finish_both("pretrain.py", out, environment, 1, SETTINGS | {"data": people / "unlabelled", "output_dir": out})
    told = [out.with_suffix(f".{rank}").read_text() for rank in (0, 1)]  # the second may only see the first one leave
    assert any(
        "2 processes were started, but this one knows of 1, itself included: torch sees no GPU" in t for t in told
    )
    assert not out.exists()


def test_processes_that_no_launcher_numbered_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes .* knows of 1, .*no LOCAL_RANK"):
        require_connected(SimpleNamespace(num_processes=1))
    require_connected(SimpleNamespace(num_processes=3))
    monkeypatch.delenv("WORLD_SIZE")
    require_connected(SimpleNamespace(num_processes=1))


def test_trackers_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ImportError, match="`report_to` wandb: it is not installed .`pip install wandb`"):
        make_accelerator(tmp_path, "no", 1, "tensorboard,wandb", 1.0)
    with pytest.raises(ValueError, match="`report_to` 'tensorbord': no tracker; choose from .*tensorboard"):
        make_accelerator(tmp_path, "no", 1, "tensorbord", 1.0)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGURATIONS.glob("*.yaml")))
def test_every_configuration_is_one_that_accelerate_takes(name):
    environment = launch_environment(CONFIGURATIONS / name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if name == "cpu.yaml" else "bf16")
    assert f"`{name}`" in (CONFIGURATIONS / "README.md").read_text()


@pytest.mark.slow
def test_the_cpu_configuration_starts_the_script(people, tmp_path):
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "cpu.yaml")]
    script = str(CONFIGURATIONS.parent / "pretrain.py")
    settings = SETTINGS | {"data": people / "unlabelled", "output_dir": tmp_path / "out", "epochs": 1}
    subprocess.run([sys.executable, "-m", *launcher, script, *as_flags(settings)], check=True, capture_output=True)
    assert column(tmp_path / "out", "step").tolist() == [1, 2, 3, 4, 5]
