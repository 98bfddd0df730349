from __future__ import annotations

import pytest
import torch
from golden_fixtures import (
    GOLDEN,
    assert_same_weights,
    assert_within,
    load_golden,
    no_transformers_warnings,
    our_reid_names,
    tiny_config,
    tiny_model,
    under,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTModel, conversion
from personvit_hf.modeling_personvit import batch_hard_triplet_loss, interpolate_position_embeddings
from personvit_hf.schedules import finetune_learning_rate, finetuning_parameter_groups

PRETRAINED, PRETRAINED_FACTS = load_golden("personvit_pretrain_features")
REID, REID_FACTS = load_golden("personvit_reid_features")
LOSSES, LOSS_FACTS = load_golden("reid_losses")
STEP, STEP_FACTS = load_golden("reid_train_step")
POSITIONS, POSITION_FACTS = load_golden("pos_embed_resize")
TOLERANCE = 1e-5  # what README.md beside the fixtures states for all of these


def official_teacher() -> PersonViTModel:
    heads = PRETRAINED_FACTS["config"]["heads"]
    return conversion.convert_checkpoint(GOLDEN / "official_personvit_pretrain.pth", num_attention_heads=heads)[0]


def official_reid(kind: str, **settings) -> PersonViTForReID:
    path = GOLDEN / ("official_personvit_reid.pth" if kind == "plain" else "official_personvit_reid_sie.pth")
    return conversion.convert_checkpoint(path, num_attention_heads=REID_FACTS["config"]["heads"], **settings)[0]


def images(batch: int = 3, height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# Parity with the reference implementations


@pytest.mark.parametrize("size", ["", "_128x64", "_96x48"])
@torch.no_grad()
def test_teacher_tokens(size):
    output = official_teacher()(PRETRAINED[f"images{size}"])
    assert_within(TOLERANCE, output.last_hidden_state, PRETRAINED[f"teacher_tokens{size}"])
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


@torch.no_grad()
def test_teacher_attention_and_layers():
    eager = official_teacher()
    eager.set_attn_implementation("eager")
    output = eager(PRETRAINED["images"], output_attentions=True, output_hidden_states=True)
    assert_within(TOLERANCE, output.attentions[-1], PRETRAINED["teacher_attention_last"])
    depth = PRETRAINED_FACTS["config"]["depth"]
    assert len(output.hidden_states) == depth + 1
    for index in range(depth):
        normed = eager.layernorm(output.hidden_states[index + 1])
        assert_within(TOLERANCE, normed, PRETRAINED[f"teacher_normed_layer{index}"])


CASES = [case for case in POSITION_FACTS["cases"] if case["output"].startswith("pretrain.")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["output"])
def test_position_embeddings_at_other_sizes(case):
    positions = POSITIONS[case["input"]]
    native, grid = (tuple(pixels // 16 for pixels in case[name]) for name in ("native_pixels", "target_pixels"))
    resized = interpolate_position_embeddings(positions, native, grid)
    assert_within(TOLERANCE, resized, POSITIONS[case["output"]])


def test_position_embeddings_keep_their_precision():
    positions = POSITIONS["pos_16x8"]
    in_float32, in_float64 = (
        interpolate_position_embeddings(p, (16, 8), (7, 3)) for p in (positions, positions.double())
    )
    assert 0 < (in_float64 - in_float32).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["plain", "sie"])
@torch.no_grad()
def test_reid_features(kind):
    model = official_reid(kind)
    inputs = {"pixel_values": REID["images"], "camera_ids": REID["camids"] if kind == "sie" else None}
    output = model(**inputs)
    assert_within(TOLERANCE, output.embeddings, REID[f"{kind}.global_feat"])
    assert_within(TOLERANCE, output.logits, REID[f"{kind}.logits"])
    assert_within(TOLERANCE, model.personvit(**inputs).last_hidden_state, REID[f"{kind}.tokens"])
    after = official_reid(kind, neck_feature="after")(**inputs)
    assert_within(TOLERANCE, after.embeddings, REID[f"{kind}.feat_bn"])

    output = model.train()(**inputs)
    assert_within(TOLERANCE, output.embeddings, REID[f"{kind}.train_global_feat"])
    assert_within(TOLERANCE, output.logits, REID[f"{kind}.train_logits"])
    assert_within(TOLERANCE, model.bottleneck.running_mean, REID[f"{kind}.train_running_mean_after"])
    assert_within(TOLERANCE, model.bottleneck.running_var, REID[f"{kind}.train_running_var_after"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_steps_of_finetuning(dtype):
    facts = STEP_FACTS["config"]
    model, pictures = official_reid("sie").to(dtype).train(), REID["images"].to(dtype)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    groups = finetuning_parameter_groups(model, facts["base_lr"], facts["weight_decay"], facts["bias_lr_factor"])
    epoch = facts["scheduler_step_called_with"]  # of 120, with 20 of warm-up
    for group in groups:
        group["lr"] = finetune_learning_rate(epoch, base=facts["base_lr"], lr_factor=group["lr_factor"])
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    official = {name: torch.tensor(value) for name, value in STEP_FACTS["groups_lr_and_weight_decay"].items()}
    official = {name: lr.item() for name, (lr, _) in our_reid_names(official).items() if name != "bottleneck.bias"}
    assert {name: rates.get(id(parameters[name])) for name in official} == pytest.approx(official, rel=1e-6)

    optimizer = torch.optim.SGD(groups, momentum=facts["momentum"])
    for step, batch in enumerate((pictures, pictures.flip(-1)), start=1):
        before = {name: value.clone() for name, value in state.items()}
        output = model(batch, labels=REID["labels"], camera_ids=REID["camids"])
        optimizer.zero_grad()
        output.loss.backward()
        assert output.loss.item() == pytest.approx(STEP_FACTS["losses"][step - 1], abs=TOLERANCE)
        if step == 1:
            assert_within(TOLERANCE, output.logits, STEP["score"])
            assert_within(TOLERANCE, output.embeddings, STEP["feat"])
            for name, gradient in our_reid_names(under(STEP, "grad.")).items():
                assert_within(TOLERANCE, parameters[name].grad, gradient)
            norms = our_reid_names({name: torch.tensor(v) for name, v in STEP_FACTS["gradient_norm"].items()})
            for name, norm in norms.items():
                assert parameters[name].grad.norm().item() == pytest.approx(norm.item(), rel=1e-4, abs=TOLERANCE), name
        optimizer.step()
        for name, after in our_reid_names(under(STEP, f"after{step}.")).items():
            assert_within(TOLERANCE, state[name], after)
            if step == 1 and name in parameters:
                move, rounding = after - before[name], torch.finfo(torch.float32).eps * after.abs().max()
                assert_within((1e-3 * move.abs().max() + rounding).item(), state[name] - before[name], move)
        sums = STEP_FACTS["sum_and_l2_of_every_parameter"][f"after{step}"]
        for name, expected in our_reid_names({name: torch.tensor(pair) for name, pair in sums.items()}).items():
            assert_within(1e-4, torch.stack([state[name].sum(), state[name].norm()]), expected)


MARGINS = {"soft": None, "margin0.3": 0.3}
TRIPLETS = [f"{margin}.{scale}" for margin in MARGINS for scale in ("raw", "normalized")]


def triplet(feature: torch.Tensor, setting: str) -> torch.Tensor:
    margin, scale = setting.rsplit(".", 1)
    if scale == "normalized":
        feature = feature / (feature.norm(dim=1, keepdim=True) + 1e-12)
    return batch_hard_triplet_loss(feature, LOSSES["labels"], MARGINS[margin])


@pytest.mark.parametrize("setting", TRIPLETS)
def test_triplet_loss(setting):
    feature = LOSSES["feat"].clone().requires_grad_()
    loss = triplet(feature, setting)
    loss.backward()
    assert loss.item() == pytest.approx(LOSS_FACTS["values"][f"triplet.{setting}"], abs=TOLERANCE)
    assert_within(TOLERANCE, feature.grad, LOSSES[f"triplet.{setting}.grad_feat"])


class Given(nn.Module):
    """Answers with a tensor that is given, whatever it is asked."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.tensor = tensor

    def forward(self, *_, **__) -> torch.Tensor:
        return self.tensor


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 2.0)])
def test_reid_model_sums_its_losses(smoothing, margin, weights):
    """The losses that the model makes of the reference's features and scores."""
    feature, score = (LOSSES[name].clone().requires_grad_() for name in ("feat", "score"))
    settings = {"label_smoothing": smoothing, "triplet_margin": MARGINS[margin], "num_labels": score.shape[1]}
    settings |= {"id_loss_weight": weights[0], "triplet_loss_weight": weights[1]}
    model = PersonViTForReID(tiny_config(**settings)).train()
    backbone = BaseModelOutputWithPooling(pooler_output=feature)
    model.personvit, model.bottleneck, model.classifier = Given(backbone), nn.Identity(), Given(score)
    output = model(images(), labels=LOSSES["labels"])
    output.loss.backward()

    identity = "smooth0.1" if smoothing else "plain"
    values = LOSS_FACTS["values"]
    expected = [values[f"id.{identity}"], values[f"triplet.{margin}.raw"]]
    assert [output.id_loss.item(), output.triplet_loss.item()] == pytest.approx(expected, abs=TOLERANCE)
    total = weights[0] * expected[0] + weights[1] * expected[1]
    if weights == (1.0, 1.0):
        name = f"total.smooth_{'on' if smoothing else 'off'}.{margin}.raw"
        total = values[name]
        assert_within(TOLERANCE, feature.grad, LOSSES[f"{name}.grad_feat"])
        assert_within(TOLERANCE, score.grad, LOSSES[f"{name}.grad_score"])
    assert output.loss.item() == pytest.approx(total, abs=TOLERANCE)
    assert_within(TOLERANCE, score.grad, weights[0] * LOSSES[f"id.{identity}.grad_score"])
    assert_within(TOLERANCE, feature.grad, weights[1] * LOSSES[f"triplet.{margin}.raw.grad_feat"])


@pytest.mark.parametrize("margin", [None, 0.3])
def test_triplet_loss_with_any_number_of_images_of_a_person(margin):
    """Anchor by anchor; people with one picture, two and three."""
    labels = torch.tensor([4, 1, 4, 0, 1, 4])
    feature = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    losses = []
    for anchor in range(6):
        distance = [(feature[anchor] - other).norm().item() for other in feature]
        positive = max(distance[other] for other in range(6) if labels[other] == labels[anchor])
        negative = min(distance[other] for other in range(6) if labels[other] != labels[anchor])
        soft = torch.tensor(positive - negative, dtype=torch.float64).exp().log1p().item()
        losses.append(soft if margin is None else max(0.0, positive - negative + margin))
    loss = batch_hard_triplet_loss(feature, labels, margin)
    assert loss.item() == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert torch.autograd.grad(loss, feature)[0].isfinite().all()


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_attributes_of_people_instead_of_identities(problem_type):
    torch.manual_seed(0)
    config = PersonViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 16],
        num_labels=3, problem_type=problem_type,
    )  # fmt: skip
    model, pixels, labels = PersonViTForReID(config), torch.randn(4, 3, 32, 16), torch.rand(4, 3)
    output = model(pixels, labels=labels)
    losses = {
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }
    torch.testing.assert_close(output.loss, losses[problem_type](output.logits, labels))
    assert output.triplet_loss is None
    output.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_trainer_takes_losses_as_means_and_logits_as_predictions(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 64, 32), "labels": i % 2} for i in range(8)]
    model = PersonViTForReID(tiny_config(num_labels=2, triplet_loss_weight=0.0))
    losses = []
    for batches in (1, 4):
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": batches, "max_steps": 1}
        settings |= {"learning_rate": 0.0, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
        trainer = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert trainer.predict(rows).predictions.shape == (8, 2)


def test_trainer_s_label_smoothing_is_told_what_it_leaves_out(tmp_path, caplog):
    transformers_logging.warning_once.cache_clear()
    model = PersonViTForReID(tiny_config(num_labels=2)).train()
    batch = {"pixel_values": images(4), "labels": torch.tensor([0, 0, 1, 1])}
    for factor, warned in ((0.0, False), (0.1, True)):
        settings = {"label_smoothing_factor": factor, "use_cpu": True, "report_to": "none"}
        Trainer(model, TrainingArguments(tmp_path, **settings)).compute_loss(model, dict(batch))
        assert ("set `label_smoothing` of the model's config" in caplog.text) == warned


def test_one_image_is_too_few_for_the_neck_in_training():
    model = tiny_model(PersonViTForReID)
    assert model(images(1)).embeddings.shape == (1, 32)
    model.train()
    with pytest.raises(ValueError, match="at least 2 images.*`dataloader_drop_last=True`"):
        model(images(1), labels=torch.tensor([0]))
    model.bottleneck.eval()
    assert model(images(1), labels=torch.tensor([0])).loss.isfinite()


def test_triplet_loss_of_one_person_is_zero():
    feature = torch.randn(4, 5, requires_grad=True)
    batch_hard_triplet_loss(feature, torch.zeros(4, dtype=torch.long), 0.3).backward()
    assert (feature.grad == 0).all()


# Behaviour

EXTRAS = [{}, {"stem": "ics"}, {"num_part_tokens": 3}, {"stem": "ics", "num_part_tokens": 2, "num_cameras": 3}]
with_and_without_extras = pytest.mark.parametrize("extras", EXTRAS, ids=str)


@with_and_without_extras
@torch.no_grad()
def test_sdpa_equals_eager(extras):
    model = tiny_model(**extras)
    assert model.config._attn_implementation == "sdpa"
    expected = model(images()).last_hidden_state
    model.set_attn_implementation("eager")
    assert_within(1e-5, model(images()).last_hidden_state, expected)


@with_and_without_extras
def test_gradient_checkpointing_gives_the_same_gradients(extras):
    model, labels = tiny_model(PersonViTForReID, num_labels=3, **extras).train(), torch.tensor([0, 1, 0, 1])
    calls, gradients = [], []
    for layer in model.personvit.layers:
        layer.attention.register_forward_hook(lambda *_: calls.append(0))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        model(images(4), labels=labels).loss.backward()
        assert len(calls) == 2 * (1 + checkpointing)
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    without = {name for name, value in gradients[0].items() if value is None}
    assert without == ({"personvit.embeddings.side_embeddings"} if "num_cameras" in extras else set())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


@with_and_without_extras
@pytest.mark.parametrize(("height", "width"), [(64, 32), (128, 64), (48, 24), (8, 8), (24, 80)])
@torch.no_grad()
def test_outputs_at_any_size(height, width, extras):
    model = tiny_model(PersonViTForReID, num_labels=5, **extras)
    model.set_attn_implementation("eager")
    output = model(images(2, height, width), output_hidden_states=True, output_attentions=True)
    tokens = 1 + extras.get("num_part_tokens", 0) + height // 8 * (width // 8)
    assert (output.embeddings.shape, output.logits.shape) == ((2, 32), (2, 5))
    assert [tuple(state.shape) for state in output.hidden_states] == 3 * [(2, tokens, 32)]
    assert [tuple(weights.shape) for weights in output.attentions] == 2 * [(2, 2, tokens, tokens)]
    assert_within(1e-5, output.attentions[0].sum(-1), torch.ones(2, 2, tokens))
    assert model.personvit(images(2, height, width)).last_hidden_state.shape == (2, tokens, 32)


@torch.no_grad()
def test_overlapping_patches():
    model = tiny_model(patch_stride=6)
    projection = model.embeddings.patch_embeddings.projection
    patches = images().unfold(2, 8, 6).unfold(3, 8, 6)  # (batch, channels, rows, columns, 8, 8)
    assert patches.shape[2:4] == (10, 5)
    expected = torch.einsum("bcrwhv,dchv->brwd", patches, projection.weight).flatten(1, 2) + projection.bias
    assert_within(1e-5, model.embeddings.patch_embeddings(images()), expected)
    assert model(images()).last_hidden_state.shape == (3, 51, 32)
    plain, same = tiny_model(), tiny_model(patch_stride=8)
    assert torch.equal(plain(images()).last_hidden_state, same(images()).last_hidden_state)


@pytest.mark.parametrize(("cameras", "views"), [(3, 0), (0, 4), (3, 4)])
@torch.no_grad()
def test_side_information_is_added_to_every_token(cameras, views):
    model = tiny_model(num_cameras=cameras, num_views=views, side_information_scale=1.5)
    camera, view = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0])
    ids = ({"camera_ids": camera} if cameras else {}) | ({"view_ids": view} if views else {})
    table = model.embeddings.side_embeddings.reshape(max(cameras, 1), max(views, 1), 32)
    rows = table[camera if cameras else 0, view if views else 0].reshape(3, 1, 32)
    plain = model.embeddings(images())
    assert_within(1e-5, model.embeddings(images(), **ids), plain + 1.5 * rows)
    assert not torch.allclose(model(images(), **ids).pooler_output, model(images()).pooler_output)


