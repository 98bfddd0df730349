import json
import logging
import pickle
import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

from personvit_hf import PersonViTConfig, PersonViTImageProcessor, PersonViTModel
from personvit_hf.checkpointing import (
    PARTIAL_SUFFIX,
    TrainingProgress,
    export_best,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_weights,
    restore,
    save_best,
    save_checkpoint,
    save_model,
)
from personvit_hf.files import write_manifest


class Run:
    """A model, its optimizer and its progress, as the scripts prepare and resume them."""

    def __init__(self, width: int = 4, folder=None, resume_from=None, optimizer=torch.optim.AdamW, layout=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Dropout(0.5))
        self.resumed = find_checkpoint(self.accelerator, folder, resume_from) if folder else None
        if self.resumed is not None:
            load_weights(model, self.resumed)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer(model.parameters()))
        self.progress = TrainingProgress(layout=layout or {"images_per_step": 8})
        self.accelerator.register_for_checkpointing(self.progress)
        if self.resumed is not None:
            restore(self.accelerator, self.model, self.optimizer, self.resumed, folder)
        self.width = width

    def step(self) -> float:
        loss = self.model(torch.ones(8, self.width)).square().sum()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss.item()

    def save(self, folder, **options):
        return save_checkpoint(self.accelerator, self.model, self.optimizer, folder, self.progress.step, **options)


def resume(folder, resume_from="latest", **settings) -> Run:
    return Run(folder=folder, resume_from=resume_from, **settings)


