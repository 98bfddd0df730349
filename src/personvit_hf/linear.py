"""Linear layers that stay fast in bfloat16 on CPUs which multiply bfloat16 matrices slowly."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # what autocast makes bfloat16 of


@functools.cache
def bfloat16_products_are_slow() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at less than two thirds of its float32 speed.

    So it is without matrix units (AMX and the like), by a factor of 2 to 8. Measured on first use, in 20 to 100 ms:
    the CPU's flags don't tell, since the same instructions run at half of float32's speed on some and at twice on
    others.
    """
    # in a thread of its own, out of the caller's autocast, default device, and modes that count or fake operations
    with ThreadPoolExecutor(1) as thread:
        seconds = thread.submit(_seconds_of_products).result()
    return seconds[torch.bfloat16] > 1.5 * seconds[torch.float32]


def _seconds_of_products() -> dict[torch.dtype, float]:
    """How long a product of two matrices takes at best."""
    matrix = torch.ones(512, 512, device="cpu")
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode():
        for _ in range(5):
            for dtype, times in seconds.items():
                operand = matrix.to(dtype)
                started = time.perf_counter()
                operand @ operand
                times.append(time.perf_counter() - started)
    return {dtype: min(times) for dtype, times in seconds.items()}


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, rounded to what bfloat16 can hold."""
    return tensor.bfloat16().float()


class _LinearInFloat32(torch.autograd.Function):
    """A linear layer of bfloat16 numbers with its products in float32, which holds them exactly.

    As in bfloat16 kernels sums are float32, operands and the result are rounded to bfloat16, and bfloat16 is what
    is kept for the backward pass. Gradients of float32 tensors aren't rounded.

    `kept` are the inputs in bfloat16. They come from outside, so that a second derivative finds its way through them;
    the first one goes to `inputs` alone.
    """

    @staticmethod
    def forward(
        ctx, inputs: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.input_dtype = inputs.dtype
        ctx.save_for_backward(kept, weight)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else rounded(bias)
            return nn.functional.linear(kept.float(), rounded(weight), bias).bfloat16()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):
            gradient = gradient.float()
            rows = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[0]:
                of_inputs = (gradient @ rounded(weight)).to(ctx.input_dtype)
            if ctx.needs_input_grad[2]:
                of_weight = (rows.T @ kept.reshape(-1, kept.shape[-1]).float()).to(weight.dtype)
            if ctx.needs_input_grad[3]:
                of_bias = rows.sum(0).to(weight.dtype)
        return of_inputs, None, of_weight, of_bias


class PersonViTLinear(nn.Linear):
    """`nn.Linear`; what it computes in bfloat16 (under autocast, mostly) on a CPU takes the faster kind of product."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if torch.compiler.is_compiling() or not self._computes_in_bfloat16(inputs) or not bfloat16_products_are_slow():
            return super().forward(inputs)
        return _LinearInFloat32.apply(inputs, inputs.bfloat16(), self.weight, self.bias)

    def _computes_in_bfloat16(self, inputs: torch.Tensor) -> bool:
        """Whether torch's own layer would, on a CPU.

        Not where `_LinearInFloat32` can't stand for it: tracing, torch.func's transforms, and subclasses of tensors
        such as quantised weights.
        """
        tensors = [tensor for tensor in (inputs, self.weight, self.bias) if tensor is not None]
        if not all(tensor.device.type == "cpu" and type(tensor) in PLAIN_TENSORS for tensor in tensors):
            return False
        dtypes = {tensor.dtype for tensor in tensors}
        if torch.is_autocast_enabled("cpu"):
            fits = torch.get_autocast_dtype("cpu") == torch.bfloat16 and dtypes <= AUTOCAST_DTYPES
        else:
            fits = dtypes == {torch.bfloat16}
        return fits and not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())
