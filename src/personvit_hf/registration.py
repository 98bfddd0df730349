"""Tells transformers' auto classes of PersonViT, but not before somebody imports them.

The auto classes, and what is registered with them, take seconds to import (torch, torchvision, transformers' model
code). A program that imports this package may never need them, or not yet.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_personvit import PersonViTConfig

    AutoConfig.register(PersonViTConfig.model_type, PersonViTConfig)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

    from .configuration_personvit import PersonViTConfig
    from .modeling_personvit import PersonViTForReID, PersonViTModel
    from .modeling_personvit_pretraining import PersonViTForPreTraining

    AutoModel.register(PersonViTConfig, PersonViTModel)
    AutoModelForPreTraining.register(PersonViTConfig, PersonViTForPreTraining)
    AutoModelForImageClassification.register(PersonViTConfig, PersonViTForReID)


def _register_image_processors() -> None:
    from transformers import AutoImageProcessor

    from .configuration_personvit import PersonViTConfig
    from .image_processing_personvit import PersonViTImageProcessor, PersonViTImageProcessorPil

    AutoImageProcessor.register(
        PersonViTConfig,
        image_processor_classes={"torchvision": PersonViTImageProcessor, "pil": PersonViTImageProcessorPil},
    )


def _register_no_video_processor() -> None:
    """Pipelines look for one, and would ask whether to run code of the checkpoint to find it."""
    from transformers import AutoVideoProcessor

    from .configuration_personvit import PersonViTConfig

    AutoVideoProcessor.register(PersonViTConfig, None)


class _AfterImports(MetaPathFinder):
    """Runs actions once the modules that they belong to are imported.

    Not before the outermost import of transformers or this package is complete: transformers' own modules import the
    auto classes before they define what our models are made of.
    """

    PACKAGES = ("transformers", __package__)

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions  # by module
        self.under_way = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that other finders have, with a loader that reports to us; None for modules of other packages."""
        if name.partition(".")[0] not in self.PACKAGES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ReportingLoader(spec.loader, self)
                return spec
        return None

    def run_ready(self) -> None:
        """Runs the actions of modules that are imported by now; after the last one, imports are as ever."""
        for module in [name for name in self.actions if name in sys.modules]:
            action = self.actions.pop(module, None)  # None: an import by another action has run it
            if action is not None:
                action()
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class _ReportingLoader(Loader):
    """Another loader, which tells the finder when the outermost import is complete."""

    def __init__(self, loader: Loader, finder: _AfterImports):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # `python -m` asks for the module's code, others for its source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # the module never knows
        under_way = self.finder.under_way
        outermost = not getattr(under_way, "any", False)
        under_way.any = True
        try:
            self.loader.exec_module(module)
        finally:
            under_way.any = not outermost
        if outermost:
            self.finder.run_ready()


def register_when_needed() -> None:
    """Registers with the auto classes that are imported already, and with the others as soon as they are."""
    finder = _AfterImports(
        {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_models,
            "transformers.models.auto.image_processing_auto": _register_image_processors,
            "transformers.models.auto.video_processing_auto": _register_no_video_processor,
        }
    )
    sys.meta_path.insert(0, finder)
    finder.run_ready()
