"""Official PersonViT checkpoints in: files of the pre-training and fine-tuning code to this package's models."""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
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
OFFICIAL_NAMES = {ours: official for official, ours in (BACKBONE_NAMES | HEAD_NAMES).items()}
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
    targets = {"backbone": _convert_backbone, "pretraining": _convert_pretraining, "reid": _convert_reid}
    if target not in ("auto", *targets):
        raise ValueError(f"`target` must be 'auto', 'backbone', 'pretraining' or 'reid', got {target!r}.")
    contents = read_checkpoint(Path(path))
    kind = _kind(path, contents)
    if target == "auto":
        target = "reid" if kind == "reid" else "backbone"
    try:
        model = targets[target](path, contents, kind, config_overrides)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: its sizes and the overrides {config_overrides} don't fit: {error}") from error
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
    except Exception as error:  # from bytes of any origin the unpickler raises errors of a dozen types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a checkpoint that can be read safely ({reason}). Only tensors and plain values are accepted."
        ) from error
    return dict(_mapping(path, "the file", contents))


def _mapping(path: str | Path, name: str, value: object) -> Mapping:
    """The value if it is a dictionary whose keys are text."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: {name} should hold a dictionary of named entries, found {type(value).__name__}.")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{path}: {name} should hold a dictionary of named entries, one is called {key!r}.")
    return value


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
        _check_known(path, contents, {"teacher", "student", "ibot_loss", *DROPPED_ENTRIES})
        return "pretraining"
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(contents.get(wrapper), Mapping):
            weights = dict(_mapping(path, f"`{wrapper}`", contents.pop(wrapper)))
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


def _split(path: str | Path, weights: Mapping[str, object], *parts: str) -> dict[str, Tensors]:
    """Groups weights by their first word, one of `parts`, without the `module.` of distributed runs."""
    groups: dict[str, Tensors] = {part: {} for part in parts}
    for name, tensor in weights.items():
        part, _, rest = name.removeprefix("module.").partition(".")
        if part not in groups:
            raise ValueError(f"{path}: unknown key `{name}`; expected keys that start with {' or '.join(parts)}.")
        if rest in groups[part]:
            raise ValueError(f"{path}: `{part}.{rest}` stands twice in the file, once with `module.` before it.")
        groups[part][rest] = _checked(path, name, tensor)
    return groups


def _checked(path: str | Path, name: str, tensor: object) -> torch.Tensor:
    """The weight in float32 (counters as they are), if it is a tensor of finite numbers."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: `{name}` should be a tensor, found {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: `{name}` holds NaN or infinite values.")
    return tensor.float()


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


def _shape(path: str | Path, weights: Tensors, name: str, meaning: str) -> tuple[int, ...]:
    """The shape of a weight, which must be there with as many axes as `meaning` names."""
    official = OFFICIAL_NAMES.get(name) or OFFICIAL_NAMES.get(name.rpartition(".")[0], name)
    if name not in weights:
        raise ValueError(f"{path}: the checkpoint lacks `{name}` (`{official}` in official files).")
    if weights[name].ndim != meaning.count(",") + 1 or 0 in weights[name].shape:
        raise ValueError(
            f"{path}: `{name}` (`{official}` in official files) should be ({meaning}), "
            f"found {tuple(weights[name].shape)}."
        )
    return tuple(weights[name].shape)


