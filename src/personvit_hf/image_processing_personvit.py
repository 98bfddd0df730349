"""Image processors of PersonViT: a person crop of any size to normalised `pixel_values` of 256x128."""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_transforms import resize as pil_resize
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    torch_pil_interpolation_mapping,
)


class _SavedWithBoth:
    def to_dict(self) -> dict[str, Any]:
        """What is saved. Where it names this file as remote code, it names the classes of both backends."""
        saved = super().to_dict()
        if "auto_map" in saved:
            names = ("PersonViTImageProcessorPil", "PersonViTImageProcessor")
            saved["auto_map"] = {"AutoImageProcessor": [f"image_processing_personvit.{name}" for name in names]}
        return saved


class PersonViTImageProcessor(_SavedWithBoth, TorchvisionBackend):
    r"""
    Turns person crops into `pixel_values`, float32 (batch, 3, height, width).

    A crop is resized to `size` (pixels) whatever its shape was, as re-identification does: the aspect ratio is not
    kept. It is then scaled to [0, 1] and normalised with `image_mean` and `image_std`: ImageNet's for pre-trained
    models, 0.5 for models fine-tuned by the official PersonViT recipe. Each checkpoint carries its own.

    Bytes (uint8) are resized to a height and width by PIL's antialiased bilinear kernel, byte for byte, because that
    is what the official code tests with (PersonViT `transreid_pytorch/datasets/make_dataloader.py`,
    `val_transforms`). torchvision's own, which differs from it by one grey level here and there, resizes tensors on
    another device, floats, and to sizes such as `shortest_edge`.
    """

    _auto_class = "AutoImageProcessor"
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 256, "width": 128}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, **kwargs) -> torch.Tensor:
        """Resizes (..., channels, height, width) images; uint8 ones in main memory exactly as PIL does."""
        resample = torch_pil_interpolation_mapping.get(resample, resample)
        by_pil = image.device.type == "cpu" and image.dtype == torch.uint8 and isinstance(resample, int | None)
        if not (by_pil and size.height and size.width):
            return super().resize(image, size, resample=resample, **kwargs)
        new_size = (size.height, size.width)
        if image.shape[-2:] == new_size:
            return image
        channels_first = ChannelDimension.FIRST
        together = 3 if image.shape[-3] == 3 else 1  # else one by one: PIL takes four for RGBA, and more for nothing
        resized = [
            pil_resize(one, new_size, resample, data_format=channels_first, input_data_format=channels_first)
            for one in image.reshape(-1, together, *image.shape[-2:]).numpy()
        ]
        return torch.from_numpy(np.stack(resized)).reshape(*image.shape[:-2], *new_size)


class PersonViTImageProcessorPil(_SavedWithBoth, PilBackend):
    r"""The same for bytes and a height and width as [`PersonViTImageProcessor`], through PIL and numpy alone."""

    _auto_class = "AutoImageProcessor"
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 256, "width": 128}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: np.ndarray, *args, **kwargs) -> np.ndarray:
        """Resizes (channels, height, width)."""
        if image.shape[0] in (1, 3):
            return super().resize(image, *args, **kwargs)
        resize = super().resize  # channel by channel, as above
        return np.concatenate([resize(channel[None], *args, **kwargs) for channel in image])


__all__ = ["PersonViTImageProcessor", "PersonViTImageProcessorPil"]
