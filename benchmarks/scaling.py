"""What pre-training at scale takes: memory, steps, data rate, disk and GPU-hours; docs/scaling.md explains the tables.

Nothing here needs a GPU. Parameters are counted on the meta device, floating point operations of one step by
PyTorch's counter, and what the forward pass keeps for the backward pass by hooks, in bf16 on the CPU with a few
images. The rest is arithmetic on these three and on the assumptions that are flags.

    python benchmarks/scaling.py --preset base
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, losses
from personvit_hf.masking import BlockMasking
from personvit_hf.scripting import checkpoint_layers, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from pretrain import PretrainArguments  # noqa: E402

GPUS = {"A100": 312e12, "H100 SXM": 989e12}  # FLOP/s of dense bf16 products, by NVIDIA's data sheets
LAYOUTS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
GIB = 2**30
DEEPSPEED_BUCKET = 500_000_000  # elements, DeepSpeed's default `reduce_bucket_size`
BYTES_PER_LOGIT = 24  # of a chunk: logits, log-softmax, the teacher's probabilities and gradients, in bf16 and float32


@dataclass
class Arguments:
    recipe: str = field(
        default=str(ROOT / "examples" / "recipes" / "pretrain_luperson.yaml"),
        metadata={"help": "Settings of examples/pretrain.py."},
    )
    preset: str = field(default="base", metadata={"help": "tiny, small, base or large."})
    images: int = field(default=4_180_243, metadata={"help": "Images of the data set; by default LUPerson's."})
    image_kib: float = field(default=10.0, metadata={"help": "Assumed mean size of an encoded image, in KiB."})
    images_per_step: int = field(default=1024, metadata={"help": "Images of an optimizer step, over all GPUs."})
    gpus: list[int] = field(default_factory=lambda: [8, 64], metadata={"help": "Numbers of GPUs."})
    utilisation: float = field(default=0.26, metadata={"help": "Share of the GPU's peak that is reached."})
    images_per_core: float = field(default=489.0, metadata={"help": "Images/s of a core, by benchmarks/data.py."})
    measured_images: int = field(default=4, metadata={"help": "Images of the pass that is measured on the CPU."})


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: trained (the student's), frozen (the teacher's), and all outside the layers."""

    trained: int
    frozen: int
    outside_layers: int


@dataclass(frozen=True)
class StepCost:
    """Of one image in one step: FLOPs of all matrix products, and bytes that the forward pass keeps."""

    flops: float
    kept_bytes: float


