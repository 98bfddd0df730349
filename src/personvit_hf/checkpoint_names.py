"""What each project calls the weights of a ViT, and what this package calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Weight:
    """A tensor (float32, counters as they are), and what its file calls it."""

    tensor: torch.Tensor
    key: str


Weights = dict[str, Weight]  # by a name within the model, or by one of ours

# PersonViT, iBOT, DINO, TransReID-SSL, TransReID, PASS and timm agree on the names of a backbone's weights.
OFFICIAL_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "part_tokens": "embeddings.part_tokens",  # joined; PASS has part_token1, part_token2, ...
    "masked_embed": "embeddings.mask_token",
    "sie_embed": "embeddings.side_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
OFFICIAL_NAMES |= {
    f"patch_embed.conv.{official}": f"embeddings.patch_embeddings.stem.{ours}"
    for official, ours in {
        **{"0": "0", "1.IN": "1.instance_norm", "1.BN": "1.batch_norm"},
        **{"3": "3", "4.IN": "4.instance_norm", "4.BN": "4.batch_norm"},
        **{"6": "6", "7": "7"},
    }.items()
}
OFFICIAL_LAYER = re.compile(r"blocks\.([0-9]{1,4})\.(.+)")
OFFICIAL_LAYER_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.qkv_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OFFICIAL_HEAD_NAMES = {
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
    "mlp.4": "mlp.4",
    "last_layer.weight_v": "cls_prototypes.direction",
    "last_layer.weight_g": "cls_prototypes.gain",
    "last_layer2.weight_v": "patch_prototypes.direction",
    "last_layer2.weight_g": "patch_prototypes.gain",
}
# transformers' ViT and DeiT, as their files have them, and as version 5 has them in memory.
TRANSFORMERS_NAMES = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.mask_token": "embeddings.mask_token",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embeddings.projection",
    "layernorm": "layernorm",
}
TRANSFORMERS_LAYER = re.compile(r"(?:encoder\.layer|layers)\.([0-9]{1,4})\.(.+)")
TRANSFORMERS_LAYER_NAMES = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
TRANSFORMERS_LAYER_NAMES |= {name: name for name in TRANSFORMERS_LAYER_NAMES.values()}
OUR_LAYER = re.compile(r"layers\.([0-9]{1,4})\.(.+)")
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

# What stands in backbones and has no place here, and why.
LEFT_OUT_OF_OFFICIAL = {
    r"head(_dist)?\.(weight|bias)": "classifier of ImageNet",
    r"pre_logits\.fc\.(weight|bias)": "layer before the classifier of ImageNet-21k",
    r"fc\.(weight|bias)": "classifier that TransReID never uses",
    r"dist_token": "distillation token of DeiT: ReID works without it, as TransReID does",
    r"gem\.p": "exponent of a pooling that the feature does not use",
    r"mask_token|decoder_.+": "decoder of MAE",
}
LEFT_OUT_OF_TRANSFORMERS = {
    r"pooler\.dense\.(weight|bias)": "pooling layer: the feature is the [CLS] token itself",
    r"((cls_|distillation_)?classifier)\.(weight|bias)": "classifier of ImageNet",
    r"embeddings\.distillation_token": "distillation token of DeiT: ReID works without it, as TransReID does",
    r"decoder\..+": "decoder of masked image modelling",
}
DISTILLATION_TOKENS = {"dist_token", "embeddings.distillation_token"}


def checked_weight(path: str | Path, key: str, tensor: object) -> Weight:
    """A weight of a file, if it is a tensor of finite numbers."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: `{key}` should be a tensor, found {type(tensor).__name__}.")
    if key.endswith("num_batches_tracked") and tensor.dtype == torch.int64:
        return Weight(tensor, key)
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: `{key}` should hold floating point numbers, found {tensor.dtype}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: `{key}` holds NaN or infinite values.")
    return Weight(tensor.float(), key)


def renamed(path: str | Path, weights: Weights, names: Mapping[str, str], prefix: str = "") -> Weights:
    """Weights outside of layers under our names, `prefix` before them; an unknown one is an error."""
    ours: Weights = {}
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(".")
        if name in names:
            new_name = names[name]
        elif stem in names and leaf in LEAVES:
            new_name = f"{names[stem]}.{leaf}"
        else:
            raise ValueError(f"{path}: unknown key `{weight.key}`: no part of PersonViT has such a weight.")
        if prefix + new_name in ours:
            raise ValueError(f"{path}: `{weight.key}` and `{ours[prefix + new_name].key}` are the same weight.")
        ours[prefix + new_name] = weight
    return ours


def without(weights: Weights, reasons: Mapping[str, str], left_out: dict[str, str]) -> Weights:
    """The weights whose names match no pattern in `reasons`; of the others, `left_out` gets key and reason."""
    kept: Weights = {}
    for name, weight in weights.items():
        reason = next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            kept[name] = weight
        else:
            left_out[weight.key] = reason
    return kept


