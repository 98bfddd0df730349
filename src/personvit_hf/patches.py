"""What a model computes for each patch: features, parts found by clustering them, matches, and attention to them.

Arrays in and out; `visualization` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from .plain_vit import backbone_and_neck

_BATCH_SIZE = 16


@dataclass(frozen=True)
class PatchTokens:
    """What the backbone makes of some images, by patch.

    Attributes:
        images: uint8 (images, height, width, 3) RGB, resized as the model saw them, not normalised.
        tokens: float32 (images, rows, columns, hidden), of length 1 along `hidden`.
        attention: float32 (images, heads, rows, columns): the share of [CLS]'s attention that each patch gets; what
            [CLS] and part tokens get is missing from the sum of 1.
        embeddings: float32 (images, hidden), the feature for retrieval, of length 1.
        patch_size: Side of a patch in pixels of `images`.
        patch_stride: Pixels from a patch to the next; patches overlap if it is smaller than `patch_size`.
    """

    images: np.ndarray
    tokens: np.ndarray
    attention: np.ndarray
    embeddings: np.ndarray
    patch_size: int
    patch_stride: int

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) in pixels of what a map of the patches covers, cells of `patch_stride` a side."""
        rows, columns = self.tokens.shape[1:3]
        start, step = (self.patch_size - self.patch_stride) / 2, self.patch_stride
        return start, start + columns * step, start + rows * step, start

    def only(self, index: int) -> PatchTokens:
        """The same of one image."""
        here = slice(index, index + 1)
        return replace(
            self,
            images=self.images[here],
            tokens=self.tokens[here],
            attention=self.attention[here],
            embeddings=self.embeddings[here],
        )

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """(x, y) of the middle of a patch, in pixels."""
        half = self.patch_size / 2
        return column * self.patch_stride + half, row * self.patch_stride + half


@torch.inference_mode()
def patch_tokens(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[np.ndarray],
    layer: int = -1,
    image_size: tuple[int, int] | None = None,
) -> PatchTokens:
    """Runs images through a backbone and keeps what it computes for each patch.

    Args:
        model: PersonViTModel, or PersonViTForReID (its backbone is taken), of any stem, stride and part tokens.
        processor: The model's own image processor.
        images: uint8 (height, width, 3) RGB, each of any size.
        layer: Whose attention: -1 is the last, 0 the first.
        image_size: (height, width) in pixels to resize to, in place of the processor's. More patches than the model
            was trained with make finer pictures; position embeddings are interpolated.

    Raises:
        ValueError: There are no images, no such layer, the size can't be cut into patches, or the features are NaN or
            infinite.
    """
    backbone, neck = backbone_and_neck(model)
    config = backbone.config
    if not len(images):
        raise ValueError("`images` must hold at least one image.")
    if not -config.num_hidden_layers <= layer < config.num_hidden_layers:
        raise ValueError(f"`layer` must be one of the {config.num_hidden_layers} layers from 0, or -1, got {layer}.")
    height, width = image_size or (processor.size["height"], processor.size["width"])
    rows, columns = config.patch_grid(height, width)
    first_patch = 1 + config.num_part_tokens
    resample = Image.Resampling(processor.resample)
    seen = np.stack([np.asarray(Image.fromarray(image).resize((width, height), resample)) for image in images])
    attention, tokens, embeddings = [], [], []
    implementation, was_training = config._attn_implementation, model.training
    model.eval()
    backbone.set_attn_implementation("eager")  # the others don't give attention away
    try:
        for start in range(0, len(seen), _BATCH_SIZE):
            pixel_values = processor(
                images=list(seen[start : start + _BATCH_SIZE]),
                do_resize=False,
                input_data_format="channels_last",
                return_tensors="pt",
            ).pixel_values
            outputs = backbone(pixel_values.to(backbone.device), output_attentions=True)
            attention.append(outputs.attentions[layer][:, :, 0, first_patch:].float().cpu())
            tokens.append(_unit(outputs.last_hidden_state[:, first_patch:]))
            embeddings.append(_unit(outputs.pooler_output if neck is None else neck(outputs.pooler_output)))
    finally:
        backbone.set_attn_implementation(implementation)
        model.train(was_training)
    if not all(part.isfinite().all() for part in (*tokens, *embeddings)):
        raise ValueError(
            "The features are NaN or infinite: the weights of the model "
            f"{model.config._name_or_path or type(model).__name__} are damaged, or its image processor's statistics."
        )
    return PatchTokens(
        seen,
        torch.cat(tokens).unflatten(1, (rows, columns)).numpy(),
        torch.cat(attention).unflatten(2, (rows, columns)).numpy(),
        torch.cat(embeddings).numpy(),
        config.patch_size,
        config.patch_stride or config.patch_size,
    )


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def cluster_parts(tokens: np.ndarray, num_parts: int = 6, seed: int = 0) -> np.ndarray:
    """Groups the patches of several images by their features (k-means): what belongs together across people.

    Nothing tells the groups which part of the body they are; background is a group or several, too.

    Args:
        tokens: float32 (images, rows, columns, hidden), as in `PatchTokens`.
        num_parts: Groups.
        seed: Of the starting points.

    Returns:
        int64 (images, rows, columns), groups from 0, numbered from the top of the pictures to the bottom.

    Raises:
        ValueError: There are fewer different patches than groups, or `num_parts` is below 2.
    """
    from sklearn.cluster import KMeans

    points = tokens.reshape(-1, tokens.shape[-1])
    if num_parts < 2 or num_parts > len(np.unique(points, axis=0)):
        raise ValueError(
            f"`num_parts` must be from 2 to the number of different patches ({len(np.unique(points, axis=0))}), "
            f"got {num_parts}."
        )
    labels = KMeans(num_parts, n_init=4, random_state=seed).fit_predict(points).reshape(tokens.shape[:3])
    heights = [np.nonzero(labels == part)[1].mean() for part in range(num_parts)]
    places = np.empty(num_parts, np.int64)
    places[np.argsort(heights, kind="stable")] = np.arange(num_parts)
    return places[labels]


