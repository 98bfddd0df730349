"""The stem of three convolutions with instance and batch normalisation that `stem="ics"` puts before the patches."""

import torch
from torch import nn

from .configuration_personvit import PersonViTConfig


class PersonViTIBN(nn.Module):
    """Instance normalisation of the first half of the channels, batch normalisation of the second (IBN-Net)."""

    def __init__(self, num_channels: int):
        super().__init__()
        half = num_channels // 2
        self.instance_norm = nn.InstanceNorm2d(half, affine=True)
        self.batch_norm = nn.BatchNorm2d(num_channels - half)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same."""
        half = self.instance_norm.num_features
        return torch.cat((self.instance_norm(features[:, :half]), self.batch_norm(features[:, half:])), dim=1)


class PersonViTConvolutionStem(nn.Sequential):
    """Pixels (batch, channels, height, width) to features (batch, 64, height / 2, width / 2).

    Three convolutions with IBN after the first two (TransReID-SSL `dino/ours_vit.py`, `PatchEmbed_VOLO`).
    """

    width = 64

    def __init__(self, config: PersonViTConfig):
        width = self.width
        super().__init__(
            nn.Conv2d(config.num_channels, width, 7, stride=2, padding=3, bias=False),
            PersonViTIBN(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            PersonViTIBN(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
