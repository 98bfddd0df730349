"""Checkpoints of ours as models and image processors: all there, or an error that says what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from .checkpoint_reading import excerpt
from .checkpoint_sources import checked_statistics
from .configuration_personvit import PersonViTConfig
from .files import read_json
from .modeling_personvit import PersonViTForReID, PersonViTModel, PersonViTPreTrainedModel
from .modeling_personvit_pretraining import PersonViTForPreTraining

MODEL_CLASSES = {cls.__name__: cls for cls in (PersonViTModel, PersonViTForPreTraining, PersonViTForReID)}
Model = TypeVar("Model", bound=PreTrainedModel)
# What transformers raises for a JSON file whose values are of other types than it takes for granted, or nested deeply.
WRONG_VALUES = (StrictDataclassError, AttributeError, LookupError, TypeError, RecursionError)
MAX_PIXELS = 2**24  # of what a processor makes of an image


def read_config(name_or_path: str, revision: str | None = None) -> PersonViTConfig:
    """The configuration of a checkpoint, once it is sure to be one of PersonViT.

    Args:
        name_or_path: Folder or Hub name of a checkpoint that `save_pretrained` wrote.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another architecture, whose weights transformers would replace by random ones, or its
            config.json holds what no setting can be.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except WRONG_VALUES as error:
        raise ValueError(f"{name_or_path}: its config.json is damaged or was edited: {error}") from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name_or_path}: neither folder nor Hub name of a checkpoint that `save_pretrained` wrote: {error} "
            "(Official .pth files are converted with `convert_checkpoint` first.)"
        ) from error
    if config.model_type != PersonViTConfig.model_type:
        raise ValueError(
            f"{name_or_path}: a checkpoint of another architecture, model_type {config.model_type!r}; expected "
            f"{PersonViTConfig.model_type!r}."
        )
    if not isinstance(config.architectures, list | None):
        raise ValueError(f"{name_or_path}: `architectures` in its config.json must be a list of class names.")
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, name, None)):  # a kernel on the Hub, whose code transformers would run
            raise ValueError(f"{name_or_path}: `{name}` in its config.json names code elsewhere, which is not run.")
    return config


def load_pretrained(model_class: type[Model], name_or_path: str, **overrides: Any) -> Model:
    """A model with the whole backbone of a checkpoint; heads that it lacks are new.

    Args:
        model_class: PersonViTForPreTraining or PersonViTForReID.
        name_or_path: As in `read_config`.
        overrides: Settings of PersonViTConfig that replace the checkpoint's.

    Raises:
        FileNotFoundError: As in `read_config`.
        ValueError: As in `read_config`, if weights are damaged, or if with these settings some of the model is not as
            in the checkpoint.
    """
    read_config(name_or_path)
    model, loading = _read_weights(model_class, name_or_path, ignore_mismatched_sizes=True, **overrides)
    backbone = f"{model_class.base_model_prefix}."
    unlike = [key for key in loading["missing_keys"] if key.startswith(backbone)]
    unlike += [mismatch[0] for mismatch in loading["mismatched_keys"]]
    # new with another data set: the classifier of its people, the embedding of its cameras
    unlike = [key for key in unlike if not key.endswith(("classifier.weight", "side_embeddings"))]
    if unlike:
        raise ValueError(
            f"`model_name_or_path` {name_or_path}: {len(unlike)} parameters are not in it or have another shape, such "
            f"as {min(unlike)}. Check `config_overrides`: sizes must be the checkpoint's."
        )
    return model


def load_embedder(
    name_or_path: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PersonViTModel | PersonViTForReID, BaseImageProcessor]:
    """The model whose feature a checkpoint is for, in evaluation mode, and its image processor.

    Args:
        name_or_path: As in `read_config`: a backbone, a pre-training run (its teacher is taken) or a fine-tuned model
            (whose `neck_feature` counts).
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights; None for the checkpoint's.

    Raises:
        FileNotFoundError: As in `read_config`, or if there is no image processor.
        ValueError: As in `read_config`, or if weights are damaged, missing or no numbers, as features of random ones
            would look like any others; or if the processor's settings are none.
    """
    config = read_config(name_or_path, revision)
    model = _read_whole(_embedder_class(config), name_or_path, revision=revision, dtype=dtype or "auto")
    return model, _load_processor(name_or_path, revision, config.num_channels)


