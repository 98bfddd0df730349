from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn

from personvit_hf.schedules import (
    StepPlan,
    clip_gradients_per_parameter,
    finetune_learning_rate,
    finetuning_parameter_groups,
    is_due,
    pretraining_parameter_groups,
    teacher_temperature,
    warmup_cosine,
)

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "schedules.json").read_text())
EXPECTED = load_file(GOLDEN / "schedules.safetensors")
exactly = {"rel": FACTS["tolerance"]["relative"], "abs": FACTS["tolerance"]["abs"]}


@pytest.mark.parametrize("name", ["pretrain0.lr", "pretrain0.weight_decay", "pretrain0.teacher_momentum"])
def test_warmup_cosine_equals_reference(name):
    call = FACTS["tensors"][name]["call"]
    ours = [
        warmup_cosine(
            step,
            total_steps=call["epochs"] * call["niter"],
            base=call["base"],
            final=call["final"],
            warmup_steps=call.get("warmup", 0) * call["niter"],
            warmup_start=call.get("start", 0.0),
        )
        for step in range(len(EXPECTED[name]))
    ]
    assert ours == pytest.approx(EXPECTED[name], **exactly)


@pytest.mark.parametrize("name", [name for name in EXPECTED if "_temp." in name])
def test_teacher_temperature_equals_reference(name):
    call = FACTS["tensors"][name]["call"]
    ours = [
        teacher_temperature(
            epoch,
            warmup_start=call["warmup_teacher_temp"],
            final=call["teacher_temp"],
            warmup_epochs=call["warmup_epochs"],
            delay_epochs=call.get("mim_start_epoch", 0),
        )
        for epoch in range(call["epochs"])
    ]
    assert ours == pytest.approx(EXPECTED[name], **exactly)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("finetune.")])
def test_finetune_learning_rate_equals_reference(name):
    base, warmup = name.removeprefix("finetune.lr").split(".warmup")
    warmup, kind = warmup.split(".")
    ours = [
        finetune_learning_rate(
            epoch, base=float(base), lr_factor=2.0 if kind.startswith("biases") else 1.0, warmup_epochs=int(warmup)
        )
        for epoch in range(len(EXPECTED[name]))
    ]
    assert ours == pytest.approx(EXPECTED[name], **exactly)


@given(
    total=st.integers(1, 300),
    share=st.floats(0, 1),
    base=st.floats(1e-6, 1),
    final=st.floats(1e-6, 1),
    over=st.floats(0, 2),
)
def test_warmup_cosine_stays_between_its_ends(total, share, base, final, over):
    warmup = int(share * total)
    value = warmup_cosine(int(over * total), total_steps=total, base=base, final=final, warmup_steps=warmup)
    rounding = 1e-15 * max(base, final)
    assert 0 <= value <= max(base, final) + rounding
    if warmup <= int(over * total):
        assert value >= min(base, final) - rounding


