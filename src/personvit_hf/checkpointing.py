"""Resumable training state: written whole or not at all, verified before it is used, kept by count and by score.

A checkpoint is a folder of safetensors and JSON: `model.safetensors` (what `save_pretrained` stores), the optimizer's
state by parameter name, the random generators of each process, where the run stands, and a manifest with checksums.
It does not depend on how the run was spread over processes, and reading one runs no code from it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import BaseImageProcessor

from .cards import BEST_FILE
from .distributed import whole_module, whole_weights
from .files import check_manifest, flush_entry, flush_to_disk, follow_umask, read_json, rename_durably, write_manifest
from .loading import nonfinite_weights
from .training_state import (
    load_optimizer_state,
    load_position,
    load_random_states,
    optimizer_state,
    position_of,
    random_states,
)

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
CORRUPT_SUFFIX = ".corrupt"
LEFT_SUFFIX = ".left"  # of a branch that the run no longer is on
MODEL_FILE, OPTIMIZER_FILE, RANDOM_FILE, PROGRESS_FILE = (
    *("model.safetensors", "optimizer.safetensors", "random_states.safetensors"),
    "progress.json",
)


@dataclass
class TrainingProgress:
    """Where a run stands; saved with each checkpoint through `Accelerator.register_for_checkpointing`.

    Args:
        epoch: The epoch under way, from 0.
        samples: Samples of that epoch already trained on, by all processes together.
        step: Optimizer steps of the whole run, skipped ones included.
        best: Highest score of an evaluation so far, or None.
        layout: What positions are counted in, such as `images_per_step`: a checkpoint with another layout is refused,
            since it would go on at another place. How a step's images are dealt out to processes is no part of it.
        skipped: Optimizer steps of the run that were skipped as their gradients were no numbers.
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    best: float | None = None
    layout: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the fields of `state_dict`.

        Raises:
            ValueError: if a field is missing or no number from 0, or if the layout is another.
        """
        layout = state.get("layout")
        if layout != self.layout:
            then, now = dict(layout or {}), self.layout
            names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            changed = "; ".join(f"{name} {then.get(name)}, now {now.get(name)}" for name in names)
            advice = (
                "Choose batch size and gradient accumulation so that with this number of processes an optimizer step "
                "sees as many images as before"
            )
            if names == ["steps_per_epoch"]:
                advice = (
                    "Steps see as many images, but an epoch's last, incomplete step of accumulated batches counts; "
                    "batches that are too few for all processes are left out. Accumulate as the run did before; if it "
                    "didn't, go on with a larger batch size in place of accumulation"
                )
            raise ValueError(f"it counts in other units: {changed}. {advice}")
        for name in ("epoch", "samples", "step", "skipped"):
            value = state.get(name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be a number from 0, found {value!r}")
            setattr(self, name, value)
        self.best = None if state.get("best") is None else float(state["best"])


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    keep: int = 2,
) -> Path:
    """Saves model, optimizer, random generators and all that is registered with `accelerator` as `folder/step-<step>`.

    It is written under another name, flushed to disk and renamed when complete, so a crash, a power cut or a full disk
    leaves the older checkpoints as they were. Call it on every process, between optimizer steps; the main one writes.

    Args:
        accelerator: The run's accelerator.
        model: The model that it prepared.
        optimizer: The optimizer that it prepared.
        folder: Where checkpoints lie; on a file system that all machines see.
        step: Optimizer steps done.
        keep: How many checkpoints up to this step to keep, the new one included; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: on every process, if it can't be written; the message says where, and older checkpoints are untouched.
        TypeError: if a registered object's state is no JSON.
    """
    final = folder / f"step-{step:08d}"
    weights = whole_weights(accelerator, model)
    optimizer_tensors = optimizer_state(accelerator, model, optimizer)
    generators = random_states(accelerator)
    position = json.dumps(position_of(accelerator, optimizer), indent=1)

    def write() -> None:
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):  # of a run that was killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            parts = {MODEL_FILE: weights, OPTIMIZER_FILE: optimizer_tensors, RANDOM_FILE: generators}
            for name, tensors in parts.items():
                _write_tensors(tensors, partial / name)
            (partial / PROGRESS_FILE).write_text(position + "\n")
            follow_umask(partial)
            write_manifest(partial)
            flush_to_disk(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _put_in_place(partial, final)
        # later ones, if there are any, are of another run: not in its way, and not its own to remove
        for old in [path for path in list_checkpoints(folder) if _step_of(path) <= step][:-keep]:
            _remove(old)

    error = _on_main_process(accelerator, write)
    if error is not None:
        last = latest_checkpoint(folder)
        raise OSError(
            f"{final}: the checkpoint could not be written ({error}). "
            + (f"The last good one is {last}. " if last else "")
            + "Free some disk space or choose another output folder, then resume."
        )
    return final


def save_model(accelerator: Accelerator, model: torch.nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
    """Saves a trained model and its image processor for `from_pretrained`. Call it on every process.

    Each file is written aside and renamed, so none is ever half there.

    Args:
        accelerator: The run's accelerator.
        model: The model that `accelerator` prepared.
        processor: Its image processor.
        folder: The run's output folder.

    Raises:
        OSError: on every process, if they can't be written; the message says where. Checkpoints are untouched.
        FloatingPointError: on every process, if the weights are no numbers any more.
    """
    whole = whole_module(accelerator, model)
    broken = [nonfinite_weights(whole) if accelerator.is_main_process else []]
    broadcast_object_list(broken)  # or the others would wait for a main process that has ended
    if broken[0]:
        raise FloatingPointError(
            f"Training has diverged: {len(broken[0])} weights hold NaN or infinity, such as {min(broken[0])}. Nothing "
            f"was written to {folder}; resume from a checkpoint with a lower learning rate."
        )

    def write() -> None:
        with _beside(folder) as partial:
            whole.save_pretrained(partial)
            processor.save_pretrained(partial)

    error = _on_main_process(accelerator, write)
    if error is not None:
        raise OSError(
            f"{folder}: the trained model could not be written ({error}). Free some disk space, then repeat the "
            "command with `--resume_from latest`, which goes on from the last checkpoint."
        )


def save_best(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: BaseImageProcessor,
    folder: Path,
    progress: TrainingProgress,
    score: float,
) -> bool:
    """Saves the model as `save_model` does if its score is higher than all before. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        model: The model that `accelerator` prepared.
        processor: Its image processor.
        folder: Where the best model lies; `best.json` beside it holds step and score.
        progress: The run's progress, whose `best` is updated.
        score: This model's score, the main process's counts.

    Returns:
        Whether it is the best so far.

    Raises:
        OSError: As in `save_model`.
    """
    shared = [score]
    broadcast_object_list(shared)
    if progress.best is not None and not shared[0] > progress.best:
        return False
    save_model(accelerator, model, processor, folder)
    progress.best = shared[0]
    if accelerator.is_main_process:
        (folder / BEST_FILE).write_text(json.dumps({"step": progress.step, "score": progress.best}) + "\n")
    return True


def check_best(accelerator: Accelerator, best: Path, progress: TrainingProgress) -> None:
    """Forgets a resumed run's best score if its model isn't there, as it is in another folder, or of another branch.

    Call it on every process, after `restore`; the best is then chosen among the models from here on.

    Args:
        accelerator: The run's accelerator.
        best: The folder given to `save_best`.
        progress: The run's progress, whose `best` may become None.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        found = [read_json(best / BEST_FILE).get("score")]
    broadcast_object_list(found)
    if progress.best is not None and found[0] != progress.best:
        logger.warning("%s is not the best model so far (mAP %.4f): chosen is from here on.", best, progress.best)
        progress.best = None


