"""The way back: our models as the files that the official code of PersonViT, iBOT, TransReID and PASS reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor

from .checkpoint_names import official_name
from .configuration_personvit import PersonViTConfig
from .files import written_aside
from .loading import load_own_model
from .modeling_personvit import (
    PersonViTForReID,
    PersonViTModel,
    PersonViTPreTrainedModel,
    interpolate_position_embeddings,
)
from .modeling_personvit_pretraining import PersonViTForPreTraining, PersonViTProjectionHead

Tensors = dict[str, torch.Tensor]


def convert_to_official(folder: str | Path, path: str | Path) -> list[str]:
    """Writes the official file of a model in a folder of this package, for the size of its image processor.

    Returns:
        What was written, and what the file doesn't tell: lines for people, the last with options for the way back.

    Raises:
        FileNotFoundError: if there is no such folder or no model in it.
        ValueError: if it holds another model, or a processor for images of no fixed size or one the model can't take.
        OSError: if it can't be written.
    """
    folder = Path(folder)
    model = load_own_model(folder)
    size, processor = tuple(model.config.image_size), None
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder)
        size = tuple(dict(processor.size).get(side) for side in ("height", "width"))
    if None in size:
        raise ValueError(
            f"{folder}: an official file is for images of one size; `size` in preprocessor_config.json should be "
            f"`height` and `width`, found {dict(processor.size)}."
        )
    save_official_checkpoint(model, path, size)
    lines = [f"{type(model).__name__} of {folder} written to {path}."]
    grid, native = (model.config.patch_grid(*sides) for sides in (size, model.config.image_size))
    if grid != native:
        lines += ["Its positions are for {}x{}, the image processor's size, and not the model's own.".format(*size)]
    options, settings = _untold(model, size)
    if processor is not None:
        statistics = {"image-mean": processor.image_mean, "image-std": processor.image_std}
        options |= {name: ",".join(map(str, values)) for name, values in statistics.items()}
    if settings:
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        lines += [
            f"Not told by it, and without an option of convert: {told}. Set them in config.json after the way back."
        ]
    return [*lines, "Not told by it; for the way back: " + " ".join(f"--{name} {options[name]}" for name in options)]


def official_checkpoint(model: PersonViTPreTrainedModel, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The contents of the official file of a model.

    `convert_checkpoint` makes the same weights of it again, bit for bit. Official files hold no settings: what the
    tensors don't tell (heads, unusual image sizes, views, LayerNorm's epsilon, ...) is given as overrides there, and
    in the official code's own configuration.

    Args:
        model: A PersonViTModel: names without prefix, as TransReID-SSL's `convert_model_dino.py` writes them;
            PersonViTForPreTraining: `student`, `teacher` and `ibot_loss`, as iBOT's training does;
            PersonViTForReID: `base.*`, `bottleneck.*`, `classifier.weight`, as PersonViT's fine-tuning does. Part
            tokens are named as PASS does.
        image_size: (height, width) in pixels to write position embeddings for, as the model interpolates them in each
            forward pass, since official code does it in another way; None for the model's own.

    Raises:
        ValueError: for another model, or a size that it can't take.
    """
    if isinstance(model, PersonViTModel):
        return _backbone(model, image_size)
    if isinstance(model, PersonViTForReID):
        weights = {f"base.{name}": value for name, value in _backbone(model.personvit, image_size).items()}
        for part in ("bottleneck", "classifier"):
            weights |= {f"{part}.{name}": value for name, value in getattr(model, part).state_dict().items()}
        return weights
    if isinstance(model, PersonViTForPreTraining):
        student, teacher = (_backbone(backbone, image_size) for backbone in (model.student, model.personvit))
        # the official teacher has no mask token; ours is a moving average of the student's
        if torch.equal(teacher["masked_embed"], student["masked_embed"]):
            del teacher["masked_embed"]
        return {
            "student": _joined("module.", student, model.student_head),
            "teacher": _joined("", teacher, model.teacher_head),
            "ibot_loss": {"center": model.center[None], "center2": model.patch_center[None, None]},
        }
    raise ValueError(f"No official file holds a {type(model).__name__}.")


def save_official_checkpoint(
    model: PersonViTPreTrainedModel, path: str | Path, image_size: tuple[int, int] | None = None
) -> None:
    """Writes `official_checkpoint` with `torch.save`, whole or not at all, over a file of that name.

    Raises:
        ValueError: for a model that no official file holds, or a size that it can't take.
        OSError: if it can't be written.
    """
    contents = official_checkpoint(model, image_size)
    with written_aside(Path(path), overwrite=True) as aside, aside.open("wb") as file:
        torch.save(contents, file)


def _untold(model: PersonViTPreTrainedModel, image_size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that features depend on and an official file doesn't tell: options of `personvit convert`, and others.

    Those that `convert_checkpoint` takes for granted are left out.
    """
    config, usual = model.config, PersonViTConfig()
    options = {"num-attention-heads": config.num_attention_heads, "image-size": "{}x{}".format(*image_size)}
    if config.patch_stride not in (None, config.patch_size):
        options["patch-stride"] = config.patch_stride
    if config.num_views:  # of a table of so many pairs neither factor is told
        options |= {"num-cameras": config.num_cameras, "num-views": config.num_views}
    has_sides = config.num_cameras or config.num_views
    if has_sides and config.side_information_scale != usual.side_information_scale:
        options["side-information-scale"] = config.side_information_scale
    if config.layer_norm_eps != usual.layer_norm_eps:
        options["layer-norm-eps"] = config.layer_norm_eps
    others = ["hidden_act"] + ["neck_feature"] * isinstance(model, PersonViTForReID)
    settings = {name: getattr(config, name) for name in others if getattr(config, name) != getattr(usual, name)}
    return options, settings


def _backbone(model: PersonViTModel, image_size: tuple[int, int] | None) -> Tensors:
    """A backbone's weights by official name, with positions for a size of images; None for its own."""
    weights = {official_name(name): value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if image_size is not None:
        weights["pos_embed"] = interpolate_position_embeddings(
            weights["pos_embed"], model.embeddings.native_grid, model.config.patch_grid(*image_size)
        )
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
