"""Prototype generation spread over processes: each process works on some of the classes.

Every class is worked on by one process, on all of its instances in the order of the dataset, so
that any generator picks what it picks in a single process. Not here: the work itself.

Shapes: R instances of this process, K classes.
"""

from dataclasses import dataclass
from typing import Callable, List, Optional, TypeVar

import torch
from detectron2.utils import comm
from torch import Tensor

from .structures import PairedFeatures, PrototypeSet

T = TypeVar("T")


def run_everywhere(work: Callable[[], T], doing: str) -> T:
    """Run something on every process; if it fails on one, fail on all instead of waiting.

    Args:
        work: called once on each process.
        doing: what it is, for the message: "Extracting instance features".

    Returns:
        this process's result.

    Raises:
        RuntimeError: it failed on another process; the message says on which, and with what.
            On the process itself its own exception is raised.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    failures = comm.all_gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RuntimeError(f"{doing} failed on process {rank} of {len(failures)}: {failure}")
    return result


@dataclass
class ClassShard:
    """The classes that this process works on.

    Attributes:
        features: all instances of these classes, from every process, in the processes' order.
        rows: (R,) int64, where each of them stands in the rows of all processes one after another.
        owners: (K,) int64, the process that works on each class.
    """

    features: PairedFeatures
    rows: Tensor
    owners: Tensor

    @staticmethod
    def exchange(features: PairedFeatures, num_classes: int) -> "ClassShard":
        """Hand every process the instances of its classes. All processes must call it.

        Args:
            features: this process's instances, on the CPU if there are several processes; their
                classes lie in [0, num_classes). With several processes it is empty afterwards: one
                tensor after the other is handed over and forgotten.
            num_classes: K.
        """
        world_size, rank = comm.get_world_size(), comm.get_rank()
        counts = comm.all_gather(torch.bincount(features.classes, minlength=num_classes))
        start = sum(int(c.sum()) for c in counts[:rank])
        rows = torch.arange(start, start + len(features))
        owners = _deal(torch.stack(counts).sum(dim=0), world_size)
        if world_size == 1:
            return ClassShard(features, rows, owners)
        wanted = [owners[features.classes] == owner for owner in range(world_size)]

        def hand_over(x: Tensor) -> Tensor:
            mine: List[Tensor] = []
            for owner, chosen in enumerate(wanted):
                mine = comm.gather(x[chosen], dst=owner) or mine
            return torch.cat(mine)

        levels = features.levels
        shard = PairedFeatures(
            teacher={n: hand_over(features.teacher.pop(n)) for n in levels},
            student={n: hand_over(features.student.pop(n)) for n in levels},
            classes=hand_over(features.classes),
            image_ids=hand_over(features.image_ids),
            boxes=hand_over(features.boxes),
            annotation_ids=hand_over(features.annotation_ids),
        )
        return ClassShard(shard, hand_over(rows), owners)

    def collect(self, prototypes: PrototypeSet) -> Optional[PrototypeSet]:
        """Put the processes' prototypes together. All processes must call it.

        Args:
            prototypes: of `features`; the classes of other processes are empty in it.

        Returns:
            On the main process the prototypes of all classes, with `rows` that count through the
            rows of all processes; None elsewhere.
        """
        for level, valid in prototypes.valid.items():
            chosen = prototypes.rows[level]
            chosen[valid] = self.rows[chosen[valid]]
        parts = comm.gather(prototypes)
        if not parts:
            return None
        of_class = [parts[owner] for owner in self.owners.tolist()]

        def merge(name):
            fields = [getattr(part, name) for part in of_class]
            return {n: torch.stack([x[n][k] for k, x in enumerate(fields)]) for n in fields[0]}

        names = ("teacher", "student", "valid", "rows", "gain")
        counts = torch.stack([part.counts[k] for k, part in enumerate(of_class)])
        return PrototypeSet(**{name: merge(name) for name in names}, counts=counts)


def _deal(counts: Tensor, world_size: int) -> Tensor:
    """Deal classes out to processes, the largest first, always to the one with the least so far."""
    load = [0] * world_size
    owners = torch.zeros_like(counts)
    for k in counts.argsort(descending=True, stable=True).tolist():
        owners[k] = load.index(min(load))
        load[owners[k]] += int(counts[k])
    return owners
