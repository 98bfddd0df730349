"""Watching pre-training learn: figures that show a collapse early, steps that are no number, a score past its peak."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from .losses import teacher_probabilities
from .modeling_personvit_pretraining import PersonViTForPreTraining

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

COLLAPSE_PATIENCE = 3  # a single batch can be odd
MIN_FEATURE_STD = 0.02  # 1 for features spread over the whole sphere; random ViTs have about 0.5
MIN_NATS_FROM_UNIFORM = 0.02
MIN_PROTOTYPES_USED = 1.5
PEAK_PATIENCE = 2
PEAK_DROP = 0.02  # of the best score; smaller falls are noise


def feature_figures(features: torch.Tensor) -> dict[str, float]:
    """How far the teacher's [CLS] features spread.

    Args:
        features: float (images, hidden), of any length.

    Returns:
        `feature_std`: root of the summed variances of L2-normalised features; 1 if they are spread over the sphere, 0
        if all are the same. `effective_rank`: exp of the entropy of the centered features' squared singular values as
        shares (Roy and Vetterli, EUSIPCO 2007, of the covariance); between 1 and the smaller of images and hidden.
    """
    features = torch.nn.functional.normalize(features.detach().double().cpu(), dim=1)
    centered = features - features.mean(0)
    small = centered @ centered.T if len(centered) < centered.shape[1] else centered.T @ centered
    spectrum = torch.linalg.eigvalsh(small).clamp(min=0)
    total = spectrum.sum()
    shares = spectrum / total.clamp(min=torch.finfo(total.dtype).tiny)
    return {
        "feature_std": (total / len(features)).sqrt().item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
    }


def prototype_figures(probabilities: torch.Tensor) -> dict[str, float]:
    """How the teacher uses its [CLS] prototypes.

    Args:
        probabilities: float (views, prototypes), the teacher's, centered and sharpened.

    Returns:
        In nats: `teacher_entropy`, mean entropy of one view's distribution (the logarithm of the number of prototypes
        if the teacher tells nothing apart), and `teacher_kl_to_uniform`, that of the views' mean distribution to the
        uniform one (the same logarithm if all views fall on one prototype, 0 if prototypes are used equally).
    """
    entropy = torch.special.entr(probabilities).sum(-1).mean().item()
    used = torch.special.entr(probabilities.mean(0)).sum().item()
    return {"teacher_entropy": entropy, "teacher_kl_to_uniform": math.log(probabilities.shape[-1]) - used}


def name_collapse(figures: dict[str, float], num_prototypes: int) -> str | None:
    """What has collapsed, in words, or None; `figures` are those of the two functions above."""
    most = math.log(num_prototypes)
    if figures["feature_std"] < MIN_FEATURE_STD:
        return "all pictures have nearly the same [CLS] feature"
    if most - figures["teacher_entropy"] < MIN_NATS_FROM_UNIFORM:
        return "the teacher gives every prototype the same probability, so there is nothing to learn from it"
    if math.exp(most - figures["teacher_kl_to_uniform"]) < MIN_PROTOTYPES_USED:
        return "the teacher puts all pictures on one prototype"
    return None


class TeacherWatch:
    """What the teacher made of the last batch, seen on its way through the forward pass: nothing is computed twice.

    Args:
        model: The unwrapped model; what accelerate wraps around it doesn't matter.

    Set `wanted` before the forward pass that is to be seen.
    """

    def __init__(self, model: PersonViTForPreTraining):
        self.model = model
        self.wanted = False
        self.features: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.recent: deque[str | None] = deque(maxlen=COLLAPSE_PATIENCE)
        model.personvit.register_forward_hook(self._keep_features)
        model.teacher_head.cls_prototypes.register_forward_hook(self._keep_logits)

    def _keep_features(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self.wanted:
            self.features, self.logits = output.pooler_output.detach(), None

    def _keep_logits(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # [CLS] first (a chunk of them, where all would be too large); a shared head is then called for patches
        if self.wanted and self.logits is None:
            self.logits = output.detach().flatten(0, -2)

    @torch.no_grad()
    def figures(self, teacher_temperature: float, **other_temperatures: float) -> dict[str, float]:
        """Those of `feature_figures` and `prototype_figures` of this process's batch, and the centers' norms."""
        if self.features is None or self.logits is None:
            raise RuntimeError("No forward pass was watched: set `wanted` before it.")
        probabilities = teacher_probabilities(self.logits, self.model.center, teacher_temperature)
        figures = feature_figures(self.features) | prototype_figures(probabilities)
        figures["center_norm"] = self.model.center.norm().item()
        figures["patch_center_norm"] = self.model.patch_center.norm().item()
        self.recent.append(name_collapse(figures, self.logits.shape[-1]))
        self.wanted, self.features, self.logits = False, None, None
        return figures

    def require_no_collapse(self, step: int, output_dir: str | Path) -> None:
        """Stops a run of which one collapse was seen `COLLAPSE_PATIENCE` times in a row.

        Raises:
            RuntimeError: naming the collapse and what to do.
        """
        if len(self.recent) == COLLAPSE_PATIENCE and None not in self.recent:
            raise RuntimeError(
                f"Pre-training has collapsed at step {step}: {self.recent[-1]} (seen {COLLAPSE_PATIENCE} times in a "
                f"row). The figures are in {output_dir}/metrics.jsonl. Start anew, or from an earlier checkpoint, "
                "with a lower `teacher_temperature`, a `center_momentum` of 0.9, a lower `learning_rate` or a "
                "`koleo_loss_weight` (`config_overrides`); `--stop_on_collapse false` goes on regardless."
            )


class StepGuard:
    """Skips optimizer steps whose gradients are no numbers, and counts them.

    Args:
        model: The unwrapped model. Its buffers (centers, statistics of batch norms) move in the forward pass, and are
            put back.
        limit: Steps that a run may skip; 0 checks and keeps nothing.
        skipped: Steps skipped already, before the run was resumed.
    """

    def __init__(self, model: torch.nn.Module, limit: int, skipped: int = 0):
        if limit < 0:
            raise ValueError(f"`skip_nonfinite_steps` must be 0 (none) or more, got {limit}.")
        self.model, self.limit, self.skipped = model, limit, skipped
        self.remember()

    def remember(self) -> None:
        """Keeps the buffers as they are; call it after each step that counted."""
        if self.limit:
            self.buffers = [buffer.clone() for buffer in self.model.buffers()]

    def must_skip(self, step: int, gradient_norm: torch.Tensor) -> bool:
        """Whether this step's gradients are no numbers.

        Args:
            step: Optimizer steps done.
            gradient_norm: Scalar, over all gradients together, equal on all processes. With fp16's loss scaler, which
                leaves out steps whose scaled gradients overflow by itself, give the loss instead.

        Raises:
            FloatingPointError: if more steps than the limit had to be skipped.
        """
        if not self.limit or math.isfinite(norm := gradient_norm.item()):
            return False
        self.skipped += 1
        if self.skipped > self.limit:
            raise FloatingPointError(
                f"The gradient's norm is {norm} after step {step}, and `skip_nonfinite_steps` {self.limit} steps were "
                "skipped already: training has diverged. Resume with a lower learning rate or without fp16."
            )
        logger.warning("Step %d is skipped: its gradient's norm is %s (%d skipped so far).", step, norm, self.skipped)
        for buffer, kept in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(kept)
        return True


class Pace:
    """How fast a run trains, and the share of its time that it waits for data; `paused` times count for neither.

    Add to `images` what it trains on.
    """

    def __init__(self) -> None:
        self.images, self.waited = 0, 0.0
        self.started = self.looked = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, with the time between asking and getting counted."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training, such as scoring and saving."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - paused
            self.started, self.looked = self.started + took, self.looked + took

    def figures(self) -> dict[str, float]:
        """`images_per_second`, and `data_wait_share`, between 0 and 1, since the last call."""
        now = time.perf_counter()
        share = self.waited / max(now - self.looked, 1e-9)
        self.waited, self.looked = 0.0, now
        return {"images_per_second": self.images / max(now - self.started, 1e-9), "data_wait_share": share}


def add_mean(
    means: Mapping[str, torch.Tensor], figures: Mapping[str, torch.Tensor], num_batches: int
) -> dict[str, torch.Tensor]:
    """Adds a batch's share to the means over a step's batches, which all weigh the same.

    Args:
        means: What this function returned for the step's batch before; empty for its first.
        figures: Scalars of this batch, by name.
        num_batches: Batches of the step.
    """
    shares = {name: figure.detach().float() / num_batches for name, figure in figures.items()}
    return {name: means[name] + share if means else share for name, share in shares.items()}


def mean_over_processes(accelerator: Accelerator, figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over all processes. Call it on every one, with the same names."""
    means = accelerator.reduce(torch.stack(list(figures.values())), "mean")
    return dict(zip(figures, means.tolist(), strict=True))


def warn_past_peak(metrics: Path) -> str | None:
    """Warns when the downstream score has peaked and fallen, as in PersonViT's Fig. 3 (arXiv 2408.05398).

    Args:
        metrics: The run's metrics.jsonl; its lines with `mAP` are the scores, resumed runs' too.

    Returns:
        The warning, or None: the last `PEAK_PATIENCE` scores lie more than `PEAK_DROP` (as a share) below the best.
    """
    lines = map(json.loads, metrics.read_text().splitlines())
    scores = [(line["mAP"], line["epoch"]) for line in lines if "mAP" in line]
    best, epoch = max(scores, default=(0.0, 0))
    last = scores[-PEAK_PATIENCE:]
    if len(scores) <= PEAK_PATIENCE or any(score > (1 - PEAK_DROP) * best for score, _ in last):
        return None
    warning = (
        f"mAP was best after epoch {epoch} ({best:.4f}) and has fallen to {last[-1][0]:.4f}: on little data "
        "downstream scores peak and then fall (PersonViT, Fig. 3). Take the model from then (`--keep_best`), or train "
        "for fewer epochs."
    )
    logger.warning(warning)
    return warning
