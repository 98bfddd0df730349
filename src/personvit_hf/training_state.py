"""The state of a training run as plain tensors by parameter name, the same whatever shards the run.

Optimizer states are gathered to whole tensors and cut up again on loading, so a run moves between one process, DDP,
FSDP2 and DeepSpeed. Nothing here is pickled to a file: tensors go to safetensors, the rest to JSON.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import deepspeed_partitions, unwrap

# between a parameter's name and that of one of its optimizer states, and between a process and one of its generators
SEPARATOR = "/"
FORMAT = 1


def optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """An optimizer's whole state. Call it on every process.

    Args:
        accelerator: The run's accelerator.
        model: The model that `accelerator` prepared.
        optimizer: The optimizer that `accelerator` prepared.

    Returns:
        CPU tensors by `<parameter name>/<state>`, such as `head.weight/exp_avg`; on the main process, and empty on
        others.
    """
    names = {parameter: name for name, parameter in unwrap(accelerator, model).named_parameters()}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_state(accelerator, names, optimizer.optimizer)
    state = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD's momentum before the first step
                    continue
                whole = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
                if accelerator.is_main_process:
                    state[f"{names[parameter]}{SEPARATOR}{key}"] = whole.detach().cpu().contiguous()
    return state


def load_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]
) -> None:
    """Puts what `optimizer_state` returned into an optimizer.

    Args:
        accelerator: The run's accelerator.
        model: The model that `accelerator` prepared.
        optimizer: The optimizer that `accelerator` prepared.
        state: Whole tensors, on every process.

    Raises:
        ValueError: if a parameter is unknown, or a state has another shape than its parameter.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        parameter, _, key = name.rpartition(SEPARATOR)
        by_name.setdefault(parameter, {})[key] = value
    parameters = dict(unwrap(accelerator, model).named_parameters())
    for name, values in by_name.items():
        for key, value in values.items():
            _check_state(name, key, value, parameters.get(name))
    names = {parameter: name for name, parameter in parameters.items()}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _load_deepspeed_state(names, optimizer.optimizer, by_name)
        return
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indexed = {
        index: {key: _sharded_like(parameter, value) for key, value in by_name[names[parameter]].items()}
        for index, parameter in enumerate(ordered)
        if names[parameter] in by_name
    }
    # learning rates and the like are functions of settings and step: the groups keep what they have
    torch_optimizer = getattr(optimizer, "optimizer", optimizer)
    torch_optimizer.load_state_dict({"state": indexed, "param_groups": torch_optimizer.state_dict()["param_groups"]})


def _deepspeed_state(accelerator: Accelerator, names: dict[nn.Parameter, str], zero: Any) -> dict[str, torch.Tensor]:
    """`optimizer_state` of DeepSpeed's flat partitions."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = {}
    _link_deepspeed_state(zero)
    for _, parameters, partition in deepspeed_partitions(zero):
        flat = zero.optimizer.state.get(partition, {})
        if not flat or not flat.get("step", 1):  # no step yet, or frozen so far
            continue
        for parameter in parameters:
            for key, value in flat.items():
                if value is None:
                    continue
                is_flat = torch.is_tensor(value) and value.shape == partition.shape
                whole = safe_get_full_optimizer_state(parameter, key) if is_flat else torch.as_tensor(value)
                if accelerator.is_main_process:
                    state[f"{names[parameter]}{SEPARATOR}{key}"] = whole.detach().cpu().clone()
    return state


def _load_deepspeed_state(
    names: dict[nn.Parameter, str], zero: Any, by_name: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Inverse of `_deepspeed_state`."""
    from deepspeed.utils import safe_set_full_optimizer_state

    loaded = []
    for _, parameters, partition in deepspeed_partitions(zero):
        stored = {parameter: by_name.get(names[parameter], {}) for parameter in parameters}
        first = stored[parameters[0]]
        numbers = {key: value for key, value in first.items() if not value.ndim}
        for parameter, values in stored.items():
            own = {key: value for key, value in values.items() if not value.ndim}
            if set(values) != set(first) or own != numbers:
                raise ValueError(f"the optimizer state of {names[parameter]!r} is not at the step of its group")
        if first:
            zero.optimizer.state[partition] = {
                key: value.clone() if key in numbers else torch.zeros_like(partition) for key, value in first.items()
            }
            loaded += [(parameter, values) for parameter, values in stored.items()]
    _link_deepspeed_state(zero)
    for parameter, values in loaded:
        for key, value in values.items():
            if value.ndim:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _link_deepspeed_state(zero: Any) -> None:
    """Tells parameters where their states lie in stages 1 and 2, whose optimizer does so for its first group only."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for _, parameters, partition in deepspeed_partitions(zero):
        if partition in zero.optimizer.state and hasattr(parameters[0], "_hp_mapping"):
            lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)


def _check_state(name: str, key: str, value: torch.Tensor, parameter: nn.Parameter | None) -> None:
    if parameter is None or not parameter.requires_grad:
        raise ValueError(f"optimizer state of {name!r}, which is no trained parameter of this model")
    shape = getattr(parameter, "ds_shape", parameter.shape)  # of the whole, where ZeRO-3 holds a shard
    if value.shape != shape and not (key == "step" and value.ndim == 0):
        raise ValueError(f"optimizer state {key!r} of {name!r}: shape {tuple(value.shape)}, expected {tuple(shape)}")


def _sharded_like(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    if value.ndim and isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def random_states(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The states of all random generators of all processes. Call it on every process.

    Returns:
        CPU tensors by `<process>/<generator>`; on the main process, and empty on others.
    """
    _, python_state, gauss = random.getstate()
    _, words, position, has_gauss, cached_gauss = np.random.get_state()
    own = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_state, dtype=torch.int64),
        "python_gauss": torch.tensor(np.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(words.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached_gauss, dtype=torch.float64),
    }
    device = accelerator.device.type
    if device in ("cuda", "xpu", "mps"):
        own[device] = getattr(torch, device).get_rng_state()
    gathered = gather_object([own])
    if not accelerator.is_main_process:
        return {}
    return {
        f"{process}{SEPARATOR}{name}": state
        for process, states in enumerate(gathered)
        for name, state in states.items()
    }


