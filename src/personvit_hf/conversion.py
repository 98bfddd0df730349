"""Official PersonViT checkpoints in: files of the pre-training and fine-tuning code to this package's models."""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .configuration_personvit import PersonViTConfig
from .image_processing_personvit import PersonViTImageProcessor
from .modeling_personvit import PersonViTForReID, PersonViTModel
from .modeling_personvit_pretraining import PersonViTForPreTraining

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

BACKBONE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "masked_embed": "embeddings.mask_token",
    "sie_embed": "embeddings.side_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
LAYER_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.qkv_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HEAD_NAMES = {
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
    "mlp.4": "mlp.4",
    "last_layer.weight_v": "cls_prototypes.direction",
    "last_layer.weight_g": "cls_prototypes.gain",
    "last_layer2.weight_v": "patch_prototypes.direction",
    "last_layer2.weight_g": "patch_prototypes.gain",
}
# What may stand beside the weights, and why it is left out.
DROPPED_ENTRIES = {
    "optimizer": "state of the official training run",
    "epoch": "state of the official training run",
    "args": "settings of the official training run",
    "fp16_scaler": "state of the official training run",
}
OFFICIAL_REID_STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def convert_checkpoint(
    path: str | Path, target: str = "auto", **config_overrides
) -> tuple[PersonViTModel | PersonViTForPreTraining | PersonViTForReID, PersonViTImageProcessor]:
    """Builds a model and its image processor from an official PersonViT (or iBOT) checkpoint.

    Args:
        path: A file of the pre-training code (`student`, `teacher`), of the fine-tuning code (`base.*`,
            `bottleneck.*`, `classifier.weight`), or a bare backbone; `.pth` or `.safetensors`. It is read without
            running any code from it.
        target: "backbone" (PersonViTModel; of a pre-training file the teacher), "pretraining" (student, teacher,
            heads and centers), "reid", or "auto": "reid" for a fine-tuned file, else "backbone".
        config_overrides: Settings of PersonViTConfig that the tensors can't tell: `num_attention_heads` (assumed to
            be hidden size / 64), `image_size` (assumed to be twice as high as wide, else square). An `image_size`
            with another number of patches resizes the position embeddings as the official fine-tuning does.

    Returns:
        The model in evaluation mode, float32, and a processor with the statistics it was trained with: ImageNet's, or
        0.5 for fine-tuned models.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, or any key is unknown, missing or of another shape.
    """
    contents = read_checkpoint(Path(path))
    kind = _kind(path, contents)
    if target == "auto":
        target = "reid" if kind == "reid" else "backbone"
    if target == "backbone":
        model = _convert_backbone(path, contents, kind, config_overrides)
    elif target == "pretraining":
        model = _convert_pretraining(path, contents, kind, config_overrides)
    elif target == "reid":
        model = _convert_reid(path, contents, kind, config_overrides)
    else:
        raise ValueError(f"`target` must be 'auto', 'backbone', 'pretraining' or 'reid', got {target!r}.")
    height, width = model.config.image_size
    statistics = OFFICIAL_REID_STATISTICS if kind == "reid" else {}
    processor = PersonViTImageProcessor(size={"height": height, "width": width}, **statistics)
    return model.eval(), processor


