"""Kullback-Leibler divergences between two detectors' logits, at a temperature."""

from typing import Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row: (M, C) logits -> (M,)."""
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    output = F.log_softmax(student.float() / temperature, dim=-1)
    divergence = F.kl_div(output, target, reduction="none", log_target=True)
    return divergence.sum(dim=-1) * temperature**2


def sigmoid_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the binary KL divergence of each class, summed: (..., C) logits -> (...) float32.

    With gradient for the student's logits alone.
    """
    return _BinaryKL.apply(student, teacher.detach(), temperature)


#: Logits of `_BinaryKL` that are worked on at a time: each of its steps takes 32 MB.
_AT_A_TIME = 1 << 23


class _BinaryKL(torch.autograd.Function):
    """T^2 sum over classes of KL(sigmoid(t / T) || sigmoid(s / T)): (..., C) logits -> (...).

    Its derivative by s is T (sigmoid(s / T) - sigmoid(t / T)). The logits may be those of all
    anchors: autograd would keep several tensors of their size, and each step of the formula is one.
    Here the logits themselves are all that is kept, and the steps see a part of them at a time.
    """

    @staticmethod
    def forward(context, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        context.save_for_backward(student, teacher)
        context.temperature = temperature
        divergence = student.new_empty(student.shape[:-1], dtype=torch.float32)
        for s, t, out in _parts(temperature, student, teacher, divergence[..., None]):
            # The same with both signs changed: of t >= 0 small results are no differences of large
            # numbers.
            s, t = torch.where(t < 0, -s, s), t.abs()
            each = F.logsigmoid(t) - F.logsigmoid(s) - (-t).sigmoid() * (t - s)
            out.copy_(each.sum(dim=-1, keepdim=True))
        return divergence * temperature**2

    @staticmethod
    def backward(context, gradient: Tensor):
        (student, teacher), temperature = context.saved_tensors, context.temperature
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        factor = (gradient * temperature)[..., None]
        for s, t, out, f in _parts(temperature, student, teacher, result, factor):
            out.copy_((s.sigmoid() - t.sigmoid()) * f)
        return result, None, None


def _parts(
    temperature: float, student: Tensor, teacher: Tensor, *others: Tensor
) -> Iterator[Tuple[Tensor, ...]]:
    """Some rows at a time: both logits / T in float32, and of contiguous others views."""
    at_a_time = max(_AT_A_TIME // max(student.shape[-1], 1), 1)
    flat = (x.flatten(0, -2).split(at_a_time) for x in (student, teacher, *others))
    for s, t, *rest in zip(*flat):
        yield s.float() / temperature, t.float() / temperature, *rest
