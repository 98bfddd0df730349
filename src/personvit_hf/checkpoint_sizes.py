"""Sizes of a model, read off the tensors of a checkpoint, and its position grid."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint_names import Weight, Weights, official_name
from .checkpoint_sources import Source
from .configuration_personvit import PersonViTConfig

MAX_LAYERS = 256
PATCHES = "embeddings.patch_embeddings"
POSITIONS = "embeddings.position_embeddings"
PART_TOKENS = "embeddings.part_tokens"
MASK_TOKEN = "embeddings.mask_token"
SIDES = "embeddings.side_embeddings"
# (height, width) and strides of TransReID's configurations
USUAL_SIZES, USUAL_STRIDES, USUAL_PATCH = ((256, 128), (384, 128)), (16, 12), 16


def resize_position_embeddings(
    position_embeddings: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Position embeddings of another grid, as the official fine-tuning loads them.

    Bilinear to the exact size without antialiasing (PersonViT `transreid_pytorch/model/backbones/vit_pytorch.py`,
    `resize_pos_embed`); the forward pass at other sizes uses another method,
    `modeling_personvit.interpolate_position_embeddings`.

    Args:
        position_embeddings: float (1, n + rows * columns, hidden), those of [CLS] and the parts first.
        grid: (rows, columns) of `position_embeddings`.
        new_grid: (rows, columns) wanted.

    Returns:
        float (1, n + new rows * new columns, hidden).
    """
    count = grid[0] * grid[1]
    first, patches = position_embeddings[:, :-count], position_embeddings[:, -count:]
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat((first, patches.flatten(2).transpose(1, 2)), dim=1)


