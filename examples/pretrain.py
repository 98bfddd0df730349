"""Pre-trains PersonViT on unlabelled person images (DINO + masked image modelling).

    accelerate launch examples/pretrain.py --data examples/data --output_dir runs/pretrain --preset small

Settings come from flags, from a YAML file (`--config FILE`), or both. The output folder holds the model (for
`AutoModel.from_pretrained`: the teacher's backbone), its image processor, `metrics.jsonl` and, under `checkpoints`,
the state to resume from (`--resume_from latest`).
"""

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import DatasetDict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTImageProcessor,
    load_person_images,
    load_reid_dataset,
)
from personvit_hf.augmentation import MultiCrop, normalize
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
from personvit_hf.distributed import (
    backward,
    clip_gradients,
    forget_frozen_steps,
    freeze_step,
    make_accelerator,
    optimizer_step,
    split_frozen_group,
    unwrap,
    whole_module,
)
from personvit_hf.hub import RunPublisher
from personvit_hf.loading import load_pretrained
from personvit_hf.masking import BlockMasking, PretrainingCrops, draw_views
from personvit_hf.person_images import BrokenImageBudget, PersonImages
from personvit_hf.preemption import StopRequest, ignore_stop_requests
from personvit_hf.reid_data import require_true_match
from personvit_hf.sampling import EpochSampler
from personvit_hf.schedules import StepPlan, is_due, pretraining_parameter_groups, teacher_temperature, warmup_cosine
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
    warn_long_warmup,
)
from personvit_hf.shards import load_person_stream
from personvit_hf.streaming import PersonStream, skip_batches, stream_loader
from personvit_hf.watching import Pace, StepGuard, TeacherWatch, add_mean, mean_over_processes, warn_past_peak


@dataclass
class PretrainArguments:
    data: str = field(metadata={"help": "Folder of images, folder or file of parquet, or a Hub data set."})
    output_dir: str = field(metadata={"help": "Where the model, the checkpoints and metrics.jsonl are written."})
    streaming: bool = option(
        False, "Read parquet or WebDataset shards as a stream, from a folder, the Hub or https://host/{000..417}.tar."
    )
    # model
    preset: str = option("small", "tiny, small, base or large.")
    model_name_or_path: str | None = option(None, "Checkpoint to start from; replaces `preset`.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2 ...; None: eager in bf16 on a CPU, where it is the faster, else sdpa."
    )
    config_overrides: str = option("{}", 'Settings of PersonViTConfig as JSON, such as {"drop_path_rate": 0.2}.')
    drop_path_rate: float = option(0.1, "Stochastic depth of the student's last layer.")
    # crops and masks
    image_size: list[int] = option([256, 128], "Height and width of the global crops in pixels.")
    local_size: list[int] = option([128, 64], "Height and width of the local crops in pixels.")
    num_local_crops: int = option(8, "Local crops per image.", least=0)
    global_scale: list[float] = option([0.4, 1.0], "Smallest and largest area of a global crop, as a share.")
    local_scale: list[float] = option([0.05, 0.4], "Smallest and largest area of a local crop, as a share.")
    aspect_ratio: list[float] = option([0.375, 0.667], "Smallest and largest width / height cut out for a crop.")
    brightness: float = option(0.4, "Strength of the brightness jitter.")
    contrast: float = option(0.4, "Strength of the contrast jitter.")
    saturation: float = option(0.2, "Strength of the saturation jitter.")
    hue: float = option(0.1, "Strength of the hue jitter, in full circles.")
    grayscale_probability: float = option(0.2, "Share of grey crops.")
    solarize_probability: float = option(0.2, "Share of solarized second global crops.")
    mask_ratios: list[float] = option([0.0, 0.3], "Each global crop takes one of these shares of masked patches ...")
    mask_ratio_spreads: list[float] = option([0.0, 0.2], "... plus or minus the share of the same position here.")
    # optimization
    epochs: int = option(100, "Passes over the data.", least=1)
    batch_size: int = option(64, "Images per process and step.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", least=1)
    learning_rate: float = option(5e-4, "Peak rate for 256 images a step; scaled with all processes' images.", least=0)
    min_learning_rate: float = option(1e-6, "Final rate.", least=0)
    warmup_epochs: float = option(10.0, "Epochs of linear warm-up.", least=0)
    weight_decay: float = option(0.04, "Weight decay at the start.", least=0)
    final_weight_decay: float = option(0.4, "Weight decay at the end (cosine).", least=0)
    clip_gradients: float = option(3.0, "Largest norm of each parameter's gradient; 0 for no clipping.", least=0)
    gradient_checkpointing: bool = option(False, "Compute each layer again in the backward pass: slower, less memory.")
    freeze_last_layer_epochs: int = option(1, "Epochs during which the prototypes stay as they are.", least=0)
    teacher_momentum: float = option(0.996, "Momentum of the teacher at the start.", least=0, most=1)
    final_teacher_momentum: float = option(1.0, "Momentum of the teacher at the end (cosine).", least=0, most=1)
    teacher_temperature: float = option(0.04, "Teacher's [CLS] temperature after the warm-up.", above=0)
    warmup_teacher_temperature: float = option(0.04, "Both teacher temperatures at the start.", above=0)
    teacher_patch_temperature: float = option(0.07, "Teacher's patch temperature after the warm-up.", above=0)
    warmup_temperature_epochs: int = option(30, "Epochs of the temperatures' linear warm-up.", least=0)
    # the run
    seed: int = option(0, "Seed of everything random.")
    num_workers: int = option(4, "Processes that load images, for each training process.", least=0)
    mixed_precision: str | None = option(None, "no, fp16 or bf16; None follows accelerate's configuration.")
    max_broken_share: float = option(0.01, "Share of broken images above which the run stops.", least=0, most=1)
    logging_steps: int = option(10, "Optimizer steps between two lines of metrics.jsonl.", least=0)
    watch_steps: int = option(
        50, "Optimizer steps between two looks at the teacher: spread, entropies ...; 0 for none.", least=0
    )
    stop_on_collapse: bool = option(True, "Stop when three looks in a row show a collapse.")
    skip_nonfinite_steps: int = option(0, "Steps that may be skipped as their gradients are no numbers.", least=0)
    save_epochs: float = option(1.0, "Epochs (or a part of one) between two checkpoints; 0 for none.", least=0)
    keep_checkpoints: int = option(2, "Checkpoints kept.", least=1)
    resume_from: str | None = option(None, "A checkpoint's folder, or `latest`.")
    eval_data: str | None = option(None, "Labelled data set to score the teacher on during training.")
    eval_epochs: int = option(10, "Epochs between two scores.", least=0)
    keep_best: bool = option(False, "Keep the model with the highest mAP in `best`; it becomes the run's result.")
    timeout_minutes: float = option(30.0, "Minutes that processes wait for each other before they give up.", above=0)
    report_to: str | None = option(None, "tensorboard, trackio or wandb (several with commas), beside metrics.jsonl.")
    push_to_hub: bool = option(
        False, "Push model, processor, card and code to the Hub: in the background, and at the end."
    )
    hub_model_id: str | None = option(None, "Repository on the Hub, owner/name; None for the output folder's name.")
    hub_private_repo: bool = option(False, "Create the repository as a private one.")