@pytest.fixture(autouse=True)
def leave_no_accelerator_behind():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def disk_full_after(num_bytes: int):
    """No file can grow beyond so many bytes: a write fails as on a full disk, by an error of the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, sgd])
def test_resumed_run_goes_on_as_if_unbroken(tmp_path, optimizer):
    run = Run(optimizer=optimizer)
    run.step()
    run.progress.epoch, run.progress.samples, run.progress.best = 3, 40, 0.25
    saved = run.save(tmp_path)
    expected = [run.step() for _ in range(3)]  # dropout: the state of the random generators counts too

    other = resume(tmp_path, optimizer=optimizer)
    assert other.resumed == saved
    assert other.progress == TrainingProgress(3, 40, 1, 0.25, {"images_per_step": 8})
    assert [other.step() for _ in range(3)] == expected
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])


def test_every_generator_goes_on_as_if_unbroken(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()

    run = Run()
    draw()  # leaves both of them with half a pair of normal numbers
    run.save(tmp_path)
    expected = draw()
    resume(tmp_path)
    assert draw() == expected


def test_a_checkpoint_is_plain_tensors_by_parameter_name(tmp_path):
    run = Run()
    run.step()
    saved = run.save(tmp_path)
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    assert set(load_file(saved / "model.safetensors")) == {"0.weight", "0.bias"}
    state = load_file(saved / "optimizer.safetensors")
    assert set(state) == {
        f"0.{name}/{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert torch.equal(state["0.bias/exp_avg"], run.optimizer.state[run.model[0].bias]["exp_avg"])


def test_resume_from_a_given_checkpoint(tmp_path):
    run = Run()
    run.step()
    first = run.save(tmp_path)
    run.step()
    run.save(tmp_path)
    other = resume(tmp_path, str(first))
    assert other.resumed == first
    assert other.progress.step == 1


def test_a_branch_that_is_left_is_not_what_latest_goes_on_with(tmp_path, caplog):
    run = Run()
    for step in (10, 20, 30):
        run.progress.step = step
        run.save(tmp_path, keep=3)
    with pytest.raises(ValueError, match="does not fit"):
        resume(tmp_path, str(tmp_path / "step-00000010"), layout={"images_per_step": 9})
    assert len(list_checkpoints(tmp_path)) == 3
    resume(tmp_path, str(tmp_path / "step-00000010"))
    assert "renamed to *.left are step-00000020, step-00000030" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-00000010", "step-00000020.left", "step-00000030.left"),
    ]
    assert resume(tmp_path).resumed.name == "step-00000010"
    assert resume(tmp_path, str(tmp_path / "step-00000030.left")).progress.step == 30


def test_only_the_newest_are_kept(tmp_path):
    run = Run()
    for _ in range(12):
        run.step()
        run.save(tmp_path, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011", "step-00000012"]
    assert latest_checkpoint(tmp_path).name == "step-00000012"


def test_a_run_that_branches_off_keeps_its_own_checkpoint(tmp_path):
    run = Run()
    for step in (20, 30, 10):
        run.progress.step = step
        saved = run.save(tmp_path, keep=1)
        assert saved.is_dir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000030"]


def test_checkpoints_are_sorted_as_numbers_and_other_names_ignored(tmp_path):
    for name in ("step-00000009", "step-123456789", f"step-99{PARTIAL_SUFFIX}", "step-", "step-10x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000777").touch()  # a file
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-123456789"]
    assert list_checkpoints(tmp_path / "none") == []
    assert latest_checkpoint(tmp_path / "none") is None


def test_saving_the_same_step_again_replaces_it(tmp_path):
    run = Run()
    run.save(tmp_path)
    run.progress.epoch = 7
    run.save(tmp_path)
    assert resume(tmp_path).progress.epoch == 7
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_half_written_is_no_checkpoint_and_goes_away(tmp_path):
    leftover = tmp_path / f"step-00000005{PARTIAL_SUFFIX}"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    run = resume(tmp_path)
    assert run.resumed is None
    run.step()
    run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    run = Run()
    saved = run.save(tmp_path)
    saved.rename(saved.with_name(saved.name + ".replaced"))
    assert resume(tmp_path).resumed == saved


def test_full_disk_leaves_older_checkpoints_as_they_were(tmp_path):
    run = Run(width=64)  # weights of 16 kB
    run.step()
    good = run.save(tmp_path, keep=1)
    before = contents(tmp_path)
    run.step()
    with disk_full_after(4096), pytest.raises(OSError, match="step-00000002: .*could not be written") as caught:
        run.save(tmp_path, keep=1)
    assert str(good) in str(caught.value)
    assert "disk space" in str(caught.value)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [good.name]

    run.save(tmp_path, keep=1)  # there is space again
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_full_disk_at_the_first_checkpoint(tmp_path):
    run = Run(width=64)
    with disk_full_after(4096), pytest.raises(OSError, match="step-00000000: .*could not be written") as caught:
        run.save(tmp_path)
    assert "last good" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_the_final_model_names_the_folder_and_the_way_on(tmp_path):
    run = Run(width=4)
    run.save(tmp_path / "checkpoints")
    before = contents(tmp_path / "checkpoints")
    config = PersonViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    model = run.accelerator.prepare(PersonViTModel(config))
    with disk_full_after(4096), pytest.raises(OSError, match="could not be written") as caught:
        save_model(run.accelerator, model, PersonViTImageProcessor(), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "--resume_from latest" in str(caught.value)
    assert contents(tmp_path / "checkpoints") == before


def test_a_model_of_no_numbers_is_not_saved(tmp_path):
    run = Run()
    config = PersonViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    model = run.accelerator.prepare(PersonViTModel(config))
    with torch.no_grad():
        model.layernorm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 weights hold NaN or infinity, such as layernorm\.weight"):
        save_model(run.accelerator, model, PersonViTImageProcessor(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_run_refuses_a_folder_with_checkpoints(tmp_path):
    Run().save(tmp_path)
    with pytest.raises(FileExistsError, match="--resume_from latest") as caught:
        resume(tmp_path, None)
    assert str(tmp_path) in str(caught.value)


def test_new_run_and_latest_in_an_empty_folder_start_anew(tmp_path):
    assert resume(tmp_path / "none", None).resumed is None
    assert resume(tmp_path / "none", "latest").resumed is None


def test_resume_from_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="`resume_from` .*step-00000003"):
        resume(tmp_path, str(tmp_path / "step-00000003"))


def test_resume_with_another_architecture_or_optimizer(tmp_path):
    run = Run(width=4)
    run.step()
    saved = run.save(tmp_path)
    for settings in ({"width": 5}, {"optimizer": sgd}):
        with pytest.raises(ValueError, match="does not fit the run") as caught:
            resume(tmp_path, **settings)
        assert str(saved) in str(caught.value)


def test_resume_with_another_number_of_images_a_step(tmp_path):
    Run(layout={"images_per_step": 64, "images": 50}).save(tmp_path)
    with pytest.raises(ValueError, match="images_per_step 64, now 32.*gradient accumulation"):
        resume(tmp_path, layout={"images_per_step": 32, "images": 50})


def test_resume_with_another_number_of_steps_an_epoch(tmp_path):
    Run(layout={"images_per_step": 128, "steps_per_epoch": 7}).save(tmp_path)
    with pytest.raises(ValueError, match="steps_per_epoch 7, now 8.*incomplete step.*a larger batch size in place of"):
        resume(tmp_path, layout={"images_per_step": 128, "steps_per_epoch": 8})


DAMAGES = pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "one bit", "another file"])
FILES = ["model.safetensors", "optimizer.safetensors", "random_states.safetensors", "progress.json", "manifest.json"]


def damage_file(file, damage: str) -> None:
    whole = file.read_bytes()
    file.unlink()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut off":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "one bit":
        file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "another file":
        file.write_bytes(whole)
        file.with_name("optimizer.bin").write_bytes(b"?")


@DAMAGES
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, name, damage, caplog):
    run = Run()
    run.step()
    good = run.save(tmp_path)
    run.step()
    expected = run.step()
    damaged = run.save(tmp_path)
    damage_file(damaged / name, damage)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        resume(tmp_path, str(damaged))
    with caplog.at_level(logging.WARNING):
        other = resume(tmp_path)
    assert other.resumed == good
    assert f"{damaged} is damaged: " in caplog.text
    assert f"Resuming from {good}" in caplog.text
    other.step()
    assert other.step() == expected
    assert other.save(tmp_path).is_dir()


@DAMAGES
def test_no_run_starts_anew_because_all_its_checkpoints_are_damaged(tmp_path, damage):
    run = Run()
    run.step()
    damage_file(run.save(tmp_path) / "optimizer.safetensors", damage)
    with pytest.raises(ValueError, match="not a complete checkpoint among 1: step-00000001"):
        resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", [*FILES, "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"])
def test_nothing_in_a_checkpoint_is_unpickled(tmp_path, name):
    saved = Run().save(tmp_path / "checkpoints")
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(proof))).close()
    assert proof.exists()  # it would be
    proof.unlink()
    torch.save(Hostile(proof), saved / name)
    if name != "manifest.json":
        (saved / "manifest.json").unlink()
        write_manifest(saved)  # whoever wrote the checkpoint wrote the checksums too
    try:
        resume(tmp_path / "checkpoints")
    except ValueError as error:
        assert "checkpoint" in str(error)
    else:
        assert name not in FILES  # a file more is never opened
    assert not proof.exists()


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("epoch", -1),
        ("samples", "3"),
        ("step", None),
        ("layout", None),
        ("best", [1]),
    ],
)
def test_progress_that_is_none(tmp_path, name, wrong):
    saved = Run().save(tmp_path)
    position = json.loads((saved / "progress.json").read_text())
    position["registered"][0][1][name] = wrong
    (saved / "progress.json").write_text(json.dumps(position))
    (saved / "manifest.json").unlink()
    write_manifest(saved)
    with pytest.raises(ValueError, match="does not fit the run"):
        resume(tmp_path)


@pytest.mark.parametrize(
    "file, name, wrong",
    [
        ("optimizer", "0.weight/exp_avg", torch.zeros(8, 4)),
        ("optimizer", "0.weight/exp_avg", torch.tensor(1.0)),
        ("optimizer", "0.weight/step", torch.zeros(2)),
        ("optimizer", "1.weight/step", torch.tensor(1.0)),  # dropout has none
        ("random_states", "0/numpy", torch.zeros(623, dtype=torch.int64)),
        ("random_states", "0/numpy_position", torch.tensor([625, 0])),
        ("random_states", "0/python", torch.zeros(3, dtype=torch.int64)),
        ("random_states", "0/torch", torch.zeros(7, dtype=torch.uint8)),
    ],
)
def test_state_that_is_none(tmp_path, file, name, wrong):
    run = Run()
    run.step()
    saved = run.save(tmp_path)
    path = saved / f"{file}.safetensors"
    save_file(load_file(path) | {name: wrong}, path)
    (saved / "manifest.json").unlink()
    write_manifest(saved)
    with pytest.raises(ValueError, match="does not fit the run"):
        resume(tmp_path)


# The best model


@pytest.fixture
def small_model():
    run = Run()
    config = PersonViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    return run, run.accelerator.prepare(PersonViTModel(config))


def test_only_a_better_model_replaces_the_best(tmp_path, small_model):
    run, model = small_model
    stored, bias = [], model.layernorm.bias
    for step, score in enumerate([0.3, 0.5, 0.5, 0.4]):
        run.progress.step = step
        torch.nn.init.constant_(bias, step)
        stored.append(
            save_best(run.accelerator, model, PersonViTImageProcessor(), tmp_path / "b", run.progress, score)
        )
    assert stored == [True, True, False, False]
    assert run.progress.best == 0.5
    assert json.loads((tmp_path / "b" / "best.json").read_text()) == {"step": 1, "score": 0.5}
    export_best(run.accelerator, tmp_path / "b", tmp_path / "out")
    assert (PersonViTModel.from_pretrained(tmp_path / "out").layernorm.bias == 1).all()
    assert not list(tmp_path.rglob(f"*{PARTIAL_SUFFIX}"))


def test_models_and_checkpoints_have_the_mode_of_any_file(tmp_path, small_model):
    """safetensors writes for its owner alone; whoever may read the folder may read the model."""
    run, model = small_model
    (tmp_path / "any").touch()
    save_best(run.accelerator, model, PersonViTImageProcessor(), tmp_path / "best", run.progress, 0.1)
    export_best(run.accelerator, tmp_path / "best", tmp_path / "out")
    run.save(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_full_disk_leaves_the_best_as_it_was(tmp_path, small_model):
    run, model = small_model
    save_best(run.accelerator, model, PersonViTImageProcessor(), tmp_path, run.progress, 0.1)
    before = contents(tmp_path)
    torch.nn.init.zeros_(model.layernorm.bias)
    with disk_full_after(4096), pytest.raises(OSError, match="could not be written"):
        save_best(run.accelerator, model, PersonViTImageProcessor(), tmp_path, run.progress, 0.2)
    assert contents(tmp_path) == before
    assert run.progress.best == 0.1


def test_a_best_model_that_is_gone(tmp_path):
    with pytest.raises(OSError, match="gone.* could not be copied"):
        export_best(Run().accelerator, tmp_path / "gone", tmp_path / "out")
