"""What changes while training runs: learning rates, weight decay, momentum, temperatures, and whom they apply to.

Schedules are pure functions of a step or an epoch, counted from 0, so a resumed run needs nothing but its position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class StepPlan:
    """How batches make up a run's optimizer steps.

    Args:
        images_per_batch: Images of a batch of all processes together.
        batches_per_epoch: Batches of a process.
        batches_per_step: Batches whose gradients make one step; an epoch's last step takes what is left.
        epochs: Epochs of the run.
    """

    images_per_batch: int
    batches_per_epoch: int
    batches_per_step: int
    epochs: int

    @property
    def images_per_step(self) -> int:
        """Images of a full step."""
        return self.images_per_batch * self.batches_per_step

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch, by all processes together."""
        return self.images_per_batch * self.batches_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, its last one included, which may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.batches_per_step)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps_per_epoch

    def steps_in(self, epochs: float) -> int:
        """Steps of so many epochs, or of a part of one, rounded."""
        return round(epochs * self.steps_per_epoch)

    def steps_between(self, epochs: float) -> int:
        """Steps between what happens every so many epochs: at least one, or 0 for never, which `epochs` 0 is."""
        return max(self.steps_in(epochs), 1) if epochs else 0

    def batches_in_step(self, batch: int) -> int:
        """How many batches make the step that batch number `batch` of an epoch, from 0, is part of."""
        first = batch - batch % self.batches_per_step
        return min(self.batches_per_step, self.batches_per_epoch - first)


def is_due(every: int, count: int) -> bool:
    """Whether what happens every so many steps or epochs, or with 0 never, happens after number `count`, from 1."""
    return bool(every) and count % every == 0


def warmup_cosine(
    step: int, *, total_steps: int, base: float, final: float, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Linear warm-up, then half a cosine: pre-training's learning rate, weight decay and teacher momentum.

    The warm-up holds both of its ends, so `base` is the value of two steps in a row, and the cosine is sampled at
    `total_steps - warmup_steps` points from its start on, so the last step is still a little short of `final`.

    Args:
        step: Optimizer step, from 0. From `total_steps` on the value stays `final`.
        total_steps: Steps of the whole run.
        base: Value at the end of the warm-up.
        final: Value that the cosine approaches; may be above `base` (weight decay, momentum).
        warmup_steps: Steps of the warm-up, at most `total_steps`.
        warmup_start: Value at step 0 if there is a warm-up.

    Returns:
        The value for this step.

    Raises:
        ValueError: If `step` is negative or `warmup_steps` does not lie in [0, total_steps].

    Source: `cosine_scheduler` of iBOT (and DINO), `utils.py`.
    """
    _check_position("step", step)
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"`warmup_steps` must lie in [0, total_steps={total_steps}]; got {warmup_steps}.")
    if step < warmup_steps:
        return warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def teacher_temperature(
    epoch: int, *, warmup_start: float, final: float, warmup_epochs: int, delay_epochs: int = 0
) -> float:
    """Linear warm-up of a teacher temperature by epoch.

    Args:
        epoch: Epoch, from 0.
        warmup_start: Temperature of the first epoch.
        final: Temperature of the warm-up's last epoch and of all epochs after it.
        warmup_epochs: Epochs of the warm-up; 0 gives `final` at once.
        delay_epochs: Epochs at `warmup_start` before the warm-up begins (iBOT: `mim_start_epoch`, for the patch
            temperature only).

    Returns:
        The temperature for this epoch.

    Raises:
        ValueError: If an argument that counts epochs is negative.

    Source: `iBOTLoss.teacher_temp_schedule` and `teacher_temp2_schedule` of iBOT, `main_ibot.py`.
    """
    for name, value in (("epoch", epoch), ("warmup_epochs", warmup_epochs), ("delay_epochs", delay_epochs)):
        _check_position(name, value)
    if epoch < delay_epochs:
        return warmup_start
    done = epoch - delay_epochs
    if done >= warmup_epochs:
        return final
    return warmup_start + (final - warmup_start) * done / max(warmup_epochs - 1, 1)


def finetune_learning_rate(
    epoch: int,
    *,
    base: float,
    lr_factor: float = 1.0,
    total_epochs: int = 120,
    warmup_epochs: int = 20,
) -> float:
    """Learning rate of one parameter group while ReID fine-tuning's epoch `epoch` trains.

    Two things are as in the official recipe, and easy to miss. The smallest rate and the warm-up's first rate are
    0.002 and 0.01 of `base` for every group, whatever its `lr_factor`. And the cosine counts from epoch 0, so after a
    warm-up the rate drops and never reaches `base`.

    Args:
        epoch: Epoch, from 0. From `total_epochs` on the rate stays at its minimum.
        base: Base learning rate (official: 4e-4 for batches of 64).
        lr_factor: The group's multiple of `base`, as `finetuning_parameter_groups` stores it.
        total_epochs: Length of the cosine in epochs, the warm-up's included.
        warmup_epochs: Epochs of linear warm-up.

    Returns:
        The learning rate.

    Raises:
        ValueError: If `epoch` is negative or `warmup_epochs` does not lie in [0, total_epochs].

    Source: `create_scheduler` and `CosineLRScheduler` of PersonViT's `transreid_pytorch/solver`.
    """
    _check_position("epoch", epoch)
    if not 0 <= warmup_epochs <= total_epochs:
        raise ValueError(f"`warmup_epochs` must lie in [0, total_epochs={total_epochs}]; got {warmup_epochs}.")
    peak, lowest, start = base * lr_factor, base * 0.002, base * 0.01
    if epoch < warmup_epochs:
        return start + (peak - start) * epoch / warmup_epochs
    if epoch >= total_epochs:
        return lowest
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * epoch / total_epochs))


def pretraining_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups of a model's trainable parameters: with weight decay, then without.

    Biases and 1-D tensors are not decayed; `cls_token`, position embeddings, the mask token and prototypes are. A
    weight decay schedule applies to the first group (`name` "decayed") alone.

    Args:
        model: Module whose parameters with `requires_grad` are trained.
        weight_decay: Weight decay of the first group.

    Returns:
        Two dicts with keys `name`, `params` and `weight_decay`.

    Source: `get_params_groups` of iBOT, `utils.py`.
    """
    decayed, undecayed = _split_trainable(model, lambda name, p: p.ndim > 1 and not name.endswith(".bias"))
    return [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "undecayed", "params": undecayed, "weight_decay": 0.0},
    ]