def read_checkpoint(path: Path) -> dict:
    """The contents of a `.pth` or `.safetensors` file, on the CPU, without running code from it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds objects other than tensors, numbers, text and containers of
            these (`argparse.Namespace` is allowed: official files carry their arguments).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}).") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a checkpoint that can be read safely ({reason}). Only tensors and plain values are accepted."
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: expected a dictionary of weights, found {type(contents).__name__}.")
    return dict(contents)


def resize_position_embeddings(position_embeddings: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]):
    """Position embeddings of another grid, as the official fine-tuning loads them.

    Bilinear to the exact size without antialiasing (PersonViT `transreid_pytorch/model/backbones/vit_pytorch.py`,
    `resize_pos_embed`); the forward pass at other sizes uses another method,
    `modeling_personvit.interpolate_position_embeddings`.

    Args:
        position_embeddings: float (1, 1 + rows * columns, hidden), [CLS] first.
        grid: (rows, columns) of `position_embeddings`.
        new_grid: (rows, columns) wanted.

    Returns:
        float (1, 1 + new rows * new columns, hidden).
    """
    cls_position, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat((cls_position, patches.flatten(2).transpose(1, 2)), dim=1)


def _kind(path: str | Path, contents: dict) -> str:
    """One of "pretraining", "reid" and "backbone", unwrapping `state_dict`, `model` and `module` in place."""
    if "teacher" in contents:
        return "pretraining"
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(contents.get(wrapper), Mapping):
            weights = dict(contents.pop(wrapper))
            _check_known(path, contents, DROPPED_ENTRIES)
            contents.clear()
            contents.update(weights)
    names = [name.removeprefix("module.") for name in contents]
    if any(name.startswith("base.") for name in names):
        return "reid"
    if any(name.removeprefix("backbone.") == "patch_embed.proj.weight" for name in names):
        return "backbone"
    raise ValueError(
        f"{path}: not an official PersonViT checkpoint: found neither `teacher`, `base.*` nor "
        f"`patch_embed.proj.weight` among its keys, which start with {sorted(contents)[:5]}."
    )


def _check_known(path: str | Path, entries: Mapping, known: Mapping | set) -> None:
    unknown = sorted(set(entries) - set(known))
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} unknown entries beside the weights: {unknown[:5]}.")


def _split(path: str | Path, weights: Mapping[str, torch.Tensor], *parts: str) -> dict[str, Tensors]:
    """Groups weights by their first word, `parts`, without the `module.` of distributed runs."""
    groups: dict[str, Tensors] = {part: {} for part in parts}
    for name, tensor in weights.items():
        part, _, rest = name.removeprefix("module.").partition(".")
        if part not in groups:
            raise ValueError(f"{path}: unknown key `{name}`; expected keys that start with {' or '.join(parts)}.")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: `{name}` should be a tensor, found {type(tensor).__name__}.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: `{name}` holds NaN or infinite values.")
        groups[part][rest] = tensor.float() if tensor.is_floating_point() else tensor
    return groups


def _rename(path: str | Path, weights: Tensors, names: Mapping[str, str], prefix: str) -> Tensors:
    """Renames by the table, with or without a trailing `.weight` or `.bias`; an unknown key is an error."""
    renamed = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if name in names:
            renamed[prefix + names[name]] = tensor
        elif stem in names and kind in ("weight", "bias"):
            renamed[f"{prefix}{names[stem]}.{kind}"] = tensor
        else:
            raise ValueError(f"{path}: unknown key `{name}`: no part of PersonViT has such a weight.")
    return renamed


def _backbone_weights(path: str | Path, weights: Tensors) -> Tensors:
    """Backbone weights under our names."""
    outside, renamed = {}, {}
    for name, tensor in weights.items():
        layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if layer is None:
            outside[name] = tensor
            continue
        index, part = layer.groups()
        renamed |= _rename(path, {part: tensor}, LAYER_NAMES, f"layers.{index}.")
    renamed |= _rename(path, outside, BACKBONE_NAMES, "")
    mask_token = renamed.get("embeddings.mask_token")
    if mask_token is not None and mask_token.ndim == 2:
        renamed["embeddings.mask_token"] = mask_token[None]
    return renamed


def _native_image_size(path: str | Path, num_patches: int, patch_size: int) -> list[int]:
    """[height, width] in pixels that so many patches cover: twice as high as wide, else a square."""
    for ratio in (2, 1):
        columns = math.isqrt(num_patches // ratio)
        if ratio * columns * columns == num_patches:
            return [ratio * columns * patch_size, columns * patch_size]
    raise ValueError(f"{path}: {num_patches} positions are no 2:1 or square grid; pass `image_size=[height, width]`.")


def _backbone_settings(path: str | Path, weights: Tensors, overrides: dict) -> dict:
    """Settings of PersonViTConfig read off the backbone's tensors; resizes positions to `image_size` in place."""
    positions_name = "embeddings.position_embeddings"
    try:
        projection = weights["embeddings.patch_embeddings.projection.weight"]
        positions = weights[positions_name]
        intermediate_size = weights["layers.0.mlp.fc1.weight"].shape[0]
        hidden_size, num_channels, patch_size, _ = projection.shape
        num_positions = positions.shape[1] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a ViT backbone: {error} is missing or of another shape.") from error
    if hidden_size % 64 and "num_attention_heads" not in overrides:
        raise ValueError(
            f"{path}: can't tell the number of attention heads of a width of {hidden_size}: "
            "pass `num_attention_heads`."
        )
    settings = {
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        "intermediate_size": intermediate_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "qkv_bias": "layers.0.attention.qkv_proj.bias" in weights,
    }
    if "embeddings.side_embeddings" in weights:
        settings["num_cameras"] = len(weights["embeddings.side_embeddings"])
    config = PersonViTConfig(**settings | overrides)
    if "image_size" not in overrides or math.prod(config.patch_grid(*config.image_size)) != num_positions:
        native = _native_image_size(path, num_positions, patch_size)
        settings["image_size"] = native
        if "image_size" in overrides:
            grids = config.patch_grid(*native), config.patch_grid(*config.image_size)
            weights[positions_name] = resize_position_embeddings(positions, *grids)
    return settings | overrides