def build_model(args: PretrainArguments) -> PersonViTForPreTraining:
    overrides = {"drop_path_rate": args.drop_path_rate, "attn_implementation": args.attn_implementation}
    # unlabelled images tell no camera: a fine-tuned model's embeddings of them would stay as they are
    overrides |= {"num_cameras": 0, "num_views": 0} | parse_overrides(args.config_overrides)
    if args.model_name_or_path is not None:
        return load_pretrained(PersonViTForPreTraining, args.model_name_or_path, **overrides)
    overrides.setdefault("image_size", args.image_size)
    return PersonViTForPreTraining(PersonViTConfig.from_preset(args.preset, **overrides))


def build_dataloader(
    args: PretrainArguments, config: PersonViTConfig, accelerator: Accelerator | None = None
) -> DataLoader:
    augment = MultiCrop(
        global_size=tuple(args.image_size),
        local_size=tuple(args.local_size),
        num_local_crops=args.num_local_crops,
        global_scale=tuple(args.global_scale),
        local_scale=tuple(args.local_scale),
        aspect_ratio=tuple(args.aspect_ratio),
        **{name: getattr(args, name) for name in ("brightness", "contrast", "saturation", "hue")},
        **{name: getattr(args, name) for name in ("grayscale_probability", "solarize_probability")},
    )
    config.patch_grid(*args.local_size)  # an impossible size is an error before anything starts
    masking = BlockMasking(
        grid=config.patch_grid(*args.image_size),
        ratios=tuple(args.mask_ratios),
        ratio_spreads=tuple(args.mask_ratio_spreads),
    )
    # a generator of its own, so that starting an epoch draws nothing from the one that dropout uses
    options = {
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": ignore_stop_requests,
        "generator": torch.Generator().manual_seed(args.seed),
    }
    if args.streaming:
        stream = PersonStream(
            load_person_stream(args.data),
            partial(draw_views, augment, masking),
            args.batch_size,
            args.seed,
            args.num_workers,
            process_index=accelerator.process_index if accelerator else 0,
            num_processes=accelerator.num_processes if accelerator else 1,
        )
        return stream_loader(stream, collate, accelerator, **options)
    images = PersonImages(load_person_images(args.data))
    crops = PretrainingCrops(images, augment, masking, args.seed)
    if len(crops) < args.batch_size:
        raise ValueError(f"{args.data} has {len(crops)} images, fewer than `batch_size` {args.batch_size}.")
    return DataLoader(
        crops,
        sampler=EpochSampler(len(crops), seed=args.seed),
        batch_size=args.batch_size,
        drop_last=True,
        collate_fn=collate,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        **options,
    )