def finetuning_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    bias_factor: float = 2.0,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Two optimizer groups of a model's trainable parameters: weights, then biases at a multiple of the rate.

    Args:
        model: Module whose parameters with `requires_grad` are trained.
        learning_rate: Base learning rate.
        weight_decay: Weight decay of everything but biases (normalisation weights and embeddings too).
        bias_factor: Learning rate of parameters with "bias" in their name, as a multiple of `learning_rate`.
        bias_weight_decay: Weight decay of these; None for the same as `weight_decay`, as in the official recipe.

    Returns:
        Two dicts with keys `name`, `params`, `lr`, `lr_factor` and `weight_decay`; `lr_factor` is what
        `finetune_learning_rate` takes.

    Source: `make_optimizer` of PersonViT's `transreid_pytorch/solver` (there one group for each parameter).
    """
    weights, biases = _split_trainable(model, lambda name, _: "bias" not in name)
    bias_decay = weight_decay if bias_weight_decay is None else bias_weight_decay
    return [
        {"name": name, "params": params, "lr": learning_rate * factor, "lr_factor": factor, "weight_decay": decay}
        for name, params, factor, decay in (
            ("weights", weights, 1.0, weight_decay),
            ("biases", biases, bias_factor, bias_decay),
        )
    ]


@torch.no_grad()
def clip_gradients_per_parameter(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale each gradient, in place, to an L2 norm of at most `max_norm`: every tensor by its own norm.

    All norms are taken in one grouped call, and nothing waits for the device.

    Args:
        parameters: Parameters; those without a gradient are passed over.
        max_norm: Largest norm of a single tensor's gradient.

    Returns:
        Norm over all gradients together before clipping, a scalar tensor on their device (0 if there are none).

    Raises:
        ValueError: If `max_norm` is not positive.

    Source: `clip_gradients` of iBOT (and DINO), `utils.py`: coefficient max_norm / (norm + 1e-6) where below 1.
    """
    if not max_norm > 0:
        raise ValueError(f"`max_norm` must be positive; got {max_norm}. Leave the call out to train without clipping.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))
    coefficients = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(coefficients.unbind()))
    return torch.linalg.vector_norm(norms)


def _check_position(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"`{name}` counts from 0; got {value}.")


def _split_trainable(
    model: nn.Module, is_first: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    first, second = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (first if is_first(name, parameter) else second).append(parameter)
    if not first and not second:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad: nothing to train.")
    return first, second
