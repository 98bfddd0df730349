from __future__ import annotations

import math

import pytest
import torch
from golden_fixtures import tiny_config
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, ViTConfig

from personvit_hf import PersonViTConfig

# What transformers' configurations raise: its strict dataclasses wrap our ValueError.
BAD_SETTING = (ValueError, StrictDataclassError)


def test_defaults_are_the_paper_s():
    config = PersonViTConfig()
    assert (config.image_size, config.patch_size, config.patch_grid(*config.image_size)) == ([256, 128], 16, (16, 8))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.layer_norm_eps, config.hidden_act, config.qkv_bias) == (1e-6, "gelu", True)
    assert (config.num_cls_prototypes, config.num_patch_prototypes) == (65536, 8192)
    assert (config.projection_hidden_size, config.projection_bottleneck_size) == (2048, 256)
    assert (config.student_temperature, config.center_momentum, config.share_projection_head) == (0.1, 0.9, False)
    assert (config.dino_loss_weight, config.mim_loss_weight, config.triplet_margin) == (1, 1, None)
    assert config.neck_feature == "before"


def test_shared_field_names_are_those_of_transformers_vit():
    shared = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias"}
    shared |= {"layer_norm_eps", "image_size", "patch_size", "num_channels", "initializer_range"}
    shared |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
    assert shared <= set(PersonViTConfig.__annotations__)
    assert shared <= set(ViTConfig().to_dict())


@pytest.mark.parametrize(
    ("name", "width", "heads", "depth"),
    [("tiny", 192, 3, 12), ("small", 384, 6, 12), ("base", 768, 12, 12), ("large", 1024, 16, 24)],
)
def test_presets(name, width, heads, depth):
    config = PersonViTConfig.from_preset(name)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (width, heads, depth)
    assert config.intermediate_size == 4 * width
    assert (config.patch_size, config.image_size) == (16, [256, 128])


def test_presets_take_overrides():
    config = PersonViTConfig.from_preset("tiny", num_hidden_layers=4, image_size=[128, 64])
    assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (192, 4, [128, 64])


@pytest.mark.parametrize("name", ["huge", "Tiny", ""])
def test_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="preset.*tiny, small, base, large"):
        PersonViTConfig.from_preset(name)


def test_round_trip_through_a_folder(tmp_path):
    settings = {"num_cameras": 3, "triplet_margin": 0.3, "share_teacher_projection_head": None, "patch_stride": 6}
    config = tiny_config(num_labels=7, student_sees_unmasked_global=True, drop_path_rate=0.25, **settings)
    config.save_pretrained(tmp_path)
    for loaded in (PersonViTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, PersonViTConfig)
        ours, theirs = config.to_dict(), loaded.to_dict()
        for volatile in ("transformers_version", "_name_or_path"):
            ours.pop(volatile, None), theirs.pop(volatile, None)
        assert theirs == ours
        assert loaded.num_labels == 7


def test_image_size_may_be_a_tuple():
    assert tiny_config(image_size=(64, 32)).image_size == [64, 32]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("hiden_size", "hidden_size"), ("patch_strides", "patch_stride"), ("num_camera", "num_cameras")],
)
def test_misspelt_setting_is_rejected(misspelt, meant):
    with pytest.raises(ValueError, match=f"{misspelt}.*{meant}"):
        PersonViTConfig(**{misspelt: 64})
    with pytest.raises(ValueError, match=f"{misspelt}.*{meant}"):
        PersonViTConfig.from_preset("tiny", **{misspelt: 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": [250, 128]}, "250x128.*patch_size=16"),
        ({"image_size": [256, 120]}, "256x120.*patch_size=16"),
        ({"image_size": [0, 0]}, "0x0.*patch_size=16"),
        ({"image_size": [8, 8], "patch_stride": 4}, "8x8.*patch_size=16"),
        ({"image_size": [256]}, "image_size"),
        ({"image_size": 256}, "image_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_stride": 0}, "patch_stride"),
        ({"patch_stride": -4}, "patch_stride"),
        ({"patch_stride": 20}, "patch_stride"),
        ({"hidden_size": 100}, "hidden_size.*num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "384"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers.*at most 1024"),
        ({"num_cls_prototypes": 10**12}, "num_cls_prototypes.*at most"),
        ({"num_labels": 10**9}, "num_labels.*at most"),
        ({"image_size": [2**20, 2**20]}, "image_size.*at most"),
        ({"num_cameras": 2**20, "num_views": 2**20}, "num_cameras.*at most"),
        ({"neck_feature": "middle"}, "neck_feature.*middle"),
        ({"stem": "resnet"}, "stem.*resnet"),
        ({"stem": "ics", "patch_stride": 8}, "ics.*patch_stride.*8"),
        ({"stem": "ics", "patch_size": 1, "image_size": [4, 4]}, "ics.*even `patch_size`.*1"),
        ({"num_part_tokens": -1}, "num_part_tokens.*-1"),
        ({"student_temperature": 0.0}, "student_temperature"),
        ({"student_temperature": math.nan}, "student_temperature"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"num_cls_prototypes": 0}, "num_cls_prototypes"),
        ({"hidden_dropout_prob": 2}, "hidden_dropout_prob"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"mim_loss_weight": math.nan}, "mim_loss_weight"),
        ({"share_projection_head": True, "share_teacher_projection_head": False}, "share_teacher_projection_head"),
        ({"share_teacher_projection_head": True}, "num_patch_prototypes=8192.*num_cls_prototypes=65536"),
    ],
)
def test_bad_setting_is_rejected_by_name(settings, message):
    with pytest.raises(BAD_SETTING, match=f"(?s){message}"):
        PersonViTConfig(**settings)


@given(size=st.integers(1, 20), stride=st.integers(1, 20), extra=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_patch_grid_is_what_the_convolution_makes(size, stride, extra):
    height, width = size + extra[0], size + extra[1]
    stride = min(stride, size)
    config = PersonViTConfig(patch_size=size, patch_stride=stride, image_size=[4 * size, 2 * size])
    if stride == size and (height % size or width % size):
        with pytest.raises(ValueError, match=f"{height}x{width}.*`patch_size={size}`"):
            config.patch_grid(height, width)
        return
    patches = nn.Conv2d(1, 1, size, stride, device="meta")(torch.empty(1, 1, height, width, device="meta"))
    assert config.patch_grid(height, width) == tuple(patches.shape[-2:])
