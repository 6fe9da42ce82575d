"""The prototypes of all classes and levels, and what a training step asks of them (Sec. 3.2).

`PrototypeBank` holds aligned prototypes of both spaces and answers two questions about pooled
instance features: their coefficients on the prototypes, and how reliable each instance is (Eq. 8).
Not here: one level's buffers and projections (`projection`), how prototypes are chosen
(`generation`), the file format (`files`) and the losses.

Shapes: L levels, R instances, K classes, P prototypes a class, D_t and D_s channels.
"""

import math
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn

from ..requirement import require
from . import files
from .projection import LevelPrototypes, Projection
from .structures import PrototypeSet


class PrototypeBank(nn.Module):
    """Prototypes in both spaces, with the projections and reliability weights built on them.

    Attributes:
        is_ready: Python bool, whether any prototype is there. It follows `update`, `load`,
            `broadcast` and `load_state_dict`; reading it costs no device synchronisation.
    """

    def __init__(
        self,
        *,
        levels: Sequence[str],
        num_classes: int,
        num_prototypes: int,
        teacher_channels: Dict[str, int],
        student_channels: Dict[str, int],
        projection: str,
        projection_lambda: float,
        reliability: str,
        normalize: bool,
    ):
        """
        Args:
            levels: names of the feature levels.
            num_classes: K.
            num_prototypes: P.
            teacher_channels: level -> D_t.
            student_channels: level -> D_s.
            projection: "pursuit" (Eq. 5 on residuals, the spaces coupled) or "cosine" (cosine with
                each prototype, each space on its own).
            projection_lambda: lambda of Eq. (5), >= 0, for the projection "pursuit" and for the
                reliability "coefficients".
            reliability: "coefficients", "max_cosine" or "none"; see `reliability`.
            normalize: "pursuit" works on features and prototypes of unit length. Cosines always do.

        Raises:
            ValueError: a setting that is not among these.
        """
        super().__init__()
        require("PROJECTION.TYPE", projection, projection in PROJECTIONS, list(PROJECTIONS))
        require("RELIABILITY.TYPE", reliability, reliability in RELIABILITIES, list(RELIABILITIES))
        require("PROTOTYPES.NUM", num_prototypes, num_prototypes >= 1, "1 or more")
        lam = projection_lambda
        require("PROJECTION.LAMBDA", lam, lam >= 0 and math.isfinite(lam), "finite and 0 or more")
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.projection = projection
        self.reliability_type = reliability
        self.levels = nn.ModuleDict()
        for name in levels:
            self.levels[name] = LevelPrototypes(
                (num_classes, num_prototypes),
                (teacher_channels[name], student_channels[name]),
                lam=lam,
                normalize=normalize,
                pursuit=projection == "pursuit",
            )
        self.names = list(levels)
        widths = {(teacher_channels[name], student_channels[name]) for name in levels}
        self.same_widths = len(widths) == 1
        #: All levels as one; made where a GPU first asks for it.
        self.joint: Optional[Projection] = None
        self.register_load_state_dict_post_hook(_prepare_after_loading)
        self._prepare()

    @torch.no_grad()
    def update(self, prototypes: PrototypeSet) -> None:
        """Replace the prototypes of every class that has instances; others keep what they have.

        The buffers keep their device and dtype.
        """
        seen = prototypes.counts > 0
        for name, level in self.levels.items():
            for buffer, new in (
                (level.teacher_prototypes, prototypes.teacher[name]),
                (level.student_prototypes, prototypes.student[name]),
                (level.valid, prototypes.valid[name]),
            ):
                assert buffer.shape == new.shape, (name, buffer.shape, new.shape)
                buffer[seen.to(buffer.device)] = new[seen].to(buffer)
        self._prepare()

    def valid(self, level: str) -> Tensor:
        """(K, P) bool, which slots hold a prototype."""
        return self.levels[level].valid

    def covered(self, levels: Sequence[str]) -> Tensor:
        """(L, K) bool, which classes have a prototype on each level."""
        return torch.stack([self.valid(level) for level in levels]).any(dim=2)

    def project(
        self,
        teacher: Dict[str, Tensor],
        student: Dict[str, Tensor],
        classes: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor]:
        """Coefficients of instances on prototypes, on one or more levels (Sec. 3.2).

        Args:
            teacher: level -> (R, D_t) pooled raw features.
            student: level -> (R, D_s), of the same levels in the same order.
            classes: (R,) class ids in [0, K), for the prototypes of each instance's own class; None
                for those of every class.

        Returns:
            (w_t, w_s), each (L, R, P), or (L, R, K, P) without `classes`; float32, also under
            autocast; 0 in slots without a prototype. Gradient flows from w_s to `student` alone.
        """
        return self._ask(PROJECTIONS[self.projection], teacher, student, classes)

    @torch.no_grad()
    def reliability(
        self,
        teacher: Dict[str, Tensor],
        student: Dict[str, Tensor],
        classes: Tensor,
        kind: str = "",
    ) -> Tensor:
        """The weight omega of each instance on one or more levels, Eq. (8).

        "coefficients": exp(-(1 + 2 lambda) |w_t - w_s|) with the pursuit's coefficients on the
        prototypes of the instance's class, all of unit length, whatever `projection` and
        `normalize` are; for unit vectors Eq. (5) shrinks that difference by 1 + 2 lambda.
        "max_cosine": 1 - |max_k cos(f_s, p_s,k) - max_k cos(f_t, p_t,k)| over those prototypes k.
        "none": 1.

        Args:
            teacher: level -> (R, D_t) pooled raw features.
            student: level -> (R, D_s), of the same levels in the same order.
            classes: (R,) class ids in [0, K).
            kind: one of these names; empty: the bank's own.

        Returns:
            (L, R) float32 in [0, 1], detached; 1 where the class has no prototype.
        """
        weight = RELIABILITIES[kind or self.reliability_type]
        (weights,) = self._ask(weight, teacher, student, classes)
        return weights

    @torch.no_grad()
    def broadcast(self) -> None:
        """Give every process the prototypes of rank 0; nothing to do in a single process."""
        if comm.get_world_size() == 1:
            return
        for buffer in self.state_dict().values():
            message = buffer.float()  # not every backend sends bool
            dist.broadcast(message, src=0)
            buffer.copy_(message)
        self._prepare()

    def save(self, path: str, fingerprint: dict, counts: Tensor) -> None:
        """Write the prototypes to a safetensors file.

        Args:
            path: the file; its folder is made if need be.
            fingerprint: what they were made with, for `load` to compare; JSON values.
            counts: (K,) the instances of each class that took part.
        """
        tensors = {name: x.cpu().contiguous() for name, x in self.state_dict().items()}
        files.write(path, tensors, fingerprint=fingerprint, counts=counts.tolist())

    def load(self, path: str, expect: Optional[dict] = None) -> dict:
        """Read prototypes that `save` wrote. On an error the bank stays as it was.

        Args:
            path: the file.
            expect: the fingerprint that the file must carry; None accepts any.

        Returns:
            {"fingerprint": dict, "counts": list of K ints}, as in the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an intact prototype file, or of another model or fingerprint.
        """
        tensors, about = files.read(path)
        files.check_tensors(path, tensors, self.state_dict())
        if expect is not None:
            files.check_fingerprint(path, about["fingerprint"], expect)
        self.load_state_dict(tensors)
        return about

    def _ask(
        self,
        question: Callable[..., Tuple[Tensor, ...]],
        teacher: Dict[str, Tensor],
        student: Dict[str, Tensor],
        classes: Optional[Tensor],
    ) -> Tuple[Tensor, ...]:
        """What a function of (projection, teacher, student, classes) gives, stacked over levels."""
        assert list(teacher) == list(student), (list(teacher), list(student))
        names = list(student)
        theirs = [x.detach().float() for x in teacher.values()]
        ours = [x.float() for x in student.values()]
        device = ours[0].device.type
        with torch.autocast(device, enabled=False):
            # A GPU waits for the host to launch its kernels: few large ones.
            whole = self.same_widths and names == self.names
            if device != "cpu" and whole and classes is not None:
                levels = self.levels.values()
                self.joint = self.joint or Projection.stack([x.projection for x in levels])
                return question(self.joint, torch.stack(theirs), torch.stack(ours), classes)
            answers = [
                question(self.levels[name].projection, t, s, classes)
                for name, t, s in zip(names, theirs, ours)
            ]
        return tuple(torch.stack(parts) for parts in zip(*answers))

    def _prepare(self) -> None:
        levels = list(self.levels.values())
        for level in levels:
            level.prepare()
        self.is_ready = any(bool(level.valid.any()) for level in levels)
        self.joint = None


