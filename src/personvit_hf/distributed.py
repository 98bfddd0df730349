"""What differs when a run spreads over processes: how it starts, and steps on parameters that lie in shards.

The same scripts run on one process, with DDP, FSDP2 and DeepSpeed ZeRO. Under FSDP2 parameters and gradients are
DTensors; DeepSpeed keeps its own flat partitions, reached here through its `deepspeed.utils` and its ZeRO optimizer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    LoggerType,
)
from torch import nn
from torch.distributed.tensor import DTensor

from .schedules import clip_gradients_per_parameter


def make_accelerator(
    output_dir: str | Path,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str | None,
    timeout_minutes: float,
) -> Accelerator:
    """The accelerator of a training script, as `accelerate launch` configured it.

    Under DeepSpeed bf16 becomes autocast, since its own bf16 mode rounds all parameters, and a teacher in bf16 loses
    most of its motion to rounding. Gradients are clipped by parameter or not at all, so its global clipping is off.

    Args:
        output_dir: The run's output folder.
        mixed_precision: no, bf16 or fp16; None follows accelerate's configuration.
        gradient_accumulation_steps: Batches per optimizer step.
        report_to: Accelerate's trackers, with commas between them; None for none.
        timeout_minutes: How long processes wait for each other before they give up.

    Raises:
        ValueError: for fp16 or bf16 modes of DeepSpeed that would round the teacher, for FSDP of version 1, for an
            unknown tracker, and as `require_connected`.
        ImportError: for a tracker that is not installed.
    """
    backend = None
    deepspeed = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        deepspeed, mixed_precision = _deepspeed_plugin(precision), "no"
        backend = None if torch.cuda.is_available() else "gloo"
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of version 1 is not supported: set `fsdp_version: 2` (`--fsdp_version 2`).")
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        # batches in pinned memory reach a GPU while it is still busy with the step before
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=torch.cuda.is_available()),
        log_with=_trackers(report_to),
        project_dir=output_dir,
        deepspeed_plugin=deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_minutes))],
    )
    require_connected(accelerator)
    return accelerator


def require_connected(accelerator: Accelerator) -> None:
    """Stops processes that were started together but don't know of each other: each would do all of the work.

    Raises:
        ValueError: if the environment's WORLD_SIZE tells of more processes than the accelerator.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes >= started:
        return
    reason = "the launcher set no LOCAL_RANK: start them by `accelerate launch` or torchrun"
    if not torch.cuda.is_available():
        reason = "torch sees no GPU; on CPUs set ACCELERATE_USE_CPU=true"
    raise ValueError(
        f"{started} processes were started, but this one knows of {accelerator.num_processes}, itself included: "
        f"{reason} (see examples/accelerate_configs/README.md). For one process alone unset WORLD_SIZE."
    )


