"""Checkpoints of the field in: PersonViT, iBOT, DINO, TransReID(-SSL), PASS, timm and transformers to our models."""

from __future__ import annotations

import inspect
import logging
import os
import re
import tempfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .cards import SETTINGS_FILE as RUN_SETTINGS_FILE
from .checkpoint_names import (
    OFFICIAL_HEAD_NAMES,
    Weight,
    Weights,
    backbone_from_official,
    backbone_from_transformers,
    checked_weight,
    official_name,
    renamed,
    without,
)
from .checkpoint_reading import named_entries
from .checkpoint_sizes import MASK_TOKEN, backbone_settings, commonest_size, shape_of
from .checkpoint_sources import (
    KINDS,
    LEFT_OUT_ENTRIES,
    Source,
    check_entries,
    checked_statistics,
    flat_weights,
    open_source,
    split_weights,
)
from .configuration_personvit import PersonViTConfig
from .files import follow_umask
from .image_processing_personvit import PersonViTImageProcessor
from .modeling_personvit import PersonViTForReID, PersonViTModel
from .modeling_personvit_pretraining import PersonViTForPreTraining

logger = logging.getLogger(__name__)

Model = PersonViTModel | PersonViTForPreTraining | PersonViTForReID

TARGETS = ("backbone", "pretraining", "reid")
OVERRIDES = {*inspect.get_annotations(PersonViTConfig), "num_labels", "id2label", "label2id"}
REID_PARTS = ("base", "b1", "b2", "fcneck", "bottleneck", "classifier")
REID_PARTS += tuple(f"{part}_{index}" for part in ("bottleneck", "classifier") for index in range(1, 5))
OWN_PREFIX = re.compile(r"^(personvit|student|student_head|teacher_head)\.")
JPM_REASON = "local branch of TransReID (JPM): the feature is the global branch's"
JPM_UNUSED = "TransReID with JPM does not use it: its global branch b1 has a last layer of its own"
PASS_HEAD_REASON = "head of PASS for [CLS] and parts together: the parts are last_hidden_state[:, 1:4]"


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, and what became of the file.

    Attributes:
        model: In evaluation mode, float32.
        image_processor: With the statistics of the images that the model was trained with.
        kind: What the file is, one of `checkpoint_sources.KINDS`.
        left_out: Keys of the file that are not used, each with the reason.
        notes: What was assumed and may need an override.
    """

    model: Model
    image_processor: PersonViTImageProcessor
    kind: str
    left_out: dict[str, str]
    notes: list[str]


def convert_checkpoint(
    path: str | Path, target: str = "auto", *, kind: str = "auto", **overrides: Any
) -> tuple[Model, PersonViTImageProcessor]:
    """Builds a model and its image processor from a checkpoint of PersonViT or of a project near it.

    Each key of the file is used, or logged (level INFO) with the reason why it is left out; any other is an error.
    `convert_with_report` returns that list.

    Args:
        path: A file (`.pth`, `.bin`, `.safetensors`) or a folder of timm or transformers. It is read without running
            code from it. The files may be those of pre-training (iBOT, DINO, PersonViT, TransReID-SSL, PASS:
            `student`, `teacher`), of fine-tuning (PersonViT, TransReID, TransReID-SSL, PASS: `base.*`), bare backbones
            of these, and ViTs of timm and transformers.
        target: "backbone" (PersonViTModel; of a pre-training file the teacher), "pretraining" (student, teacher,
            heads and centers), "reid", or "auto": "reid" for a fine-tuned file that PersonViTForReID can hold, else
            "backbone".
        kind: What the file is: "pretraining", "reid", "backbone", "timm" (a ViT trained with labels) or
            "transformers"; "auto" tells it by the keys.
        overrides: Settings of PersonViTConfig that the tensors can't tell, such as `num_attention_heads` (assumed to
            be hidden size / 64), `image_size` (assumed to be twice as high as wide, else square), `num_views`,
            `layer_norm_eps`; `image_mean` and `image_std`. An `image_size` with another grid of patches resizes the
            position embeddings as the official fine-tuning does.

    Returns:
        The model in evaluation mode, float32, and a processor with the statistics it was trained with: ImageNet's, or
        0.5 for fine-tuned models and ViTs trained with labels, or what the folder says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, or any key is unknown, missing or of another shape.
    """
    conversion = convert_with_report(path, target, kind=kind, **overrides)
    for reason in sorted(set(conversion.left_out.values())):
        keys = [key for key, value in conversion.left_out.items() if value == reason]
        logger.info("%s: left out %s (%s).", path, ", ".join(keys), reason)
    for note in conversion.notes:
        logger.warning("%s: %s.", path, note)
    return conversion.model, conversion.image_processor


def convert_with_report(path: str | Path, target: str = "auto", *, kind: str = "auto", **overrides: Any) -> Conversion:
    """What `convert_checkpoint` does, with the keys that were left out and what was assumed."""
    _check_choices(target, kind, overrides)
    statistics = {name: overrides.pop(name) for name in ("image_mean", "image_std") if name in overrides}
    source = open_source(Path(path), kind)
    if target == "auto":
        target = "reid" if source.kind == "reid" and not _has_parts(source) else "backbone"
    convert = {"backbone": convert_backbone, "pretraining": convert_pretraining, "reid": convert_reid}[target]
    try:
        model = convert(source, overrides)
    except (StrictDataclassError, ValueError) as error:
        if str(error).startswith(f"{source.path}: "):
            raise
        raise ValueError(f"{source.path}: its sizes and the overrides {overrides} don't fit: {error}") from error
    if statistics:
        source.notes = [note for note in source.notes if not note.startswith("image mean")]
    statistics = checked_statistics(path, source.statistics | statistics, model.config.num_channels)
    height, width = model.config.image_size
    processor = PersonViTImageProcessor(size={"height": height, "width": width}, **statistics)
    return Conversion(model.eval(), processor, source.kind, source.left_out, source.notes)


def save_conversion(conversion: Conversion, folder: str | Path) -> None:
    """Saves model and image processor for `from_pretrained`, aside first and then moved: nothing stands there half.

    Args:
        conversion: What `convert_with_report` returned.
        folder: Made if need be; files of the same names are replaced.

    Raises:
        FileExistsError: if a training script wrote its model there.
        OSError: if it can't be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file of this name is in the way of the output folder.")
    if (folder / RUN_SETTINGS_FILE).exists():
        raise FileExistsError(f"{folder} holds a run of training, whose card and figures would tell of another model.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as partial:
        conversion.model.save_pretrained(partial)
        conversion.image_processor.save_pretrained(partial)
        follow_umask(Path(partial))
        folder.mkdir(exist_ok=True)
        # the configuration last: without it the folder is not taken for a model
        for file in sorted(Path(partial).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(file, folder / file.name)


def _check_choices(target: str, kind: str, overrides: dict[str, Any]) -> None:
    if target not in ("auto", *TARGETS):
        raise ValueError(f"`target` must be 'auto', 'backbone', 'pretraining' or 'reid', got {target!r}.")
    if kind not in ("auto", *KINDS):
        raise ValueError(f"`kind` must be 'auto' or one of {', '.join(KINDS)}, got {kind!r}.")
    unknown = sorted(set(overrides) - OVERRIDES - {"image_mean", "image_std"})
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting of PersonViTConfig, nor `image_mean` or `image_std`.")


# Targets


def convert_backbone(source: Source, overrides: dict[str, Any]) -> PersonViTModel:
    """The backbone of any file; of a pre-training file the teacher's."""
    path = source.path
    if source.kind == "pretraining":
        weights = _teacher_backbone(source)
    elif source.kind == "reid":
        weights, rest = _reid_backbone(source)
        reason = PASS_HEAD_REASON if _has_parts(source) else "the target is the backbone"
        source.left_out |= {weight.key: reason for weight in rest.values()}
    elif source.kind == "transformers":
        weights = backbone_from_transformers(path, flat_weights(source), source.left_out)
    else:
        weights = backbone_from_official(path, flat_weights(source), source.left_out)
    settings = backbone_settings(source, weights, overrides)
    return _load(source, PersonViTModel, settings, weights, {MASK_TOKEN})


def convert_pretraining(source: Source, overrides: dict[str, Any]) -> PersonViTForPreTraining:
    """Student, teacher, heads and centers of a file of iBOT, PersonViT or DINO."""
    path, entries = source.path, source.entries
    if source.kind != "pretraining" or "student" not in entries:
        raise ValueError(
            f"{path}: target 'pretraining' needs a file with `student` and `teacher`, this is a {source.kind}."
        )
    for name in check_entries(path, entries, {"student", "teacher", "ibot_loss", "dino_loss"}):
        source.left_out[name] = LEFT_OUT_ENTRIES[name]
    backbones, heads, shared = {}, {}, {}
    for role in ("student", "teacher"):
        parts = split_weights(path, named_entries(path, f"`{role}`", entries[role]), ("backbone", "head"))
        backbones[role] = backbone_from_official(path, parts["backbone"], source.left_out)
        head, shared[role] = _without_repetition(parts["head"])
        if any(name.startswith("mlp_cls.") for name in head):
            raise ValueError(f"{path}: PASS's heads of parts have no place here: convert with target 'backbone'.")
        heads[role] = renamed(path, head, OFFICIAL_HEAD_NAMES)
    if any("last_layer2." in key for key in entries["student"]):  # iBOT's; DINO has no mask token
        shape_of(source, backbones["student"], MASK_TOKEN, "1, 1, hidden")
    # only the student is ever masked, so the teacher's copy of the mask token is the student's, if it has none
    if MASK_TOKEN in backbones["student"]:
        backbones["teacher"].setdefault(MASK_TOKEN, backbones["student"][MASK_TOKEN])
    settings = _head_settings(source, heads["student"], shared)
    for backbone in backbones.values():
        settings |= backbone_settings(source, backbone, overrides)
    weights = {f"student.{name}": value for name, value in backbones["student"].items()}
    weights |= {f"personvit.{name}": value for name, value in backbones["teacher"].items()}
    weights |= {f"{role}_head.{name}": value for role in heads for name, value in heads[role].items()}
    weights |= _centers(source)
    optional = {"center", "patch_center", f"student.{MASK_TOKEN}", f"personvit.{MASK_TOKEN}"}
    return _load(source, PersonViTForPreTraining, settings, weights, optional)


def convert_reid(source: Source, overrides: dict[str, Any]) -> PersonViTForReID:
    """Backbone, BNNeck and classifier of a fine-tuned file; of TransReID with JPM the global branch."""
    if source.kind != "reid":
        raise ValueError(
            f"{source.path}: target 'reid' needs a fine-tuned file with `base.*` keys, this is a {source.kind} file."
        )
    backbone, rest = _reid_backbone(source)
    if _has_parts(source):
        _refuse_joined_feature(source, backbone, rest)
    if "fcneck.weight" in rest:
        raise ValueError(
            f"{source.path}: `{rest['fcneck.weight'].key}` makes the feature narrower (REDUCE_FEAT_DIM), which "
            "PersonViTForReID does not: convert with target 'backbone' to leave it out."
        )
    settings = backbone_settings(source, backbone, overrides)
    weights = {f"personvit.{name}": value for name, value in backbone.items()} | rest
    num_labels = shape_of(source, weights, "classifier.weight", "labels, hidden")[0]
    settings.setdefault("num_labels", num_labels)
    return _load(source, PersonViTForReID, settings, weights)


# Their parts


def _refuse_joined_feature(source: Source, backbone: Weights, rest: Weights) -> None:
    """PASS concatenates [CLS] and the mean part, or takes their mean, which looks as if it were [CLS] alone."""
    hidden_size = shape_of(source, backbone, "embeddings.cls_token", "1, 1, hidden")[2]
    width = shape_of(source, rest, "classifier.weight", "labels, hidden")[1]
    if width != hidden_size or any(name.startswith("bottleneck_") for name in rest):
        raise ValueError(
            f"{source.path}: PASS's feature joins [CLS] and parts, PersonViTForReID's is [CLS]: convert with target "
            "'backbone' and join `pooler_output` and `last_hidden_state[:, 1:4]`."
        )
    source.notes.append("the feature is the [CLS] token; PASS's own fine-tuning takes its mean with the parts")


def _teacher_backbone(source: Source) -> Weights:
    path, entries = source.path, source.entries
    for name in check_entries(path, entries, {"student", "teacher"}):
        source.left_out[name] = LEFT_OUT_ENTRIES[name]
    parts = split_weights(path, named_entries(path, "`teacher`", entries["teacher"]), ("backbone", "head"))
    weights = backbone_from_official(path, parts["backbone"], source.left_out)
    reason = "the target is the teacher's backbone"
    source.left_out |= {f"teacher: {weight.key}": reason for weight in parts["head"].values()}
    if "student" in entries:
        source.left_out["student"] = reason
        for key, tensor in named_entries(path, "`student`", entries["student"]).items():
            # only the student is ever masked, so the mask token is the student's
            if key.endswith("backbone.masked_embed"):
                weight = checked_weight(path, key, tensor)
                weights.setdefault(MASK_TOKEN, Weight(weight.tensor.reshape(1, 1, -1), key))
    return weights


def _without_repetition(head: Weights) -> tuple[Weights, bool]:
    """A head without the second copy of its prototypes, and whether it had one: so iBOT writes a shared head.

    DINO's head has one set of prototypes to begin with, which is the same.
    """
    second = [name for name in head if name.startswith("last_layer2.")]
    for name in second:
        first = head.get(name.replace("last_layer2", "last_layer"))
        if first is None or not torch.equal(head[name].tensor, first.tensor):
            return head, False
    return {name: weight for name, weight in head.items() if name not in second}, True


def _head_settings(source: Source, head: Weights, shared: dict[str, bool]) -> dict[str, Any]:
    """Settings of PersonViTConfig read off the student's projection head."""
    num_prototypes = shape_of(source, head, "cls_prototypes.direction", "prototypes, bottleneck")[0]
    gains = [weight.tensor for name, weight in head.items() if name.endswith("_prototypes.gain")]
    patch_prototypes = head.get("patch_prototypes.direction", head["cls_prototypes.direction"])
    return {
        "share_projection_head": shared["student"],
        "share_teacher_projection_head": shared["teacher"],
        "projection_hidden_size": commonest_size(head, {r"mlp\.[02]\.(weight|bias)": 0, r"mlp\.[24]\.weight": 1}),
        "projection_bottleneck_size": commonest_size(head, {r".*\.direction": 1, r"mlp\.4\.(weight|bias)": 0}),
        "num_cls_prototypes": num_prototypes,
        "num_patch_prototypes": len(patch_prototypes.tensor),
        # iBOT fixes gains at 1 if at all
        "norm_last_layer": all(bool((gain == 1).all()) for gain in gains),
    }


def _centers(source: Source) -> Weights:
    """The centers of iBOT (`center`, `center2`) or DINO (`center`), if the file has them."""
    weights: Weights = {}
    for entry, names in (("ibot_loss", ("center", "center2")), ("dino_loss", ("center",))):
        if entry not in source.entries:
            continue
        centers = named_entries(source.path, f"`{entry}`", source.entries[entry])
        if set(centers) != set(names):
            raise ValueError(f"{source.path}: `{entry}` should hold {' and '.join(names)}, found {sorted(centers)}.")
        for ours, name in zip(("center", "patch_center"), names, strict=False):
            weight = checked_weight(source.path, f"{entry}.{name}", centers[name])
            weights[ours] = Weight(weight.tensor.flatten(), weight.key)
    return weights


def _has_parts(source: Source) -> bool:
    return any(re.search(r"\bpart_token[0-9]+$", key) for key in source.entries)


def _reid_backbone(source: Source) -> tuple[Weights, Weights]:
    """(backbone, BNNeck and classifier) of a fine-tuned file, local branches left out."""
    parts = split_weights(source.path, source.entries, REID_PARTS)
    base, left_out = parts["base"], source.left_out
    if parts["b1"]:
        last = max((int(name.split(".")[1]) for name in base if re.match(r"blocks\.[0-9]{1,4}\.", name)), default=0)
        base = without(base, {rf"blocks\.{last}\..+|norm\..+": JPM_UNUSED}, left_out)
        for name, weight in parts["b1"].items():
            base[re.sub(r"^1\.", "norm.", re.sub(r"^0\.", f"blocks.{last}.", name))] = weight
        local = [part for part in REID_PARTS if part == "b2" or "_" in part]
        left_out |= {weight.key: JPM_REASON for part in local for weight in parts.pop(part).values()}
    parts = {part: weights for part, weights in parts.items() if part not in ("base", "b1")}
    rest = {f"{part}.{name}": weight for part, weights in parts.items() for name, weight in weights.items()}
    return backbone_from_official(source.path, base, left_out), rest


def _load(
    source: Source,
    model_class: type[Model],
    settings: dict[str, Any],
    weights: Weights,
    optional: Set[str] = frozenset(),
) -> Model:
    """The model with these weights: every one must be there with its shape, but for the `optional` ones, which are 0.

    It is built without memory first, so that sizes that contradict each other take none.
    """
    with torch.device("meta"):
        model = model_class(PersonViTConfig(**settings))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = {
        "lacks": [
            f"{name} ({official_name(re.sub(OWN_PREFIX, '', name))})"
            for name in sorted(set(expected) - set(weights) - optional)
        ],
        "has no place for": [weights[name].key for name in sorted(set(weights) - set(expected))],
        "has other shapes in": [
            f"{weights[name].key} ({name}): {tuple(weights[name].tensor.shape)} instead of {shape}"
            for name, shape in sorted(expected.items())
            if name in weights and tuple(weights[name].tensor.shape) != shape
        ],
    }
    for what, names in problems.items():
        if names:
            raise ValueError(
                f"{source.path}: the checkpoint {what} {len(names)} of {len(expected)} weights: {names[:5]}."
            )
    model.to_empty(device="cpu")
    zeros = {name: torch.zeros(expected[name]) for name in set(expected) - set(weights)}
    model.load_state_dict({name: weight.tensor for name, weight in weights.items()} | zeros)
    return model
