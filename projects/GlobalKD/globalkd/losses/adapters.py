"""Convolutions from the student's width to the teacher's, one a level."""

from typing import Sequence

from torch import nn

from ..features import LevelPair


def build_adapters(levels: Sequence[LevelPair], *, kernel_size: int, relu: bool) -> nn.ModuleDict:
    """One convolution a level from the student's to the teacher's width."""

    def adapter(pair: LevelPair) -> nn.Module:
        conv = nn.Conv2d(
            pair.student_channels, pair.teacher_channels, kernel_size, padding=kernel_size // 2
        )
        return nn.Sequential(conv, nn.ReLU()) if relu else conv

    return nn.ModuleDict({pair.student: adapter(pair) for pair in levels})


def build_alignment(levels: Sequence[LevelPair]) -> nn.ModuleDict:
    """`align_width` of each level."""
    return nn.ModuleDict(
        {p.student: align_width(p.student_channels, p.teacher_channels) for p in levels}
    )


def align_width(student_channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution where the widths differ; where they are equal, nothing."""
    if student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, 1)
