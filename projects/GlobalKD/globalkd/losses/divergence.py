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
    """T^2 times the binary KL divergence of each class, summed: (M, C) logits -> (M,).

    With gradient for the student's logits alone.
    """
    s, t = student.float() / temperature, teacher.detach().float() / temperature
    return _BinaryKL.apply(s, t) * temperature**2


class _BinaryKL(torch.autograd.Function):
    """sum over classes of KL(sigmoid(t) || sigmoid(s)): (..., C) float32 logits s, t -> (...).

    Its derivative by s is sigmoid(s) - sigmoid(t). Autograd would keep several tensors as large as
    the logits, which may be those of all anchors; here it keeps the two that are there.
    """

    @staticmethod
    def forward(context, s: Tensor, t: Tensor) -> Tensor:
        context.save_for_backward(s, t)
        # The same with both signs changed: of t >= 0 small results are no differences of large
        # numbers.
        s, t = torch.where(t < 0, -s, s), t.abs()
        return (F.logsigmoid(t) - F.logsigmoid(s) - (-t).sigmoid() * (t - s)).sum(dim=-1)

    @staticmethod
    def backward(context, gradient: Tensor):
        s, t = context.saved_tensors
        return (s.sigmoid() - t.sigmoid()) * gradient[..., None], None
