r"""Fine-tunes PersonViT for person re-identification and scores it on query and gallery.

    accelerate launch examples/finetune.py --model_name_or_path runs/pretrain --data examples/data \
        --output_dir runs/finetune

Without `--model_name_or_path` the model starts from random weights of `--preset`. Settings come from flags, from a
YAML file (`--config FILE`), or both. The output folder holds the model, its image processor, `metrics.jsonl`,
`results.json` and, under `checkpoints`, the state to resume from (`--resume_from latest`).
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, load_reid_dataset
from personvit_hf.augmentation import ReIDTransform
from personvit_hf.checkpointing import (
    TrainingProgress,
    check_best,
    export_best,
    find_checkpoint,
    load_weights,
    restore,
    save_best,
    save_checkpoint,
    save_model,
)
from personvit_hf.distributed import make_accelerator, whole_module
from personvit_hf.hub import RunPublisher
from personvit_hf.loading import load_pretrained
from personvit_hf.person_images import BrokenImage, BrokenImageBudget, PersonImages
from personvit_hf.preemption import StopRequest, ignore_stop_requests
from personvit_hf.reid_data import person_labels, require_true_match
from personvit_hf.sampling import PKSampler
from personvit_hf.schedules import StepPlan, finetune_learning_rate, finetuning_parameter_groups, is_due
from personvit_hf.scripting import (
    MetricsLog,
    checkpoint_layers,
    collate,
    default_attention,
    option,
    parse_arguments,
    parse_overrides,
    require_finite,
    score,
)
from personvit_hf.streaming import skip_batches
from personvit_hf.watching import Pace, add_mean, mean_over_processes


@dataclass
class FinetuneArguments:
    data: str = field(metadata={"help": "Market-1501 folder tree, or parquet or Hub data with train, query, gallery."})
    output_dir: str = field(metadata={"help": "Where the model, the checkpoints and the figures are written."})
    # model
    model_name_or_path: str | None = option(None, "Checkpoint to start from; None for random weights of `preset`.")
    preset: str = option("small", "tiny, small, base or large, without a checkpoint.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2 ...; None: eager in bf16 on a CPU, where it is the faster, else sdpa."
    )
    config_overrides: str = option("{}", 'Settings of PersonViTConfig as JSON, such as {"label_smoothing": 0.1}.')
    drop_path_rate: float = option(0.1, "Stochastic depth of the last layer.")
    use_cameras: bool = option(False, "Learn an embedding of each camera (SIE).")
    # images
    image_size: list[int] = option([256, 128], "Height and width in pixels.")
    image_mean: list[float] = option([0.5, 0.5, 0.5], "Mean of the channels scaled to [0, 1].")
    image_std: list[float] = option([0.5, 0.5, 0.5], "Standard deviation of the channels scaled to [0, 1].", above=0)
    flip_probability: float = option(0.5, "Share of flipped images.", least=0, most=1)
    padding: int = option(10, "Pixels padded on each side before the random crop.", least=0)
    erasing_probability: float = option(0.5, "Share of images with a random rectangle erased.", least=0, most=1)
    # optimization
    epochs: int = option(120, "Passes over the identities.", least=1)
    identities_per_batch: int = option(16, "P: identities in a batch, per process.", least=1)
    images_per_identity: int = option(4, "K: images of each identity in a batch.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", least=1)
    gradient_checkpointing: bool = option(False, "Compute each layer again in the backward pass: slower, less memory.")
    optimizer: str = option("sgd", "sgd (momentum 0.9, the paper's) or adamw.")
    learning_rate: float = option(4e-4, "Base rate; biases learn at twice this rate.", least=0)
    warmup_epochs: int = option(20, "Epochs of warm-up from 0.01 of the base rate; at most `epochs`.", least=0)
    weight_decay: float = option(1e-4, "Weight decay.", least=0)
    # the run
    seed: int = option(0, "Seed of everything random.")
    num_workers: int = option(4, "Processes that load images, for each training process.", least=0)
    mixed_precision: str | None = option(None, "no, fp16 or bf16; None follows accelerate's configuration.")
    max_broken_share: float = option(0.01, "Share of broken images above which the run stops.", least=0, most=1)
    logging_steps: int = option(10, "Optimizer steps between two lines of metrics.jsonl.", least=0)
    save_epochs: int = option(10, "Epochs between two checkpoints; 0 for none.", least=0)
    keep_checkpoints: int = option(2, "Checkpoints kept.", least=1)
    resume_from: str | None = option(None, "A checkpoint's folder, or `latest`.")
    eval_epochs: int = option(0, "Epochs between two scores on query and gallery; 0 for one at the end.", least=0)
    keep_best: bool = option(
        False, "Keep the model with the highest mAP in `best`; it becomes the run's result, chosen on the test data."
    )
    timeout_minutes: float = option(30.0, "Minutes that processes wait for each other before they give up.", above=0)
    report_to: str | None = option(None, "tensorboard, trackio or wandb (several with commas), beside metrics.jsonl.")
    push_to_hub: bool = option(
        False, "Push model, processor, card and code to the Hub: in the background, and at the end."
    )
    hub_model_id: str | None = option(None, "Repository on the Hub, owner/name; None for the output folder's name.")
    hub_private_repo: bool = option(False, "Create the repository as a private one.")


class ReIDTrainingImages(Dataset):
    """Image, label and camera of `index` in epoch `epoch`, by key = epoch * number of images + index."""

    def __init__(
        self, images: PersonImages, labels: list[int], cameras: list[int], transform: ReIDTransform, seed: int
    ):
        self.images, self.labels, self.cameras = images, labels, cameras
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> dict[str, np.ndarray | int] | BrokenImage:
        epoch, index = divmod(key, len(self.images))
        image = self.images[index]
        if isinstance(image, BrokenImage):
            return image
        pixel_values = self.transform(image, np.random.default_rng([self.seed, epoch, index]))
        return {"pixel_values": pixel_values, "labels": self.labels[index], "camera_ids": self.cameras[index]}


def build_dataloader(args: FinetuneArguments, rows, labels: dict[int, int]) -> DataLoader:
    """Batches of P x K images from the training split; junk and distractors are no identities and are left out."""
    if len(labels) < args.identities_per_batch:
        raise ValueError(
            f"{args.data} has {len(labels)} people in train, fewer than `identities_per_batch` "
            f"{args.identities_per_batch}: lower it, or give more data."
        )
    rows = rows.select([row for row, person in enumerate(rows["person_id"]) if person in labels])
    transform = ReIDTransform(
        size=tuple(args.image_size),
        flip_probability=args.flip_probability,
        padding=args.padding,
        erasing_probability=args.erasing_probability,
        mean=tuple(args.image_mean),
        std=tuple(args.image_std),
    )
    row_labels = [labels[person] for person in rows["person_id"]]
    images = ReIDTrainingImages(PersonImages(rows), row_labels, list(rows["camera_id"]), transform, args.seed)
    return DataLoader(
        images,
        sampler=PKSampler(row_labels, args.identities_per_batch, args.images_per_identity, seed=args.seed),
        batch_size=args.identities_per_batch * args.images_per_identity,
        drop_last=True,
        collate_fn=collate,
        worker_init_fn=ignore_stop_requests,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # of its own, so that starting an epoch draws nothing from the generator that dropout uses
        generator=torch.Generator().manual_seed(args.seed),
    )


def build_model(args: FinetuneArguments, labels: dict[int, int], num_cameras: int) -> PersonViTForReID:
    overrides = {
        "id2label": {label: str(person) for person, label in labels.items()},
        "label2id": {str(person): label for person, label in labels.items()},
        "drop_path_rate": args.drop_path_rate,
        "num_cameras": num_cameras,
        "attn_implementation": args.attn_implementation,
    } | parse_overrides(args.config_overrides)
    if args.model_name_or_path is not None:
        return load_pretrained(PersonViTForReID, args.model_name_or_path, **overrides)
    overrides.setdefault("image_size", args.image_size)
    return PersonViTForReID(PersonViTConfig.from_preset(args.preset, **overrides))


def build_optimizer(
    args: FinetuneArguments, model: PersonViTForReID, scaler: torch.amp.GradScaler | None = None
) -> torch.optim.Optimizer:
    groups = finetuning_parameter_groups(model, args.learning_rate, args.weight_decay)
    if args.optimizer == "sgd":
        # fused, its momentum would be uninitialised memory after a first step that fp16's loss scaler skips
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, fused=scaler is None)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    raise ValueError(f"`optimizer` must be sgd or adamw, got {args.optimizer!r}.")


@dataclass(frozen=True)
class Run:
    """What a run consists of once all is prepared; the functions below work on it."""

    args: FinetuneArguments
    accelerator: Accelerator
    model: torch.nn.Module  # as prepared: perhaps wrapped
    optimizer: torch.optim.Optimizer
    dataloader: DataLoader
    dataset: DatasetDict
    processor: PersonViTImageProcessor
    plan: StepPlan
    progress: TrainingProgress
    log: MetricsLog
    publisher: RunPublisher
    stop: StopRequest
    pace: Pace
    broken: BrokenImageBudget


def plan_steps(args: FinetuneArguments, accelerator: Accelerator, dataloader: DataLoader) -> StepPlan:
    if not len(dataloader):
        raise ValueError(
            f"{args.data} has fewer batches of `identities_per_batch` x `images_per_identity` images than the "
            f"{accelerator.num_processes} processes: lower one of them."
        )
    return StepPlan(
        images_per_batch=args.identities_per_batch * args.images_per_identity * accelerator.num_processes,
        batches_per_epoch=len(dataloader),
        batches_per_step=args.gradient_accumulation_steps,
        epochs=args.epochs,
    )


def prepare_run(args: FinetuneArguments, accelerator: Accelerator) -> Run:
    """Data, model and optimizer, as they were at the checkpoint to resume from."""
    output_dir = Path(args.output_dir)
    args.attn_implementation = args.attn_implementation or default_attention(accelerator)
    checkpoint = find_checkpoint(accelerator, output_dir / "checkpoints", args.resume_from)
    dataset = load_reid_dataset(args.data)
    require_true_match(dataset, args.data)
    train = dataset["train"]
    labels = person_labels(train["person_id"])
    num_cameras = 1 + max(max(rows["camera_id"]) for rows in dataset.values()) if args.use_cameras else 0
    dataloader = build_dataloader(args, train, labels)
    set_seed(args.seed)
    model = build_model(args, labels, num_cameras)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    height, width = args.image_size
    model.config.patch_grid(height, width)  # an impossible size is an error before anything starts
    processor = PersonViTImageProcessor(
        size={"height": height, "width": width}, image_mean=args.image_mean, image_std=args.image_std
    )
    optimizer = build_optimizer(args, model, accelerator.scaler)
    set_seed(args.seed, device_specific=True)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)

    plan = plan_steps(args, accelerator, dataloader)
    layout = {
        "images": len(dataloader.dataset),
        "identities_per_batch": args.identities_per_batch,
        "images_per_identity": args.images_per_identity,
        "batches_per_step": accelerator.num_processes * args.gradient_accumulation_steps,
    }
    progress = TrainingProgress(layout=layout)
    accelerator.register_for_checkpointing(progress)
    if checkpoint is not None:
        restore(accelerator, model, optimizer, checkpoint, output_dir / "checkpoints")
        check_best(accelerator, output_dir / "best", progress)
    log = MetricsLog(output_dir / "metrics.jsonl", accelerator, progress.step)
    if accelerator.is_main_process:
        (output_dir / "arguments.yaml").write_text(yaml.safe_dump(asdict(args), sort_keys=False))
    publisher = RunPublisher(accelerator, args)
    if args.report_to:
        accelerator.init_trackers("personvit-finetune")
    return Run(
        *(args, accelerator, model, optimizer, dataloader, dataset, processor, plan, progress, log, publisher),
        stop=StopRequest(accelerator),
        pace=Pace(),
        broken=BrokenImageBudget(args.max_broken_share),
    )


def save(run: Run) -> None:
    checkpoints, step = Path(run.args.output_dir) / "checkpoints", run.progress.step
    with run.pace.paused():
        save_checkpoint(run.accelerator, run.model, run.optimizer, checkpoints, step, run.args.keep_checkpoints)
        run.publisher.checkpoint(run.model, run.processor, step)


def set_learning_rates(optimizer: torch.optim.Optimizer, epoch: int, args: FinetuneArguments) -> None:
    for group in optimizer.param_groups:
        group["lr"] = finetune_learning_rate(
            epoch,
            base=args.learning_rate,
            lr_factor=group["lr_factor"],
            total_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
        )


def add_batch(run: Run, figures: dict[str, torch.Tensor], batch: dict) -> dict[str, torch.Tensor]:
    """Adds a batch's gradients to the step's, and takes the step when they are complete.

    Returns:
        Losses and accuracy, means over the step's batches up to this one: `figures` with this batch's share.
    """
    inputs = batch["inputs"]
    run.broken.count(batch["broken"], len(inputs["labels"]))
    if not run.args.use_cameras:
        del inputs["camera_ids"]
    plan = replace(run.plan, batches_per_epoch=len(run.dataloader))  # the sampler gives each epoch as many as it has
    num_batches = plan.batches_in_step(run.progress.samples // plan.images_per_batch)
    with run.accelerator.accumulate(run.model):
        outputs = run.model(**inputs)
        # Accelerate weights each batch as one of a full step's, of which an epoch's last step can have fewer
        run.accelerator.backward(outputs.loss * (plan.batches_per_step / num_batches))
        run.optimizer.step()
        run.optimizer.zero_grad()
    own = {name: outputs[name] for name in ("loss", "id_loss", "triplet_loss")}
    own["accuracy"] = (outputs.logits.argmax(-1) == inputs["labels"]).float().mean()
    return add_mean(figures, own, num_batches)


def checked(run: Run, figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """A step's figures, means over all processes; raises if the loss is no number."""
    means = mean_over_processes(run.accelerator, figures)
    require_finite(run.progress.step, run.args.output_dir, loss=means["loss"])
    return means


