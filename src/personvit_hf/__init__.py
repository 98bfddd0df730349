"""PersonViT for transformers: pre-training on unlabelled person crops, re-identification, evaluation as retrieval.

Importing the package registers the model classes with transformers' auto classes, so that `AutoModel.from_pretrained`
knows `model_type = "personvit"`. Models and functions are loaded when they are first used: torch, transformers' model
code, data set and image libraries take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_when_needed

if TYPE_CHECKING:
    from .configuration_personvit import PersonViTConfig
    from .conversion import convert_checkpoint
    from .embedding import embed_images
    from .hub import push_to_hub
    from .image_processing_personvit import PersonViTImageProcessor
    from .modeling_personvit import PersonViTForReID, PersonViTModel
    from .modeling_personvit_pretraining import PersonViTForPreTraining
    from .person_images import load_person_images
    from .reid_data import load_reid_dataset
    from .reid_retrieval.ranking import evaluate_reid
    from .reid_retrieval.reranking import rerank

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
    "rerank",
]

_MODULE_OF = {
    "PersonViTConfig": "configuration_personvit",
    "PersonViTForPreTraining": "modeling_personvit_pretraining",
    "PersonViTForReID": "modeling_personvit",
    "PersonViTImageProcessor": "image_processing_personvit",
    "PersonViTModel": "modeling_personvit",
    "convert_checkpoint": "conversion",
    "embed_images": "embedding",
    "evaluate_reid": "reid_retrieval.ranking",
    "load_person_images": "person_images",
    "load_reid_dataset": "reid_data",
    "push_to_hub": "hub",
    "rerank": "reid_retrieval.reranking",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("personvit-hf")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


register_when_needed()
