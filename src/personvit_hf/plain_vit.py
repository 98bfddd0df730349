"""The backbone as the plain ViT of other libraries: their names for its weights, and what they can't compute."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .configuration_personvit import PersonViTConfig
from .modeling_personvit import PersonViTForReID, PersonViTModel, interpolate_position_embeddings

Tensors = dict[str, torch.Tensor]

# Names of a layer's weights: ours, and those of ViT files on the Hub, where query, key and value are three matrices.
# transformers 4 and 5 read these files alike; 5 renames what it loads.
VIT_LAYER_NAMES = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def check_plain(config: PersonViTConfig, target: str) -> None:
    """Raises a ValueError for models that are no plain ViT, naming what makes the difference."""
    reasons = {
        "a convolutional stem (`stem='ics'`)": config.stem != "patch",
        "part tokens (`num_part_tokens`)": config.num_part_tokens > 0,
        f"overlapping patches (`patch_stride={config.patch_stride}`)": config.patch_stride
        not in (None, config.patch_size),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(f"This model has {' and '.join(found)}, which {target} can't compute: use onnx or torch.")


def backbone_and_neck(
    model: PersonViTModel | PersonViTForReID,
) -> tuple[PersonViTModel, nn.BatchNorm1d | None]:
    """What the feature for retrieval comes from: the backbone, and the BNNeck if it is taken after that."""
    if not isinstance(model, PersonViTForReID):
        return model, None
    return model.personvit, model.bottleneck if model.config.neck_feature == "after" else None


def plain_weights(model: PersonViTModel | PersonViTForReID, size: tuple[int, int]) -> Tensors:
    """The backbone's float32 weights under our names, with positions for `size` and the BNNeck folded in."""
    backbone, neck = backbone_and_neck(model)
    weights = {name: tensor.detach().cpu().float() for name, tensor in backbone.state_dict().items()}
    for name in ("embeddings.mask_token", "embeddings.side_embeddings"):
        weights.pop(name, None)
    weights["embeddings.position_embeddings"] = interpolate_position_embeddings(
        weights["embeddings.position_embeddings"], backbone.embeddings.native_grid, model.config.patch_grid(*size)
    )
    if neck is not None:
        # scale * (gain * x + bias) + shift, in float64 since it is rounded once more than the two steps are
        neck = copy.deepcopy(neck).cpu().double()
        scale = neck.weight / (neck.running_var + neck.eps).sqrt()
        shift = neck.bias - neck.running_mean * scale
        gain, bias = weights["layernorm.weight"].double(), weights["layernorm.bias"].double()
        weights["layernorm.weight"] = (scale * gain).detach().float()
        weights["layernorm.bias"] = (scale * bias + shift).detach().float()
    return weights


def vit_names(weights: Tensors) -> Tensors:
    """Backbone weights under the names of transformers' ViT files."""
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith("layers."):
            renamed[name] = tensor  # outside the layers they are called the same
            continue
        _, index, rest = name.split(".", 2)
        part, _, kind = rest.rpartition(".")
        prefix = f"encoder.layer.{index}"
        if part == "attention.qkv_proj":
            for which, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{which}.{kind}"] = piece
        else:
            renamed[f"{prefix}.{VIT_LAYER_NAMES[part]}.{kind}"] = tensor
    return renamed