def log_step(run: Run, figures: dict[str, torch.Tensor], epoch: int, bar: tqdm) -> None:
    """Writes a line of metrics.jsonl."""
    means = checked(run, figures)
    bar.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.2f}")
    rate = run.optimizer.param_groups[0]["lr"]
    run.log.write(run.progress.step, epoch=epoch, **means, learning_rate=rate, **run.pace.figures())


def train_epoch(run: Run, epoch: int, bar: tqdm) -> None:
    """Trains on what is left of an epoch."""
    args, accelerator, plan, progress = run.args, run.accelerator, run.plan, run.progress
    run.dataloader.set_epoch(epoch)
    set_learning_rates(run.optimizer, epoch, args)
    batches = skip_batches(accelerator, run.dataloader, epoch, progress.samples // plan.images_per_batch)
    figures, last = {}, {}  # of the step under way, and of the last one
    for batch in run.pace.timed(batches):
        figures = add_batch(run, figures, batch)
        progress.samples += plan.images_per_batch
        run.pace.images += plan.images_per_batch
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        last, figures = figures, {}
        if is_due(args.logging_steps, progress.step):
            log_step(run, last, epoch, bar)
        if run.stop.agreed():
            checked(run, last)
            save(run)
            run.stop.leave()
    run.broken.end_epoch()
    progress.epoch, progress.samples = epoch + 1, 0
    bar.update()
    if last and not is_due(args.logging_steps, progress.step):  # not `last`: the run was stopped after the last step
        log_step(run, last, epoch, bar)


def score_model(run: Run) -> None:
    """Scores the model on query and gallery, and keeps it if it is the best so far."""
    accelerator, progress = run.accelerator, run.progress
    result, whole = {}, whole_module(accelerator, run.model)
    if accelerator.is_main_process:
        result = score(whole.to(accelerator.device), run.processor, run.dataset, num_workers=run.args.num_workers)
        run.log.write(progress.step, epoch=progress.epoch - 1, mAP=result["mAP"], rank1=result["rank1"])
    accelerator.wait_for_everyone()
    if run.args.keep_best:
        best = Path(run.args.output_dir) / "best"
        save_best(accelerator, run.model, run.processor, best, progress, result.get("mAP"))


def write_results(run: Run) -> None:
    """Scores what was saved, as whoever loads it will."""
    output_dir = Path(run.args.output_dir)
    trained = PersonViTForReID.from_pretrained(output_dir).to(run.accelerator.device)
    result = score(trained, run.processor, run.dataset, num_workers=run.args.num_workers)
    results = {name: result[name] for name in ("mAP", "mINP", "rank1", "rank5", "rank10", "num_valid_queries")}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"mAP {100 * results['mAP']:.2f}  Rank-1 {100 * results['rank1']:.2f}  ({output_dir / 'results.json'})")