def _load(path: str | Path, model: nn.Module, weights: Tensors, optional: set[str] = frozenset()):
    """Loads strictly: every key must be there with its shape, but for the `optional` ones."""
    state = model.state_dict()
    missing = sorted(set(state) - set(weights) - optional)
    unexpected = sorted(set(weights) - set(state))
    shapes = [
        f"{name}: {tuple(weights[name].shape)} instead of {tuple(state[name].shape)}"
        for name in sorted(set(state) & set(weights))
        if weights[name].shape != state[name].shape
    ]
    for what, names in (("lacks", missing), ("has no place for", unexpected), ("has other shapes in", shapes)):
        if names:
            raise ValueError(f"{path}: the checkpoint {what} {len(names)} of {len(state)} weights: {names[:5]}.")
    model.load_state_dict(weights, strict=False)
    return model


def _log_dropped(path: str | Path, names: list[str], reason: str) -> None:
    if names:
        logger.info("%s: left out %s (%s).", path, ", ".join(sorted(names)), reason)


def _convert_backbone(path: str | Path, contents: dict, kind: str, overrides: dict) -> PersonViTModel:
    if kind == "pretraining":
        _check_known(path, contents, {"teacher", "student", "ibot_loss", *DROPPED_ENTRIES})
        parts = _split(path, contents["teacher"], "backbone", "head")
        weights = _backbone_weights(path, parts["backbone"])
        # only the student is ever masked, so the mask token is the student's
        student = _split(path, contents.get("student", {}), "backbone", "head")["backbone"]
        if "masked_embed" in student and "embeddings.mask_token" not in weights:
            weights["embeddings.mask_token"] = student["masked_embed"].reshape(1, 1, -1)
        _log_dropped(path, ["student", "head", "ibot_loss"], "the target is the teacher's backbone")
    elif kind == "reid":
        weights, dropped = _reid_backbone(path, _split(path, contents, "base", "bottleneck", "classifier")["base"])
        _log_dropped(path, [*dropped, "bottleneck", "classifier"], "the target is the backbone")
    else:
        bare = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in contents.items()}
        bare = _split(path, {f"backbone.{name}": value for name, value in bare.items()}, "backbone")["backbone"]
        weights = _backbone_weights(path, bare)
    settings = _backbone_settings(path, weights, overrides)
    return _load(path, PersonViTModel(PersonViTConfig(**settings)), weights, {"embeddings.mask_token"})