@dataclass(frozen=True)
class Run:
    """What a run consists of once all is prepared; the functions below work on it."""

    args: PretrainArguments
    accelerator: Accelerator
    model: torch.nn.Module  # as prepared: perhaps wrapped
    unwrapped: PersonViTForPreTraining
    optimizer: torch.optim.Optimizer
    dataloader: DataLoader
    eval_dataset: DatasetDict | None
    processor: PersonViTImageProcessor
    plan: StepPlan
    progress: TrainingProgress
    log: MetricsLog
    publisher: RunPublisher
    stop: StopRequest
    watch: TeacherWatch
    guard: StepGuard
    pace: Pace
    broken: BrokenImageBudget


@dataclass
class Step:
    """What an optimizer step comes to, batch by batch."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_norm: torch.Tensor | None = None  # before clipping; None while gradients are incomplete
    skipped: bool = False


def plan_steps(args: PretrainArguments, accelerator: Accelerator, dataloader: DataLoader) -> StepPlan:
    if not len(dataloader):
        raise ValueError(
            f"{args.data} has {len(dataloader.dataset)} images, fewer than one batch for each of the "
            f"{accelerator.num_processes} processes: lower `batch_size`."
        )
    return StepPlan(
        images_per_batch=args.batch_size * accelerator.num_processes,
        batches_per_epoch=len(dataloader),
        batches_per_step=args.gradient_accumulation_steps,
        epochs=args.epochs,
    )


def prepare_run(args: PretrainArguments, accelerator: Accelerator) -> Run:
    """Model, data and optimizer, as they were at the checkpoint to resume from."""
    output_dir = Path(args.output_dir)
    args.attn_implementation = args.attn_implementation or default_attention(accelerator)
    checkpoint = find_checkpoint(accelerator, output_dir / "checkpoints", args.resume_from)
    set_seed(args.seed)
    model = build_model(args)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if args.gradient_checkpointing:  # the teacher, which keeps nothing anyway, is not in training mode
        checkpoint_layers(model)
    height, width = args.image_size
    processor = PersonViTImageProcessor(size={"height": height, "width": width})
    dataloader = build_dataloader(args, model.config, accelerator)
    eval_dataset = load_reid_dataset(args.eval_data, require_train=False) if args.eval_data else None
    if eval_dataset is not None:
        require_true_match(eval_dataset, args.eval_data)
    groups = pretraining_parameter_groups(model, args.weight_decay)
    if args.freeze_last_layer_epochs:
        groups = split_frozen_group(accelerator, groups, model.student_head.prototype_parameters())
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # the stem's batch norms, as DINO does; there is no such layer for CPUs, where each process has its own
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    set_seed(args.seed, device_specific=True)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    unwrapped = unwrap(accelerator, model)

    plan = plan_steps(args, accelerator, dataloader)
    layout = {
        "images": len(dataloader.dataset),
        "images_per_step": plan.images_per_step,
        "steps_per_epoch": plan.steps_per_epoch,
    }
    progress = TrainingProgress(layout=layout)
    accelerator.register_for_checkpointing(progress)
    if args.streaming:
        accelerator.register_for_checkpointing(dataloader.dataset)
    if checkpoint is not None:
        restore(accelerator, model, optimizer, checkpoint, output_dir / "checkpoints")
        check_best(accelerator, output_dir / "best", progress)
    log = MetricsLog(output_dir / "metrics.jsonl", accelerator, progress.step)
    if accelerator.is_main_process:
        (output_dir / "arguments.yaml").write_text(yaml.safe_dump(asdict(args), sort_keys=False))
    publisher = RunPublisher(accelerator, args)
    if args.report_to:
        accelerator.init_trackers("personvit-pretrain")
    return Run(
        *(args, accelerator, model, unwrapped, optimizer, dataloader, eval_dataset, processor),
        *(plan, progress, log, publisher),
        stop=StopRequest(accelerator),
        watch=TeacherWatch(unwrapped),
        guard=StepGuard(unwrapped, args.skip_nonfinite_steps, progress.skipped),
        pace=Pace(),
        broken=BrokenImageBudget(args.max_broken_share),
    )


def save(run: Run) -> None:
    checkpoints, step = Path(run.args.output_dir) / "checkpoints", run.progress.step
    with run.pace.paused():
        save_checkpoint(run.accelerator, run.model, run.optimizer, checkpoints, step, run.args.keep_checkpoints)
        run.publisher.checkpoint(run.model, run.processor, step)


def teacher_temperatures(args: PretrainArguments, epoch: int) -> dict[str, float]:
    finals = {
        "teacher_temperature": args.teacher_temperature,
        "teacher_patch_temperature": args.teacher_patch_temperature,
    }
    warmup = {"warmup_start": args.warmup_teacher_temperature, "warmup_epochs": args.warmup_temperature_epochs}
    return {name: teacher_temperature(epoch, final=final, **warmup) for name, final in finals.items()}


def set_schedules(
    optimizer: torch.optim.Optimizer, step: int, args: PretrainArguments, plan: StepPlan
) -> dict[str, float]:
    """Gives the optimizer this step's learning rate and weight decay; returns them, and the teacher's momentum."""
    cosine = partial(warmup_cosine, step, total_steps=plan.total_steps)
    peak_rate = args.learning_rate * plan.images_per_step / 256
    warmup_steps = min(plan.steps_in(args.warmup_epochs), plan.total_steps)
    rate = cosine(base=peak_rate, final=args.min_learning_rate, warmup_steps=warmup_steps)
    decay = cosine(base=args.weight_decay, final=args.final_weight_decay)
    momentum = cosine(base=args.teacher_momentum, final=args.final_teacher_momentum)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["name"] == "decayed" else 0.0
    return {"learning_rate": rate, "weight_decay": decay, "teacher_momentum": momentum}


def add_batch(run: Run, step: Step, batch: dict, epoch: int, temperatures: dict[str, float]) -> None:
    """Adds a batch's gradients to the step's, and moves the student when they are complete."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    inputs = batch["inputs"]
    run.broken.count(batch["broken"], len(inputs["global_pixel_values"]))
    for name in ("global_pixel_values", "local_pixel_values"):
        inputs[name] = normalize(inputs[name], run.processor.image_mean, run.processor.image_std)
    # Accelerate weights each batch as one of a full step's, of which an epoch's last step can have fewer
    num_batches = run.plan.batches_in_step(run.progress.samples // run.plan.images_per_batch)
    weight = run.plan.batches_per_step / num_batches
    frozen = epoch < run.args.freeze_last_layer_epochs
    with accelerator.accumulate(model):
        outputs = model(**inputs, **temperatures, move_centers=accelerator.sync_gradients)
        backward(accelerator, model, outputs.loss * weight)
        losses = {name: value for name, value in outputs.items() if name.endswith("loss")}
        step.losses = add_mean(step.losses, losses, num_batches)
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(optimizer)
            step.gradient_norm = clip_gradients(accelerator, model, run.args.clip_gradients or math.inf)
            watched = step.gradient_norm
            if accelerator.scaler is not None:  # fp16's scaler leaves out steps that overflow, and they don't count
                watched = accelerator.reduce(step.losses["loss"], "mean")
            step.skipped = run.guard.must_skip(run.progress.step, watched)
            if step.skipped:
                optimizer.zero_grad()
            if frozen:
                freeze_step(accelerator, optimizer, run.unwrapped.student_head.prototype_parameters())
        optimizer_step(accelerator, model, optimizer)
        if frozen:
            forget_frozen_steps(accelerator, optimizer)


def checked_losses(run: Run, step: Step) -> dict[str, float]:
    """The step's losses, means over all processes; raises if they, or the weights by now, are no numbers."""
    losses = mean_over_processes(run.accelerator, step.losses)
    # weights can have gone bad in this very step, whose loss was taken before; fp16's scaler leaves such steps out
    gradient_norm = step.gradient_norm.item() if run.accelerator.scaler is None else 0.0
    require_finite(run.progress.step, run.args.output_dir, loss=losses["loss"], gradient_norm=gradient_norm)
    return losses


def log_step(run: Run, step: Step, epoch: int, schedules: dict[str, float], temperatures: dict[str, float]) -> dict:
    """Writes a line of metrics.jsonl, and returns its losses."""
    losses = checked_losses(run, step)
    watched = {}
    if run.watch.wanted:
        watched = run.watch.figures(**temperatures)
        if math.isfinite(gradient_norm := step.gradient_norm.item()):  # fp16's scaler left the step out where it isn't
            watched["gradient_norm"] = gradient_norm
    run.log.write(
        run.progress.step,
        epoch=epoch,
        **losses,
        **schedules,
        **run.pace.figures(),
        **({"skipped_steps": run.guard.skipped} if run.args.skip_nonfinite_steps else {}),
        **watched,
    )
    if run.args.stop_on_collapse:
        run.watch.require_no_collapse(run.progress.step, run.args.output_dir)
    return losses


def train_epoch(run: Run, epoch: int, bar: tqdm) -> None:
    """Trains on what is left of an epoch."""
    args, accelerator, plan, progress = run.args, run.accelerator, run.plan, run.progress
    temperatures = teacher_temperatures(args, epoch)
    run.dataloader.set_epoch(epoch)
    batches = skip_batches(accelerator, run.dataloader, epoch, progress.samples // plan.images_per_batch)
    step = Step()
    for batch in run.pace.timed(batches):
        schedules = set_schedules(run.optimizer, progress.step, args, plan)
        run.watch.wanted = is_due(args.watch_steps, progress.step + 1)
        add_batch(run, step, batch, epoch, temperatures)
        progress.samples += plan.images_per_batch
        run.pace.images += plan.images_per_batch
        if not accelerator.sync_gradients:
            continue
        if not step.skipped:
            run.unwrapped.update_teacher(schedules["teacher_momentum"])
            run.guard.remember()
        progress.step, progress.skipped = progress.step + 1, run.guard.skipped
        bar.update()
        due_to_save = is_due(plan.steps_between(args.save_epochs), progress.step)
        due_to_log = is_due(args.logging_steps, progress.step) or due_to_save or progress.step == plan.total_steps
        if (due_to_log or run.watch.wanted) and not step.skipped:
            losses = log_step(run, step, epoch, schedules, temperatures)
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
        if run.stop.agreed():
            if not step.skipped:
                checked_losses(run, step)
            save(run)
            run.stop.leave()
        if due_to_save and progress.samples < plan.images_per_epoch:
            save(run)
        step = Step()
    run.broken.end_epoch()
    progress.epoch, progress.samples = epoch + 1, 0


def score_teacher(run: Run) -> None:
    """Scores the teacher on `eval_data`, and keeps it if it is the best so far."""
    accelerator, args, progress = run.accelerator, run.args, run.progress
    result, teacher = {}, whole_module(accelerator, run.model, "personvit")
    if accelerator.is_main_process:
        result = score(teacher.to(accelerator.device), run.processor, run.eval_dataset, num_workers=args.num_workers)
        run.log.write(progress.step, epoch=progress.epoch - 1, mAP=result["mAP"], rank1=result["rank1"])
        warn_past_peak(run.log.path)
    accelerator.wait_for_everyone()
    if args.keep_best:
        best = Path(args.output_dir) / "best"
        save_best(accelerator, run.model, run.processor, best, progress, result.get("mAP"))


def main() -> None:
    args = parse_arguments(PretrainArguments)
    if args.keep_best and not args.eval_data:
        raise ValueError("`keep_best` needs `eval_data` to tell which model is the best.")
    accelerator = make_accelerator(
        args.output_dir, args.mixed_precision, args.gradient_accumulation_steps, args.report_to, args.timeout_minutes
    )
    if args.skip_nonfinite_steps and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("`skip_nonfinite_steps` is not for DeepSpeed, whose optimizer takes every step.")
    if accelerator.is_main_process:
        warn_long_warmup(args.warmup_epochs, args.epochs)
    run = prepare_run(args, accelerator)
    steps = {"total": run.plan.total_steps, "initial": run.progress.step}
    run.model.train()
    with tqdm(**steps, desc="Pre-training", disable=not accelerator.is_main_process) as bar:
        for epoch in range(run.progress.epoch, args.epochs):
            train_epoch(run, epoch, bar)
            is_last = epoch + 1 == args.epochs
            if run.eval_dataset is not None and (is_due(args.eval_epochs, epoch + 1) or is_last):
                with run.pace.paused():
                    score_teacher(run)
            # here and not in the epoch's last step, so that a resumed run starts with the next epoch
            if is_due(run.plan.steps_between(args.save_epochs), run.progress.step) or (is_last and args.save_epochs):
                save(run)
    run.stop.close()
    output_dir = Path(args.output_dir)
    if args.keep_best and run.progress.best is not None:
        export_best(accelerator, output_dir / "best", output_dir)
    else:
        save_model(accelerator, run.model, run.processor, output_dir)
    if url := run.publisher.finish():
        print(f"On the Hub: {url}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
