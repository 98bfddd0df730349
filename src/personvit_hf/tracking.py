"""Appearance features for trackers: a frame and its boxes in, unit vectors out; and an ONNX file for BoxMOT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .embedding import embed_images
from .export import export_onnx
from .loading import load_embedder
from .modeling_personvit import PersonViTForReID, PersonViTModel

# What BoxMOT feeds every ReID model whose name says nothing else (`reid/backends/base_backend.py`).
BOXMOT_SIZE = (256, 128)


class TrackerEmbedder:
    """Features of the people in a frame, in the forms that trackers ask for.

    - deep-sort-realtime: `tracker = DeepSort(embedder=None); tracker.embedder = embedder`, then
      `tracker.update_tracks(detections, frame=frame)`;
    - BoxMOT's ReID models: `get_features(boxes, frame)`;
    - others: the same call, with the result handed over as the detections' embeddings.

    Args:
        model: PersonViTModel or PersonViTForReID, on any device.
        processor: The model's own image processor.
        batch_size: Boxes a forward pass.
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor, batch_size: int = 64):
        self.model, self.processor, self.batch_size = model, processor, batch_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, neck_feature: str | None = None, device: str | torch.device | None = None
    ) -> TrackerEmbedder:
        """An embedder of a checkpoint.

        Args:
            name_or_path: Folder or Hub name.
            neck_feature: "before" or "after" the BNNeck, for fine-tuned models; as the checkpoint has it if not given.
                Trackers compare distances with a threshold: after the BNNeck, which takes the features' mean away,
                they spread, while before it all can lie close to 0.
            device: Where to compute; a GPU if there is one, if not given.

        Raises:
            OSError, ValueError: As in `load_embedder`; or there is no neck, or no such place.
        """
        model, processor = load_embedder(name_or_path, dtype=torch.float32)
        if neck_feature is not None:
            if not isinstance(model, PersonViTForReID) or neck_feature not in ("before", "after"):
                raise ValueError(
                    f"`neck_feature` must be 'before' or 'after', for a fine-tuned model; got {neck_feature!r} for a "
                    f"{type(model).__name__}."
                )
            model.config.neck_feature = neck_feature
        return cls(model.to(device or PartialState().device), processor)

    def get_features(self, boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Features of the boxes of a frame.

        Args:
            boxes: float or int (boxes, 4 or more): left, top, right, bottom in pixels; further columns are ignored. A
                box of no size, or outside the frame altogether, counts as a black picture, as in BoxMOT.
            frame: uint8 (height, width, 3) BGR, as OpenCV reads it.

        Returns:
            float32 (boxes, hidden), each of length 1.

        Raises:
            ValueError: The frame is no such image, or the boxes are no such array, not finite, or have right before
                left or bottom above top, as boxes of another format do.
        """
        _require_bgr("frame", frame)
        boxes = np.asarray(boxes, np.float64)
        if boxes.size == 0:
            return np.zeros((0, self.model.config.hidden_size), np.float32)
        if boxes.ndim != 2 or boxes.shape[1] < 4 or not np.isfinite(boxes[:, :4]).all():
            raise ValueError(f"`boxes` must be finite (boxes, 4 or more), got {boxes.shape}.")
        inverted = np.flatnonzero((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]))
        if inverted.size:
            found = boxes[inverted[0], :4].tolist()
            raise ValueError(
                f"`boxes` must be left, top, right, bottom (not width, height), got {found} for box {inverted[0]}."
            )
        height, width = frame.shape[:2]
        corners = np.clip(boxes[:, :4].round(), 0, [width, height, width, height]).astype(int)
        return self._embed([frame[top:bottom, left:right] for left, top, right, bottom in corners])

    def predict(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features of crops, as deep-sort-realtime asks for them.

        Args:
            crops: uint8 (height, width, 3) BGR, each of any size.

        Returns:
            One float32 (hidden,) of length 1 for each.

        Raises:
            ValueError: A crop is no such image.
        """
        for index, crop in enumerate(crops):
            _require_bgr(f"crops[{index}]", crop)
        return list(self._embed(list(crops)))

    def _embed(self, crops: list[np.ndarray]) -> np.ndarray:
        if not crops:
            return np.zeros((0, self.model.config.hidden_size), np.float32)
        black = np.zeros((*BOXMOT_SIZE, 3), np.uint8)
        pictures = [np.ascontiguousarray(crop[:, :, ::-1]) if crop.size else black for crop in crops]
        return embed_images(self.model, self.processor, pictures, batch_size=self.batch_size)


def _require_bgr(name: str, image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"`{name}` must be uint8 (height, width, 3) BGR, got {getattr(image, 'dtype', type(image).__name__)} "
            f"{getattr(image, 'shape', '')}."
        )


class _FromBoxMOT(nn.Module):
    """Pixels as BoxMOT gives them, float32 (batch, 3, 256, 128) by ImageNet's statistics, to a model's own."""

    def __init__(self, processor: BaseImageProcessor):
        super().__init__()
        self.size = (processor.size["height"], processor.size["width"])
        theirs, own = torch.tensor(IMAGENET_DEFAULT_STD), torch.tensor(processor.image_std)
        shift = (torch.tensor(IMAGENET_DEFAULT_MEAN) - torch.tensor(processor.image_mean)) / own
        self.register_buffer("scale", (theirs / own).view(3, 1, 1))
        self.register_buffer("shift", shift.view(3, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values * self.scale + self.shift
        if self.size != BOXMOT_SIZE:
            pixel_values = nn.functional.interpolate(pixel_values, self.size, mode="bilinear", align_corners=False)
        return pixel_values


def export_boxmot(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    file: str | Path,
    *,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes an ONNX file that BoxMOT takes as its ReID model.

    BoxMOT resizes crops to 256x128 and normalises them by ImageNet's mean and deviation, whatever the model; what this
    model was trained with instead is made from that inside the file. Its name must hold that of a model that BoxMOT
    knows, which it builds and doesn't use: `osnet_x0_25_personvit.onnx`.

    Args:
        model: What to export.
        processor: Its image processor: size and statistics.
        file: Where to write, ending in `.onnx`.
        half: Weights of 16 bits, as in `export_onnx`.
        overwrite: Replace an existing file.

    Raises:
        ImportError, ValueError, FileExistsError: As in `export_onnx`.
    """
    theirs = copy.deepcopy(processor)
    theirs.size = {"height": BOXMOT_SIZE[0], "width": BOXMOT_SIZE[1]}
    theirs.image_mean, theirs.image_std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    export_onnx(model, theirs, file, half=half, overwrite=overwrite, prepare=_FromBoxMOT(processor))
