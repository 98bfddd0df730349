"""Linear layers in bfloat16, whichever kind of product computes them."""

import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from personvit_hf import PersonViTConfig, PersonViTForReID, linear
from personvit_hf.linear import PersonViTLinear, bfloat16_products_are_slow


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request, monkeypatch):
    """A CPU whose bfloat16 products are slow, or one where they aren't."""
    monkeypatch.setattr(linear, "bfloat16_products_are_slow", lambda: request.param)
    return request.param


@pytest.fixture
def always_slow(monkeypatch):
    monkeypatch.setattr(linear, "bfloat16_products_are_slow", lambda: True)


def layer(bias: bool = True) -> PersonViTLinear:
    torch.manual_seed(0)
    return PersonViTLinear(48, 96, bias=bias)


def results(module: nn.Linear, inputs: torch.Tensor, forward) -> list[torch.Tensor]:
    """The output and all gradients, under bfloat16 autocast."""
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = forward(inputs)
    output.float().square().sum().backward()
    return [output.detach(), inputs.grad, *(parameter.grad for parameter in module.parameters())]


def assert_near(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Within half a step of bfloat16, relative to the whole."""
    assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
    assert (tensor.double() - expected.double()).norm() <= 2**-8 * expected.double().norm()


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_own_linear_layer_to_bfloat16s_precision(slow, shape, bias, dtype):
    module = layer(bias)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = results(module, inputs, module)
    expected = results(module, inputs, lambda x: nn.functional.linear(x, module.weight, module.bias))
    for tensor, wanted in zip(ours, expected, strict=True):
        assert_near(tensor, wanted)
        assert slow or torch.equal(tensor, wanted)
    # the rounded result is the very same but where two float32 sums fall on both sides of a half
    assert not ours[0].numel() or (ours[0] == expected[0]).float().mean() > 0.98


def test_operands_and_result_are_rounded_to_bfloat16(always_slow):
    module, inputs = layer(), torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs)
    operands = (tensor.bfloat16().double() for tensor in (inputs, module.weight, module.bias))
    exact = nn.functional.linear(*operands).detach()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-6)


def test_activations_are_kept_in_bfloat16(always_slow):
    module, kept = layer(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(7, 48))
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in kept} == {
        ((7, 48), torch.bfloat16),
        ((96, 48), torch.float32),  # the parameter itself, not a copy
    }
    assert any(tensor.data_ptr() == module.weight.data_ptr() for tensor in kept)


def test_frozen_weights_take_no_gradient(always_slow):
    module = layer().requires_grad_(False)
    output, gradient = results(module, torch.randn(7, 48), module)[:2]
    assert gradient.abs().sum() > 0
    assert module.weight.grad is None and module.bias.grad is None


def test_a_model_that_is_bfloat16_itself(slow):
    module, inputs = layer().bfloat16(), torch.randn(7, 48).bfloat16()
    output = module(inputs)
    output.sum().backward()
    assert_near(output, nn.functional.linear(inputs, module.weight, module.bias))
    assert module.weight.grad.dtype == module.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_without_bfloat16(always_slow, dtype):
    module, inputs = layer().to(dtype), torch.randn(7, 48, dtype=dtype)
    assert torch.equal(module(inputs), nn.functional.linear(inputs, module.weight, module.bias))
    with torch.autocast("cpu", dtype=torch.float16):  # nor in the other half precision
        assert torch.equal(module(inputs), nn.functional.linear(inputs, module.weight, module.bias))


def test_gradient_checkpointing_gives_the_same_gradients(always_slow):
    config = PersonViTConfig(
        image_size=(32, 16), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    pixels, gradients = torch.randn(2, 3, 32, 16), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PersonViTForReID(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = model(pixels).embeddings
        embeddings.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_gradients_of_a_model_are_at_least_as_near_to_float32_as_torchs_own(monkeypatch):
    config = PersonViTConfig(
        image_size=(32, 16), hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256
    )
    torch.manual_seed(0)
    model, pixels = PersonViTForReID(config).train(), torch.randn(8, 3, 32, 16)
    gradients = {}
    for name, enabled, slow in (("float32", False, False), ("torch", True, False), ("ours", True, True)):
        monkeypatch.setattr(linear, "bfloat16_products_are_slow", lambda slow=slow: slow)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            embeddings = model(pixels).embeddings
        embeddings.float().square().sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    errors = {name: (value - gradients["float32"]).norm().item() for name, value in gradients.items()}
    assert 0 < errors["ours"] <= 1.1 * errors["torch"]
    assert errors["torch"] < 0.05 * gradients["float32"].norm().item()


def test_compiled_models_use_torchs_own(always_slow):
    module, inputs = layer(), torch.randn(7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(module, backend="eager", fullgraph=True)(inputs)
        assert torch.equal(compiled, nn.functional.linear(inputs, module.weight, module.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*jit.* is deprecated")
def test_tracing_and_transforms_use_torchs_own(always_slow, dtype):
    module, inputs = layer().to(dtype), torch.randn(7, 48).to(dtype)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def plain(inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, module.weight, module.bias)

    def of_one(weights: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, weights, one).float().sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32, cache_enabled=False):
        traced = torch.jit.trace(module, inputs)
        torch.jit.save(traced, io.BytesIO())
        assert torch.equal(traced(inputs), plain(inputs))
        assert torch.equal(torch.func.vmap(module)(inputs), torch.func.vmap(plain)(inputs))
        of_each = torch.func.vmap(torch.func.grad(of_one), (None, 0))(weights, inputs)
        moved = torch.func.jvp(module, (inputs,), (inputs,))[1]
    assert of_each["weight"].shape == (7, 96, 48)
    assert_near(of_each["weight"][:, 0], inputs)
    assert moved.shape == (7, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives(slow, dtype):
    module, inputs = layer().to(dtype), torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)

    def second_derivatives(forward) -> list[torch.Tensor]:
        leaf = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = forward(leaf)
        first = torch.autograd.grad(output.float().pow(3).sum(), (leaf, *module.parameters()), create_graph=True)
        total = sum(gradient.float().square().sum() for gradient in first)
        return list(torch.autograd.grad(total, (leaf, *module.parameters())))

    ours = second_derivatives(module)
    expected = second_derivatives(lambda x: nn.functional.linear(x, module.weight, module.bias))
    for tensor, wanted in zip(ours, expected, strict=True):
        assert (tensor.double() - wanted.double()).norm() <= 0.02 * wanted.double().norm()


def test_types_that_do_not_belong_together_are_refused_as_by_torch(always_slow):
    module, inputs = layer(), torch.randn(7, 48).bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        module(inputs)
    module.weight = nn.Parameter(module.weight.double())
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        module(inputs)


class Quantized(torch.Tensor):
    """A weight that only a linear layer can use."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return args[0].new_ones(*args[0].shape[:-1], len(args[1]))
        if function in (torch.Tensor.bfloat16, torch.Tensor.float):
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_may_be_subclasses_of_tensors(always_slow):
    module = layer().bfloat16()
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)
    assert (module(torch.randn(7, 48).bfloat16()) == 1).all()


def test_the_kind_of_product_is_measured_alike_within_autocast():
    outside = bfloat16_products_are_slow()
    bfloat16_products_are_slow.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would make both products bfloat16
        assert bfloat16_products_are_slow() is outside


def test_measuring_is_not_seen_by_the_caller_s_modes():
    module, inputs = layer().bfloat16(), torch.randn(7, 48).bfloat16()
    bfloat16_products_are_slow.cache_clear()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        module(inputs)
    assert counter.get_total_flops() == 2 * 7 * 48 * 96
    assert bfloat16_products_are_slow.cache_info().currsize == 1