def _prepare_after_loading(bank: PrototypeBank, _incompatible: List) -> None:
    bank._prepare()


def _max_cosine(
    projection: Projection, teacher: Tensor, student: Tensor, classes: Tensor
) -> Tuple[Tensor]:
    """1 less the difference of the largest cosines, as in the released code."""
    # -1, the least cosine, in empty slots: a class without prototypes has difference 0.
    empty = ~projection.valid.index_select(-2, classes)
    cosines = projection.by_cosine(teacher, student, classes)
    t, s = (w.masked_fill(empty, -1).amax(dim=-1) for w in cosines)
    return ((1 - (s - t).abs()).clamp(0, 1),)


def _coefficient_distance(
    projection: Projection, teacher: Tensor, student: Tensor, classes: Tensor
) -> Tuple[Tensor]:
    """exp of minus how far the pursuit's coefficients lie apart, Eq. (8)."""
    difference = projection.disagree(teacher, student, classes)
    return (torch.exp(-torch.linalg.vector_norm(difference, dim=-1)),)


def _one(
    projection: Projection, teacher: Tensor, student: Tensor, classes: Tensor
) -> Tuple[Tensor]:
    """1 everywhere."""
    return (student.new_ones(student.shape[:-1]),)


#: The values of MODEL.GLOBALKD.PROJECTION.TYPE and of MODEL.GLOBALKD.RELIABILITY.TYPE.
PROJECTIONS = {"pursuit": Projection.by_pursuit, "cosine": Projection.by_cosine}
RELIABILITIES = {"coefficients": _coefficient_distance, "max_cosine": _max_cosine, "none": _one}
