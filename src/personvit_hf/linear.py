"""Linear layers that stay fast in bfloat16 on CPUs which multiply bfloat16 matrices slowly."""

import functools
import time

import torch
from torch import nn
from torch.autograd.function import once_differentiable


@functools.cache
def bfloat16_products_are_slow() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at less than two thirds of its float32 speed.

    So it is without matrix units (AMX and the like), by a factor of 2 to 8. Measured on first use, in 20 to 100 ms:
    the CPU's flags don't tell, since the same instructions run at half of float32's speed on some and at twice on
    others.
    """
    matrix = torch.ones(512, 512)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(5):
            for dtype, times in seconds.items():
                operand = matrix.to(dtype)
                started = time.perf_counter()
                operand @ operand
                times.append(time.perf_counter() - started)
    return min(seconds[torch.bfloat16]) > 1.5 * min(seconds[torch.float32])


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, rounded to what bfloat16 can hold."""
    return tensor.bfloat16().float()


class _LinearInFloat32(torch.autograd.Function):
    """A linear layer of bfloat16 numbers with its products in float32, which holds them exactly.

    As in bfloat16 kernels sums are float32, operands and the result are rounded to bfloat16, and bfloat16 is what
    is kept for the backward pass. Gradients of float32 tensors aren't rounded.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kept = inputs.bfloat16()
        ctx.input_dtype = inputs.dtype
        ctx.save_for_backward(kept, weight)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else rounded(bias)
            return nn.functional.linear(kept.float(), rounded(weight), bias).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):
            gradient = gradient.float()
            rows = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[0]:
                of_inputs = (gradient @ rounded(weight)).to(ctx.input_dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (rows.T @ kept.reshape(-1, kept.shape[-1]).float()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(weight.dtype)
        return of_inputs, of_weight, of_bias


class PersonViTLinear(nn.Linear):
    """`nn.Linear`; what it computes in bfloat16 (under autocast, mostly) on a CPU takes the faster kind of product."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if inputs.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(inputs)
        autocast = torch.is_autocast_enabled("cpu") and inputs.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocast else inputs.dtype
        if dtype != torch.bfloat16 or not bfloat16_products_are_slow():
            return super().forward(inputs)
        return _LinearInFloat32.apply(inputs, self.weight, self.bias)