def load_random_states(accelerator: Accelerator, states: dict[str, torch.Tensor]) -> bool:
    """Sets this process's generators to what `random_states` found.

    Returns:
        False, and nothing is set, if there are no states of this process: it ran with fewer then.

    Raises:
        ValueError: if a state is not one of its generator.
    """
    prefix = f"{accelerator.process_index}{SEPARATOR}"
    own = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    if not own:
        return False
    try:
        gauss = own["python_gauss"].item()
        random.setstate((3, tuple(own["python"].tolist()), None if np.isnan(gauss) else gauss))
        position, has_gauss = own["numpy_position"].tolist()
        words = own["numpy"].numpy().astype(np.uint32)
        if words.shape != (624,) or not 0 <= position <= 624:  # which numpy takes unchecked
            raise ValueError(f"numpy: {words.shape} words at position {position}")
        np.random.set_state(("MT19937", words, position, has_gauss, own["numpy_gauss"].item()))
        torch.set_rng_state(own["torch"])
        device = accelerator.device.type
        if device in own:
            getattr(torch, device).set_rng_state(own[device])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the states of the random generators can't be used: {error}") from error
    return True


def position_of(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Where a run stands, as JSON: what is registered with `accelerator`, and the loss scaler of fp16."""
    return {
        "format": FORMAT,
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "optimizer": _optimizer_name(optimizer),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),  # of fp16
        # what scripts gave to `register_for_checkpointing`; it has no public reader
        "registered": [[type(item).__name__, item.state_dict()] for item in accelerator._custom_objects],
    }


def load_position(accelerator: Accelerator, optimizer: torch.optim.Optimizer, position: dict[str, Any]) -> None:
    """Puts what `position_of` returned back.

    Raises:
        ValueError: if the run is of another kind: its optimizer, its precision or what it registered.
    """
    if position["format"] != FORMAT:
        raise ValueError(f"it has format {position['format']}, and this version reads format {FORMAT}")
    if position["optimizer"] != _optimizer_name(optimizer):
        raise ValueError(f"its optimizer is {position['optimizer']}, and this run's {_optimizer_name(optimizer)}")
    names = [type(item).__name__ for item in accelerator._custom_objects]
    stored = [name for name, _ in position["registered"]]
    if names != stored:
        raise ValueError(f"it holds the states of {stored}, expected {names}")
    if (accelerator.scaler is None) != (position["scaler"] is None):
        raise ValueError("one of both trains in fp16, with a loss scaler, and the other does not")
    for item, (_, state) in zip(accelerator._custom_objects, position["registered"], strict=True):
        item.load_state_dict(state)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(position["scaler"])


def _optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    while hasattr(optimizer, "optimizer"):  # Accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return type(optimizer).__name__