def _convert_pretraining(path: str | Path, contents: dict, kind: str, overrides: dict) -> PersonViTForPreTraining:
    if kind != "pretraining" or "student" not in contents:
        raise ValueError(f"{path}: target 'pretraining' needs a file with `student` and `teacher`, this is a {kind}.")
    _check_known(path, contents, {"teacher", "student", "ibot_loss", *DROPPED_ENTRIES})
    _log_dropped(path, [name for name in DROPPED_ENTRIES if name in contents], "not part of the model")
    weights: Tensors = {}
    shared = {}
    for role, prefix in (("student", "student."), ("teacher", "personvit.")):
        parts = _split(path, contents[role], "backbone", "head")
        head = parts["head"]
        # a shared head stands twice in the file, under both names
        names = [name for name in head if name.startswith("last_layer2.")]
        shared[role] = not names or all(
            torch.equal(head[name], head.get(name.replace("last_layer2", "last_layer"), torch.empty(0)))
            for name in names
        )
        if shared[role]:
            head = {name: tensor for name, tensor in head.items() if name not in names}
        weights |= {prefix + name: tensor for name, tensor in _backbone_weights(path, parts["backbone"]).items()}
        weights |= _rename(path, head, HEAD_NAMES, f"{role}_head.")
    student = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    settings = _backbone_settings(path, student, overrides)
    if student["embeddings.position_embeddings"] is not weights["student.embeddings.position_embeddings"]:
        raise ValueError(f"{path}: target 'pretraining' keeps the file's own image size; leave out `image_size`.")
    weights["personvit.embeddings.mask_token"] = weights["student.embeddings.mask_token"]
    head = {name.removeprefix("student_head."): value for name, value in weights.items()}
    gains = [value for name, value in head.items() if name.endswith("_prototypes.gain")]
    heads = {
        "share_projection_head": shared["student"],
        "share_teacher_projection_head": shared["teacher"],
        "projection_hidden_size": head["mlp.0.weight"].shape[0],
        "projection_bottleneck_size": head["mlp.4.weight"].shape[0],
        "num_cls_prototypes": head["cls_prototypes.direction"].shape[0],
        "num_patch_prototypes": head.get("patch_prototypes.direction", head["cls_prototypes.direction"]).shape[0],
        # iBOT fixes gains at 1 if at all
        "norm_last_layer": all(bool((gain == 1).all()) for gain in gains),
    }
    for ours, official in (("center", "center"), ("patch_center", "center2")):
        if "ibot_loss" in contents:
            weights[ours] = contents["ibot_loss"][official].float().flatten()
    model = PersonViTForPreTraining(PersonViTConfig(**heads | settings))
    return _load(path, model, weights, {"center", "patch_center"})


def _reid_backbone(path: str | Path, base: Tensors) -> tuple[Tensors, list[str]]:
    """The backbone of a fine-tuned file, and its keys that are left out: TransReID keeps an unused classifier."""
    dropped = [name for name in base if name.startswith("fc.")]
    return _backbone_weights(path, {name: value for name, value in base.items() if name not in dropped}), dropped


def _convert_reid(path: str | Path, contents: dict, kind: str, overrides: dict) -> PersonViTForReID:
    if kind != "reid":
        raise ValueError(f"{path}: target 'reid' needs a fine-tuned file with `base.*` keys, this is a {kind} file.")
    parts = _split(path, contents, "base", "bottleneck", "classifier")
    backbone, dropped = _reid_backbone(path, parts["base"])
    _log_dropped(path, dropped, "TransReID's unused classifier")
    settings = _backbone_settings(path, backbone, overrides)
    weights = {f"personvit.{name}": value for name, value in backbone.items()}
    weights |= {f"bottleneck.{name}": value for name, value in parts["bottleneck"].items()}
    weights |= {f"classifier.{name}": value for name, value in parts["classifier"].items()}
    if "classifier.weight" not in weights:
        raise ValueError(f"{path}: the checkpoint lacks `classifier.weight`.")
    settings.setdefault("num_labels", weights["classifier.weight"].shape[0])
    return _load(path, PersonViTForReID(PersonViTConfig(**settings)), weights)
