"""Which project a checkpoint comes from: told by its keys, and by the configuration beside it if it is a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .checkpoint_names import DISTILLATION_TOKENS, Weight, Weights, checked_weight
from .checkpoint_reading import excerpt, named_entries, read_checkpoint
from .files import read_json

KINDS = ("pretraining", "reid", "backbone", "timm", "transformers")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TRANSFORMERS_MODEL_TYPES = ("vit", "deit", "vit_mae")
WRAPPERS = ("model", "state_dict", "module")
# What may stand beside the weights, and why it is left out.
LEFT_OUT_ENTRIES = dict.fromkeys(
    ["optimizer", "epoch", "args", "fp16_scaler", "scaler", "lr_scheduler", "ibot_loss", "dino_loss"],
    "state or settings of the official training run",
)
# Names that only models with a classifier have: they were trained with labels.
SUPERVISED = re.compile(r"(head|head_dist|pre_logits\.fc|pooler\.dense|(cls_|distillation_)?classifier)\.weight")

Statistics = dict[str, list[float]]
IMAGENET: Statistics = {"image_mean": [*IMAGENET_DEFAULT_MEAN], "image_std": [*IMAGENET_DEFAULT_STD]}
HALF: Statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass
class Source:
    """A checkpoint on its way in.

    Attributes:
        path: The file, for errors.
        kind: One of `KINDS`.
        entries: Of a pre-training file its entries (`student`, `teacher`, ...); of others the weights by the names in
            the file.
        statistics: Mean and standard deviation of the images that the weights were trained with.
        settings: What a configuration beside the weights tells, by the names of `PersonViTConfig`.
        left_out: Keys of the file that are not used, each with the reason.
        notes: What was assumed and may need an override.
    """

    path: Path
    kind: str
    entries: dict[str, Any]
    statistics: Statistics = field(default_factory=lambda: dict(IMAGENET))
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(path: Path, kind: str = "auto") -> Source:
    """Reads a checkpoint and tells where it comes from.

    Args:
        path: A file, or a folder of timm or transformers: `config.json` beside `model.safetensors` or
            `pytorch_model.bin`.
        kind: One of `KINDS`, or "auto" to tell it by the keys. "backbone" and "timm" differ in the statistics of the
            images alone.

    Raises:
        FileNotFoundError: if there is no such file, or no weights in the folder.
        ValueError: if it can't be read safely, is of none of these kinds, or of another than `kind`.
    """
    settings, statistics = {}, None
    if path.is_dir():
        path, settings, statistics = _open_folder(path)
    contents = read_checkpoint(path)
    left_out = _unwrap(path, contents)
    found = _kind(path, contents)
    if kind not in ("auto", found) and {kind, found} != {"backbone", "timm"}:
        raise ValueError(f"{path}: `kind` is {kind!r}, but its keys are those of a {found!r} file.")
    source = Source(path, found if kind == "auto" else kind, contents, settings=settings, left_out=left_out)
    if statistics is not None:
        source.statistics = statistics
    else:
        _assume_statistics(source)
    return source


def bare_name(name: str) -> str:
    """The name without what wrappers of distributed and compiled models put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def split_weights(path: str | Path, entries: Mapping[str, object], parts: tuple[str, ...]) -> dict[str, Weights]:
    """Groups checked weights by their first word, which must be one of `parts`; the rest is their name."""
    groups: dict[str, Weights] = {part: {} for part in parts}
    for key, tensor in entries.items():
        part, _, rest = bare_name(key).partition(".")
        if part not in groups:
            raise ValueError(f"{path}: unknown key `{key}`; expected keys that start with {', '.join(parts)}.")
        if rest in groups[part]:
            raise ValueError(f"{path}: `{key}` and `{groups[part][rest].key}` are the same weight.")
        groups[part][rest] = checked_weight(path, key, tensor)
    return groups


def flat_weights(source: Source) -> Weights:
    """The weights of a file that is a backbone alone, by name within the backbone."""
    prefix = r"(vit|deit)\." if source.kind == "transformers" else r"backbone\."
    weights: Weights = {}
    for key, tensor in source.entries.items():
        name = re.sub(f"^{prefix}", "", bare_name(key))
        if name in weights:
            raise ValueError(f"{source.path}: `{key}` and `{weights[name].key}` are the same weight.")
        weights[name] = Weight(checked_weight(source.path, key, tensor).tensor, key)
    return weights


def checked_statistics(origin: str | Path, statistics: Mapping[str, Any], num_channels: int = 3) -> Statistics:
    """Mean and standard deviation, if they are numbers for each channel and the deviations are positive."""
    for name, values in statistics.items():
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != num_channels or not all(map(math.isfinite, values)):
            raise ValueError(f"{origin}: `{name}` should be {num_channels} numbers, found {excerpt(str(values))}.")
        if name == "image_std" and min(values) <= 0:
            raise ValueError(f"{origin}: `image_std` should be positive, found {values}.")
    return {name: [float(value) for value in values] for name, values in statistics.items()}


