"""What the tests of the app share: a small checkpoint and a gallery."""

from pathlib import Path

import torch

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor

DATA = str(Path(__file__).parents[1] / "examples" / "data")


def small_checkpoint(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    config = PersonViTConfig(image_size=[64, 32], num_labels=3, initializer_range=0.2, **sizes)
    PersonViTForReID(config).save_pretrained(folder)
    PersonViTImageProcessor(size={"height": 64, "width": 32}).save_pretrained(folder)
    return str(folder)