@dataclass(frozen=True)
class PatchMatches:
    """Patches of two images that are each other's most similar.

    Attributes:
        first: int64 (matches, 2), row and column in the first image.
        second: int64 (matches, 2), row and column in the second image.
        similarity: float32 (matches,), cosines, highest first.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


def match_patches(first: np.ndarray, second: np.ndarray) -> PatchMatches:
    """Mutual nearest neighbours among the patches of two images, by cosine; of equal ones the first counts.

    Args:
        first: float32 (rows, columns, hidden), of length 1 along `hidden`.
        second: The same of the other image; rows and columns may differ.

    Raises:
        ValueError: The features differ in width.
    """
    if first.ndim != 3 or second.ndim != 3 or first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"`first` and `second` must be (rows, columns, hidden) of the same width, got {first.shape} and "
            f"{second.shape}."
        )
    similarity = first.reshape(-1, first.shape[-1]) @ second.reshape(-1, second.shape[-1]).T
    forth, back = similarity.argmax(axis=1), similarity.argmax(axis=0)
    mutual = np.flatnonzero(back[forth] == np.arange(len(forth)))
    values = similarity[mutual, forth[mutual]]
    order = np.argsort(-values, kind="stable")
    mutual = mutual[order]
    return PatchMatches(
        np.stack(np.unravel_index(mutual, first.shape[:2]), axis=1),
        np.stack(np.unravel_index(forth[mutual], second.shape[:2]), axis=1),
        values[order],
    )


def occlude(image: np.ndarray, share: float, side: str = "bottom") -> np.ndarray:
    """Hides a part of an image behind plain grey, from one side.

    Args:
        image: uint8 (height, width, 3).
        share: Share of the area to hide, from 0 (nothing) to below 1.
        side: "bottom", "top", "left" or "right".

    Returns:
        uint8 (height, width, 3), a new image.

    Raises:
        ValueError: The share or the side is none of these.
    """
    if not 0 <= share < 1:
        raise ValueError(f"`share` must be at least 0 and below 1, got {share}.")
    sides = {"bottom": (0, True), "top": (0, False), "right": (1, True), "left": (1, False)}
    if side not in sides:
        raise ValueError(f"`side` must be one of {', '.join(sides)}, got {side!r}.")
    axis, from_end = sides[side]
    hidden = round(share * image.shape[axis])
    area = slice(image.shape[axis] - hidden, None) if from_end else slice(None, hidden)
    result = image.copy()
    result[(slice(None),) * axis + (area,)] = 128
    return result
