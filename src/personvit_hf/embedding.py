"""Images in, vectors out: the features that retrieval compares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from .person_images import BrokenImage, BrokenImageBudget, PersonImages, decode_image, split_broken


class _ProcessedImages(torch.utils.data.Dataset):
    """(index, pixel values) by index, so that DataLoader workers decode and resize; or a BrokenImage."""

    def __init__(self, images: Sequence[Any] | datasets.Dataset, processor: BaseImageProcessor):
        self.images = PersonImages(images) if isinstance(images, datasets.Dataset) else images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor] | BrokenImage:
        image = self.images[index]
        if isinstance(image, BrokenImage):
            return image
        if not hasattr(image, "__array_interface__"):  # neither a numpy array nor a PIL image
            name = str(image) if isinstance(image, str | os.PathLike) else f"image {index}"
            try:
                image = decode_image(image, name)
            except ValueError as error:
                return BrokenImage(name, str(error))
        return index, self.processor(images=image, return_tensors="pt").pixel_values[0]


@torch.inference_mode()
def embed_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Any] | datasets.Dataset,
    camera_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    max_broken_share: float = 0.0,
    progress: bool = False,
) -> np.ndarray:
    """Embeds person images, in their order.

    Args:
        model: PersonViTModel ([CLS] feature) or PersonViTForReID (`embeddings`), on any device.
        processor: The model's own image processor.
        images: Rows with a column `image`, or a sequence of paths, PIL images, file contents (bytes) or
            uint8 (height, width, 3) RGB arrays.
        camera_ids: Cameras from 0, one an image, for models with `num_cameras`.
        batch_size: Images a forward pass.
        num_workers: Processes that decode and resize; 0 for this one.
        max_broken_share: Largest share of images that may be broken. Those are logged, and their rows are NaN.
        progress: Whether to show a progress bar.

    Returns:
        float32 (images, hidden), each row of length 1 (or NaN).

    Raises:
        ValueError: if `camera_ids` has another length.
        RuntimeError: if more images than `max_broken_share` can't be decoded; they are named.
    """
    if camera_ids is not None and len(camera_ids) != len(images):
        raise ValueError(f"`camera_ids` must have one entry an image: {len(camera_ids)} for {len(images)} images.")
    processed = _ProcessedImages(images, processor)
    loader = DataLoader(
        processed,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=split_broken,
        # of its own, so that scoring a model draws nothing from the generator that its training uses
        generator=torch.Generator(),
    )
    budget = BrokenImageBudget(max_broken_share)
    embeddings = np.full((len(processed), model.config.hidden_size), np.nan, np.float32)
    was_training = model.training
    model.eval()
    try:
        for items, broken in tqdm(loader, desc="Embedding", disable=not progress):
            budget.count(broken, len(items) + len(broken))
            if not items:
                continue
            indices, pixel_values = zip(*items, strict=True)
            sides = {}
            if camera_ids is not None:
                sides["camera_ids"] = torch.tensor([int(camera_ids[i]) for i in indices], device=model.device)
            outputs = model(torch.stack(pixel_values).to(model.device), **sides)
            features = outputs["embeddings"] if "embeddings" in outputs else outputs["pooler_output"]
            embeddings[list(indices)] = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        budget.end_epoch()
    finally:
        model.train(was_training)
    return embeddings
