"""Resumable training state: written whole or not at all, found again, and kept by count."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"


@dataclass
class TrainingProgress:
    """Where a run stands; saved with each checkpoint through `Accelerator.register_for_checkpointing`.

    Args:
        epoch: The epoch under way, from 0.
        batch: Batches of that epoch already trained on, per process.
        step: Optimizer steps of the whole run.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        """The three numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over the numbers of `state_dict`."""
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int = 2) -> Path:
    """Saves everything that `accelerator` prepared or has registered as `folder/step-<step>`.

    It is written under another name and renamed when complete, so a crash or a full disk leaves the older checkpoints
    as they were. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        folder: Where checkpoints lie.
        step: Optimizer steps done.
        keep: How many checkpoints up to this step to keep, the new one included; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it can't be written; the message says where, and older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    if accelerator.is_main_process:
        for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):  # of a run that was killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
    except Exception as error:  # torch and safetensors raise their own errors for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise OSError(
            f"{final}: the checkpoint could not be written ({error}). "
            + (f"The last good one is {last}. " if last else "")
            + "Free some disk space or choose another output folder, then resume."
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        # later ones are of a run that this one branched off from: not in its way, and not its own to remove
        for old in [path for path in list_checkpoints(folder) if _step_of(path) <= step][:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def save_model(accelerator: Accelerator, model: torch.nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
    """Saves a trained model and its image processor for `from_pretrained`. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        model: The model that `accelerator` prepared.
        processor: Its image processor.
        folder: The run's output folder.

    Raises:
        OSError: if they can't be written; the message says where. Checkpoints are untouched.
    """
    state = accelerator.get_state_dict(model)
    try:
        accelerator.unwrap_model(model).save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=state,
        )
        if accelerator.is_main_process:
            processor.save_pretrained(folder)
    except Exception as error:  # as above
        raise OSError(
            f"{folder}: the trained model could not be written ({error}). Free some disk space, then repeat the "
            "command with `--resume_from latest`, which goes on from the last checkpoint."
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def resume(accelerator: Accelerator, folder: Path, resume_from: str | None) -> Path | None:
    """Loads a checkpoint into everything that `accelerator` prepared or has registered.

    Args:
        accelerator: The run's accelerator.
        folder: Where this run's checkpoints lie.
        resume_from: A checkpoint's folder, "latest" for the newest in `folder`, or None to start anew.

    Returns:
        What was loaded, or None for a new run ("latest" in a folder without checkpoints is one, so that the same
        command starts and restarts a job).

    Raises:
        FileNotFoundError: if `resume_from` names a folder that is not there.
        FileExistsError: if a new run would mix with the checkpoints of an old one.
        ValueError: if the checkpoint does not fit the model, or is no complete checkpoint.
    """
    found = latest_checkpoint(folder)
    if resume_from is None:
        if found is not None:
            raise FileExistsError(
                f"{folder} holds checkpoints of an earlier run (the last is {found.name}). "
                "Continue it with `--resume_from latest`, or choose another `--output_dir`."
            )
        return None
    checkpoint = found if resume_from == "latest" else Path(resume_from)
    if checkpoint is None:
        logger.info("No checkpoint in %s yet: starting anew.", folder)
        return None
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"`resume_from` {checkpoint}: no such checkpoint folder.")
    try:
        accelerator.load_state(str(checkpoint))
    except OSError as error:
        raise ValueError(
            f"{checkpoint}: not a complete checkpoint: {error}. Give a folder `step-...` or `latest`."
        ) from error
    except Exception as error:  # torch, pickle and safetensors raise their own errors for what they can't read
        raise ValueError(
            f"{checkpoint}: this checkpoint does not fit the run: {error}. Resume with the settings it was made with."
        ) from error
    return checkpoint


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
