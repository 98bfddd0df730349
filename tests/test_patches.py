import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, PersonViTModel, embed_images
from personvit_hf.patches import cluster_parts, match_patches, occlude, patch_tokens

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
MODELS = {
    "plain": {},
    "part tokens": {"num_part_tokens": 3},
    "stem": {"stem": "ics"},
    "overlapping patches": {"patch_stride": 12},
    "cameras": {"num_cameras": 4},
}


def tiny(**settings) -> PersonViTModel:
    torch.manual_seed(0)
    return PersonViTModel(PersonViTConfig(image_size=[64, 32], initializer_range=0.3, **SIZES, **settings)).eval()


def processor(height=64, width=32) -> PersonViTImageProcessor:
    return PersonViTImageProcessor(size={"height": height, "width": width})


def photographs(*shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def unit_rows(rng, *shape) -> np.ndarray:
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [(64, 32), (96, 32), (48, 80)], ids=str)
def test_tokens_and_attention_are_the_models_own(settings, size):
    model = tiny(**settings)
    images = photographs((50, 20), (90, 70), (64, 32))
    patches = patch_tokens(model, processor(), images, image_size=size)
    rows, columns = model.config.patch_grid(*size)
    first = 1 + model.config.num_part_tokens
    assert patches.tokens.shape == (3, rows, columns, 16)
    assert patches.images.shape == (3, *size, 3) and patches.images.dtype == np.uint8

    pixel_values = processor(*size)(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
        tokens = torch.nn.functional.normalize(outputs.last_hidden_state, dim=-1)
        # attention written out: softmax of [CLS]'s query with all keys
        layer = model.layers[-1]
        qkv = layer.attention.qkv_proj(layer.layernorm_before(outputs.hidden_states[-2]))
        query, key, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        weights = (query[:, :, :1] @ key.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0]
    np.testing.assert_allclose(patches.tokens.reshape(3, -1, 16), tokens[:, first:], atol=1e-5)
    np.testing.assert_allclose(patches.attention.reshape(3, 2, -1), weights[:, :, first:], atol=1e-5)
    np.testing.assert_allclose(patches.embeddings, tokens[:, 0], atol=1e-5)


def test_the_attention_of_another_layer():
    model = tiny()
    images = photographs((64, 32))
    first, last = (patch_tokens(model, processor(), images, layer).attention for layer in (0, 1))
    assert not np.allclose(first, last, atol=1e-3)
    np.testing.assert_array_equal(last, patch_tokens(model, processor(), images).attention)


def test_pictures_go_where_the_model_is():
    """On the meta device all is computed but the numbers: only taking them to main memory fails."""
    model = PersonViTForReID(PersonViTConfig(image_size=[64, 32], neck_feature="after", num_labels=3, **SIZES)).to(
        "meta"
    )
    devices = []
    model.personvit.register_forward_hook(
        lambda _, inputs, outputs: devices.extend([inputs[0].device, outputs[0].device])
    )
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        patch_tokens(model, processor(), photographs((64, 32)))
    assert devices == [torch.device("meta")] * 2


@pytest.mark.parametrize("neck", ["before", "after"])
def test_embeddings_are_those_that_retrieval_compares(neck):
    torch.manual_seed(0)
    model = PersonViTForReID(PersonViTConfig(image_size=[64, 32], neck_feature=neck, num_labels=3, **SIZES))
    model.bottleneck.running_mean.uniform_(-1, 1)
    images = photographs((50, 20), (90, 70))
    patches = patch_tokens(model, processor(), images)
    np.testing.assert_allclose(patches.embeddings, embed_images(model, processor(), images), atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    implementation = model.config._attn_implementation
    patch_tokens(model, processor(), photographs((64, 32)))
    assert model.training and model.config._attn_implementation == implementation != "eager"
    with pytest.raises(ValueError, match="patch"):
        patch_tokens(model, processor(), photographs((64, 32)), image_size=(60, 30))
    assert model.config._attn_implementation == implementation


def test_places_of_patches_that_overlap():
    patches = patch_tokens(tiny(patch_stride=12), processor(), photographs((64, 32)))
    assert patches.tokens.shape[1:3] == (5, 2)
    # patches of 16 pixels at 0 and 12, at 0, 12, 24, 36 and 48
    assert patches.centre(0, 0) == (8, 8)
    assert patches.centre(4, 1) == (20, 56)
    # as cells of 12 around these centres
    assert patches.extent == (2, 26, 62, 2)
    plain = patch_tokens(tiny(), processor(), photographs((64, 32)))
    assert plain.extent == (0, 32, 64, 0)


def test_pictures_as_low_as_channels_are_not_taken_for_channels_first():
    torch.manual_seed(0)
    model = PersonViTModel(PersonViTConfig(image_size=[4, 8], patch_size=4, **SIZES)).eval()
    images = photographs((4, 8))
    patches = patch_tokens(model, processor(4, 8), images)
    np.testing.assert_allclose(patches.embeddings, embed_images(model, processor(4, 8), images), atol=1e-5)
    assert patches.tokens.shape == (1, 1, 2, 16)


def test_wrong_images_or_layer():
    with pytest.raises(ValueError, match="at least one"):
        patch_tokens(tiny(), processor(), [])
    with pytest.raises(ValueError, match="2 layers.*got 2"):
        patch_tokens(tiny(), processor(), photographs((64, 32)), layer=2)


def test_features_that_are_no_numbers():
    model = tiny()
    with torch.no_grad():
        model.layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite.*model"):
        patch_tokens(model, processor(), photographs((64, 32)))


def test_parts_are_found_in_all_images_and_numbered_from_the_top():
    rng = np.random.default_rng(0)
    head, coat, shoes = unit_rows(rng, 3, 16)
    tokens = np.empty((2, 6, 2, 16), np.float32)
    tokens[0] = np.stack([shoes, coat, coat, coat, coat, head])[:, None]  # stands on their head
    tokens[1] = np.stack([head, head, head, coat, shoes, shoes])[:, None]
    parts = cluster_parts(tokens, 3)
    names = np.array([[2, 1, 1, 1, 1, 0], [0, 0, 0, 1, 2, 2]])
    assert (parts == names[:, :, None]).all()


@pytest.mark.parametrize("num_parts", [1, 4])
def test_as_many_parts_as_there_can_be(num_parts):
    tokens = unit_rows(np.random.default_rng(0), 3, 8)[[0, 1, 1, 2]].reshape(1, 2, 2, 8)
    with pytest.raises(ValueError, match=rf"from 2 to .*\(3\), got {num_parts}"):
        cluster_parts(tokens, num_parts)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_a_shuffled_image_matches_itself_patch_by_patch(seed, rows, columns):
    rng = np.random.default_rng(seed)
    tokens = unit_rows(rng, rows * columns, 8)
    order = rng.permutation(len(tokens))
    found = match_patches(tokens.reshape(rows, columns, 8), tokens[order].reshape(columns, rows, 8))
    places = np.ravel_multi_index(found.first.T, (rows, columns))
    others = np.ravel_multi_index(found.second.T, (columns, rows))
    assert sorted(places) == list(range(rows * columns))
    assert (order[others] == places).all()
    np.testing.assert_allclose(found.similarity, 1, atol=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_matches_are_the_same_both_ways_and_ordered(seed):
    rng = np.random.default_rng(seed)
    first, second = unit_rows(rng, 4, 2, 8), unit_rows(rng, 3, 5, 8)
    there, back = match_patches(first, second), match_patches(second, first)
    pairs = {(*a, *b) for a, b in zip(there.first.tolist(), there.second.tolist(), strict=True)}
    assert pairs == {(*b, *a) for a, b in zip(back.first.tolist(), back.second.tolist(), strict=True)}
    assert len(pairs) >= 1 and (np.diff(there.similarity) <= 0).all()
    for (r, c), (s, d), value in zip(there.first, there.second, there.similarity, strict=True):
        similarity = second @ first[r, c]
        assert similarity[s, d] == pytest.approx(similarity.max(), abs=1e-6) == pytest.approx(value, abs=1e-6)


def test_matches_of_features_of_different_widths():
    with pytest.raises(ValueError, match=r"\(4, 2, 8\) and \(4, 2, 6\)"):
        match_patches(np.zeros((4, 2, 8), np.float32), np.zeros((4, 2, 6), np.float32))


@pytest.mark.parametrize(
    "side, kept", [("bottom", np.s_[:6]), ("top", np.s_[4:]), ("left", np.s_[:, 8:]), ("right", np.s_[:, :12])]
)
def test_occlusion_hides_its_share_from_its_side(side, kept):
    image = np.full((10, 20, 3), 7, np.uint8)
    hidden = occlude(image, 0.4, side)
    assert (hidden[kept] == 7).all() and (image == 7).all()
    assert (hidden != 7).all(axis=2).sum() == 80
    assert (occlude(image, 0, side) == image).all()


@pytest.mark.parametrize("share, side, message", [(1.0, "top", "got 1.0"), (-0.1, "top", "-0.1"), (0.5, "up", "'up'")])
def test_occlusion_that_is_none(share, side, message):
    with pytest.raises(ValueError, match=message):
        occlude(np.zeros((4, 4, 3), np.uint8), share, side)
