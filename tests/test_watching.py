"""Figures of a run that learns, collapses or stalls, against known distributions."""

import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit_hf import PersonViTConfig, PersonViTForPreTraining
from personvit_hf.watching import (
    Pace,
    StepGuard,
    TeacherWatch,
    add_mean,
    feature_figures,
    name_collapse,
    prototype_figures,
    warn_past_peak,
)

PROTOTYPES = 24


def tiny_model(**settings) -> PersonViTForPreTraining:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    heads = {"projection_hidden_size": 16, "projection_bottleneck_size": 8, "num_cls_prototypes": PROTOTYPES}
    torch.manual_seed(0)
    config = PersonViTConfig(**sizes, **heads, num_patch_prototypes=12, image_size=[32, 16], patch_size=8, **settings)
    return PersonViTForPreTraining(config).train()


def watched(model: PersonViTForPreTraining, pixels: torch.Tensor, temperature: float = 0.04) -> dict[str, float]:
    watch = TeacherWatch(model)
    watch.wanted = True
    model(pixels, bool_masked_pos=torch.rand(len(pixels), 2, 8) < 0.3, teacher_temperature=temperature)
    return watch.figures(temperature)


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 8), images=st.integers(24, 40), scale=st.floats(0.01, 100))
def test_effective_rank_of_points_on_axes(rank, images, scale):
    axes = torch.eye(12)[:rank].repeat(images, 1) * scale
    both_ways = torch.cat([axes, -axes])
    figures = feature_figures(both_ways)
    assert figures["effective_rank"] == pytest.approx(rank)
    assert figures["feature_std"] == pytest.approx(1)


def test_features_that_are_all_the_same():
    figures = feature_figures(torch.ones(16, 384))
    assert figures["feature_std"] == pytest.approx(0, abs=1e-6) and math.isfinite(figures["effective_rank"])
    assert feature_figures(torch.randn(16, 384))["effective_rank"] <= 15 + 1e-6


def test_entropies_of_known_distributions():
    uniform = torch.full((6, PROTOTYPES), 1 / PROTOTYPES)
    each_its_own = torch.eye(PROTOTYPES)
    one = each_its_own[:1].repeat(6, 1)
    most = math.log(PROTOTYPES)
    for probabilities, entropy, kl in ((uniform, most, 0), (each_its_own, 0, 0), (one, 0, most)):
        figures = prototype_figures(probabilities)
        assert figures["teacher_entropy"] == pytest.approx(entropy, abs=1e-5)
        assert figures["teacher_kl_to_uniform"] == pytest.approx(kl, abs=1e-5)
    spread = feature_figures(torch.randn(20, 8))
    assert name_collapse(spread | prototype_figures(each_its_own), PROTOTYPES) is None
    assert "same probability" in name_collapse(spread | prototype_figures(uniform), PROTOTYPES)
    assert "one prototype" in name_collapse(spread | prototype_figures(one), PROTOTYPES)
    same = feature_figures(torch.ones(20, 8)) | prototype_figures(each_its_own)
    assert "same [CLS] feature" in name_collapse(same, PROTOTYPES)


@pytest.mark.parametrize("shared", [False, True])
def test_the_teacher_is_seen_on_its_way(shared):
    model, pixels = tiny_model(share_projection_head=shared), torch.randn(5, 2, 3, 32, 16)
    model.center.normal_(std=0.1)
    model.eval()
    figures = watched(model, pixels)
    with torch.no_grad():
        features = model.personvit(pixels.flatten(0, 1)).pooler_output
        logits = model.teacher_head.cls_logits(model.teacher_head.project(features))
    probabilities = ((logits - model.center) / 0.04).softmax(-1)
    expected = feature_figures(features) | prototype_figures(probabilities)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert figures["center_norm"] == pytest.approx(model.center.norm().item())


def test_watching_must_be_asked_for():
    model = tiny_model()
    watch = TeacherWatch(model)
    model(torch.randn(2, 2, 3, 32, 16))
    assert watch.features is None and watch.logits is None
    with pytest.raises(RuntimeError, match="wanted"):
        watch.figures(0.04)


def test_a_collapse_stops_the_run_when_it_lasts():
    model, pixels = tiny_model(), torch.randn(4, 2, 3, 32, 16)
    watch = TeacherWatch(model)
    for temperature, stops in ((9e3, False), (9e3, False), (0.04, False), (9e3, False), (9e3, False), (9e3, True)):
        watch.wanted = True
        model(pixels)
        watch.figures(temperature)
        if stops:
            with pytest.raises(RuntimeError, match=r"step 7: the teacher gives every.*metrics\.jsonl"):
                watch.require_no_collapse(7, "runs/p")
        else:
            watch.require_no_collapse(7, "runs/p")


def test_a_skipped_step_leaves_the_centers_and_is_counted():
    model = tiny_model()
    guard, nan = StepGuard(model, 1), torch.tensor(torch.nan)
    before = model.center.clone()
    model(torch.full((2, 2, 3, 32, 16), torch.nan))
    assert model.center.isnan().all()
    assert guard.must_skip(5, nan) and guard.skipped == 1
    assert torch.equal(model.center, before)
    assert not guard.must_skip(6, torch.tensor(3.0))
    with pytest.raises(FloatingPointError, match="step 7.*`skip_nonfinite_steps` 1"):
        guard.must_skip(7, torch.tensor(torch.inf))
    assert not StepGuard(model, 0).must_skip(7, nan)
    with pytest.raises(ValueError, match="skip_nonfinite_steps"):
        StepGuard(model, -1)


def test_share_of_time_spent_waiting():
    def slow():
        for item in range(3):
            time.sleep(0.05)
            yield item

    pace = Pace()
    for _ in pace.timed(slow()):
        pace.images += 10
    figures = pace.figures()
    assert 0.5 < figures["data_wait_share"] <= 1
    assert 50 < figures["images_per_second"] < 30 / 0.15
    time.sleep(0.05)
    assert pace.figures()["data_wait_share"] == 0
    with pace.paused():
        time.sleep(0.5)
    assert pace.figures()["images_per_second"] > 30 / 0.4  # 0.2 s of training


def test_the_means_of_a_steps_batches():
    means = {}
    for value in (1.0, 2.0, 6.0):
        means = add_mean(means, {"loss": torch.tensor(value, requires_grad=True)}, 3)
    assert means["loss"].item() == pytest.approx(3.0) and not means["loss"].requires_grad


@pytest.mark.parametrize(
    ("scores", "warns"),
    [([], False), ([0.1, 0.2, 0.3], False), ([0.1, 0.3, 0.2], False), ([0.1, 0.3, 0.2, 0.25], True)]
    + [([0.1, 0.3, 0.299, 0.25], False), ([0.3, 0.2, 0.31, 0.29], False)],
)
def test_scores_past_their_peak(tmp_path, caplog, scores, warns):
    lines = [{"step": 1, "loss": 3.0}] + [{"step": i, "epoch": 10 * i, "mAP": s} for i, s in enumerate(scores)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    warning = warn_past_peak(metrics)
    assert bool(warning) == warns == ("--keep_best" in caplog.text)
    if warns:
        assert "epoch 10 (0.3000)" in warning
