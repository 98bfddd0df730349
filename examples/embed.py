"""Embeds person images and writes the vectors to a .npz file.

    accelerate launch examples/embed.py --model runs/finetune --data photos/ --output features.npz

Several processes share the images. For galleries that don't fit in one file or one run, there is `personvit embed`.

The file holds `embeddings`, float32 (images, hidden) with rows of length 1, and `names`: paths, or row numbers where
the images have none. Settings come from flags, from a YAML file (`--config FILE`), or both.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from personvit_hf import load_person_images
from personvit_hf.distributed import require_connected
from personvit_hf.files import require_writable
from personvit_hf.loading import load_embedder
from personvit_hf.scripting import embed_shared, option, parse_arguments


@dataclass
class EmbedArguments:
    model: str = field(metadata={"help": "Checkpoint folder or Hub name."})
    data: str = field(metadata={"help": "Folder of images, folder or file of parquet, or a Hub data set."})
    output: str = field(metadata={"help": "The .npz file to write."})
    batch_size: int = option(64, "Images a forward pass.", least=1)
    num_workers: int = option(2, "Processes that load images.", least=0)
    max_broken_share: float = option(0.01, "Largest share of broken images, which are left out.", least=0, most=1)


def main() -> None:
    args = parse_arguments(EmbedArguments)
    accelerator = Accelerator()
    require_connected(accelerator)
    model, processor = load_embedder(args.model)
    images = load_person_images(args.data)
    require_writable(Path(args.output))
    embeddings = embed_shared(
        accelerator,
        model.to(accelerator.device),
        processor,
        images,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_broken_share=args.max_broken_share,
        progress=accelerator.is_main_process,
    )
    if not accelerator.is_main_process:
        return
    names = np.array([(row and row["path"]) or f"row {index}" for index, row in enumerate(images["image"])])
    good = ~np.isnan(embeddings[:, 0])
    with open(args.output, "wb") as file:  # given a name, numpy would add .npz to any other ending
        np.savez(file, embeddings=embeddings[good], names=names[good])
    print(f"{args.output}: {good.sum()} embeddings of {embeddings.shape[1]} numbers, {(~good).sum()} images left out")


if __name__ == "__main__":
    main()