def test_drop_path_grows_by_layer_as_in_the_reference():
    for name, rates in load_golden("schedules")[1]["drop_path_rates"].items():
        depth, rate = name.removeprefix("depth").split("_rate")
        model = PersonViTModel(tiny_config(num_hidden_layers=int(depth), drop_path_rate=float(rate)))
        assert model.drop_path_rates == pytest.approx(rates, abs=1e-6)


@torch.no_grad()
def test_drop_path_drops_whole_layers_of_images_in_training_only():
    model = tiny_model(drop_path_rate=1.0)
    output = model(images(), output_hidden_states=True).hidden_states
    assert not torch.equal(output[2], output[1])
    output = model.train()(images(), output_hidden_states=True).hidden_states
    assert not torch.equal(output[1], output[0])
    assert torch.equal(output[2], output[1])
    output = tiny_model(drop_path_rate=0.5).train()(images(32), output_hidden_states=True).hidden_states
    assert 0 < (output[2] == output[1]).flatten(1).all(1).sum() < 32


@pytest.mark.parametrize("rate", [0.3, 0.999])
def test_drop_path_skips_what_multiplying_by_zero_would_drop(rate):
    layer, gradients = tiny_model().train().layers[-1], []
    inputs = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()

    torch.manual_seed(0)
    first, second = scales = (torch.rand(2, 6, 1, 1) >= rate) / (1 - rate)
    assert rate > 0.9 or 0 < first.count_nonzero() < 6
    output = layer(inputs, scales=scales, skips=True)
    output.square().sum().backward()
    gradients.append([inputs.grad, *(weight.grad for weight in layer.parameters())])
    inputs.grad = None
    layer.zero_grad()

    expected = inputs + first * layer.attention(layer.layernorm_before(inputs))[0]
    expected = expected + second * layer.mlp(layer.layernorm_after(expected))
    assert_within(1e-5, output, expected)
    expected.square().sum().backward()
    gradients.append([inputs.grad, *(weight.grad for weight in layer.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)  # none is missing where all images are dropped


@torch.no_grad()
def test_only_cls_gives_the_same_cls_token():
    model = tiny_model(num_part_tokens=3)
    whole, alone = model(images()), model(images(), only_cls=True, output_hidden_states=True)
    assert alone.last_hidden_state.shape == (3, 1, 32)
    assert_within(1e-5, alone.pooler_output, whole.pooler_output)
    assert [states.shape[1] for states in alone.hidden_states] == [36, 36, 1]


def test_training_for_reid_computes_the_last_layer_for_cls_alone():
    model = tiny_model(PersonViTForReID, num_labels=2)
    labels, shapes, features = torch.tensor([0, 0, 1]), [], []
    model.personvit.layernorm.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    for mode, asked in ((False, {}), (True, {}), (True, {"output_hidden_states": True})):
        features.append(model.train(mode)(images(), labels, **asked).embeddings)
    assert shapes == [33, 1, 33]
    for feature in features[1:]:
        assert_within(1e-5, feature, features[0])


@pytest.mark.parametrize("parts", [0, 3])
@torch.no_grad()
def test_masked_patches_are_not_seen(parts):
    model = tiny_model(num_part_tokens=parts)
    mask = torch.zeros(3, 8, 4, dtype=torch.bool)
    mask[0, 2:5, 1:3] = True
    hidden = mask[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = model(images(), bool_masked_pos=mask).last_hidden_state
    repainted = model(images().masked_fill(hidden, 3.0), bool_masked_pos=mask.flatten(1)).last_hidden_state
    assert torch.equal(repainted, expected)
    unmasked = model(images()).last_hidden_state
    assert torch.equal(unmasked[1:], expected[1:])
    assert not torch.allclose(unmasked[0], expected[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": images()[0]}, "`pixel_values`.*batch, 3, height, width"),
        ({"pixel_values": images()[:, :2]}, r"`pixel_values`.*\(3, 2, 64, 32\)"),
        ({"pixel_values": images(height=60)}, "60x32.*`patch_size=8`"),
        ({"bool_masked_pos": torch.zeros(3, 31)}, r"`bool_masked_pos`.*\(3, 32\).*\(3, 31\)"),
        ({"bool_masked_pos": torch.zeros(3, 4, 8)}, r"`bool_masked_pos`.*\(3, 8, 4\).*\(3, 4, 8\)"),
        ({"attention_mask": torch.ones(3, 33)}, "no `attention_mask`.*`bool_masked_pos`"),
        ({"camera_ids": torch.tensor([0, 3, 1])}, "`camera_ids`.*`num_cameras` is 3.*0 to 3"),
        ({"camera_ids": torch.tensor([0, -1, 1])}, "`camera_ids`.*-1 to 1"),
        ({"camera_ids": torch.tensor([0, 1])}, "`camera_ids`.*3"),
        ({"camera_ids": torch.zeros(3)}, "`camera_ids`.*integer type.*float32"),
        ({"labels": torch.tensor([0, 1, 7])}, "`labels`.*`num_labels` is 7.*0 to 7"),
        ({"labels": torch.tensor([0, -1, 6])}, "`labels`.*-1 to 6"),
        ({"labels": torch.tensor([0, 1])}, "`labels`.*3"),
        ({"labels": torch.zeros(3)}, "`labels`.*integer type.*float32"),
    ],
)
def test_bad_input_is_rejected_by_name(inputs, message):
    model = tiny_model(PersonViTForReID if "labels" in inputs else PersonViTModel, num_cameras=3, num_labels=7)
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": images()} | inputs)


@torch.no_grad()
def test_no_attention_mask_may_be_given_as_none():
    model = tiny_model()
    assert torch.equal(model(images(), attention_mask=None).pooler_output, model(images()).pooler_output)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@torch.no_grad()
def test_ids_may_be_of_any_integer_type(dtype):
    model = tiny_model(PersonViTForReID, num_cameras=100, num_views=4, num_labels=3)
    ids = {"camera_ids": [90, 0, 70], "view_ids": [1, 3, 2], "labels": [0, 2, 0]}
    small, whole = (
        model(images(), **{name: torch.tensor(values, dtype=kind) for name, values in ids.items()})
        for kind in (dtype, torch.long)
    )
    assert torch.equal(small.embeddings, whole.embeddings)
    assert torch.equal(small.loss, whole.loss)


def test_ids_without_values_are_not_looked_at():
    ids = {"camera_ids": torch.tensor([0, 2, 1]), "labels": torch.tensor([0, 1, 0])}
    settings = {"num_cameras": 3, "num_labels": 2}
    with torch.device("meta"):
        model = PersonViTForReID(tiny_config(**settings)).train()
    output = model(images().to("meta"), **{name: values.to("meta") for name, values in ids.items()})
    assert output.loss.is_meta and output.loss.shape == ()

    model = tiny_model(PersonViTForReID, attn_implementation="eager", **settings)
    pixels, labels = images(), torch.tensor([[0, 1, 0], [1, 0, 1]])

    def loss(labels: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        return model(pixels, labels=labels, camera_ids=cameras).loss

    mapped = torch.func.vmap(loss)(labels, labels)
    assert_within(1e-5, mapped, torch.stack([loss(one, one) for one in labels]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("neck_feature", "befor"), ("drop_path_rate", 1.5), ("num_cameras", -1), ("triplet_margin", float("nan"))],
        *[("image_size", [63, 32]), ("num_part_tokens", -2)],
    ],
)
def test_settings_given_while_loading_are_checked(tmp_path, setting, value):
    tiny_model(PersonViTForReID).save_pretrained(tmp_path)
    for load in (PersonViTForReID.from_pretrained, PersonViTModel.from_pretrained):
        with pytest.raises(ValueError, match="63x32" if setting == "image_size" else f"`{setting}`.*{value}"):
            load(tmp_path, **{setting: value})


def test_a_checkpoint_s_own_head_weights_that_the_model_lacks_are_told(tmp_path):
    tiny_model(PersonViTForReID, num_labels=3).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"classifier.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for cls, unexpected in ((PersonViTForReID, {"classifier.bias"}), (PersonViTModel, set())):
        assert cls.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"] == unexpected


def test_missing_view_and_missing_mask_token_are_named():
    with pytest.raises(ValueError, match="`view_ids` must be given.*`num_views` is 2"):
        tiny_model(num_cameras=3, num_views=2)(images(), camera_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="`bool_masked_pos`.*use_mask_token=True"):
        tiny_model(PersonViTForReID).personvit(images(), bool_masked_pos=torch.zeros(3, 32))


@pytest.mark.parametrize("extras", [{"patch_stride": 6}, {"stem": "ics", "num_part_tokens": 3}], ids=str)
@torch.no_grad()
def test_saved_models_come_back_bit_for_bit(tmp_path, caplog, extras):
    model = tiny_model(PersonViTForReID, num_labels=7, **{"num_cameras": 3} | extras)
    model.save_pretrained(tmp_path / "reid")
    model.personvit.save_pretrained(tmp_path / "backbone")
    with no_transformers_warnings(caplog):
        for auto in (PersonViTForReID, AutoModelForImageClassification):
            loaded = auto.from_pretrained(tmp_path / "reid")
            assert type(loaded) is PersonViTForReID
            assert_same_weights(loaded, model)
            assert [name for name, value in loaded.named_parameters() if not value.requires_grad] == [
                "bottleneck.bias"
            ]
        for path in ("backbone", "reid"):
            loaded, report = AutoModel.from_pretrained(tmp_path / path, output_loading_info=True)
            assert type(loaded) is PersonViTModel
            assert not report["missing_keys"]
            ids = torch.tensor([0, 2, 1])
            expected = model.personvit(images(), camera_ids=ids).last_hidden_state
            assert torch.equal(loaded(images(), camera_ids=ids).last_hidden_state, expected)


def test_backbone_checkpoint_leaves_nothing_of_reid_uninitialised(tmp_path):
    backbone = tiny_model()
    backbone.save_pretrained(tmp_path)
    model, report = PersonViTForReID.from_pretrained(tmp_path, num_labels=300, output_loading_info=True)
    assert not report["unexpected_keys"]
    expected = {name: value for name, value in backbone.state_dict().items() if not name.endswith("mask_token")}
    torch.testing.assert_close(dict(model.personvit.state_dict()), expected, rtol=0, atol=0)
    neck = model.bottleneck
    assert (neck.weight == 1).all() and (neck.bias == 0).all() and not neck.bias.requires_grad
    assert (neck.running_mean == 0).all() and (neck.running_var == 1).all()
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)


@torch.no_grad()
def test_part_tokens_stand_between_cls_and_patches():
    model = tiny_model(num_part_tokens=2)
    embeddings = model.embeddings
    positions = embeddings.position_embeddings
    assert positions.shape == (1, 3 + 32, 32)
    tokens = embeddings(images())
    assert_within(1e-6, tokens[:, 1:3], (embeddings.part_tokens + positions[:, 1:3]).expand(3, -1, -1))
    assert_within(1e-6, tokens[:, 3:], embeddings.patch_embeddings(images()) + positions[:, 3:])
    resized = interpolate_position_embeddings(positions, (8, 4), (4, 2))
    assert torch.equal(resized[:, :3], positions[:, :3])
    without_parts = interpolate_position_embeddings(positions[:, 2:], (8, 4), (4, 2))
    assert torch.equal(resized[:, 3:], without_parts[:, 1:])


@with_and_without_extras
def test_every_parameter_is_initialised(extras):
    """On a model built without memory, as `from_pretrained` builds it, no parameter keeps what memory held."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = PersonViTModel(tiny_config(**extras))
    model.to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        value.data.fill_(7)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert not (value == 7).any(), name
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == (4 if extras.get("stem") == "ics" else 1)
    for convolution in convolutions:
        bound = convolution.weight[0].numel() ** -0.5  # PyTorch's default
        assert 0.9 * bound < convolution.weight.abs().max() <= bound


@with_and_without_extras
@torch.no_grad()
def test_exported_program_equals_the_model(extras):
    model = tiny_model(**extras)
    program = torch.export.export(model, (images(),)).module()
    assert_within(1e-6, program(images()).last_hidden_state, model(images()).last_hidden_state)


def test_attentions_in_training_have_all_images():
    model = tiny_model(drop_path_rate=0.9, attn_implementation="eager").train()
    for asked in ({"output_attentions": True}, {}):
        model.config.output_attentions = not asked
        assert {attention.shape[0] for attention in model(images(8), **asked).attentions} == {8}


@torch.no_grad()
def test_a_layer_in_evaluation_mode_drops_nothing():
    model = tiny_model(drop_path_rate=1.0)
    expected = model(images()).pooler_output
    model.train()
    for layer in model.layers:
        layer.eval()
    assert_within(1e-6, model(images()).pooler_output, expected)


class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@torch.no_grad()
def test_layers_may_be_wrapped():
    model = tiny_model(drop_path_rate=1.0)
    expected = model(images()).pooler_output
    model.layers[1] = Wrapped(model.layers[1])
    assert_within(0, model(images()).pooler_output, expected)
    seen = []
    model.layers[1].register_forward_hook(lambda _, inputs, output: seen.append(torch.equal(inputs[0], output)))
    model.train()(images())
    assert seen == [True]  # dropped as before


def test_offloaded_weights_train():
    from accelerate import cpu_offload

    model = tiny_model(drop_path_rate=0.3).train()
    cpu_offload(model, execution_device="cpu")
    assert model(images()).pooler_output.isfinite().all()


def test_a_model_in_training_is_exported_for_any_batch_size():
    model = tiny_model(drop_path_rate=0.2).train()
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (images(8),), dynamic_shapes=sizes, strict=False)
    assert program.module()(images(5)).pooler_output.shape == (5, 32)
