"""How fast training steps are, against the usual way (benchmarks/plain_steps.py), and how near they are to the limit.

A pre-training step is teacher and student forward, both losses, backward, clipping, AdamW and the teacher's moving
average, on 2 masked global crops of 256x128 and 8 local ones of 96x48. First both must give the same losses and
gradients; then they take turns, and a figure is the median over rounds. The limit is the time that the step's own
matrix products would take at the speed of one large product, measured in the same run. Peak memory is that of fresh
processes.

    python benchmarks/train_step.py --batch 4 --precisions fp32 bf16
    python benchmarks/train_step.py --steps memory --prototypes 65536
    python benchmarks/train_step.py --steps checkpointing      # ours with and without `gradient_checkpointing`
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from plain_steps import PlainPreTraining, PlainReID, clip_one_by_one
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, PreTrainedModel

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, PersonViTForReID
from personvit_hf.checkpoint_names import official_name
from personvit_hf.linear import bfloat16_products_are_slow
from personvit_hf.masking import BlockMasking
from personvit_hf.official_format import official_checkpoint
from personvit_hf.schedules import (
    clip_gradients_per_parameter,
    finetuning_parameter_groups,
    pretraining_parameter_groups,
)

STEPS = ("pretrain", "finetune", "embed", "memory", "checkpointing")
CLIP, MOMENTUM, DECAY = 3.0, 0.996, 0.04
TOLERANCE = 1e-5
PHASES = ("teacher", "student", "rest of forward", "backward", "clip", "optimizer", "moving average", "whole")


@dataclass
class Arguments:
    steps: list[str] = field(default_factory=lambda: list(STEPS), metadata={"help": f"Of {', '.join(STEPS)}."})
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"], metadata={"help": "fp32, bf16 or both."})
    preset: str = field(default="small", metadata={"help": "tiny, small, base or large."})
    image_size: list[int] = field(default_factory=lambda: [256, 128], metadata={"help": "Global crops."})
    local_size: list[int] = field(default_factory=lambda: [96, 48], metadata={"help": "Local crops."})
    prototypes: int = field(default=8192, metadata={"help": "Prototypes of [CLS], and as many of patches."})
    batch: int = field(default=4, metadata={"help": "Images in a step; four times as many to fine-tune and embed."})
    rounds: int = field(default=5, metadata={"help": "Steps of each; figures are medians over them."})
    threads: int = field(default=1, metadata={"help": "Threads of PyTorch, on the CPU."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the last layer."})
    attn_implementation: str | None = field(default=None, metadata={"help": "None: eager in bf16 on CPUs, else sdpa."})
    only: str | None = field(default=None, metadata={"help": "Used by itself: one of `ALONE`, in a process alone."})


@dataclass
class Step:
    """One way of doing a step: its phases in turn, and the modules whose time within `forward` is told apart."""

    model: nn.Module
    forward: Callable[[], tuple[torch.Tensor, ...]]  # losses, or features
    clip: Callable[[], object] | None = None
    optimizer: torch.optim.Optimizer | None = None
    update: Callable[[], object] | None = None
    parts: dict[str, list[nn.Module]] = field(default_factory=dict)


def config_of(args: Arguments, precision: str, **settings) -> PersonViTConfig:
    attention = args.attn_implementation or ("eager" if precision == "bf16" and args.device == "cpu" else "sdpa")
    settings = {"drop_path_rate": args.drop_path_rate, "image_size": args.image_size} | settings
    prototypes = {"num_cls_prototypes": args.prototypes, "num_patch_prototypes": args.prototypes}
    return PersonViTConfig.from_preset(args.preset, attn_implementation=attention, **prototypes, **settings)


def pretraining_batch(args: Arguments, config: PersonViTConfig) -> dict[str, torch.Tensor]:
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    # the recipe's mean share: half of the global crops unmasked, the others 30%
    masking = BlockMasking(grid=config.patch_grid(*args.image_size), ratios=(0.3,), ratio_spreads=(0.0,))
    masks = np.stack([[masking(rng).ravel() for _ in range(2)] for _ in range(args.batch)])
    masks[::2, 0] = masks[1::2, 1] = False
    batch = {
        "global_pixel_values": torch.randn(args.batch, 2, 3, *args.image_size, generator=generator),
        "local_pixel_values": torch.randn(args.batch, 8, 3, *args.local_size, generator=generator),
        "bool_masked_pos": torch.from_numpy(masks),
    }
    return {name: value.to(args.device) for name, value in batch.items()}


def our_pretraining(args: Arguments, precision: str, **settings) -> Step:
    torch.manual_seed(0)
    config = config_of(args, precision, **settings)
    model, batch = PersonViTForPreTraining(config).to(args.device).train(), pretraining_batch(args, config)
    optimizer = torch.optim.AdamW(pretraining_parameter_groups(model, DECAY), lr=1e-5, fused=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        output = model(**batch)
        return output.dino_loss, output.mim_loss

    return Step(
        model,
        forward,
        lambda: clip_gradients_per_parameter(trained, CLIP),
        optimizer,
        lambda: model.update_teacher(MOMENTUM),
        {  # not the student itself: on a GPU its crops take a way of their own, unless something listens to it
            "teacher": [model.personvit, model.teacher_head.mlp],
            "student": [
                *(model.student.embeddings, *model.student.layers, model.student.layernorm),
                model.student_head.mlp,
            ],
        },
    )


def checkpointed_pretraining(args: Arguments, precision: str, **settings) -> Step:
    step = our_pretraining(args, precision, **settings)
    # not by personvit_hf.scripting, whose imports would count as the process's memory
    getattr(step.model, "activation_checkpointing_enable", step.model.gradient_checkpointing_enable)()
    return step


def plain_pretraining(args: Arguments, precision: str, **settings) -> Step:
    config = config_of(args, precision, **settings)
    model = PlainPreTraining(config).to(args.device).train()
    model.teacher.eval()
    batch = pretraining_batch(args, config)
    crops = [list(batch[name].unbind(1)) for name in ("global_pixel_values", "local_pixel_values", "bool_masked_pos")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, foreach=False)
    parts = {
        role: [getattr(model, role)["backbone"], getattr(model, role)["head"].mlp] for role in ("teacher", "student")
    }
    return Step(
        model,
        lambda: model(*crops),
        lambda: clip_one_by_one(trained, CLIP),
        optimizer,
        lambda: model.update_teacher(MOMENTUM),
        parts,
    )


def reid_batch(args: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(4 * args.batch, 3, *args.image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(args.device), torch.arange(args.batch, device=args.device).repeat_interleave(4)


def our_finetuning(args: Arguments, precision: str, **settings) -> Step:
    torch.manual_seed(0)
    model = PersonViTForReID(config_of(args, precision, num_labels=751, **settings)).to(args.device).train()
    pixels, labels = reid_batch(args)
    optimizer = torch.optim.SGD(finetuning_parameter_groups(model, 1e-4, 1e-4), momentum=0.9, fused=True)
    return Step(model, lambda: (model(pixels, labels).loss,), optimizer=optimizer)


def plain_finetuning(args: Arguments, precision: str, **settings) -> Step:
    model = PlainReID(config_of(args, precision, num_labels=751, **settings)).to(args.device).train()
    pixels, labels = reid_batch(args)
    groups = [
        {"params": [parameter], "lr": 1e-4 * (2 if "bias" in name else 1)}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, weight_decay=1e-4, foreach=False)
    return Step(model, lambda: (model(pixels, labels),), optimizer=optimizer)


def our_embedding(args: Arguments, precision: str, **settings) -> Step:
    step, (pixels, _) = our_finetuning(args, precision, **settings), reid_batch(args)
    model = step.model.eval()
    return Step(model, torch.inference_mode()(lambda: (model(pixels).embeddings,)))


def plain_embedding(args: Arguments, precision: str, **settings) -> Step:
    step, (pixels, _) = plain_finetuning(args, precision, **settings), reid_batch(args)
    model = step.model.eval()
    return Step(model, torch.no_grad()(lambda: (model.base(pixels)[:, 0],)))


BUILDERS = {
    "pretrain": (our_pretraining, plain_pretraining),
    "finetune": (our_finetuning, plain_finetuning),
    "embed": (our_embedding, plain_embedding),
}


ALONE = {"ours": our_pretraining, "plain": plain_pretraining, "checkpointed": checkpointed_pretraining}


def load_plain(kind: str, ours: Step, plain: Step) -> None:
    weights = official_checkpoint(ours.model)
    if kind == "pretrain":
        plain.model.load_official(weights)
    else:
        missing, unexpected = plain.model.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise RuntimeError(f"The plain model lacks {unexpected} and needs {missing}.")


def plain_name(kind: str, name: str) -> str:
    """What the plain model calls one of our trained weights."""
    if kind == "finetune":
        return f"base.{official_name(name.removeprefix('personvit.'))}" if name.startswith("personvit.") else name
    part, _, name = name.partition(".")
    return f"student.{'head' if part == 'student_head' else 'backbone'}.{official_name(name)}"


def relative_difference(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours.flatten() - plain.flatten()).norm() / plain.norm()).item()


def check_equal(kind: str, args: Arguments) -> None:
    """Losses (or features) and gradients of both without stochastic depth; raises if they differ.

    In float32, but to fine-tune in float64: new models give all images nearly the same feature, and the triplet loss
    takes differences of them. Gradients that are zero but for rounding are left out: of the keys' bias, and of the
    last norm's where batch norm follows it.
    """
    torch.set_default_dtype(torch.float64 if kind == "finetune" else torch.float32)
    ours, plain = (build(args, "fp32", drop_path_rate=0.0) for build in BUILDERS[kind])
    load_plain(kind, ours, plain)
    results, expected = ours.forward(), plain.forward()
    torch.set_default_dtype(torch.float32)
    differences = {"outputs": max(map(relative_difference, results, expected))}
    if ours.optimizer is not None:
        sum(results).backward()
        sum(expected).backward()
        gradients = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
        for name, parameter in ours.model.named_parameters():
            if parameter.grad is None:
                continue
            pair = parameter.grad, gradients.pop(plain_name(kind, name))
            if name.endswith("qkv_proj.bias"):
                pair = tuple(torch.cat(gradient.chunk(3)[::2]) for gradient in pair)
            if name != "personvit.layernorm.bias":
                differences[name] = relative_difference(*pair)
        if gradients:
            raise RuntimeError(f"Only the plain {kind} step has gradients of {', '.join(gradients)}.")
    name = max(differences, key=differences.get)
    print(f"{kind}: {len(differences)} outputs and gradients, within {differences[name]:.1e} of each other ({name})")
    if not differences[name] <= TOLERANCE:
        raise RuntimeError(f"The {kind} steps differ: {name} by {differences[name]:.1e}, more than {TOLERANCE}.")


def clock(device: str) -> float:
    """Seconds; a GPU is waited for, which works on while Python has gone ahead."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Adds up the time that some modules take, forward, while `on`."""

    def __init__(self, modules: list[nn.Module], device: str):
        self.seconds, self.device, self.on = 0.0, device, False
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, *_) -> None:
        self.started = clock(self.device) if self.on else 0.0

    def _stop(self, *_) -> None:
        self.seconds += clock(self.device) - self.started if self.on else 0.0