def _backbone_settings(path: str | Path, weights: Tensors, overrides: dict) -> dict:
    """Settings of PersonViTConfig read off the backbone's tensors; resizes positions to `image_size` in place."""
    positions_name = "embeddings.position_embeddings"
    hidden_size, num_channels, patch_size, _ = _shape(
        path, weights, "embeddings.patch_embeddings.projection.weight", "hidden, channels, patch, patch"
    )
    num_patches = _shape(path, weights, positions_name, "1, 1 + patches, hidden")[1] - 1
    if num_patches < 1:
        raise ValueError(f"{path}: `pos_embed` has no position for a patch.")
    if hidden_size % 64 and "num_attention_heads" not in overrides:
        raise ValueError(
            f"{path}: can't tell the number of attention heads of a width of {hidden_size}: "
            "pass `num_attention_heads`."
        )
    settings = {
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_hidden_layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        "intermediate_size": _shape(path, weights, "layers.0.mlp.fc1.weight", "intermediate, hidden")[0],
        "patch_size": patch_size,
        "num_channels": num_channels,
        "qkv_bias": any(name.endswith(".qkv_proj.bias") for name in weights),
    }
    if "embeddings.side_embeddings" in weights:
        settings["num_cameras"] = len(weights["embeddings.side_embeddings"])
    if "image_size" in overrides:
        config = PersonViTConfig(**settings | overrides)
        if math.prod(config.patch_grid(*config.image_size)) == num_patches:
            return settings | overrides
    settings["image_size"] = _native_image_size(path, num_patches, patch_size)
    config = PersonViTConfig(**settings | overrides)
    native_grid = tuple(side // patch_size for side in settings["image_size"])
    grid = config.patch_grid(*config.image_size)
    if grid != native_grid:
        weights[positions_name] = resize_position_embeddings(weights[positions_name], native_grid, grid)
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
        parts = _split(path, _mapping(path, "`teacher`", contents["teacher"]), "backbone", "head")
        weights = _backbone_weights(path, parts["backbone"])
        # only the student is ever masked, so the mask token is the student's
        student = _split(path, _mapping(path, "`student`", contents.get("student", {})), "backbone", "head")
        if "masked_embed" in student["backbone"]:
            weights["embeddings.mask_token"] = student["backbone"]["masked_embed"].reshape(1, 1, -1)
        _log_dropped(path, ["student", "head", "ibot_loss"], "the target is the teacher's backbone")
    elif kind == "reid":
        weights, dropped = _reid_backbone(path, _split(path, contents, "base", "bottleneck", "classifier")["base"])
        _log_dropped(path, [*dropped, "bottleneck", "classifier"], "the target is the backbone")
    else:
        # some files put `backbone.` before each name and some don't, with or without `module.`
        prefixed = {
            name if "backbone." in name else re.sub(r"^(module\.)?", r"\1backbone.", name, count=1): value
            for name, value in contents.items()
        }
        weights = _backbone_weights(path, _split(path, prefixed, "backbone")["backbone"])
    settings = _backbone_settings(path, weights, overrides)
    return _load(path, PersonViTModel(PersonViTConfig(**settings)), weights, {"embeddings.mask_token"})


def _convert_pretraining(path: str | Path, contents: dict, kind: str, overrides: dict) -> PersonViTForPreTraining:
    if kind != "pretraining" or "student" not in contents:
        raise ValueError(f"{path}: target 'pretraining' needs a file with `student` and `teacher`, this is a {kind}.")
    _log_dropped(path, [name for name in DROPPED_ENTRIES if name in contents], "not part of the model")
    backbones, heads, shared = {}, {}, {}
    for role in ("student", "teacher"):
        parts = _split(path, _mapping(path, f"`{role}`", contents[role]), "backbone", "head")
        backbones[role] = _backbone_weights(path, parts["backbone"])
        head, shared[role] = _without_repetition(parts["head"])
        heads[role] = _rename(path, head, HEAD_NAMES, "")
    _shape(path, backbones["student"], "embeddings.mask_token", "1, 1, hidden")
    # only the student is ever masked, so the teacher's copy of the mask token is the student's
    backbones["teacher"]["embeddings.mask_token"] = backbones["student"]["embeddings.mask_token"]
    settings = _head_settings(path, heads["student"], shared)
    for backbone in backbones.values():
        settings |= _backbone_settings(path, backbone, overrides)
    weights = {f"student.{name}": value for name, value in backbones["student"].items()}
    weights |= {f"personvit.{name}": value for name, value in backbones["teacher"].items()}
    weights |= {f"{role}_head.{name}": value for role in heads for name, value in heads[role].items()}
    if "ibot_loss" in contents:
        centers = _mapping(path, "`ibot_loss`", contents["ibot_loss"])
        _check_known(path, centers, {"center", "center2"})
        for ours, official in (("center", "center"), ("patch_center", "center2")):
            if official not in centers:
                raise ValueError(f"{path}: `ibot_loss` lacks `{official}`.")
            weights[ours] = _checked(path, f"ibot_loss.{official}", centers[official]).flatten()
    model = PersonViTForPreTraining(PersonViTConfig(**settings))
    return _load(path, model, weights, {"center", "patch_center"})


def _without_repetition(head: Tensors) -> tuple[Tensors, bool]:
    """A head without the second copy of its prototypes, and whether it had one: so iBOT writes a shared head."""
    second = [name for name in head if name.startswith("last_layer2.")]
    for name in second:
        first = head.get(name.replace("last_layer2", "last_layer"))
        if first is None or not torch.equal(head[name], first):
            return head, False
    return {name: tensor for name, tensor in head.items() if name not in second}, True


def _head_settings(path: str | Path, head: Tensors, shared: dict[str, bool]) -> dict:
    """Settings of PersonViTConfig read off the student's projection head."""
    num_cls_prototypes, bottleneck = _shape(path, head, "cls_prototypes.direction", "prototypes, bottleneck")
    gains = [value for name, value in head.items() if name.endswith("_prototypes.gain")]
    return {
        "share_projection_head": shared["student"],
        "share_teacher_projection_head": shared["teacher"],
        "projection_hidden_size": _shape(path, head, "mlp.0.weight", "projection hidden, hidden")[0],
        "projection_bottleneck_size": bottleneck,
        "num_cls_prototypes": num_cls_prototypes,
        "num_patch_prototypes": len(head.get("patch_prototypes.direction", head["cls_prototypes.direction"])),
        # iBOT fixes gains at 1 if at all
        "norm_last_layer": all(bool((gain == 1).all()) for gain in gains),
    }


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