def _trackers(report_to: str | None) -> list[str] | None:
    """Names of trackers that are there; Accelerate itself passes over those that aren't, without a word."""
    if not report_to:
        return None
    names = [name.strip() for name in report_to.split(",")]
    known, installed = LoggerType.list(), {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(f"`report_to` {name!r}: no tracker; choose from {', '.join(known)}.")
        if name not in installed and name != LoggerType.ALL.value:
            raise ImportError(f"`report_to` {name}: it is not installed (`pip install {name}`).")
    return names


class _WholeModelsPlugin(DeepSpeedPlugin):
    """Models are built and loaded whole and cut up by `prepare`; transformers must not know of ZeRO-3."""

    def set_deepspeed_weakref(self) -> None:
        """Would make every `from_pretrained`, such as that of one process alone, wait for the others."""


def _deepspeed_plugin(precision: str) -> DeepSpeedPlugin:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # which the accelerator would read again
    plugin = _WholeModelsPlugin(zero3_init_flag=False)
    config = plugin.deepspeed_config
    rounding = [name for name in ("fp16", "bf16") if str(config.get(name, {}).get("enabled")).lower() == "true"]
    if precision == "fp16" or rounding:
        raise ValueError(
            f"DeepSpeed with {rounding or ['fp16']} rounds all parameters to 16 bits, and a teacher in 16 bits stands "
            "still: choose `mixed_precision` bf16 and leave fp16 and bf16 out of the DeepSpeed configuration."
        )
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    config["gradient_clipping"] = 0.0
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds all parameters: FSDP2 and ZeRO-3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model as it was before `accelerator` prepared it, without what compiles it, too."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a prepared model by their names in the model itself. Call it on every process.

    Under ZeRO-3 they are on the main process, and none on others.
    """
    weights = accelerator.get_state_dict(model) or {}
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


def whole_module(accelerator: Accelerator, model: nn.Module, name: str = "") -> nn.Module | None:
    """A module of the model that the main process can use alone, such as to score it. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        model: The model that it prepared, a PreTrainedModel.
        name: Attribute of the model; the model itself if empty.

    Returns:
        On the main process the module itself, or a copy on the CPU with all weights where they are sharded; else None.
    """
    unwrapped = unwrap(accelerator, model)
    module = getattr(unwrapped, name) if name else unwrapped
    if not is_sharded(accelerator):
        return module if accelerator.is_main_process else None
    weights = whole_weights(accelerator, model)
    if not accelerator.is_main_process:
        return None
    prefix = f"{name}." if name else ""
    random_state = torch.get_rng_state()  # a new module draws weights; training goes on as if it had not
    copy = type(module)(unwrapped.config)
    torch.set_rng_state(random_state)
    copy.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    return copy


def backward(accelerator: Accelerator, model: nn.Module, loss: torch.Tensor) -> None:
    """`accelerator.backward`, which under DeepSpeed would also take the optimizer's step, with unclipped gradients."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.backward(loss)
        return
    model.set_gradient_accumulation_boundary(is_boundary=accelerator.sync_gradients)
    model.backward(loss)


def optimizer_step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, if gradients are complete, and no gradients afterwards."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        optimizer.step()
        optimizer.zero_grad()
    elif accelerator.sync_gradients:
        model.step()


@torch.no_grad()
def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """`clip_gradients_per_parameter` of a prepared model's parameters, whose norms are those of whole gradients.

    Args:
        accelerator: The run's accelerator.
        model: The model that it prepared, after the `backward` that completes a step's gradients.
        max_norm: Largest norm of a single parameter's gradient.

    Returns:
        Norm over all gradients together before clipping, a scalar tensor.
    """
    parameters = [p for p in unwrap(accelerator, model).parameters() if p.requires_grad]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        shards = [_deepspeed_gradient(parameter) for parameter in parameters]
        replicas = torch.ones(len(parameters))
    elif accelerator.distributed_type == DistributedType.FSDP:
        shards = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
        replicas = torch.tensor([_num_replicas(parameter) for parameter in parameters])
    else:
        return clip_gradients_per_parameter(parameters, max_norm)
    squares = torch.zeros(len(parameters), device=accelerator.device)
    present = [index for index, shard in enumerate(shards) if shard is not None]
    if present:
        squares[present] = torch.stack(torch._foreach_norm([shards[index].float() for index in present])).square()
    torch.distributed.all_reduce(squares)
    norms = (squares / replicas.to(squares)).sqrt()
    coefficients = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    if present:
        torch._foreach_mul_([shards[index] for index in present], list(coefficients[present].unbind()))
    return torch.linalg.vector_norm(norms)


def _num_replicas(parameter: nn.Parameter) -> int:
    """How many processes hold the same part of an FSDP2 parameter; more than one in hybrid sharding."""
    if not isinstance(parameter, DTensor):
        return torch.distributed.get_world_size()
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_shard())


def freeze_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> None:
    """Before a step that is to leave `parameters` as they are, under DeepSpeed in an optimizer group of their own.

    Elsewhere a parameter without gradient is passed over by the optimizer; DeepSpeed's flat partitions always take
    part, so the group's rates are zero for this step, as are its gradients.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        for parameter in parameters:
            parameter.grad = None
        return
    for parameter in parameters:
        if parameter.requires_grad and (shard := _deepspeed_gradient(parameter)) is not None:
            shard.zero_()
    for group in optimizer.param_groups:
        if group.get("frozen_at_first"):
            group["lr"] = group["weight_decay"] = 0.0


def forget_frozen_steps(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """After a step with `freeze_step`: for the frozen group's optimizer state it was none."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    zero = optimizer.optimizer
    for group, _, partition in deepspeed_partitions(zero):
        if zero.optimizer.param_groups[group].get("frozen_at_first") and partition in zero.optimizer.state:
            zero.optimizer.state[partition]["step"].zero_()


def split_frozen_group(
    accelerator: Accelerator, groups: list[dict[str, Any]], frozen: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """Under DeepSpeed, optimizer groups in which the parameters given to `freeze_step` are apart; else `groups`."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return groups
    apart = set(frozen)
    split = []
    for group in groups:
        for is_frozen in (False, True):
            parameters = [p for p in group["params"] if (p in apart) == is_frozen]
            if parameters:
                split.append({**group, "params": parameters, "frozen_at_first": is_frozen})
    return split


def deepspeed_partitions(zero: Any) -> list[tuple[int, list[nn.Parameter], torch.Tensor]]:
    """The flat tensors that DeepSpeed's optimizer steps on.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.

    Returns:
        For each: its group's index, the parameters of which it holds parts, and this process's tensor, the key of its
        state in `zero.optimizer`.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 cuts groups into smaller ones
        groups = [zero.sub_group_to_group_id[index] for index in range(len(zero.fp16_groups))]
        return list(zip(groups, zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
    tensors = zero.single_partition_of_fp32_groups
    return list(zip(range(len(tensors)), zero.bit16_groups, tensors, strict=True))


def _deepspeed_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """This process's part of a reduced gradient, in place; None if it has none."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)
    mapping = getattr(parameter, "_hp_mapping", None)
    return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)