def take(step: Step, precision: str, device: str, watches: dict[str, Stopwatch] | None = None) -> dict[str, float]:
    """Takes a step; returns the seconds of each of its phases, if these are watched."""
    seconds, started = {}, 0.0 if watches is None else clock(device)

    def lap(phase: str) -> None:
        nonlocal started
        if watches is not None:
            now = clock(device)
            seconds[phase], started = now - started, now

    before = {name: watch.seconds for name, watch in (watches or {}).items()}
    for watch in (watches or {}).values():
        watch.on = True
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        losses = step.forward()
    lap("rest of forward")
    for name, watch in (watches or {}).items():
        watch.on = False
        seconds[name] = watch.seconds - before[name]
        seconds["rest of forward"] -= seconds[name]
    if step.optimizer is not None:
        sum(losses).backward()
        lap("backward")
        if step.clip is not None:
            step.clip()
            lap("clip")
        step.optimizer.step()
        step.optimizer.zero_grad()
        lap("optimizer")
    if step.update is not None:
        step.update()
        lap("moving average")
    return seconds


def seconds_of(step: Step, precision: str, device: str) -> float:
    """Of a step as it is in training, where nothing waits for a GPU: the mean of 10 in a row there."""
    in_a_row, started = 1 if device == "cpu" else 10, clock(device)
    for _ in range(in_a_row):
        take(step, precision, device)
    return (clock(device) - started) / in_a_row


