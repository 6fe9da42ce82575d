"""Kullback-Leibler divergences between two detectors' logits, at a temperature."""

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
        for out, s, t in _parts(temperature, divergence.unsqueeze(-1), student, teacher):
            # The same with both signs changed: of t >= 0 small results are no differences of large
            # numbers.
            s, t = torch.where(t < 0, -s, s), t.abs()
            each = F.logsigmoid(t) - F.logsigmoid(s) - (-t).sigmoid() * (t - s)
            out.copy_(each.sum(dim=-1, keepdim=True))
        return divergence * temperature**2

    @staticmethod
    def backward(context, gradient: Tensor):
        student, teacher = context.saved_tensors
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        scaled = (gradient * context.temperature)[..., None]
        rows = scaled.flatten(0, -2).split(_rows_at_a_time(student))
        for (out, s, t), factor in zip(_parts(context.temperature, result, student, teacher), rows):
            out.copy_((s.sigmoid() - t.sigmoid()) * factor)
        return result, None, None


def _rows_at_a_time(logits: Tensor) -> int:
    return max(_AT_A_TIME // max(logits.shape[-1], 1), 1)


def _parts(temperature: float, out: Tensor, student: Tensor, teacher: Tensor):
    """Some rows of each at a time: views of the result, and both logits / T in float32."""
    at_a_time = _rows_at_a_time(student)
    flat = (x.flatten(0, -2).split(at_a_time) for x in (out, student, teacher))
    for part, s, t in zip(*flat):
        yield part, s.float() / temperature, t.float() / temperature
