"""People in pictures, by the detectors of torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.models import detection, get_model, list_models

from .checkpoint_reading import read_checkpoint

PERSON_LABEL = 1  # of COCO, on which all of torchvision's detectors are trained


class PersonDetector:
    """A detector of torchvision.

    Args:
        name: Of the model, such as fasterrcnn_mobilenet_v3_large_320_fpn.
        weights: None for torchvision's own, which are fetched once; or a file with them (.pth), for machines without
            network. No code of it is run.
        device: Where to run it; None for a GPU if there is one.

    Raises:
        ValueError: There is no such model, or the weights are of another.
        FileNotFoundError: There is no such file, or torchvision's weights can't be fetched.
    """

    def __init__(self, name: str, weights: str | Path | None = None, device: str | torch.device | None = None) -> None:
        known = list_models(module=detection)
        if name not in known:
            raise ValueError(f"{name}: torchvision has no such detector; it has {', '.join(known)}.")
        if weights is None:
            try:
                model = get_model(name, weights="DEFAULT")
            except OSError as error:
                raise FileNotFoundError(
                    f"{name}: its weights can't be fetched ({error}). Fetch the file on another machine and give its "
                    "path, or give boxes."
                ) from error
        else:
            model = get_model(name, weights=None, weights_backbone=None)
            try:
                model.load_state_dict(read_checkpoint(Path(weights)))
            except RuntimeError as error:
                raise ValueError(f"{weights}: no weights of {name}: {error}") from error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The people in each image.

        Args:
            images: uint8 RGB (height, width, 3).

        Returns:
            For each image float32 (people, 4): left, top, width, height in pixels; and float32 (people,): scores.
        """
        tensors = [torch.from_numpy(image).to(self.device).permute(2, 0, 1).float() / 255 for image in images]
        found = []
        for output in self.model(tensors):
            is_person = output["labels"] == PERSON_LABEL
            boxes = output["boxes"][is_person].cpu().numpy().astype(np.float32)
            boxes[:, 2:] -= boxes[:, :2]
            good = (boxes[:, 2:] > 0).all(axis=1)
            found.append((boxes[good], output["scores"][is_person].cpu().numpy().astype(np.float32)[good]))
        return found