def matmul_speed(precision: str, device: str) -> float:
    """FLOP/s of a product of two large square matrices, the median of seven; in bf16, of the faster kind of product.

    bf16 numbers can be multiplied as float32 ones, too, which CPUs without matrix units do faster.
    """
    size, speeds = 2048 if device == "cpu" else 8192, []
    for dtype in (torch.float32, torch.bfloat16)[: 2 if precision == "bf16" else 1]:
        matrix, times = torch.randn(size, size, device=device).to(dtype), []
        for _ in range(8):
            started = clock(device)
            matrix @ matrix
            times.append(clock(device) - started)
        speeds.append(2 * size**3 / statistics.median(times[1:]))
    return max(speeds)


def count_flops(step: Step, precision: str, device: str) -> float:
    """FLOPs of the matrix products of one step; attention's are counted where they are plain products."""
    if isinstance(step.model, PreTrainedModel):
        used = step.model.config._attn_implementation
        step.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        take(step, precision, device)
    if isinstance(step.model, PreTrainedModel):
        step.model.set_attn_implementation(used)
    return counter.get_total_flops()


def compare(kind: str, precision: str, args: Arguments) -> None:
    """Both ways in turns, and a table of their phases."""
    pair = dict(zip(("plain", "ours"), (build(args, precision) for build in reversed(BUILDERS[kind])), strict=True))
    load_plain(kind, pair["ours"], pair["plain"])
    device = args.device
    watches = {who: {name: Stopwatch(part, device) for name, part in step.parts.items()} for who, step in pair.items()}
    flops = {who: count_flops(step, precision, device) for who, step in pair.items()}
    for step in pair.values():  # warms up: the count took attention's other way
        take(step, precision, device)
    speeds, laps = [matmul_speed(precision, device)], {who: defaultdict(list) for who in pair}
    for _ in range(args.rounds):
        for who, step in pair.items():
            seconds = take(step, precision, device, watches[who])
            seconds["whole"] = sum(seconds.values())
            if device != "cpu":
                seconds["whole"] = seconds_of(step, precision, device)
            for phase, value in seconds.items():
                laps[who][phase].append(value)
        speeds.append(matmul_speed(precision, device))
    speed = statistics.median(speeds)
    ratio = statistics.median(np.divide(laps["plain"]["whole"], laps["ours"]["whole"]))
    print(f"\n{kind}, {precision}: {ratio:.2f} times as fast; large product {speed / 1e9:.0f} GFLOP/s")
    print("| | plain, s | ours, s |\n|---|---|---|")
    for phase in sorted(laps["plain"], key=PHASES.index):
        row = [statistics.median(laps[who][phase]) for who in pair]
        print(f"| {phase} | " + " | ".join(f"{value:.4f}" for value in row) + " |")
    share = {who: flops[who] / speed / statistics.median(laps[who]["whole"]) for who in pair}
    print(f"| GFLOP counted | {flops['plain'] / 1e9:.0f} | {flops['ours'] / 1e9:.0f} |")
    print(f"| share of the limit | {share['plain']:.0%} | {share['ours']:.0%} |")


