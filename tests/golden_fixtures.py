"""What the tests of models and conversion share: the golden fixtures, a tiny configuration, and how to compare."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, PersonViTModel
from personvit_hf.checkpoint_names import OFFICIAL_HEAD_NAMES, Weight, backbone_from_official, renamed
from personvit_hf.checkpoint_sources import Source
from personvit_hf.conversion import convert_pretraining

GOLDEN = Path(__file__).parent / "golden"

Tensors = dict[str, torch.Tensor]


def load_golden(name: str) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, facts) of the fixture `name`."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def load_official(name: str) -> dict[str, Any]:
    """The contents of the official checkpoint `name`.pth."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / f"{name}.pth", weights_only=True)


def under(weights: Tensors, prefix: str) -> Tensors:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def tiny_config(**settings: Any) -> PersonViTConfig:
    """A model of a few thousand weights, all of whose sizes differ, on a grid of 8x4 patches."""
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [64, 32],
        "patch_size": 8,
        "projection_hidden_size": 24,
        "projection_bottleneck_size": 12,
        "num_cls_prototypes": 20,
        "num_patch_prototypes": 16,
    }
    return PersonViTConfig(**tiny | settings)


def tiny_model(cls: type = PersonViTModel, **settings: Any) -> Any:
    """A model in evaluation mode with random values in all it holds, so that nothing can be left out unseen."""
    torch.manual_seed(0)
    model = cls(tiny_config(**settings)).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and not name.endswith("running_var"):
                value.add_(0.1 * torch.randn_like(value))
    return model


def assert_within(tolerance: float, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every element of both tensors, of any float type, agrees within an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Both modules have the same weights and buffers, bit for bit."""
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@contextmanager
def no_transformers_warnings(caplog: Any) -> Iterator[None]:
    """Fails if transformers, whose records do not reach pytest by themselves, warns of anything."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        yield
    finally:
        library.removeHandler(caplog.handler)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings


def our_backbone_names(official: Tensors) -> Tensors:
    """Tensors of a reference's backbone by our names."""
    weights = {name: Weight(value, name) for name, value in official.items()}
    return {name: weight.tensor for name, weight in backbone_from_official("", weights, {}).items()}


def our_reid_names(official: Tensors) -> Tensors:
    """Tensors of the fine-tuned reference by the names of `PersonViTForReID`; its unused classifier is left out."""
    ours = {f"personvit.{name}": value for name, value in our_backbone_names(under(official, "base.")).items()}
    return ours | {name: value for name, value in official.items() if not name.startswith("base.")}


def our_pretraining_names(official: Tensors, role: str, shared_head: bool) -> Tensors:
    """Tensors of the reference's student or teacher by the names of `PersonViTForPreTraining`."""
    backbone = "student." if role == "student" else "personvit."
    ours = {backbone + name: v for name, v in our_backbone_names(under(official, "backbone.")).items()}
    head = under(official, "head.")
    if shared_head:  # stands twice in the reference
        head = {name: value for name, value in head.items() if not name.startswith("last_layer2.")}
    head = renamed("", {name: Weight(value, name) for name, value in head.items()}, OFFICIAL_HEAD_NAMES)
    return ours | {f"{role}_head.{name}": weight.tensor for name, weight in head.items()}


def model_before_step(variant: str, dtype: torch.dtype) -> tuple[PersonViTForPreTraining, Tensors, dict[str, Any]]:
    """(model, tensors, facts) of the fixture `ibot_step_<variant>`, before its first step."""
    inputs, _ = load_golden("ibot_step_inputs")
    tensors, facts = load_golden(f"ibot_step_{variant}")
    file = {role: under(inputs, f"{role}.") | under(tensors, f"{role}.") for role in ("student", "teacher")}
    file["ibot_loss"] = {"center": tensors["center"], "center2": tensors["center2"]}
    overrides = {"num_attention_heads": facts["config"]["heads"], "image_size": facts["config"]["g"]}
    overrides["norm_last_layer"] = facts["variant"]["norm_last_layer"]
    model = convert_pretraining(Source(Path(variant), "pretraining", file), overrides).to(dtype).train()
    return model, tensors, facts


def batch_of_step(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(global crops, local crops, masks) of a step; those of step 2 are flipped along the width."""
    inputs, _ = load_golden("ibot_step_inputs")
    views = (torch.stack([inputs[f"{name}_0"], inputs[f"{name}_1"]], dim=1) for name in ("global", "local", "mask"))
    crops, local, masks = (view if step == 1 else view.flip(-1) for view in views)
    return crops.to(dtype), local.to(dtype), masks
