"""Kullback-Leibler divergences between two detectors' logits, at a temperature."""

import torch.nn.functional as F
from torch import Tensor


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row: (M, C) logits -> (M,)."""
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    output = F.log_softmax(student.float() / temperature, dim=-1)
    divergence = F.kl_div(output, target, reduction="none", log_target=True)
    return divergence.sum(dim=-1) * temperature**2


def sigmoid_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the binary KL divergence of each class, summed: (M, C) logits -> (M,)."""
    s, t = student.float() / temperature, teacher.float() / temperature
    positive = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    negative = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (positive + negative).sum(dim=-1) * temperature**2
