"""The way back: our models as official files, and again as ours."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import GOLDEN, assert_same_weights, load_official, tiny_model
from torch import nn
from typer.testing import CliRunner

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
)
from personvit_hf.cli import app
from personvit_hf.conversion import convert_checkpoint, convert_with_report
from personvit_hf.loading import load_embedder
from personvit_hf.official_format import (
    convert_to_official,
    official_checkpoint,
    save_official_checkpoint,
)

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


@pytest.mark.parametrize("cls", TARGETS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("settings", [{}, {"num_part_tokens": 2}, {"patch_stride": 4}], ids=str)
def test_positions_are_written_for_another_size_as_the_model_interpolates_them(tmp_path, cls, settings):
    model = tiny_model(cls, **settings).eval()
    size = tuple(2 * side for side in model.config.image_size)
    save_official_checkpoint(model, tmp_path / "official.pth", size)
    stride = {"patch_stride": 4} if "patch_stride" in settings else {}
    options = {"num_attention_heads": 2, "image_size": list(size), **stride}
    again, _ = convert_checkpoint(tmp_path / "official.pth", TARGETS[cls], **options)
    for role in ("personvit", "student")[: 1 + (cls is PersonViTForPreTraining)]:
        backbones = [getattr(one, role, one).eval() for one in (model, again)]
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, after = (backbone(images).last_hidden_state for backbone in backbones)
        assert torch.equal(before, after)
    with pytest.raises(ValueError, match="can't be cut"):
        official_checkpoint(model, (1, 1))


def folder_of(tmp_path, size=None, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    config = PersonViTConfig(**sizes | {"patch_size": 8, "image_size": [32, 16], "initializer_range": 0.3} | settings)
    model = PersonViTForReID(config).eval()
    nn.init.normal_(model.bottleneck.running_mean)
    model.save_pretrained(tmp_path / "ours")
    if size is not None:
        statistics = {"image_mean": [0.48145466, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}
        PersonViTImageProcessor(size=size, **statistics).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, ""),
        ({"size": {"height": 64, "width": 16}}, "--image-size 64x16"),
        ({"patch_stride": 4}, "--patch-stride 4"),
        ({"num_cameras": 4}, ""),
        ({"num_cameras": 4, "side_information_scale": 1.5}, "--side-information-scale 1.5"),
        ({"num_cameras": 1, "num_views": 2}, "--num-cameras 1 --num-views 2"),
        ({"num_views": 2, "side_information_scale": 1}, "--num-cameras 0 --num-views 2 --side-information-scale 1"),
        ({"side_information_scale": 1.5}, ""),
        ({"layer_norm_eps": 1e-2}, "--layer-norm-eps 0.01"),
    ],
    ids=str,
)
def test_told_options_give_the_same_features(tmp_path, settings, options):
    folder = folder_of(tmp_path, **{"size": {"height": 32, "width": 16}} | settings)
    *others, line = convert_to_official(folder, tmp_path / "official.pth")
    told = line.split("for the way back: ")[1].split()
    for option in (
        "--num-attention-heads 4 --image-mean 0.48145466,0.5,0.5 --image-std 0.25,0.5,1 " + options
    ).split():
        told.remove(option)
    assert told in ([], ["--image-size", "32x16"])
    assert len(others) == 1 + ("64x16" in options)
    told = line.split("for the way back: ")[1].split()
    assert CliRunner().invoke(app, ["convert", f"{tmp_path}/official.pth", f"{tmp_path}/again", *told]).exit_code == 0
    images = torch.randint(256, (3, 3, 40, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = {"camera_ids": "num_cameras", "view_ids": "num_views"}
    ids = {name: torch.zeros(3, dtype=torch.int64) for name, setting in ids.items() if settings.get(setting)}
    features = []
    for where in (folder, tmp_path / "again"):
        model, processor = load_embedder(where)
        with torch.no_grad():
            features.append(model(**processor(images=list(images), return_tensors="pt"), **ids).embeddings)
    assert torch.equal(*features)


def test_without_an_image_processor_the_rest_is_told(tmp_path):
    folder = folder_of(tmp_path, layer_norm_eps=1e-3, neck_feature="after", hidden_act="relu")
    _, settings, line = convert_to_official(folder, tmp_path / "official.pth")
    assert "without an option of convert: hidden_act='relu', neck_feature='after'. Set" in settings
    assert line.endswith("for the way back: --num-attention-heads 4 --image-size 32x16 --layer-norm-eps 0.001")


def test_an_image_processor_without_a_fixed_size_is_refused(tmp_path):
    folder = folder_of(tmp_path, size={"shortest_edge": 32})
    with pytest.raises(ValueError, match=r"`height` and `width`, found .*shortest_edge"):
        convert_to_official(folder, tmp_path / "official.pth")
    assert not (tmp_path / "official.pth").exists()


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
