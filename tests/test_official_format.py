"""The way back: our models as official files, and again as ours."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import GOLDEN, assert_same_weights, load_official, tiny_model
from torch import nn

from personvit_hf import PersonViTForPreTraining, PersonViTForReID, PersonViTModel
from personvit_hf.conversion import convert_with_report
from personvit_hf.official_format import official_checkpoint, save_official_checkpoint

TARGETS = {PersonViTModel: "backbone", PersonViTForPreTraining: "pretraining", PersonViTForReID: "reid"}
SETTINGS = [
    {},
    {"stem": "ics"},
    {"num_part_tokens": 3},
    {"stem": "ics", "num_part_tokens": 2, "num_cameras": 3},
    {"num_cameras": 3, "num_views": 2},
    {"qkv_bias": False, "norm_last_layer": False},
    {"share_projection_head": True},
    {"share_teacher_projection_head": True, "num_patch_prototypes": 20},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cls", TARGETS, ids=lambda cls: cls.__name__)
def test_ours_to_official_to_ours_is_exact(tmp_path, cls, settings):
    model = tiny_model(cls, **settings)
    save_official_checkpoint(model, tmp_path / "official.pth")
    views = {"num_views": settings["num_views"]} if "num_views" in settings else {}
    conversion = convert_with_report(tmp_path / "official.pth", TARGETS[cls], num_attention_heads=2, **views)
    assert type(conversion.model) is cls
    assert_same_weights(conversion.model, model)
    assert not conversion.left_out
    for name in ("stem", "num_part_tokens", "num_cameras", "num_views", "qkv_bias", "image_size", "num_labels"):
        assert getattr(conversion.model.config, name) == getattr(model.config, name)
    assert [path.name for path in tmp_path.iterdir()] == ["official.pth"]


@pytest.mark.parametrize(
    ("name", "target", "heads"),
    [
        ("official_personvit_pretrain", "pretraining", 3),
        ("official_personvit_reid", "reid", 5),
        ("official_personvit_reid_sie", "reid", 5),
        ("official_transreid_ssl_ics", "backbone", 2),
        ("official_pass_pretrain", "backbone", 2),
    ],
)
def test_official_to_ours_to_official_is_exact(name, target, heads):
    """Every key that is not left out comes back under its name, with the same numbers."""
    before = load_official(name)
    conversion = convert_with_report(GOLDEN / f"{name}.pth", target, num_attention_heads=heads)
    after = official_checkpoint(conversion.model)
    if target == "pretraining":
        assert set(after) == {"student", "teacher", "ibot_loss"}
        pairs = [(after[role], before[role]) for role in after]
    elif name == "official_pass_pretrain":
        prefix = "module.backbone."
        pairs = [({prefix + key: value for key, value in after.items()}, before["teacher"])]
        pairs[0][0].pop(f"{prefix}masked_embed")  # ours has one, at zero
        pairs = [(pairs[0][0], {key: value for key, value in pairs[0][1].items() if ".head." not in key})]
    else:
        after.pop("masked_embed", None)
        kept = {key.removeprefix("module."): value for key, value in before.items() if key not in conversion.left_out}
        pairs = [(after, kept)]
    for ours, official in pairs:
        assert set(ours) == set(official)
        for key, value in official.items():
            assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear"):
        official_checkpoint(nn.Linear(2, 2))


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "made" / "official.pth"
    save_official_checkpoint(tiny_model(), path)
    before = path.read_bytes()

    def fails(contents, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        save_official_checkpoint(tiny_model(), path)
    assert [path.read_bytes() for path in path.parent.iterdir()] == [before]
