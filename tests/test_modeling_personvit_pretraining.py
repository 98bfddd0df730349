from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from golden_fixtures import (
    assert_same_weights,
    assert_within,
    batch_of_step,
    model_before_step,
    no_transformers_warnings,
    our_pretraining_names,
    tiny_config,
    under,
)
from golden_fixtures import tiny_model as tiny_model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForPreTraining

from personvit_hf import PersonViTForPreTraining, PersonViTForReID, PersonViTModel, losses
from personvit_hf.losses import koleo_loss
from personvit_hf.modeling_personvit_pretraining import packed_passes
from personvit_hf.schedules import clip_gradients_per_parameter, pretraining_parameter_groups

TOLERANCE = 1e-5  # what README.md beside the fixtures states for all of these

every_variant = pytest.mark.parametrize("variant", ["separate", "shared", "teacher_shared"])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# Parity with the reference implementations


def without_noise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Leaves out the key third of the qkv bias: its true gradient is zero, and AdamW moves it by chance."""
    if not name.endswith("qkv_proj.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat((query, value))


def run_step(model: PersonViTForPreTraining, optimizer, facts: dict, step: int, dtype: torch.dtype):
    """One optimizer step as the reference takes it; returns its output, and the gradients before clipping."""
    schedule = facts["schedule"][f"step{step}"]
    for group in optimizer.param_groups:
        group["lr"] = schedule["lr"]
    optimizer.param_groups[0]["weight_decay"] = schedule["weight_decay"]
    temperatures = {"teacher_temperature": facts["teacher_temp"]}
    temperatures["teacher_patch_temperature"] = facts["teacher_patch_temp"]
    output = model(*batch_of_step(step, dtype), **temperatures, output_logits=True)
    optimizer.zero_grad()
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    clip_gradients_per_parameter(model.parameters(), facts["config"]["clip"])
    if facts["variant"]["freezing_active"]:
        for parameter in model.student_head.prototype_parameters():
            parameter.grad = None
    optimizer.step()
    model.update_teacher(schedule["teacher_momentum"])
    return output, gradients


@both_types
@every_variant
def test_two_steps_of_pretraining(variant, dtype):
    model, tensors, facts = model_before_step(variant, dtype)
    shared = {role: facts["variant"][f"shared_head_{role}"] for role in ("student", "teacher")}
    parameters = dict(model.named_parameters())
    groups = pretraining_parameter_groups(model, facts["schedule"]["step1"]["weight_decay"])
    for group, names in zip(groups, ("weight_decay_group", "no_weight_decay_group"), strict=True):
        ours = our_pretraining_names({name: torch.zeros(1) for name in facts[names]}, "student", shared["student"])
        assert {id(parameter) for parameter in group["params"]} == {id(parameters[name]) for name in ours}
    optimizer = torch.optim.AdamW(groups, lr=1.0)

    for step in (1, 2):
        output, gradients = run_step(model, optimizer, facts, step, dtype)
        for loss, name in ((output.dino_loss, "cls"), (output.mim_loss, "patch"), (output.loss, "total")):
            expected = facts["losses"][f"step{step}"][name]  # not rounded to float32
            assert loss.item() == pytest.approx(expected, abs=TOLERANCE if dtype == torch.float32 else 1e-9), name
        assert_within(TOLERANCE, model.center, tensors[f"step{step}.center_after"].flatten())
        assert_within(TOLERANCE, model.patch_center, tensors[f"step{step}.center2_after"].flatten())
        if step == 1:
            check_logits(output, tensors)
            check_gradients(gradients, tensors, facts, shared["student"])
        for role in ("student", "teacher"):
            check_weights(model, tensors, facts, step, role, shared[role])


def check_logits(output, tensors: dict) -> None:
    masks = batch_of_step(1, torch.float32)[2].flatten(2)

    def by_image(name: str) -> torch.Tensor:
        return tensors[f"step1.{name}"].unflatten(0, (2, -1)).transpose(0, 1)

    student = torch.cat((by_image("student_cls"), by_image("student_local_cls")), dim=1)
    assert_within(TOLERANCE, output.student_cls_logits, student)
    assert_within(TOLERANCE, output.teacher_cls_logits, by_image("teacher_cls"))
    assert_within(TOLERANCE, output.student_patch_logits, by_image("student_patch")[masks])
    assert_within(TOLERANCE, output.teacher_patch_logits, by_image("teacher_patch")[masks])


def check_gradients(gradients: dict, tensors: dict, facts: dict, shared: bool) -> None:
    relative = facts["tolerance"]["gradients_relative_to_largest"]
    for name, expected in our_pretraining_names(under(tensors, "step1.grad."), "student", shared).items():
        assert_within(relative * expected.abs().max().item(), gradients[name], expected)
    norms = {name: torch.tensor(norm) for name, norm in facts["gradient_norm_before_clipping"].items()}
    norms = our_pretraining_names(norms, "student", shared)
    assert set(norms) == set(gradients)
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=TOLERANCE), name


def check_weights(model, tensors: dict, facts: dict, step: int, role: str, shared: bool) -> None:
    weights = model.state_dict()
    for name, expected in our_pretraining_names(under(tensors, f"after{step}.{role}."), role, shared).items():
        distance = without_noise(name, (weights[name] - expected).abs())
        if role == "teacher" or weights[name].dtype == torch.float64:
            assert distance.max() <= TOLERANCE, name
        else:
            # where a gradient is of rounding size, float32 moves a weight by any part of the learning rate
            assert distance.max() <= 2 * step * facts["schedule"]["step1"]["lr"], name
            assert (distance > TOLERANCE).sum() <= math.ceil(0.001 * distance.numel()), name
    if weights["center"].dtype == torch.float64:
        sums = facts["sum_and_l2_of_every_parameter"][f"after{step}"][role]
        for name, pair in our_pretraining_names(
            {name: torch.tensor(v) for name, v in sums.items()}, role, shared
        ).items():
            if not name.endswith("qkv_proj.bias"):
                assert_within(1e-4, torch.stack([weights[name].sum(), weights[name].norm()]), pair)


# Behaviour


tiny_model = partial(tiny_model_of, PersonViTForPreTraining)


def views(batch: int = 3, num_local: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(batch, 2, 8, 4, generator=generator) < 0.3
    masks[1, 0] = False
    return {
        "global_pixel_values": torch.randn(batch, 2, 3, 64, 32, generator=generator),
        "local_pixel_values": torch.randn(batch, num_local, 3, 48, 24, generator=generator),
        "bool_masked_pos": masks,
    }


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return -(target * torch.log_softmax(logits / temperature, dim=-1)).sum(-1)


@pytest.mark.parametrize("unmasked_too", [False, True])
@pytest.mark.parametrize("num_local", [0, 1, 3])
@torch.no_grad()
def test_dino_loss_is_the_mean_over_pairs_of_different_views(unmasked_too, num_local):
    model, inputs = tiny_model(student_sees_unmasked_global=unmasked_too), views(num_local=num_local)
    crops, local, masks = inputs.values()

    def logits(backbone, head, picture, **kwargs):
        return head.cls_logits(head.project(backbone(picture[None], **kwargs).pooler_output))[0]

    losses = []
    for image in range(3):
        student = [  # (which global view it shows, logits)
            (
                view,
                logits(
                    model.student, model.student_head, crops[image, view], bool_masked_pos=masks[image, view][None]
                ),
            )
            for view in range(2)
        ]
        if unmasked_too:
            student += [(v, logits(model.student, model.student_head, crops[image, v])) for v in range(2)]
        student += [(None, logits(model.student, model.student_head, crop)) for crop in local[image]]
        for teacher_view in range(2):
            teacher = logits(model.personvit, model.teacher_head, crops[image, teacher_view])
            target = torch.softmax((teacher - model.center) / 0.05, dim=-1)
            losses += [cross_entropy(target, own, 0.1) for view, own in student if view != teacher_view]
    assert len(losses) == 3 * (2 * (2 * (1 + unmasked_too) + num_local) - 2 * (1 + unmasked_too))
    loss = model(**inputs, teacher_temperature=0.05).dino_loss
    assert_within(1e-5, loss, torch.stack(losses).mean())


@torch.no_grad()
def test_mim_loss_counts_masked_patches_only():
    model, inputs = tiny_model(), views()
    crops, _, masks = inputs.values()
    by_view = []
    for image in range(3):
        for view in range(2):
            mask = masks[image, view].flatten()
            student = model.student(crops[image, view][None], bool_masked_pos=mask[None]).last_hidden_state[0, 1:]
            teacher = model.personvit(crops[image, view][None]).last_hidden_state[0, 1:]
            tokens = []
            for patch in mask.nonzero().flatten():
                own = model.student_head.patch_logits(model.student_head.project(student[patch]))
                target = model.teacher_head.patch_logits(model.teacher_head.project(teacher[patch]))
                tokens.append(cross_entropy(torch.softmax((target - model.patch_center) / 0.06, -1), own, 0.1))
            by_view.append(torch.stack(tokens).mean() if tokens else torch.zeros(()))
    assert by_view[2] == 0  # the view without a mask
    loss = model(**inputs, teacher_patch_temperature=0.06).mim_loss
    assert_within(1e-5, loss, torch.stack(by_view).mean())


@torch.no_grad()
def test_koleo_loss_is_the_log_distance_to_the_nearest_other_image():
    tokens = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for view in range(2):
        units = [token / token.norm() for token in tokens[:, view]]
        for i, unit in enumerate(units):
            expected -= min((unit - other).norm() for j, other in enumerate(units) if j != i).log() / 12
    assert_within(1e-7, koleo_loss(tokens), expected)


def test_koleo_loss_of_equal_images_is_finite_and_spreads_nearly_equal_ones():
    same = torch.ones(4, 2, 5, requires_grad=True)
    loss = koleo_loss(same)
    loss.backward()
    assert loss.isfinite() and same.grad.isfinite().all()

    tokens = (1 + 0.1 * torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    koleo_loss(tokens).backward()
    assert koleo_loss(tokens.detach() - 0.01 * tokens.grad) < koleo_loss(tokens.detach())


def test_koleo_loss_is_added_by_its_weight():
    plain, spread = (tiny_model(koleo_loss_weight=weight).eval() for weight in (0.0, 0.5))
    spread.load_state_dict(plain.state_dict())
    without, with_koleo = plain(**views()), spread(**views())
    assert without.koleo_loss is None
    torch.testing.assert_close(with_koleo.loss, without.loss + 0.5 * with_koleo.koleo_loss)


def test_koleo_loss_needs_another_image():
    one = {name: value[:1] for name, value in views().items()}
    model = tiny_model(koleo_loss_weight=0.1)
    with pytest.raises(ValueError, match="`koleo_loss_weight`.*at least 2 images"):
        model.train()(**one)
    assert model.eval()(**one).koleo_loss is None


def test_the_teacher_of_a_new_model_predicts_without_noise():
    model = PersonViTForPreTraining(tiny_model(drop_path_rate=0.9, hidden_dropout_prob=0.5).config)
    assert model.training and model.student.training and not model.personvit.training
    first, second = (model(**views(), output_logits=True).teacher_cls_logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.0, -0.04, float("nan")])
def test_temperatures_are_above_zero(temperature):
    for name in ("teacher_temperature", "teacher_patch_temperature"):
        with pytest.raises(ValueError, match="temperatures must be above 0"):
            tiny_model()(**views(), **{name: temperature})


def test_views_and_masks_may_be_left_out():
    model, inputs = tiny_model(dino_loss_weight=0.5, mim_loss_weight=3.0), views(num_local=0)
    with_masks = model(**inputs)
    assert with_masks.mim_loss > 0
    assert_within(1e-6, with_masks.loss, 0.5 * with_masks.dino_loss + 3 * with_masks.mim_loss)
    assert with_masks.student_cls_logits is None
    flat = model(inputs["global_pixel_values"], None, inputs["bool_masked_pos"].flatten(2))
    assert torch.equal(flat.loss, with_masks.loss)
    for masks in (None, torch.zeros(3, 2, 32)):
        unmasked = model(inputs["global_pixel_values"], bool_masked_pos=masks)
        assert unmasked.mim_loss == 0 and not unmasked.mim_loss.signbit()  # 0.0 in logs, not -0.0
        assert unmasked.loss == 0.5 * unmasked.dino_loss


@pytest.mark.parametrize("part_tokens", [0, 2])
@pytest.mark.parametrize("unmasked_too", [False, True])
def test_dino_alone_without_masks_leaves_out_what_only_patches_need(unmasked_too, part_tokens):
    results = []
    for masks in (torch.zeros(3, 2, 32), None):
        model = tiny_model(
            mim_loss_weight=0.0, student_sees_unmasked_global=unmasked_too, num_part_tokens=part_tokens
        ).train()
        seen, patch_center = [], model.patch_center.clone()
        model.teacher_head.mlp.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        inputs = views() | {"bool_masked_pos": masks}
        model(**inputs, move_centers=False)
        output = model(**inputs)
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())  # DDP would miss them
        assert torch.equal(model.patch_center, patch_center) == (masks is None)
        assert seen[0].shape[1] == (1 if masks is None else 33 + part_tokens)
        results.append((output.loss, output.dino_loss, output.mim_loss, gradients, model.center))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    asked = model(**inputs, output_hidden_states=True)
    assert asked.hidden_states[-1].shape[1] == 33 + part_tokens


@pytest.mark.parametrize("max_logits", [1, 100])  # one image or patch at a time, and a few
def test_losses_in_chunks_are_the_same(monkeypatch, max_logits):
    results = []
    for limit in (losses.MAX_LOGITS, max_logits):
        monkeypatch.setattr(losses, "MAX_LOGITS", limit)
        model = tiny_model().train()
        output = model(**views())
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        results.append((output.dino_loss, output.mim_loss, gradients, model.center, model.patch_center))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_no_more_logits_are_kept_than_a_chunk_has(monkeypatch):
    """Of what the backward pass keeps, nothing has a row for each masked patch and a column for each prototype."""
    masked, kept = int(views()["bool_masked_pos"].sum()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        tiny_model().train()(**views())
        assert (masked, 16) in kept
        kept.clear()
        monkeypatch.setattr(losses, "MAX_LOGITS", 64)
        tiny_model().train()(**views())
        assert kept and (masked, 16) not in kept


def test_centers_move_in_training_only():
    model, inputs = tiny_model(center_momentum=0.7), views()
    before = model.center.clone(), model.patch_center.clone()
    output = model(**inputs, output_logits=True)
    assert torch.equal(model.center, before[0]) and torch.equal(model.patch_center, before[1])
    assert torch.equal(model.train()(**inputs).loss, output.loss)  # a step uses the centers of the step before
    assert_within(1e-6, model.center, 0.7 * before[0] + 0.3 * output.teacher_cls_logits.mean((0, 1)))
    tokens = model.personvit(inputs["global_pixel_values"].flatten(0, 1)).last_hidden_state[:, 1:]
    patches = model.teacher_head.patch_logits(model.teacher_head.project(tokens)).mean((0, 1))
    assert_within(1e-6, model.patch_center, 0.7 * before[1] + 0.3 * patches)
    assert not model.center.requires_grad


def run_one_process(rank: int, folder: str) -> None:
    """One of two processes, with its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model().train()
    with torch.no_grad():
        model(**{name: value[2 * rank : 2 * rank + 2] for name, value in views(batch=4).items()})
    torch.save((model.center, model.patch_center), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_centers_of_two_processes_equal_those_of_one(tmp_path):
    torch.multiprocessing.start_processes(run_one_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    alone = tiny_model().train()
    with torch.no_grad():
        alone(**views(batch=4))
    for rank in range(2):
        center, patch_center = torch.load(tmp_path / f"{rank}.pt")
        assert_within(1e-6, center, alone.center)
        assert_within(1e-6, patch_center, alone.patch_center)


def test_bfloat16_leaves_teacher_and_centers_in_float32():
    model, inputs = tiny_model().train(), views()
    expected = tiny_model().train()
    in_float32 = expected(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    model.update_teacher(0.999)
    assert output.loss.dtype == output.dino_loss.dtype == output.mim_loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(in_float32.loss.item(), rel=0.05)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.dtype == torch.float32 and value.isfinite().all(), name
        assert value.grad is None or value.grad.isfinite().all(), name
    for center, wanted in ((model.center, expected.center), (model.patch_center, expected.patch_center)):
        assert_within(0.01, center, wanted)
        assert not torch.equal(center, center.bfloat16().float())


def test_teacher_takes_no_gradient_and_no_noise():
    model, inputs = tiny_model(drop_path_rate=0.5, hidden_dropout_prob=0.2).train(), views()
    assert model.student.training and not model.personvit.training and not model.teacher_head.training
    first, second = (model(**inputs, output_logits=True) for _ in range(2))
    assert torch.equal(first.teacher_cls_logits, second.teacher_cls_logits)
    assert torch.equal(first.teacher_patch_logits, second.teacher_patch_logits)
    assert not torch.equal(first.student_cls_logits, second.student_cls_logits)
    first.loss.backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("student") and not name.endswith("gain") for name in trained)
    for parameter in model.student_head.prototype_parameters():
        parameter.grad = None
    assert {name for name in trained if model.get_parameter(name).grad is None} == {
        f"student_head.{part}_prototypes.direction" for part in ("cls", "patch")
    }


@pytest.mark.parametrize("extras", [{}, {"stem": "ics"}, {"num_part_tokens": 3, "koleo_loss_weight": 0.1}])
def test_sdpa_equals_eager(extras):
    outputs = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(**extras, attn_implementation=attention).train()
        output = model(**views(), output_logits=True)
        output.loss.backward()
        gradient = model.student.layers[0].attention.qkv_proj.weight.grad
        outputs.append((output.loss, output.student_cls_logits, output.student_patch_logits, gradient))
    for eager, sdpa in zip(*outputs, strict=True):
        assert_within(1e-5, sdpa, eager)


def test_batch_norms_that_are_synchronised_train_in_the_teacher_too():
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model(stem="ics")).train()
    norms = [module for module in model.personvit.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) == 3 and all(norm.training for norm in norms) and not model.personvit.training


def test_part_tokens_are_no_patches():
    model, inputs = tiny_model(num_part_tokens=3), views()
    output = model(**inputs, output_logits=True)
    tokens = model.personvit(inputs["global_pixel_values"].flatten(0, 1)).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 32
    logits = model.teacher_head.patch_logits(model.teacher_head.project(tokens[:, 4:]))
    assert_within(1e-6, output.teacher_patch_logits, logits[inputs["bool_masked_pos"].reshape(-1, 32)])
    before, momentum = model.patch_center.clone(), model.config.center_momentum
    model.train()(**inputs)["loss"].backward()
    assert_within(1e-6, model.patch_center, momentum * before + (1 - momentum) * logits.mean((0, 1)))
    assert model.student.embeddings.part_tokens.grad.abs().min() > 0


def test_convolution_stem_keeps_its_own_statistics(tmp_path):
    model = tiny_model(stem="ics")
    names = [name for name, _ in model.personvit.named_buffers() if name.endswith("running_mean")]
    assert len(names) == 3
    before = {name: model.personvit.get_buffer(name).clone() for name in names}
    model.train()(**views())["loss"].backward()
    for role in (model.student, model.personvit):
        assert not any(torch.equal(role.get_buffer(name), before[name]) for name in names)
    model.eval()
    before = {name: model.personvit.get_buffer(name).clone() for name in names}
    model(**views())
    assert all(torch.equal(model.personvit.get_buffer(name), before[name]) for name in names)
    # a student that starts from a backbone starts with its statistics
    model.personvit.save_pretrained(tmp_path)
    started = PersonViTForPreTraining.from_pretrained(tmp_path)
    for name in names:
        assert torch.equal(started.student.get_buffer(name), before[name])
        assert torch.equal(started.personvit.get_buffer(name), before[name])


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(drop_path_rate=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**views()).loss.backward()
        gradients.append({name: value.grad for name, value in model.student.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_teacher_is_a_moving_average(first, second):
    """Two updates with one student are one update with the product of their momenta."""
    model, expected = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    model.update_teacher(first)
    model.update_teacher(second)
    expected.update_teacher(first * second)
    assert_within(1e-6, *(torch.nn.utils.parameters_to_vector(one.parameters()) for one in (model, expected)))


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    model, before = tiny_model(), tiny_model()
    model.update_teacher(1.0)
    assert_same_weights(model, before)
    model.update_teacher(0.0)
    assert_same_weights(model.personvit, before.student)
    assert_same_weights(model.teacher_head, before.student_head)
    assert_same_weights(model.student, before.student)
    for momentum in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="`momentum`"):
            model.update_teacher(momentum)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_saved_model_comes_back_bit_for_bit(tmp_path, caplog, norm_last_layer):
    model = tiny_model(norm_last_layer=norm_last_layer)
    model.save_pretrained(tmp_path)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert ("student_head.cls_prototypes.gain" in frozen) == norm_last_layer
    with no_transformers_warnings(caplog):
        for auto in (PersonViTForPreTraining, AutoModelForPreTraining):
            loaded = auto.from_pretrained(tmp_path)
            assert type(loaded) is PersonViTForPreTraining
            assert_same_weights(loaded, model)
            assert {name for name, value in loaded.named_parameters() if not value.requires_grad} == frozen
        backbone, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(backbone) is PersonViTModel
        assert not report["missing_keys"]
        assert_same_weights(backbone, model.personvit)
        assert all(value.requires_grad for value in backbone.parameters())
    reid = PersonViTForReID.from_pretrained(tmp_path, num_labels=4)
    pictures = views()["global_pixel_values"][:, 0]
    with torch.no_grad():
        expected = model.personvit(pictures).pooler_output
        assert torch.equal(backbone(pictures).pooler_output, expected)
        assert torch.equal(reid.eval()(pictures).embeddings, expected)


def test_trained_prototypes_that_the_model_lacks_are_told(tmp_path):
    model = tiny_model(num_patch_prototypes=20)
    model.save_pretrained(tmp_path)
    _, report = PersonViTForPreTraining.from_pretrained(tmp_path, share_projection_head=True, output_loading_info=True)
    heads = ("student_head", "teacher_head")
    assert report["unexpected_keys"] == {
        f"{head}.patch_prototypes.{x}" for head in heads for x in ("direction", "gain")
    }


@pytest.mark.parametrize("source", [PersonViTModel, PersonViTForReID, PersonViTForPreTraining])
@pytest.mark.parametrize("cls", [PersonViTModel, PersonViTForReID, PersonViTForPreTraining])
def test_what_other_models_hold_is_left_aside_in_silence(tmp_path, source, cls):
    source(tiny_config(num_labels=5)).save_pretrained(tmp_path)
    assert not cls.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]


@pytest.mark.parametrize("cls", [PersonViTModel, PersonViTForReID, None])
def test_student_and_teacher_start_equal_whatever_is_loaded(tmp_path, cls):
    config = tiny_config(num_labels=5)
    if cls is None:
        model = PersonViTForPreTraining(config)
        for token in ("cls_token", "position_embeddings"):
            assert 0.01 < getattr(model.student.embeddings, token).std() < 0.03
    else:
        torch.manual_seed(0)
        saved = cls(config)
        saved.save_pretrained(tmp_path)
        model = PersonViTForPreTraining.from_pretrained(tmp_path)
        backbone = saved if cls is PersonViTModel else saved.personvit
        for name, value in backbone.state_dict().items():
            assert torch.equal(model.personvit.state_dict()[name], value), name
    assert_same_weights(model.student, model.personvit)
    assert_same_weights(model.student_head, model.teacher_head)
    assert not any(value.requires_grad for value in model.personvit.parameters())
    assert (model.center == 0).all() and (model.patch_center == 0).all()
    assert (model.student.embeddings.mask_token == 0).all()
    for name, value in model.student_head.named_parameters():
        if name.endswith("direction"):
            assert value.std().item() == pytest.approx(12**-0.5 / 3**0.5, rel=0.1)
        elif name.endswith("weight"):
            assert value.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert (value == float(name.endswith("gain"))).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_pixel_values": torch.zeros(3, 3, 64, 32)}, r"`global_pixel_values`.*\(3, 3, 64, 32\)"),
        ({"global_pixel_values": torch.zeros(3, 3, 3, 64, 32)}, "`global_pixel_values`.*batch, 2, 3"),
        ({"global_pixel_values": torch.zeros(3, 2, 1, 64, 32)}, "`global_pixel_values`.*batch, 2, 3"),
        ({"global_pixel_values": torch.zeros(3, 2, 3, 60, 32)}, "60x32.*`patch_size=8`"),
        ({"local_pixel_values": torch.zeros(2, 2, 3, 48, 24)}, r"`local_pixel_values`.*batch 3.*\(2, 2, 3, 48, 24\)"),
        ({"local_pixel_values": torch.zeros(3, 3, 48, 24)}, "`local_pixel_values`"),
        ({"local_pixel_values": torch.zeros(3, 2, 3, 48, 20)}, "48x20.*`patch_size=8`"),
        ({"bool_masked_pos": torch.zeros(3, 2, 31)}, r"`bool_masked_pos`.*\(3, 2, 32\).*\(3, 2, 31\)"),
        ({"bool_masked_pos": torch.zeros(3, 2, 4, 8)}, r"`bool_masked_pos`.*\(3, 2, 8, 4\).*\(3, 2, 4, 8\)"),
        ({"bool_masked_pos": torch.zeros(6, 32)}, r"`bool_masked_pos`.*\(6, 32\)"),
    ],
)
def test_bad_input_is_rejected_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**views() | change)