def count_parameters(config: PersonViTConfig) -> Sizes:
    """Sizes of the pre-training model, built without memory."""
    with torch.device("meta"):
        model = PersonViTForPreTraining(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_layers = sum(p.numel() for backbone in (model.student, model.personvit) for p in backbone.layers.parameters())
    return Sizes(trained, total - trained, total - in_layers)


def state_bytes(sizes: Sizes, layout: str, processes: int) -> dict[str, float]:
    """Bytes on each GPU that don't depend on the batch.

    Args:
        sizes: Of the model, all in float32.
        layout: One of `LAYOUTS`.
        processes: GPUs that a sharded thing is cut over.

    Returns:
        `student`, `gradients`, `AdamW`, `teacher`; and `buffers`, what the method itself holds for communication:

        - DDP: a bucket for each gradient (`gradient_as_bucket_view` is off in accelerate).
        - ZeRO-1 and -2: the optimizer's own float32 copy of its partition, and with bf16 autocast two buckets of
          `DEEPSPEED_BUCKET` float32 elements.
        - ZeRO-3: two such buckets, one in bf16, and at most all parameters gathered at a time (below DeepSpeed's
          default `stage3_max_live_parameters` of 1e9).
        - FSDP2: all parameters outside the layers gathered in bf16, with their gradients.

    Raises:
        ValueError: for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    trained, frozen = 4.0 * sizes.trained, 4.0 * sizes.frozen
    level = LAYOUTS.index(layout) if layout != "FSDP2" else 3
    buffers = {
        "DDP": trained,
        "ZeRO-1": 8 * DEEPSPEED_BUCKET + trained / processes,
        "ZeRO-2": 8 * DEEPSPEED_BUCKET + trained / processes,
        "ZeRO-3": 6 * DEEPSPEED_BUCKET + trained + frozen,
        "FSDP2": 2 * 2.0 * sizes.outside_layers,
    }
    return {
        "student": trained / (processes if level >= 3 else 1),
        "gradients": trained / (processes if level >= 2 else 1),
        "AdamW": 2 * trained / (processes if level >= 1 else 1),
        "teacher": frozen / (processes if level >= 3 else 1),
        "buffers": buffers[layout],
    }


def pixels_per_image(settings: PretrainArguments) -> int:
    """Bytes of an image's crops as the loaders hand them on, in uint8."""
    return 3 * (2 * math.prod(settings.image_size) + settings.num_local_crops * math.prod(settings.local_size))


def batch_bytes(
    settings: PretrainArguments, config: PersonViTConfig, cost: StepCost, trained: int, batch_size: int
) -> dict[str, float]:
    """Bytes on each GPU of a step with `batch_size` images.

    What the forward pass keeps (scaled up), crops in uint8 and float32, bf16 copies of the weights, and the logits of
    the larger loss, or a chunk of them.
    """
    cls_rows = batch_size * (2 + settings.num_local_crops)
    patch_rows = batch_size * 2 * math.prod(config.patch_grid(*settings.image_size)) * np.mean(settings.mask_ratios)
    logits = max(cls_rows * config.num_cls_prototypes, patch_rows * config.num_patch_prototypes)
    return {
        "activations": cost.kept_bytes * batch_size,
        "crops": 5.0 * pixels_per_image(settings) * batch_size,
        "bf16 weights": 2.0 * trained,
        "logits": float(BYTES_PER_LOGIT * min(logits, losses.MAX_LOGITS_ON_GPU)),
    }


def make_batch(settings: PretrainArguments, config: PersonViTConfig, images: int) -> dict[str, torch.Tensor]:
    """Random crops, and the recipe's masks."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    masking = BlockMasking(
        grid=config.patch_grid(*settings.image_size),
        ratios=tuple(settings.mask_ratios),
        ratio_spreads=tuple(settings.mask_ratio_spreads),
    )
    masks = np.stack([[masking(rng).ravel() for _ in range(2)] for _ in range(images)])
    local = (images, settings.num_local_crops, 3, *settings.local_size)
    return {
        "global_pixel_values": torch.randn(images, 2, 3, *settings.image_size, generator=generator),
        "local_pixel_values": torch.randn(local, generator=generator),
        "bool_masked_pos": torch.from_numpy(masks),
    }


def count_flops(settings: PretrainArguments, config: PersonViTConfig, images: int) -> float:
    """FLOPs an image of forward and backward pass, without stochastic depth (which spares some)."""
    torch.manual_seed(0)
    config = PersonViTConfig(**config.to_dict() | {"drop_path_rate": 0.0}, attn_implementation="eager")
    model = PersonViTForPreTraining(config).train()
    with FlopCounterMode(display=False) as counter:
        model(**make_batch(settings, config, images)).loss.backward()
    return counter.get_total_flops() / images


def measure_kept(
    settings: PretrainArguments, config: PersonViTConfig, images: int, checkpointed: bool = False
) -> float:
    """Bytes an image that the forward pass keeps for the backward pass, under bf16 autocast with sdpa.

    Weights and their bf16 copies are left out, and so are the logits: they are made in chunks, as in large batches.
    """
    torch.manual_seed(0)
    config = PersonViTConfig(**config.to_dict() | {"attn_implementation": "sdpa"})
    model = PersonViTForPreTraining(config).train()
    if checkpointed:
        checkpoint_layers(model)
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    limit = losses.MAX_LOGITS
    losses.MAX_LOGITS = 1  # one row a chunk
    try:
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
        ):
            output = model(**make_batch(settings, config, images))  # held, or what it kept would be freed
    finally:
        losses.MAX_LOGITS = limit
    del output
    return sum(kept.values()) / images


def steps_per_epoch(images: int, batch_size: int, processes: int, accumulation: int = 1) -> int:
    """Optimizer steps of an epoch in examples/pretrain.py, which leaves out what fills no batch."""
    return math.ceil(images // batch_size // processes / accumulation)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("\n" + row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows), sep="\n")


def gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def print_memory(
    args: Arguments, settings: PretrainArguments, config: PersonViTConfig, sizes: Sizes, cost: StepCost
) -> None:
    rows = []
    for layout in LAYOUTS:
        for gpus in args.gpus:
            state = state_bytes(sizes, layout, gpus)
            rows.append([layout, str(gpus), *map(gib, state.values()), gib(sum(state.values()))])
    parts = ["student", "gradients", "AdamW", "teacher", "buffers"]
    print_table(["GiB on each GPU", "GPUs", *parts, "together"], rows)
    rows = []
    for batch_size in (16, 32, 64, 128, 256):
        parts = batch_bytes(settings, config, cost, sizes.trained, batch_size)
        rows.append([str(batch_size), *map(gib, parts.values()), gib(sum(parts.values()))])
    print_table(["images a GPU", *(f"{name}, GiB" for name in parts), "together"], rows)


def print_runs(args: Arguments, settings: PretrainArguments, sizes: Sizes, cost: StepCost) -> None:
    rows = []
    for gpus in args.gpus:
        batch_size = args.images_per_step // gpus
        steps = steps_per_epoch(args.images, batch_size, gpus)
        rate = settings.learning_rate * args.images_per_step / 256
        sent = 2 * (gpus - 1) / gpus * 4 * sizes.trained
        cells = [str(gpus), str(batch_size), f"{steps:,}", f"{steps * settings.epochs:,}", f"{rate:g}"]
        rows.append([*cells, f"{sent / 1e9:.2f}"])
    head = ["GPUs", "images a GPU", "steps an epoch", f"steps in {settings.epochs} epochs", "peak learning rate"]
    print_table([*head, "GB sent by a GPU each step (DDP, ring)"], rows)
    total = cost.flops * args.images * settings.epochs
    rows = []
    for name, peak in GPUS.items():
        speed = peak * args.utilisation / cost.flops
        hours = total / (peak * args.utilisation) / 3600
        days = [f"{hours / gpus / 24:.1f}" for gpus in args.gpus]
        cores = f"{speed / args.images_per_core:.1f}"
        rows.append([name, f"{speed:.0f}", cores, f"{speed * pixels_per_image(settings) / 1e6:.0f}", f"{hours:.0f}"])
        rows[-1] += days
    head = ["GPU", "images/s", "cores that feed it", "MB/s of crops to it", "GPU-hours"]
    print_table([*head, *(f"days on {gpus}" for gpus in args.gpus)], rows)


def print_disk(args: Arguments, settings: PretrainArguments, sizes: Sizes) -> None:
    weights, optimizer = 4 * (sizes.trained + sizes.frozen), 8 * sizes.trained
    checkpoint = weights + optimizer
    checkpoints = settings.keep_checkpoints + 1  # one more while it is written
    rows = [
        ["images", f"{args.images:,} x {args.image_kib:g} KiB (assumed)", gib(args.images * args.image_kib * 1024)],
        ["a checkpoint", "weights of student and teacher, AdamW's two averages", gib(checkpoint)],
        ["all checkpoints", f"{settings.keep_checkpoints} kept, one being written", gib(checkpoints * checkpoint)],
        ["the result, and `best`", "weights of student and teacher, each", gib(weights)],
    ]
    print_table(["disk", "what", "GiB"], rows)
    prefetched = settings.num_workers * 2 * settings.batch_size * pixels_per_image(settings)
    print(
        f"\nBatches that wait for one GPU: {settings.num_workers} workers x 2 x {settings.batch_size} images x "
        f"{pixels_per_image(settings) / 1e6:.2f} MB = {gib(prefetched)} GiB of shared memory."
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    flags = ["--config", args.recipe, "--preset", args.preset, "--data", "", "--output_dir", ""]
    settings = parse_arguments(PretrainArguments, flags)
    config = PersonViTConfig.from_preset(
        args.preset, image_size=settings.image_size, drop_path_rate=settings.drop_path_rate
    )
    sizes = count_parameters(config)
    # two images are enough to count: the number doesn't depend on chance
    cost = StepCost(count_flops(settings, config, 2), measure_kept(settings, config, args.measured_images))
    print(
        f"ViT {args.preset}: {sizes.trained / 1e6:.1f} M trained parameters, {sizes.frozen / 1e6:.1f} M frozen; "
        f"an image takes {cost.flops / 1e9:.0f} GFLOP a step and keeps {cost.kept_bytes / 2**20:.0f} MiB; "
        f"{cost.flops * args.images * settings.epochs:.2e} FLOP in all, at {args.utilisation:.0%} of the peak"
    )
    print_memory(args, settings, config, sizes, cost)
    kept = measure_kept(settings, config, args.measured_images, checkpointed=True)
    print(f"\nWith `--gradient_checkpointing` an image keeps {kept / 2**20:.0f} MiB.")
    print_runs(args, settings, sizes, cost)
    print_disk(args, settings, sizes)


if __name__ == "__main__":
    main()