def backbone_from_official(path: str | Path, weights: Weights, left_out: dict[str, str]) -> Weights:
    """The backbone's weights under our names, from those of PersonViT, iBOT, DINO, TransReID, PASS or timm.

    Args:
        path: The file, for errors.
        weights: By official name, without any prefix.
        left_out: Gets the keys that have no place here, each with the reason.

    Raises:
        ValueError: for an unknown key.
    """
    distilled = bool(DISTILLATION_TOKENS & set(weights))
    weights = _with_joined_parts(path, without(weights, LEFT_OUT_OF_OFFICIAL, left_out))
    ours = _by_layer(path, weights, OFFICIAL_LAYER, OFFICIAL_LAYER_NAMES, OFFICIAL_NAMES)
    mask_token = ours.get("embeddings.mask_token")
    if mask_token is not None and mask_token.tensor.ndim == 2:
        ours["embeddings.mask_token"] = Weight(mask_token.tensor[None], mask_token.key)
    return _without_distillation_position(ours) if distilled else ours


def backbone_from_transformers(path: str | Path, weights: Weights, left_out: dict[str, str]) -> Weights:
    """The same from the names of transformers' ViT or DeiT, where query, key and value are apart."""
    distilled = bool(DISTILLATION_TOKENS & set(weights))
    weights = without(weights, LEFT_OUT_OF_TRANSFORMERS, left_out)
    ours = _by_layer(path, weights, TRANSFORMERS_LAYER, TRANSFORMERS_LAYER_NAMES, TRANSFORMERS_NAMES)
    for name in [name for name in ours if ".attention.q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
        if None in parts or len({weight.tensor.shape for weight in parts}) != 1:
            found = ["none" if weight is None else str(tuple(weight.tensor.shape)) for weight in parts]
            raise ValueError(f"{path}: query, key and value of `{parts[0].key}` differ in shape: {', '.join(found)}.")
        fused = torch.cat([weight.tensor for weight in parts])
        ours[name.replace("q_proj", "qkv_proj")] = Weight(fused, ", ".join(weight.key for weight in parts))
    return _without_distillation_position(ours) if distilled else ours


def _by_layer(
    path: str | Path, weights: Weights, layer: re.Pattern[str], layer_names: dict[str, str], names: dict[str, str]
) -> Weights:
    """Renames weights of layers by one table and all others by another."""
    groups: dict[str, Weights] = {}
    for name, weight in weights.items():
        match = layer.fullmatch(name)
        prefix, rest = (f"layers.{match[1]}.", match[2]) if match else ("", name)
        groups.setdefault(prefix, {})[rest] = weight
    ours: Weights = {}
    for prefix, group in groups.items():
        ours |= renamed(path, group, layer_names if prefix else names, prefix)
    return ours


def _with_joined_parts(path: str | Path, weights: Weights) -> Weights:
    """PASS keeps part tokens and the positions of [CLS] and parts apart: joined, positions in the tokens' order."""
    count = sum(bool(re.fullmatch(r"part_token[0-9]+", name)) for name in weights)
    if not count:
        return weights
    tokens = [f"part_token{index}" for index in range(1, count + 1)]
    positions = ["cls_pos", *(f"part{index}_pos" for index in range(1, count + 1)), "pos_embed"]
    kept = {name: weight for name, weight in weights.items() if name not in {*tokens, *positions}}
    for new_name, group in (("part_tokens", tokens), ("pos_embed", positions)):
        kept[new_name] = _joined(path, [(name, weights.get(name)) for name in group])
    return kept


def _joined(path: str | Path, parts: Iterable[tuple[str, Weight | None]]) -> Weight:
    """Tensors (1, n, hidden) one after the other along the second axis."""
    tensors, width = [], None
    for name, weight in parts:
        if weight is None:
            raise ValueError(f"{path}: the checkpoint lacks `{name}`.")
        shape = tuple(weight.tensor.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[2] != (width := width or shape[2]):
            raise ValueError(f"{path}: `{weight.key}` should be (1, n, {width or 'hidden'}), found {shape}.")
        tensors.append(weight.tensor)
        key = weight.key
    return Weight(torch.cat(tensors, dim=1), key)


def _without_distillation_position(ours: Weights) -> Weights:
    """Positions without the second one, which is the distillation token's."""
    name = "embeddings.position_embeddings"
    if name in ours and ours[name].tensor.ndim == 3:
        tensor = ours[name].tensor
        ours[name] = Weight(torch.cat((tensor[:, :1], tensor[:, 2:]), dim=1), ours[name].key)
    return ours


def official_name(name: str) -> str:
    """What official files call a weight of our backbone or projection head; the name itself if they have none."""
    names = {ours: official for official, ours in (OFFICIAL_NAMES | OFFICIAL_HEAD_NAMES).items()}
    layer_names = {ours: official for official, ours in OFFICIAL_LAYER_NAMES.items()}
    prefix, table = "", names
    if layer := OUR_LAYER.fullmatch(name):
        prefix, name, table = f"blocks.{layer[1]}.", layer[2], layer_names
    stem, _, leaf = name.rpartition(".")
    return prefix + (table.get(name) or (f"{table[stem]}.{leaf}" if stem in table else name))