def _unwrap(path: Path, contents: dict[str, Any]) -> dict[str, str]:
    """Takes weights out of `model`, `state_dict` and `module`, in place; the entries beside them are left out."""
    left_out: dict[str, str] = {}
    for _ in WRAPPERS:
        wrapper = next((name for name in WRAPPERS if isinstance(contents.get(name), Mapping)), None)
        if wrapper is None:
            break
        weights = dict(named_entries(path, f"`{wrapper}`", contents.pop(wrapper)))
        left_out |= {name: LEFT_OUT_ENTRIES[name] for name in check_entries(path, contents, set())}
        contents.clear()
        contents.update(weights)
    return left_out


def check_entries(path: Path, entries: Mapping[str, Any], known: set[str]) -> list[str]:
    """The entries that are not `known`, if all of them are what training runs keep beside the weights."""
    others = sorted(set(entries) - known)
    unknown = [name for name in others if name not in LEFT_OUT_ENTRIES]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} unknown entries beside the weights: {unknown[:5]}.")
    return others


def _kind(path: Path, contents: Mapping[str, Any]) -> str:
    if "teacher" in contents:
        return "pretraining"
    names = {bare_name(name) for name in contents}
    if any(name.startswith("base.") for name in names):
        return "reid"
    flat = {name.removeprefix("backbone.") for name in names}
    if "patch_embed.proj.weight" in flat:
        return "timm" if _is_supervised(flat) else "backbone"
    if any(name.endswith(".attention.qkv_proj.weight") for name in names):
        raise ValueError(
            f"{path}: these are weights of this package: its folder loads with AutoModel.from_pretrained."
        )
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return "transformers"
    raise ValueError(
        f"{path}: not a checkpoint of a known kind: found neither `teacher`, `base.*`, `patch_embed.proj.weight` nor "
        f"`embeddings.patch_embeddings.projection.weight` among its keys, which start with {sorted(contents)[:5]}."
    )


def _is_supervised(names: set[str]) -> bool:
    return any(SUPERVISED.fullmatch(name) for name in names)


def _assume_statistics(source: Source) -> None:
    """The statistics that weights of this kind are trained with, and a note where projects differ."""
    if source.kind == "reid":
        source.statistics = dict(HALF)
    if source.kind not in ("timm", "transformers"):
        return
    names = set(flat_weights(source))
    distilled = bool(DISTILLATION_TOKENS & names)
    if (_is_supervised(names) or source.kind == "timm") and not distilled:
        source.statistics = dict(HALF)
        source.notes.append(
            "image mean and std are taken to be 0.5, as timm's and Google's supervised ViTs have them; for DeiT and "
            "others that were trained with ImageNet's, give image_mean and image_std"
        )
    else:
        source.notes.append("image mean and std are taken to be ImageNet's, as DINO and DeiT have them")


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any], Statistics | None]:
    """(file of weights, settings, statistics) of a folder of timm or transformers."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(WEIGHT_FILES)} in this folder; name the file of weights.")
    path = folder / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type == "personvit":
        raise ValueError(f"{folder}: already in this package's format: AutoModel.from_pretrained loads it.")
    pretrained = config.get("pretrained_cfg")
    if isinstance(pretrained, dict):
        return file, _timm_settings(path, config, pretrained), _timm_statistics(path, pretrained)
    if "model_type" in config and model_type not in TRANSFORMERS_MODEL_TYPES:
        raise ValueError(
            f"{path}: `model_type` should be one of {', '.join(TRANSFORMERS_MODEL_TYPES)}, "
            f"found {excerpt(str(model_type))}."
        )
    settings = {name: config[name] for name in ("num_attention_heads", "layer_norm_eps") if name in config}
    if "hidden_act" in config:
        settings["hidden_act"] = config["hidden_act"]
        if not isinstance(config["hidden_act"], str) or config["hidden_act"] not in ACT2FN:
            raise ValueError(f"{path}: unknown `hidden_act` {excerpt(str(config['hidden_act']))}.")
    settings |= _image_size(config.get("image_size"))
    preprocessor = read_json(folder / "preprocessor_config.json")
    if "image_mean" not in preprocessor or "image_std" not in preprocessor:
        return file, settings, None
    statistics = {name: preprocessor[name] for name in ("image_mean", "image_std")}
    return file, settings, checked_statistics(folder / "preprocessor_config.json", statistics)


def _timm_settings(path: Path, config: dict[str, Any], pretrained: dict[str, Any]) -> dict[str, Any]:
    if config.get("global_pool", "token") not in ("token", ""):
        pooled = excerpt(str(config["global_pool"]))
        raise ValueError(f"{path}: its feature is pooled by {pooled}, PersonViT's is the [CLS] token.")
    arguments = config.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    input_size = pretrained.get("input_size")
    settings = _image_size(input_size[1:]) if isinstance(input_size, list) else {}
    return settings | ({"num_attention_heads": heads} if heads is not None else {})


def _timm_statistics(path: Path, pretrained: dict[str, Any]) -> Statistics | None:
    if "mean" not in pretrained or "std" not in pretrained:
        return None
    return checked_statistics(path, {"image_mean": pretrained["mean"], "image_std": pretrained["std"]})


def _image_size(value: Any) -> dict[str, Any]:
    """The `image_size` setting, if the value is one: a side of a square, or [height, width]."""
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return {}
    return {"image_size": sides}
