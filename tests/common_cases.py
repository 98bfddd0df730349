"""Our models as cases of transformers' own common tests, which `test_transformers_common.py` puts beside this file."""

import unittest

import torch
from common.test_configuration_common import ConfigTester
from common.test_modeling_common import ModelTesterMixin

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, PersonViTForReID, PersonViTModel

SIZES = {
    **{"hidden_size": 36, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 37},
    **{"image_size": [32, 16], "patch_size": 8, "num_cls_prototypes": 16, "num_patch_prototypes": 8},
    **{"projection_hidden_size": 16, "projection_bottleneck_size": 8, "num_labels": 3},
}


class Tester:
    """What the common tests ask of a model's tester; `case` is theirs."""

    batch_size, seq_length, num_masks, mask_length = 4, 9, 3, 8
    hidden_size, num_hidden_layers, num_attention_heads = 36, 2, 6

    def __init__(self, case: "Case"):
        self.case, self.is_training = case, case.is_training

    def get_config(self) -> PersonViTConfig:
        return PersonViTConfig(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[PersonViTConfig, dict[str, torch.Tensor]]:
        return self.get_config(), self.case.inputs()


class Case(ModelTesterMixin):
    test_resize_embeddings = False
    is_training = True

    def setUp(self):
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=PersonViTConfig, has_text_modality=False, hidden_size=36)

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.rand(4, 3, 32, 16)}

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """As stock ViT has it: patches are embedded by a convolution, not by nn.Embedding."""
        for model_class in self.all_model_classes:
            embeddings = model_class(self.model_tester.get_config()).get_input_embeddings()
            assert isinstance(embeddings, torch.nn.Module)


class Backbone(Case, unittest.TestCase):
    all_model_classes = (PersonViTModel,)
    is_training = False  # it has no loss


class ReID(Case, unittest.TestCase):
    all_model_classes = (PersonViTForReID,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        labels = {"labels": torch.tensor([0, 0, 1, 1])} if return_labels else {}
        return super()._prepare_for_class(inputs_dict, model_class) | labels


class PreTraining(Case, unittest.TestCase):
    all_model_classes = (PersonViTForPreTraining,)

    def inputs(self) -> dict[str, torch.Tensor]:
        masks = torch.zeros(4, 2, 8, dtype=torch.bool)
        masks[:, 1, :3] = True
        return {"global_pixel_values": torch.rand(4, 2, 3, 32, 16), "bool_masked_pos": masks}
