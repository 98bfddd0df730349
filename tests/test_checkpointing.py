import resource
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from personvit_hf import PersonViTConfig, PersonViTImageProcessor, PersonViTModel
from personvit_hf.checkpointing import (
    PARTIAL_SUFFIX,
    TrainingProgress,
    latest_checkpoint,
    list_checkpoints,
    resume,
    save_checkpoint,
    save_model,
)


class Run:
    """A model, its optimizer and its progress, as the scripts prepare them."""

    def __init__(self, width: int = 4):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Dropout(0.5))
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.progress = TrainingProgress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.width = width

    def step(self) -> float:
        loss = self.model(torch.ones(8, self.width)).square().sum()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss.item()

    def save(self, folder, **options):
        return save_checkpoint(self.accelerator, folder, self.progress.step, **options)


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


def test_resumed_run_goes_on_as_if_unbroken(tmp_path):
    run = Run()
    run.step()
    run.progress.epoch, run.progress.batch = 3, 5
    saved = run.save(tmp_path)
    expected = [run.step() for _ in range(3)]  # dropout: the state of the random generators counts too

    other = Run()
    assert resume(other.accelerator, tmp_path, "latest") == saved
    assert other.progress == TrainingProgress(epoch=3, batch=5, step=1)
    assert [other.step() for _ in range(3)] == expected
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])


def test_resume_from_a_given_checkpoint(tmp_path):
    run = Run()
    run.step()
    first = run.save(tmp_path)
    run.step()
    run.save(tmp_path)
    other = Run()
    assert resume(other.accelerator, tmp_path, str(first)) == first
    assert other.progress.step == 1


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
    other = Run()
    resume(other.accelerator, tmp_path, "latest")
    assert other.progress.epoch == 7
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_half_written_is_no_checkpoint_and_goes_away(tmp_path):
    leftover = tmp_path / f"step-00000005{PARTIAL_SUFFIX}"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    run = Run()
    assert resume(run.accelerator, tmp_path, "latest") is None
    run.step()
    run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


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


def test_new_run_refuses_a_folder_with_checkpoints(tmp_path):
    run = Run()
    run.save(tmp_path)
    with pytest.raises(FileExistsError, match="--resume_from latest") as caught:
        resume(run.accelerator, tmp_path, None)
    assert str(tmp_path) in str(caught.value)


def test_new_run_and_latest_in_an_empty_folder_start_anew(tmp_path):
    run = Run()
    assert resume(run.accelerator, tmp_path / "none", None) is None
    assert resume(run.accelerator, tmp_path / "none", "latest") is None


def test_resume_from_a_folder_that_is_not_there(tmp_path):
    run = Run()
    with pytest.raises(FileNotFoundError, match="`resume_from` .*step-00000003"):
        resume(run.accelerator, tmp_path, str(tmp_path / "step-00000003"))


def test_resume_with_another_architecture(tmp_path):
    saved = Run(width=4).save(tmp_path)
    with pytest.raises(ValueError, match="does not fit the run") as caught:
        resume(Run(width=5).accelerator, tmp_path, "latest")
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_resume_from_a_damaged_checkpoint(tmp_path, name, damage):
    run = Run()
    run.step()
    file = run.save(tmp_path) / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete checkpoint|does not fit the run") as caught:
        resume(Run().accelerator, tmp_path, "latest")
    assert "step-00000001" in str(caught.value)
