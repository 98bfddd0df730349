"""ViTs of timm and transformers, as files and as folders, give the same features here as there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_fixtures import GOLDEN, assert_within, load_official, under
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from personvit_hf import PersonViTModel
from personvit_hf.conversion import convert_with_report

TOLERANCE = 1e-5
IMAGENET_MEAN, HALF = [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "patch_size": 8}


def with_random_weights(model: nn.Module) -> nn.Module:
    """In evaluation mode, no weight left as it was made, so that nothing can be left out unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def images(height: int = 32, width: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# timm


def timm_vit(**settings) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": (32, 16), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    model = timm.models.vision_transformer.VisionTransformer(**sizes | {"num_classes": 7} | settings)
    return with_random_weights(model)


@pytest.mark.parametrize(
    "settings", [{}, {"num_classes": 0}, {"qkv_bias": False}, {"img_size": (16, 16)}, {"patch_size": 4}], ids=str
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_timm_vit(tmp_path, settings, suffix):
    model, path = timm_vit(**settings), tmp_path / f"vit{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    conversion = convert_with_report(path, num_attention_heads=3)
    pixels = images(*settings.get("img_size", (32, 16)))
    output = conversion.model(pixels)
    assert_within(TOLERANCE, output.last_hidden_state, model.forward_features(pixels))
    assert_within(TOLERANCE, output.pooler_output, model.forward_head(model.forward_features(pixels), pre_logits=True))
    supervised = settings.get("num_classes") != 0
    assert conversion.kind == ("timm" if supervised else "backbone")
    assert set(conversion.left_out) == ({"head.weight", "head.bias"} if supervised else set())
    assert list(conversion.image_processor.image_mean) == (HALF if supervised else IMAGENET_MEAN)
    assert len(conversion.notes) == supervised and all("image_mean" in note for note in conversion.notes)


def test_statistics_can_be_told(tmp_path):
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    kinds = {"auto": HALF, "timm": HALF, "backbone": IMAGENET_MEAN}
    for kind, mean in kinds.items():
        conversion = convert_with_report(tmp_path / "vit.pth", kind=kind, num_attention_heads=3)
        assert list(conversion.image_processor.image_mean) == mean
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": (0.4, 0.5, 1)}
    conversion = convert_with_report(tmp_path / "vit.pth", num_attention_heads=3, **told)
    assert not conversion.notes
    assert list(conversion.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(conversion.image_processor.image_std) == [0.4, 0.5, 1.0]


def test_distilled_deit_loses_its_token(tmp_path):
    """As TransReID loads it: with the position embeddings of [CLS] and patches."""
    weights = timm_vit(num_classes=0).state_dict()
    distilled = dict(weights)
    distilled["dist_token"] = torch.randn(1, 1, 48)
    positions = weights["pos_embed"]
    distilled["pos_embed"] = torch.cat((positions[:, :1], torch.randn(1, 1, 48), positions[:, 1:]), dim=1)
    distilled |= {
        f"{head}.{leaf}": torch.randn(7, 48) for head in ("head", "head_dist") for leaf in ("weight", "bias")
    }
    torch.save({"model": distilled}, tmp_path / "deit.pth")
    conversion = convert_with_report(tmp_path / "deit.pth", num_attention_heads=3)
    assert torch.equal(conversion.model.embeddings.position_embeddings, positions)
    assert set(conversion.left_out) == {"dist_token", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert list(conversion.image_processor.image_mean) == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"init_values": 0.1}, "ls1.gamma"), ({"reg_tokens": 2}, "reg_token"), ({"pre_norm": True}, "norm_pre")],
)
def test_other_architectures_of_timm_are_refused_by_key(tmp_path, settings, key):
    torch.save(timm_vit(**settings).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"unknown key.*{key}"):
        convert_with_report(tmp_path / "vit.pth", num_attention_heads=3)


