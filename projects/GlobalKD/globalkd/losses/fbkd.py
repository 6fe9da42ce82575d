"""Feature-based distillation: attention, features under attention masks, non-local relations.

"Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient
Detectors", Zhang and Ma, ICLR 2021 (FBKD).

Shapes: N images, D channels, H x W cells of a level.
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from .adapters import build_adapters
from .attention import attention, softmax_mask
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def root_mean_square(x: Tensor) -> Tensor:
    """|x| divided by the root of its number of entries; gradient 0 at 0."""
    return torch.linalg.vector_norm(x.float()) / max(x.numel(), 1) ** 0.5


def attention_mask(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`softmax_mask` of the sum of both detectors' attention; no gradient."""
    return softmax_mask((student + teacher).detach(), temperature)


class NonLocal(nn.Module):
    """A non-local block: x_i + W sum_j <q(x_i), k(x_j)> v(x_j) / (H W), W zero at first.

    Without a softmax the sums over pairs of cells factor through the (D/2 x D/2) matrix
    sum_j v(x_j) k(x_j)', so that the cost is linear in the number of cells.
    """

    def __init__(self, channels: int):
        """
        Args:
            channels: D.
        """
        super().__init__()
        inner = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.output = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, D, H, W) -> (N, D, H, W)."""
        query, key, value = (f(maps).flatten(2) for f in (self.query, self.key, self.value))
        mixing = value @ key.mT / key.shape[2]
        return maps + self.output((mixing @ query).unflatten(2, maps.shape[2:]))


@DISTILL_LOSS_REGISTRY.register()
class FBKD(DistillLoss):
    """`loss_kd_fbkd_spatial`, `_channel`, `_feature` and `_relation`; each a mean over levels.

    L_AT: |f(G^s(S)) - G^s(T)| and |f(G^c(S)) - G^c(T)|; L_AM: (sum M^s M^c (f(S) - T)^2)^(1/2);
    L_NLD: |f(r(S)) - r(T)|, with r a non-local block for each detector. f are, in this order, a
    3x3 and a 1x1 convolution of the attention, and 1x1 convolutions of the maps.

    Defaults: T = 0.5. The authors' two-stage code weighs norms that are neither squared nor
    averaged, summed over levels, by 4e-3 (both attentions) and 7e-5 (features, relations). Ours
    are root mean squares, mean over levels: the sum over P2 to P6 of the roots of their numbers of
    entries, for two images of 800 x 1344 and 256 channels, makes 2.8, 0.45, 0.8 and 0.8 of them.
    (Their repository holds no code; these are of copies of it in others'. One-stage code: six times
    these weights, T = 0.1; over P3 to P7: 8.6, 2.7, 2.4 and 2.4, as in
    `configs/compare/fbkd_retinanet.yaml`. The paper gives T the other way round: 0.1 for two-stage
    and 0.5 for one-stage detectors.)

    Note: r(T), the teacher's block, is trained with the student, as in that code, and nothing holds
    it: the loss is smallest if both sides say nothing. On a small problem with a student that
    cannot move, the spread of r(T) fell to a third of that of T in 150 steps; a student that can
    move learned less of T than from a frozen r (0.37 of its variance explained against 0.73). So a
    falling term alone does not mean that the student learns. `PixelRelation` bounds its branch
    against that.

    Note: the equations are the paper's. In that code the attentions matched are means of A and not
    of |A| (on maps with mean 0 these are two to three times as large), a mask is the mean of both
    detectors' softmax, and two-stage features are under the spatial mask alone. Here the masks come
    from the adapted student map, so that widths may differ. The blocks of the authors pool keys and
    values, normalise the batch, and have 64 inner channels on the two finest levels; these do
    none of it.
    """

    node = "FBKD"

    @configurable
    def __init__(
        self,
        *,
        spatial_weight: float = 2.8,
        channel_weight: float = 0.45,
        feature_weight: float = 0.8,
        relation_weight: float = 0.8,
        temperature: float = 0.5,
    ):
        """
        Args:
            spatial_weight: weight of the spatial attention.
            channel_weight: weight of the channel attention.
            feature_weight: weight of the features under both masks.
            relation_weight: weight of the non-local relations.
            temperature: T of the masks, > 0.
        """
        weights = {
            "loss_kd_fbkd_spatial": spatial_weight,
            "loss_kd_fbkd_channel": channel_weight,
            "loss_kd_fbkd_feature": feature_weight,
            "loss_kd_fbkd_relation": relation_weight,
        }
        super().__init__(weights)
        require("FBKD.TEMPERATURE", temperature, temperature > 0, "above 0")
        self.temperature = temperature
        self.measures = {
            "loss_kd_fbkd_spatial": self._spatial,
            "loss_kd_fbkd_channel": self._channel,
            "loss_kd_fbkd_feature": self._feature,
            "loss_kd_fbkd_relation": self._relation,
        }

    def attach(self, levels: Sequence[LevelPair]) -> None:
        if "loss_kd_fbkd_spatial" in self.weights:
            self.spatial_adapters = nn.ModuleDict(
                {p.student: nn.Conv2d(1, 1, 3, padding=1) for p in levels}
            )
        if "loss_kd_fbkd_channel" in self.weights:
            self.channel_adapters = build_adapters(levels, kernel_size=1, relu=False)
        if "loss_kd_fbkd_feature" in self.weights:
            self.adapters = build_adapters(levels, kernel_size=1, relu=False)
        if "loss_kd_fbkd_relation" in self.weights:
            self.relation_adapters = build_adapters(levels, kernel_size=1, relu=False)
            self.student_relations = nn.ModuleDict(
                {p.student: NonLocal(p.student_channels) for p in levels}
            )
            self.teacher_relations = nn.ModuleDict(
                {p.student: NonLocal(p.teacher_channels) for p in levels}
            )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        totals = {name: [] for name in self.weights}
        for pair in context.levels:
            student = context.student_maps[pair.student].float()
            teacher = context.teacher_maps[pair.student].float()
            with torch.autocast(student.device.type, enabled=False):
                for name, terms in totals.items():
                    difference = self.measures[name](pair.student, student, teacher)
                    terms.append(root_mean_square(difference))
        return {name: torch.stack(terms).mean() for name, terms in totals.items()}

    def _spatial(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return self.spatial_adapters[level](attention(student)[0]) - attention(teacher)[0]

    def _channel(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return self.channel_adapters[level](attention(student)[1]) - attention(teacher)[1]

    def _feature(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        adapted = self.adapters[level](student)
        spatial, channel = (
            attention_mask(s, t, self.temperature)
            for s, t in zip(attention(adapted), attention(teacher))
        )
        return (spatial * channel).sqrt() * (adapted - teacher)

    def _relation(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        ours = self.relation_adapters[level](self.student_relations[level](student))
        return ours - self.teacher_relations[level](teacher)
