"""PersonViT for transformers: pre-training on unlabelled person crops, re-identification, evaluation as retrieval.

Importing the package registers the model classes with transformers' auto classes, so that `AutoModel.from_pretrained`
knows `model_type = "personvit"`. The functions are loaded when they are first used: they bring data set and image
libraries that a model alone doesn't need.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_personvit import PersonViTConfig
from .image_processing_personvit import PersonViTImageProcessor, PersonViTImageProcessorPil
from .modeling_personvit import PersonViTForReID, PersonViTModel
from .modeling_personvit_pretraining import PersonViTForPreTraining

if TYPE_CHECKING:
    from .conversion import convert_checkpoint
    from .embedding import embed_images
    from .hub import push_to_hub
    from .person_images import load_person_images
    from .reid_data import load_reid_dataset
    from .reid_retrieval.ranking import evaluate_reid

__all__ = [
    "PersonViTConfig",
    "PersonViTForPreTraining",
    "PersonViTForReID",
    "PersonViTImageProcessor",
    "PersonViTModel",
    "convert_checkpoint",
    "embed_images",
    "evaluate_reid",
    "load_person_images",
    "load_reid_dataset",
    "push_to_hub",
]

_MODULE_OF = {
    "convert_checkpoint": "conversion",
    "embed_images": "embedding",
    "evaluate_reid": "reid_retrieval.ranking",
    "load_person_images": "person_images",
    "load_reid_dataset": "reid_data",
    "push_to_hub": "hub",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("personvit-hf")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


AutoConfig.register(PersonViTConfig.model_type, PersonViTConfig)
AutoModel.register(PersonViTConfig, PersonViTModel)
AutoModelForPreTraining.register(PersonViTConfig, PersonViTForPreTraining)
AutoModelForImageClassification.register(PersonViTConfig, PersonViTForReID)
AutoImageProcessor.register(
    PersonViTConfig,
    image_processor_classes={"torchvision": PersonViTImageProcessor, "pil": PersonViTImageProcessorPil},
)

# `save_pretrained` then copies the code files beside the weights, for `trust_remote_code=True` without the package.
PersonViTConfig.register_for_auto_class()
PersonViTModel.register_for_auto_class("AutoModel")
PersonViTForPreTraining.register_for_auto_class("AutoModelForPreTraining")
PersonViTForReID.register_for_auto_class("AutoModelForImageClassification")
PersonViTImageProcessor.register_for_auto_class()
PersonViTImageProcessorPil.register_for_auto_class()