def timm_folder(folder, **changes) -> dict:
    """A folder as timm pushes it to the Hub."""
    folder.mkdir(exist_ok=True)
    save_file(timm_vit().state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch8",
        "global_pool": "token",
        "model_args": {"num_heads": 3},
        "pretrained_cfg": {"input_size": [3, 32, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return config


def test_timm_folder_tells_heads_and_statistics(tmp_path):
    timm_folder(tmp_path)
    conversion = convert_with_report(tmp_path)
    config, processor = conversion.model.config, conversion.image_processor
    assert (config.num_attention_heads, config.image_size, config.layer_norm_eps) == (3, [32, 16], 1e-6)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert not conversion.notes
    for changes, message in (
        ({"global_pool": "avg"}, "pooled by avg"),
        ({"pretrained_cfg": {"mean": [0.1], "std": HALF}}, "`image_mean` should be 3 numbers"),
        ({"model_args": {"num_heads": "three"}}, "num_attention_heads"),
    ):
        timm_folder(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            convert_with_report(tmp_path)


# transformers


@pytest.mark.parametrize(
    ("config_class", "model_class", "left_out", "mean"),
    [
        (ViTConfig, ViTModel, {"pooler.dense.weight", "pooler.dense.bias"}, HALF),
        (ViTConfig, ViTForImageClassification, {"classifier.weight", "classifier.bias"}, HALF),
        (ViTConfig, ViTForMaskedImageModeling, {"decoder.0.weight", "decoder.0.bias"}, IMAGENET_MEAN),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_transformers_vit(tmp_path, config_class, model_class, left_out, mean):
    side = 32 if model_class is ViTForMaskedImageModeling else (32, 16)
    model = with_random_weights(model_class(config_class(**SIZES, image_size=side, hidden_act="gelu")))
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "in_memory.bin")
    pixels = images(32, 32 if side == 32 else 16)
    expected = getattr(model, "vit", model)(pixels).last_hidden_state
    for path, settings in (
        (tmp_path / "folder", {}),
        (tmp_path / "folder" / "model.safetensors", {"num_attention_heads": 3}),
        (tmp_path / "in_memory.bin", {"num_attention_heads": 3}),
    ):
        conversion = convert_with_report(path, **settings)
        assert type(conversion.model) is PersonViTModel and conversion.kind == "transformers"
        assert conversion.model.config.layer_norm_eps == 1e-12
        assert_within(TOLERANCE, conversion.model(pixels).last_hidden_state, expected)
        assert set(conversion.left_out) == left_out
        assert list(conversion.image_processor.image_mean) == mean


@torch.no_grad()
def test_transformers_folder_tells_the_rest(tmp_path):
    config = ViTConfig(**SIZES, image_size=(16, 32), hidden_act="gelu_new", layer_norm_eps=1e-3, qkv_bias=False)
    model = with_random_weights(ViTModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    conversion = convert_with_report(tmp_path)
    assert conversion.model.config.image_size == [16, 32]  # twice as high as wide would fit as well
    assert_within(
        TOLERANCE, conversion.model(images(16, 32)).last_hidden_state, model(images(16, 32)).last_hidden_state
    )
    assert list(conversion.image_processor.image_std) == [0.4, 0.5, 0.6]
    assert not conversion.notes and not conversion.left_out


def test_transformers_deit(tmp_path):
    model = with_random_weights(DeiTModel(DeiTConfig(**SIZES, image_size=(32, 16))))
    model.save_pretrained(tmp_path)
    conversion = convert_with_report(tmp_path)
    positions = model.embeddings.position_embeddings
    expected = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    assert torch.equal(conversion.model.embeddings.position_embeddings, expected)
    assert set(conversion.left_out) == {"embeddings.distillation_token", "pooler.dense.weight", "pooler.dense.bias"}
    assert list(conversion.image_processor.image_mean) == IMAGENET_MEAN


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_query_key_and_value_are_there_in_full(tmp_path, part, harm):
    ViTModel(ViTConfig(**SIZES, image_size=(32, 16))).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    key = f"encoder.layer.1.attention.attention.{part}.weight"
    value = weights.pop(key)
    if harm == "shorter":
        weights[key] = value[:-1].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="encoder.layer.1.attention.attention|layers.1.attention.qkv"):
        convert_with_report(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "JSON object, found list"),
        ('{"model_type": "swin"}', "`model_type` should be one of vit, deit.*swin"),
        ('{"model_type": "personvit"}', "AutoModel.from_pretrained loads it"),
        ('{"model_type": "vit", "hidden_act": "__import__"}', "unknown `hidden_act`"),
        ('{"model_type": "vit", "hidden_act": ["gelu"]}', "unknown `hidden_act`"),
        ('{"model_type": "vit", "num_attention_heads": "3"}', "num_attention_heads"),
        ('{"model_type": "vit", "num_attention_heads": 0}', "num_attention_heads"),
        ('{"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": "x"}', "layer_norm_eps"),
    ],
    ids=lambda value: value[:60],
)
def test_configurations_are_not_believed(tmp_path, config, message):
    ViTModel(ViTConfig(**SIZES, image_size=(32, 16))).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_with_report(tmp_path)


def test_image_sizes_that_do_not_fit_the_positions_are_not_believed(tmp_path):
    for size in ([0, 0], [-32, -16], 10**30, [64, 64], "large", None, [True, 16]):
        ViTModel(ViTConfig(**SIZES, image_size=(32, 16))).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": size}))
        try:
            assert convert_with_report(tmp_path).model.config.image_size == [32, 16]
        except ValueError as error:
            assert size == [-32, -16] and "image" in str(error)


# Any kind


def test_weights_of_this_package_are_told_from_others(tmp_path):
    model = convert_with_report(GOLDEN / "official_personvit_reid.pth", num_attention_heads=5).model
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="AutoModel.from_pretrained"):
            convert_with_report(path)


def test_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="model.safetensors or pytorch_model.bin"):
        convert_with_report(tmp_path)


@pytest.mark.parametrize("wrappers", [("model", "state_dict"), ("state_dict", "module"), ("module",)])
def test_wrappers_in_each_other(tmp_path, wrappers):
    contents = under(load_official("official_personvit_pretrain")["teacher"], "backbone.")
    for wrapper in reversed(wrappers):
        contents = {wrapper: contents, "epoch": 3}
    torch.save(contents, tmp_path / "file.pth")
    conversion = convert_with_report(tmp_path / "file.pth", num_attention_heads=3)
    assert set(conversion.left_out) == {"epoch"}
    torch.save(contents | {"surprise": 1}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="unknown entries beside the weights.*surprise"):
        convert_with_report(tmp_path / "file.pth", num_attention_heads=3)


def test_a_folder_of_plain_files(tmp_path):
    """Without a configuration, the keys tell."""
    shutil.copy(GOLDEN / "official_transreid_ssl_ics.pth", tmp_path / "pytorch_model.bin")
    assert convert_with_report(tmp_path, num_attention_heads=2).model.config.stem == "ics"
