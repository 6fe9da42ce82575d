"""Relations between the boxes of an image: the parts of DRKD's second term.

Here: padding of a batch's boxes, the relation matrix of their RoI features, its trained filter, and
features aggregated by relations, after "Dual Relation Knowledge Distillation for Object Detection"
(Ni et al., IJCAI 2023).
Not here: teacher and student; `instance_relation` compares the two.

Shapes: N images, n boxes of the fullest image, R boxes of the batch, F channels of a flattened RoI
feature, E channels of an embedding.
"""

from typing import List, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .anchored_sum import AnchoredSum


def to_padded(
    rows: Sequence[Tensor], image_index: Tensor, num_images: int, num_slots: int
) -> Tuple[List[Tensor], Tensor]:
    """Group flat rows by image, each image filled up with zeros to `num_slots` rows.

    Args:
        rows: tensors (R, ...) of the same rows; images in any order, an image's rows keep theirs.
        image_index: (R,) int64 in [0, num_images).
        num_images: N.
        num_slots: n, at least the rows of the fullest image. Given, since to count them here a
            GPU would have to be waited for.

    Returns:
        (N, n, ...) of each tensor, with gradient, and (N, n) bool, true where a row is.
    """
    same = image_index[:, None] == torch.arange(num_images, device=image_index.device)  # (R, N)
    counts = same.sum(dim=0)
    slot = (same.cumsum(dim=0) * same).sum(dim=1) - 1
    mask = torch.arange(num_slots, device=counts.device) < counts[:, None]
    padded = [
        x.new_zeros((*mask.shape, *x.shape[1:])).index_put((image_index, slot), x) for x in rows
    ]
    return padded, mask


def relation_matrix(
    queries: Tensor, keys: Tensor, relevance: Union[Tensor, float], mask: Tensor
) -> Tensor:
    """psi_ij = softmax over j of the logits m_ij <g1(f_i), g2(f_j)>, images apart.

    Note: an image's logits, less each row's mean (which a softmax ignores), are scaled to unit root
    mean square. An embedded Gaussian alone depends on the scale of the features: uniform where they
    are small, one box per row where they are large. A constant m changes nothing.

    Args:
        queries: (N, n, E), g1(f).
        keys: (N, n, E), g2(f).
        relevance: (N, n, n) non-negative, m; 1.0 for no filter.
        mask: (N, n) bool, true where a box is.

    Returns:
        (N, n, n); rows of boxes sum to 1, everything that belongs to padding is 0.
    """
    pairs = mask[:, :, None] & mask[:, None, :]
    logits = relevance * (queries @ keys.mT)
    count = mask.sum(dim=1).clamp_min(1)[:, None, None]
    mean = (logits * pairs).sum(dim=2, keepdim=True) / count
    centred = (logits - mean) * pairs
    power = centred.square().sum(dim=(1, 2), keepdim=True) / count.square()
    logits = centred * (power + 1e-8).rsqrt()
    return logits.masked_fill(~pairs, -1e4).softmax(dim=2) * pairs


class RelationFilter(nn.Module):
    """m_ij in (0, 1): how much a pair matters, from its two embeddings.

    A network of two layers on the concatenation; the first is computed for each box and added for
    each pair. Its size does not depend on the number of boxes.
    """

    def __init__(self, embedding_channels: int, hidden_channels: int):
        super().__init__()
        self.first = nn.Linear(embedding_channels, hidden_channels)
        self.second = nn.Linear(embedding_channels, hidden_channels, bias=False)
        self.score = nn.Linear(hidden_channels, 1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Two (N, n, E) -> (N, n, n)."""
        hidden = self.first(queries)[:, :, None] + self.second(keys)[:, None, :]
        return self.score(hidden.relu()).squeeze(3).sigmoid()


class BoxRelation(nn.Module):
    """The relations of one detector's boxes on one level."""

    def __init__(self, channels: int, *, embedding_channels: int, filter_channels: int):
        """
        Args:
            channels: F.
            embedding_channels: E.
            filter_channels: hidden channels of the filter; 0 for none (m_ij = 1).
        """
        super().__init__()
        self.query = nn.Linear(channels, embedding_channels)
        self.key = nn.Linear(channels, embedding_channels)
        self.filter = (
            RelationFilter(embedding_channels, filter_channels) if filter_channels else None
        )

    def forward(self, boxes: Tensor, mask: Tensor) -> Tensor:
        """(N, n, F), (N, n) -> (N, n, n)."""
        queries, keys = self.query(boxes), self.key(boxes)
        relevance = 1.0 if self.filter is None else self.filter(queries, keys)
        return relation_matrix(queries, keys, relevance, mask)


class BoxAggregation(nn.Module):
    """Box features plus what their related boxes tell: f_i + out(sum_j psi_ij g(f_j)).

    Note: the outer sum is an `AnchoredSum`, for the reason that `GlobalReasoning` gives.
    """

    def __init__(self, channels: int, *, embedding_channels: int, filter_channels: int):
        """The arguments are those of `BoxRelation`."""
        super().__init__()
        self.relation = BoxRelation(
            channels, embedding_channels=embedding_channels, filter_channels=filter_channels
        )
        self.value = nn.Linear(channels, embedding_channels)
        self.out = nn.Linear(embedding_channels, channels)
        self.add = AnchoredSum(channels)

    def forward(self, boxes: Tensor, mask: Tensor) -> Tensor:
        """(N, n, F), (N, n) -> (N, n, F), 0 in padding."""
        branch = self.out(self.relation(boxes, mask) @ self.value(boxes)) * mask[:, :, None]
        return self.add(boxes, branch, mask)