def main() -> None:
    args = parse_arguments(FinetuneArguments)
    if args.keep_best and not args.eval_epochs:
        raise ValueError("`keep_best` needs `eval_epochs` to tell which model is the best.")
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"`warmup_epochs` {args.warmup_epochs} is more than `epochs` {args.epochs}: lower it.")
    accelerator = make_accelerator(
        args.output_dir,
        args.mixed_precision,
        args.gradient_accumulation_steps,
        args.report_to,
        args.timeout_minutes,
    )
    run = prepare_run(args, accelerator)
    run.model.train()
    epochs = {"total": args.epochs, "initial": run.progress.epoch}
    with tqdm(**epochs, desc="Epochs", disable=not accelerator.is_main_process) as bar:
        for epoch in range(run.progress.epoch, args.epochs):
            train_epoch(run, epoch, bar)
            is_last = epoch + 1 == args.epochs
            if is_due(args.eval_epochs, run.progress.epoch) or (args.keep_best and is_last):
                with run.pace.paused():
                    score_model(run)
            # after the score, which a resumed run would not repeat
            if is_due(args.save_epochs, run.progress.epoch):
                save(run)
    run.stop.close()
    output_dir = Path(args.output_dir)
    if args.keep_best and run.progress.best is not None:
        export_best(accelerator, output_dir / "best", output_dir)
    else:
        save_model(accelerator, run.model, run.processor, output_dir)
    if accelerator.is_main_process:
        write_results(run)
    if url := run.publisher.finish():
        print(f"On the Hub: {url}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