def load_own_model(folder: str | Path) -> PersonViTPreTrainedModel:
    """The model in a folder of this package, of the class that was saved, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such folder or no model in it.
        ValueError: if it holds another model, or weights are damaged, missing or no numbers.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no folder with a config.json.")
    name = (read_config(str(folder)).architectures or ["PersonViTModel"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(f"{folder}: it holds a {name}, not one of {', '.join(MODEL_CLASSES)}.")
    return _read_whole(MODEL_CLASSES[name], str(folder), local_files_only=True)


def _read_whole(model_class: type[Model], name_or_path: str, **options: Any) -> Model:
    """The model in evaluation mode, once it is sure that the checkpoint has all its weights and they are numbers."""
    model, loading = _read_weights(model_class, name_or_path, **options)
    if loading["missing_keys"]:
        raise ValueError(f"{name_or_path}: the checkpoint lacks weights: {sorted(loading['missing_keys'])[:5]}.")
    if broken := nonfinite_weights(model):
        raise ValueError(f"{name_or_path}: {len(broken)} weights hold NaN or infinity, such as {min(broken)}.")
    return model.eval()


def _embedder_class(config: PersonViTConfig) -> type[PersonViTModel | PersonViTForReID]:
    """The class that has the feature which a checkpoint is for."""
    named = config.architectures or ()
    if PersonViTForReID.__name__ in named:
        return PersonViTForReID
    without_neck = any(one.__name__ in named for one in (PersonViTModel, PersonViTForPreTraining))
    # of a class that isn't ours, such as a subclass, it is the backbone's unless it is taken after the BNNeck
    return PersonViTModel if without_neck or config.neck_feature == "before" else PersonViTForReID


def _read_weights(model_class: type[Model], name_or_path: str, **options: Any) -> tuple[Model, dict[str, Any]]:
    """The model, and what transformers tells of its loading. Pickled weights are not read: they can run code."""
    folder = Path(name_or_path)
    if folder.is_dir():
        _require_own_shards(folder)
        if not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("pytorch_model*.bin"))):
            raise ValueError(
                f"{folder}: its weights are pickled ({pickled[0].name}), which could run code. `personvit convert "
                f"{folder} NEW_FOLDER` reads them without, and writes safetensors."
            )
    try:
        return model_class.from_pretrained(name_or_path, output_loading_info=True, use_safetensors=True, **options)
    except (ValueError, ImportError, *WRONG_VALUES) as error:  # such as an unknown `hidden_act`, or dtype int8
        raise ValueError(f"{name_or_path}: its config.json is damaged or was edited: {error!r}") from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name_or_path}: its weights can't be read ({error}).") from error


def _require_own_shards(folder: Path) -> None:
    """Raises a ValueError if the index of a folder's weights names files that are not safetensors in the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    names = read_json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else [names]
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: expected names of .safetensors files beside it, found {excerpt(repr(name))}.")


def nonfinite_weights(model: torch.nn.Module) -> list[str]:
    """Names of the weights that are not finite numbers throughout."""
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def _load_processor(name_or_path: str, revision: str | None, num_channels: int) -> BaseImageProcessor:
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(f"{name_or_path}: no image processor beside the weights: {error}") from error
    except (ValueError, *WRONG_VALUES) as error:
        raise ValueError(f"{name_or_path}: its preprocessor_config.json is damaged or was edited: {error}") from error
    statistics = {"image_mean": processor.image_mean, "image_std": processor.image_std}
    checked_statistics(name_or_path, statistics, num_channels)
    if not isinstance(processor.rescale_factor, int | float):
        raise ValueError(f"{name_or_path}: `rescale_factor` should be a number, found {processor.rescale_factor!r}.")
    for name in ("size", "crop_size", "pad_size"):
        _check_size(name_or_path, name, getattr(processor, name, None))
    return processor


def _check_size(name_or_path: str, name: str, size: Any) -> None:
    """Raises a ValueError if `size` of a processor is no height and width of a picture."""
    if size is None and name != "size":
        return
    told = {} if size is None else {key: value for key, value in dict(size).items() if value is not None}
    sides = list(told.values())
    good = told.keys() == {"height", "width"} and all(type(side) is int and side > 0 for side in sides)
    if not good or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(
            f"{name_or_path}: `{name}` in its preprocessor_config.json should be a `height` and `width` of together "
            f"at most {MAX_PIXELS} pixels, found {excerpt(str(told))}."
        )