def _native_image(source: Source, count: int, size: int, stride: int | None) -> dict[str, Any]:
    """`image_size`, and `patch_stride` where patches overlap, of an image that so many patches cover.

    What a configuration beside the weights says, if it fits; with a `stride`, a usual size of TransReID that it fits;
    else twice as high as wide; else square; else one of TransReID's usual sizes and strides.
    """
    told = source.settings.get("image_size", [])
    if told and not any(side % size for side in told) and math.prod(side // size for side in told) == count:
        return {"image_size": told}
    usual = {
        ((height - size) // step + 1) * ((width - size) // step + 1): (height, width, step)
        for step in (*USUAL_STRIDES, *([stride] if stride else []))
        for height, width in USUAL_SIZES
    }
    height, width, step = usual.get(count, (0, 0, 0))
    if step and step == stride:
        return {"image_size": [height, width], "patch_stride": step}
    for ratio in (2, 1):
        columns = math.isqrt(count // ratio)
        if ratio * columns * columns == count:
            return {"image_size": [ratio * columns * size, columns * size]}
    if step and size == USUAL_PATCH:
        source.notes.append(f"{count} positions are taken as {height}x{width} pixels with stride {step}")
        return {"image_size": [height, width], "patch_stride": step}
    raise ValueError(
        f"{source.path}: {count} positions are no 2:1 or square grid; pass `image_size=[height, width]` (and "
        "`patch_stride`) as it was trained with."
    )


def shape_of(source: Source, weights: Weights, name: str, meaning: str) -> tuple[int, ...]:
    """The shape of a weight, which must be there with as many axes as `meaning` names."""
    if name not in weights:
        raise ValueError(f"{source.path}: the checkpoint lacks `{name}` (`{official_name(name)}` in official files).")
    shape = tuple(weights[name].tensor.shape)
    if len(shape) != meaning.count(",") + 1 or 0 in shape:
        raise ValueError(f"{source.path}: `{weights[name].key}` (our `{name}`) should be ({meaning}), found {shape}.")
    return shape


def commonest_size(weights: Weights, axes: Mapping[str, int]) -> int:
    """The size that most weights agree on; `axes` gives the axis for each pattern of names. 0 if there are none.

    One weight of another shape is then the one that an error names, not all others.
    """
    sizes = [
        weight.tensor.shape[axis]
        for pattern, axis in axes.items()
        for name, weight in weights.items()
        if re.fullmatch(pattern, name) and -weight.tensor.ndim <= axis < weight.tensor.ndim
    ]
    return max(Counter(sizes).items(), key=lambda item: item[1], default=(0, 0))[0]


def backbone_settings(source: Source, weights: Weights, overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings of PersonViTConfig read off the backbone's tensors; resizes positions to `image_size` in place."""
    has_stem = f"{PATCHES}.stem.0.weight" in weights
    projection = f"{PATCHES}.projection.weight"
    _, num_channels, patch, _ = shape_of(source, weights, projection, "hidden, channels, patch, patch")
    shape_of(source, weights, "layers.0.mlp.fc1.weight", "intermediate, hidden")
    widths = {r"embeddings\.cls_token": -1, r"layernorm\.(weight|bias)": 0, r".*\.projection\.weight": 0}
    hidden_size = commonest_size(weights, widths | {r"layers\..*\.mlp\.fc1\.weight": 1})
    if has_stem:
        num_channels = shape_of(source, weights, f"{PATCHES}.stem.0.weight", "width, channels, 7, 7")[1]
    num_layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if num_layers > MAX_LAYERS:
        raise ValueError(f"{source.path}: {num_layers} layers, more than any ViT has.")
    settings = {
        "layer_norm_eps": 1e-12 if source.kind == "transformers" else 1e-6,
        **{name: value for name, value in source.settings.items() if name != "image_size"},
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": commonest_size(
            weights, {r"layers\..*\.fc1\.(weight|bias)": 0, r"layers\..*\.fc2\.weight": 1}
        ),
        "patch_size": patch * (2 if has_stem else 1),
        "num_channels": num_channels,
        "qkv_bias": any(name.endswith(".qkv_proj.bias") for name in weights),
        "stem": "ics" if has_stem else "patch",
    }
    if PART_TOKENS in weights:
        settings["num_part_tokens"] = shape_of(source, weights, PART_TOKENS, "1, parts, hidden")[1]
    if "num_attention_heads" not in overrides | settings:
        if hidden_size % 64:
            raise ValueError(
                f"{source.path}: can't tell the number of attention heads of a width of {hidden_size}: "
                "pass `num_attention_heads`."
            )
        settings["num_attention_heads"] = hidden_size // 64
    return _fit_positions(source, weights, settings | _sides(source, weights, overrides), overrides)


def _sides(source: Source, weights: Weights, overrides: dict[str, Any]) -> dict[str, int]:
    """`num_cameras` of a table of side information, given `num_views`; all rows are cameras if nothing is given."""
    if SIDES not in weights or "num_cameras" in overrides:
        return {}
    rows = shape_of(source, weights, SIDES, "cameras and views, 1, hidden")[0]
    views = overrides.get("num_views", 0)
    return {"num_cameras": 0 if rows == views else rows // max(views, 1)}


def _fit_positions(
    source: Source, weights: Weights, settings: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """The settings with overrides; resizes positions in place if they are of another grid than `image_size`."""
    first = 1 + settings.get("num_part_tokens", 0)
    count = shape_of(source, weights, POSITIONS, "1, 1 + patches, hidden")[1] - first
    if count < 1:
        raise ValueError(f"{source.path}: `{weights[POSITIONS].key}` has no position for a patch.")
    if "image_size" in overrides:
        config = PersonViTConfig(**settings | overrides)
        if math.prod(config.patch_grid(*config.image_size)) == count:
            return settings | overrides
    native_image = _native_image(source, count, settings["patch_size"], overrides.get("patch_stride"))
    config = PersonViTConfig(**settings | native_image | overrides)
    native = PersonViTConfig(**settings | overrides | {"patch_stride": None} | native_image)
    native_grid, grid = native.patch_grid(*native.image_size), config.patch_grid(*config.image_size)
    if grid != native_grid:
        positions = weights[POSITIONS]
        resized = resize_position_embeddings(positions.tensor, native_grid, grid)
        weights[POSITIONS] = Weight(resized, positions.key)
    return settings | native_image | overrides