def peak_alone(who: str, args: Arguments) -> None:
    """Prints peak memory of this process in MiB, and how much of it two steps added to model and optimizer."""
    step = ALONE[who](args, args.precisions[0])
    for parameter in step.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=False)
    before = peak(args.device)
    for _ in range(2):
        take(step, args.precisions[0], args.device)
    print(peak(args.device), peak(args.device) - before)


def peak(device: str) -> float:
    """MiB of this process, or of its tensors on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    # not by getrusage, whose figure a process inherits from the one that started it
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peaks_of(names: tuple[str, ...], precision: str, args: Arguments) -> list[list[float]]:
    """What `peak_alone` prints for each, in fresh processes."""
    figures = {}
    for who in names:
        settings = vars(args) | {"only": who, "precisions": [precision]}
        options = [
            part
            for name, value in settings.items()
            if value is not None
            for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
        run = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
        figures[who] = [float(number) for number in run.stdout.split()]
    return list(figures.values())


def compare_memory(precision: str, args: Arguments) -> None:
    (plain, plain_added), (ours, ours_added) = peaks_of(("plain", "ours"), precision, args)
    print(
        f"\npeak memory, pre-training, {precision}, {args.prototypes} prototypes, {args.batch} images: plain "
        f"{plain:.0f} MiB, ours {ours:.0f} MiB ({ours / plain:.2f}); beyond weights and optimizer "
        f"{plain_added:.0f} and {ours_added:.0f} MiB ({ours_added / max(plain_added, 1):.2f})"
    )


def compare_checkpointing(precision: str, args: Arguments) -> None:
    """Ours with and without checkpointed layers: time in turns, and peak memory."""
    pair = {name: ALONE[name](args, precision) for name in ("ours", "checkpointed")}
    seconds = {name: [] for name in pair}
    for _ in range(args.rounds + 1):  # the first to warm up
        for name, step in pair.items():
            seconds[name].append(seconds_of(step, precision, args.device))
    slower = statistics.median(np.divide(seconds["checkpointed"][1:], seconds["ours"][1:]))
    (kept, kept_added), (again, again_added) = peaks_of(tuple(pair), precision, args)
    print(
        f"\ncheckpointed layers, pre-training, {precision}, {args.prototypes} prototypes, {args.batch} images: "
        f"{slower:.2f} of the time; peak memory {again:.0f} of {kept:.0f} MiB ({again / kept:.2f}), beyond weights "
        f"and optimizer {again_added:.0f} of {kept_added:.0f} MiB ({again_added / max(kept_added, 1):.2f})"
    )


def main() -> None:
    """Measures and prints."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as such
    if args.device == "cpu":
        bfloat16_products_are_slow()  # measured now: its own products aren't the step's
    if args.only:
        peak_alone(args.only, args)
        return
    print(f"ViT {args.preset}, {args.batch} images, {args.threads} thread(s), medians of {args.rounds} rounds\n")
    for kind in (kind for kind in STEPS if kind in args.steps and kind in BUILDERS):
        check_equal(kind, args)
        for precision in args.precisions:
            compare(kind, precision, args)
    if "memory" in args.steps:
        for precision in args.precisions:
            compare_memory(precision, args)
    if "checkpointing" in args.steps:
        for precision in args.precisions:
            compare_checkpointing(precision, args)


if __name__ == "__main__":
    main()
