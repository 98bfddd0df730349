"""The way back: our models as the files that the official code of PersonViT, iBOT, TransReID and PASS reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint_names import official_name
from .files import written_aside
from .modeling_personvit import PersonViTForReID, PersonViTModel, PersonViTPreTrainedModel
from .modeling_personvit_pretraining import PersonViTForPreTraining, PersonViTProjectionHead

Tensors = dict[str, torch.Tensor]


def official_checkpoint(model: PersonViTPreTrainedModel) -> dict[str, Any]:
    """The contents of the official file of a model.

    `convert_checkpoint` makes the same weights of it again, bit for bit. Official files hold no settings: what the
    tensors don't tell (heads, unusual image sizes, views, LayerNorm's epsilon, ...) is given as overrides there, and
    in the official code's own configuration.

    Args:
        model: A PersonViTModel: names without prefix, as TransReID-SSL's `convert_model_dino.py` writes them;
            PersonViTForPreTraining: `student`, `teacher` and `ibot_loss`, as iBOT's training does;
            PersonViTForReID: `base.*`, `bottleneck.*`, `classifier.weight`, as PersonViT's fine-tuning does. Part
            tokens are named as PASS does.

    Raises:
        ValueError: for another model.
    """
    if isinstance(model, PersonViTModel):
        return _backbone(model)
    if isinstance(model, PersonViTForReID):
        weights = {f"base.{name}": value for name, value in _backbone(model.personvit).items()}
        for part in ("bottleneck", "classifier"):
            weights |= {f"{part}.{name}": value for name, value in getattr(model, part).state_dict().items()}
        return weights
    if isinstance(model, PersonViTForPreTraining):
        student, teacher = _backbone(model.student), _backbone(model.personvit)
        # the official teacher has no mask token; ours is a moving average of the student's
        if torch.equal(teacher["masked_embed"], student["masked_embed"]):
            del teacher["masked_embed"]
        return {
            "student": _joined("module.", student, model.student_head),
            "teacher": _joined("", teacher, model.teacher_head),
            "ibot_loss": {"center": model.center[None], "center2": model.patch_center[None, None]},
        }
    raise ValueError(f"No official file holds a {type(model).__name__}.")


def save_official_checkpoint(model: PersonViTPreTrainedModel, path: str | Path) -> None:
    """Writes `official_checkpoint(model)` with `torch.save`, whole or not at all, over a file of that name.

    Raises:
        ValueError: for a model that no official file holds.
        OSError: if it can't be written.
    """
    contents = official_checkpoint(model)
    with written_aside(Path(path), overwrite=True) as aside, aside.open("wb") as file:
        torch.save(contents, file)


def _backbone(model: PersonViTModel) -> Tensors:
    """A backbone's weights by official name."""
    weights = {official_name(name): value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if "masked_embed" in weights:
        weights["masked_embed"] = weights["masked_embed"][0]
    parts = weights.pop("part_tokens", None)
    if parts is None:
        return weights
    count, positions = parts.shape[1], weights.pop("pos_embed")
    weights |= {f"part_token{index + 1}": parts[:, index : index + 1].clone() for index in range(count)}
    names = ("cls_pos", *(f"part{index + 1}_pos" for index in range(count)))
    weights |= {name: positions[:, index : index + 1].clone() for index, name in enumerate(names)}
    return weights | {"pos_embed": positions[:, 1 + count :].clone()}


def _joined(prefix: str, backbone: Tensors, head: PersonViTProjectionHead) -> Tensors:
    """Backbone and head in one; a head without prototypes of its own for patches repeats those of [CLS], as iBOT's."""
    weights = {official_name(name): value.detach().cpu() for name, value in head.state_dict().items()}
    if head.patch_prototypes is None:
        weights |= {
            name.replace("last_layer", "last_layer2"): value for name, value in weights.items() if "last" in name
        }
    groups = {"backbone": backbone, "head": weights}
    return {f"{prefix}{part}.{name}": value for part, group in groups.items() for name, value in group.items()}