def export_best(accelerator: Accelerator, best: Path, folder: Path) -> None:
    """Copies what `save_best` kept to where `save_model` would have saved the last model. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        best: The folder given to `save_best`.
        folder: The run's output folder.

    Raises:
        OSError: on every process, if it can't be read or written.
    """

    def write() -> None:
        with _beside(folder) as partial:
            shutil.copytree(best, partial, dirs_exist_ok=True)

    if error := _on_main_process(accelerator, write):
        raise OSError(f"{folder}: the best model, {best}, could not be copied there ({error}).")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def find_checkpoint(accelerator: Accelerator, folder: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from, once its checksums are sure to be right. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        folder: Where this run's checkpoints lie.
        resume_from: A checkpoint's folder, "latest" for the newest in `folder` that is whole, or None to start anew.
            Newer ones that are damaged are named in the log, and renamed so that they don't come up again.

    Returns:
        Its folder, or None for a new run ("latest" in a folder without checkpoints is one, so that the same command
        starts and restarts a job).

    Raises:
        FileNotFoundError: if `resume_from` names a folder that is not there.
        FileExistsError: if a new run would mix with the checkpoints of an old one.
        ValueError: if it is damaged or no complete checkpoint, with "latest" if all are.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_find(folder, resume_from)]
        except (OSError, ValueError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Loads a checkpoint's weights, centers included, into a model that no accelerator has prepared yet.

    Raises:
        ValueError: if they don't fit the model.
    """
    try:
        model.load_state_dict(load_file(checkpoint / MODEL_FILE))
    except Exception as error:  # torch and safetensors raise their own errors for what they can't read
        raise _does_not_fit(checkpoint, error) from error


def restore(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, folder: Path
) -> None:
    """Loads all of a checkpoint but the weights, once everything is prepared and registered. Call it on every process.

    Random generators of a process that was not there when the checkpoint was written stay as they are, which the log
    tells: dropout then draws other numbers than in an unbroken run. Later checkpoints in `folder` are of a branch that
    is left: they are named in the log, and renamed to `step-....left`, so that "latest" goes on with this one.

    Args:
        accelerator: The run's accelerator.
        model: The model that it prepared, with the checkpoint's weights.
        optimizer: The optimizer that it prepared.
        checkpoint: Folder that `find_checkpoint` returned.
        folder: Where this run's checkpoints lie.

    Raises:
        ValueError: if it does not fit the run, such as another number of images a step.
        OSError: on every process, if a later checkpoint can't be renamed.
    """
    try:
        position = json.loads((checkpoint / PROGRESS_FILE).read_text())
        load_position(accelerator, optimizer, position)
        load_optimizer_state(accelerator, model, optimizer, load_file(checkpoint / OPTIMIZER_FILE))
        if not load_random_states(accelerator, load_file(checkpoint / RANDOM_FILE)):
            logger.warning(
                "%s is of a run with fewer processes: process %d starts with random generators of its own.",
                *(checkpoint, accelerator.process_index),
            )
    except Exception as error:  # as above
        raise _does_not_fit(checkpoint, error) from error
    (step,) = (item.step for item in accelerator._custom_objects if isinstance(item, TrainingProgress))
    if error := _on_main_process(accelerator, lambda: _leave_later(folder, step)):
        raise OSError(f"{folder}: the checkpoints after step {step} could not be renamed ({error}).")


def _leave_later(folder: Path, step: int) -> None:
    later = [path for path in list_checkpoints(folder) if _step_of(path) > step]
    if later:
        names = ", ".join(path.name for path in later)
        logger.warning("Going on from step %d in %s: renamed to *%s are %s.", step, folder, LEFT_SUFFIX, names)
    for path in later:
        _rename_aside(path, LEFT_SUFFIX)


def _rename_aside(checkpoint: Path, suffix: str) -> None:
    aside = checkpoint.with_name(checkpoint.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _find(folder: Path, resume_from: str | None) -> Path | None:
    for replaced in folder.glob(f"step-*{REPLACED_SUFFIX}"):  # of a run that was killed between two renames
        original = replaced.with_name(replaced.name.removesuffix(REPLACED_SUFFIX))
        if not original.exists():
            replaced.rename(original)
    available = list_checkpoints(folder)
    if resume_from is None:
        if available:
            raise FileExistsError(
                f"{folder} holds checkpoints of an earlier run (the last is {available[-1].name}). "
                "Continue it with `--resume_from latest`, or choose another `--output_dir`."
            )
        return None
    if resume_from != "latest":
        if not Path(resume_from).is_dir():
            raise FileNotFoundError(f"`resume_from` {resume_from}: no such checkpoint folder.")
        if problem := _problem(Path(resume_from)):
            raise ValueError(
                f"{resume_from}: not a complete checkpoint: {problem}. Give a folder `step-...` or `latest`."
            )
        return Path(resume_from)
    problems = []
    for checkpoint in reversed(available):
        problem = _problem(checkpoint)
        if problem is None:
            for damaged, what in problems:
                logger.warning("%s is damaged: %s. Resuming from %s.", damaged, what, checkpoint)
                _rename_aside(damaged, CORRUPT_SUFFIX)
            return checkpoint
        problems.append((checkpoint, problem))
    if problems:
        listed = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in problems)
        raise ValueError(f"{folder}: not a complete checkpoint among {len(problems)}: {listed}.")
    logger.info("No checkpoint in %s yet: starting anew.", folder)
    return None


def _problem(checkpoint: Path) -> str | None:
    try:
        check_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _does_not_fit(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{checkpoint}: this checkpoint does not fit the run: {error}. Resume with the settings it was made with."
    )


def _on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> str | None:
    """Runs it on the main process while all wait; what went wrong is returned on every one, so that none is left."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:  # torch and safetensors raise their own errors for a full disk
            logger.debug("", exc_info=True)
            problem = [str(error) or type(error).__name__]
    broadcast_object_list(problem)
    return problem[0]


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _put_in_place(partial: Path, final: Path) -> None:
    """A folder can't be replaced in one step; `_find` undoes the first rename if the second never came."""
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    rename_durably(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Under another name, so that a crash leaves no checkpoint with files missing."""
    aside = checkpoint.with_name(checkpoint.name + PARTIAL_SUFFIX)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder to write files to, which move to `folder` one by one when all are written and flushed."""
    partial = folder / f"model{PARTIAL_SUFFIX}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        follow_umask(partial)
        flush_to_disk(partial)
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
        flush_entry(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