def test_edges_of_the_schedules():
    assert warmup_cosine(700, total_steps=700, base=1.0, final=0.25) == 0.25
    assert warmup_cosine(0, total_steps=5, base=1.0, final=0.0, warmup_steps=1, warmup_start=0.1) == 0.1
    assert warmup_cosine(4, total_steps=5, base=1.0, final=0.0, warmup_steps=5) == 1.0
    assert teacher_temperature(0, warmup_start=0.04, final=0.07, warmup_epochs=0) == 0.07
    assert finetune_learning_rate(120, base=1.0, lr_factor=2.0) == 0.002


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_cosine(-1, total_steps=10, base=1.0, final=0.0), "`step`.*-1"),
        (lambda: warmup_cosine(0, total_steps=10, base=1.0, final=0.0, warmup_steps=11), "`warmup_steps`.*10.*11"),
        (lambda: teacher_temperature(-2, warmup_start=0.04, final=0.07, warmup_epochs=3), "`epoch`.*-2"),
        (lambda: teacher_temperature(0, warmup_start=0.04, final=0.07, warmup_epochs=-3), "`warmup_epochs`.*-3"),
        (lambda: finetune_learning_rate(0, base=1.0, total_epochs=10), "`warmup_epochs`.*10.*20"),
    ],
)
def test_bad_positions_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class OfficialNames(nn.Module):
    """Parameters under the names of the fixture, with the number of dimensions that those have."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            is_vector = leaf == "bias" or "norm" in name or name.startswith("bottleneck")
            module.register_parameter(leaf, nn.Parameter(torch.ones(2) if is_vector else torch.ones(2, 2)))


def test_finetuning_groups_equal_reference():
    expected = FACTS["finetune_groups_lr_factor_and_weight_decay"]
    model = OfficialNames(expected)
    groups = finetuning_parameter_groups(model, learning_rate=4e-4, weight_decay=1e-4)
    assert len(groups) == 2
    settings = {id(p): [g["lr_factor"], g["weight_decay"]] for g in groups for p in g["params"]}
    assert {name: settings[id(p)] for name, p in model.named_parameters()} == expected
    assert [g["lr"] for g in groups] == [4e-4, 8e-4]
    separate = finetuning_parameter_groups(model, 4e-4, 1e-4, bias_factor=1.0, bias_weight_decay=0.0)
    assert [(g["lr"], g["weight_decay"]) for g in separate] == [(4e-4, 1e-4), (4e-4, 0.0)]


def test_pretraining_groups_split_by_name_and_dimension():
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.norm = nn.LayerNorm(4)
    model.linear = nn.Linear(4, 4)
    model.register_parameter("relative_bias", nn.Parameter(torch.zeros(2, 2)))  # two-dimensional: decayed
    table = nn.Module()
    table.bias = nn.Parameter(torch.zeros(2, 2))  # a name ending in .bias: not decayed
    model.table = table
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, undecayed = pretraining_parameter_groups(model, weight_decay=0.04)
    assert {names[id(p)] for p in decayed["params"]} == {"cls_token", "linear.weight", "relative_bias"}
    assert {names[id(p)] for p in undecayed["params"]} == {"norm.weight", "norm.bias", "linear.bias", "table.bias"}
    assert (decayed["name"], decayed["weight_decay"]) == ("decayed", 0.04)
    assert (undecayed["name"], undecayed["weight_decay"]) == ("undecayed", 0.0)
    optimizer = torch.optim.AdamW([decayed, undecayed], lr=1e-3)
    assert [group["name"] for group in optimizer.state_dict()["param_groups"]] == ["decayed", "undecayed"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="Linear has no parameter"):
        pretraining_parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.04)


def test_each_gradient_is_clipped_by_its_own_norm():
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(n, 3, dtype=torch.float64)) for n in (1, 4, 9)]
    scales = (0.01, 10.0, 300.0)
    for parameter, scale in zip(parameters, scales, strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = [p.grad.clone() for p in parameters]
    total = clip_gradients_per_parameter([*parameters, nn.Parameter(torch.zeros(2))], max_norm=3.0)
    assert total.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in before)), rel=1e-12)
    for parameter, gradient in zip(parameters, before, strict=True):
        coefficient = 3.0 / (gradient.norm() + 1e-6)
        torch.testing.assert_close(parameter.grad, gradient * min(coefficient, 1.0), rtol=1e-12, atol=0)
    assert torch.equal(parameters[0].grad, before[0])


def test_clipping_without_gradients_or_norm():
    assert clip_gradients_per_parameter([nn.Parameter(torch.zeros(2))], 3.0) == 0
    with pytest.raises(ValueError, match="`max_norm` must be positive"):
        clip_gradients_per_parameter([], 0.0)


@given(batches=st.integers(1, 60), per_step=st.integers(1, 9), per_batch=st.integers(1, 5))
def test_steps_take_every_batch_once(batches, per_step, per_batch):
    plan = StepPlan(images_per_batch=per_batch, batches_per_epoch=batches, batches_per_step=per_step, epochs=3)
    shares = [1 / plan.batches_in_step(batch) for batch in range(batches)]
    assert sum(shares) == pytest.approx(plan.steps_per_epoch)
    for first in range(0, batches, per_step):  # the batches of a step weigh the same, and one together
        step = shares[first : first + per_step]
        assert step == [1 / len(step)] * len(step)
    assert plan.total_steps == 3 * plan.steps_per_epoch == plan.steps_in(3)
    assert plan.steps_between(3) == plan.total_steps and plan.steps_between(1e-3) == 1 and plan.steps_between(0) == 0
    assert plan.images_per_step == per_batch * per_step
    assert plan.images_per_epoch == per_batch * batches


def test_what_is_due():
    assert [count for count in range(1, 10) if is_due(3, count)] == [3, 6, 9]
    assert not any(is_due(0, count) for count in range(1, 10))