@pytest.mark.parametrize("settings", [{}, {"student_sees_unmasked_global": True, "num_part_tokens": 2, "stem": "ics"}])
def test_packed_passes_give_what_one_after_the_other_gives(monkeypatch, settings):
    results = []
    for packed in (False, True):
        model = tiny_model(**settings).train()
        if packed:  # as on a GPU
            monkeypatch.setattr(torch.Tensor, "is_cuda", True)
            monkeypatch.setattr(model.student, "forward", None)
        output = model(**views())
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.student.named_parameters()}
        results.append((output.dino_loss, output.mim_loss, gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_packed_passes_drop_layers_by_image():
    model, seen = tiny_model(drop_path_rate=1.0, num_hidden_layers=3).train(), []
    for layer in model.student.layers[1:]:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0] == output).all(-1)))
    with torch.no_grad():
        passes = [{"pixel_values": torch.randn(40, 3, *size)} for size in ((32, 32), (16, 16))]
        first, second = packed_passes(model.student, passes)
    packed, last_of_first, last_of_second = seen
    assert last_of_first.all() and last_of_second.all()  # at a rate of 1
    tokens = first.last_hidden_state.shape[1], second.last_hidden_state.shape[1]
    assert packed.shape == (1, 40 * sum(tokens))
    for images in packed[0].split([40 * number for number in tokens]):
        of_image = images.unflatten(0, (40, -1))
        assert torch.equal(of_image.any(1), of_image.all(1))  # all tokens of an image, or none
        assert 0 < of_image.all(1).sum() < 30  # at a rate of 0.5, and both branches


def test_hooks_on_the_student_are_not_passed_by(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model, calls = tiny_model().train(), []
    hook = model.student.register_forward_hook(lambda *_: calls.append(1))
    model(**views())
    assert len(calls) == 2  # global and local crops
    hook.remove()
    monkeypatch.setattr(model.student, "forward", None)
    model(**views())
