"""One training step of two toy detectors, for tests of losses: tensors instead of networks.

64 x 64 images, levels p3 and p4 (8 x 8 and 4 x 4 cells), 2 anchors a cell, 4 classes.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass, replace

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import box_iou

from globalkd.dense_head import DenseOutputs
from globalkd.features import InstancePooler, LevelPair
from globalkd.losses import Candidates, DistillContext, InstanceRows, Positives
from globalkd.prototypes.bank import PrototypeBank
from globalkd.prototypes.structures import PrototypeSet

SIZE, CLASSES, ANCHORS = 64, 4, 2
STRIDES = {"p3": 8, "p4": 16}
#: What a RetinaNet divides sums over all its anchors by.
NORMALIZER = 90.5
#: How deep in the dense heads' towers the toys' hidden maps are, and their channels.
DEPTH, HIDDEN = 3, 3


@dataclass
class ToyCandidates(Candidates):
    """Rows whose teacher's logits are given."""

    logits: torch.Tensor = None
    teacher: torch.Tensor = None
    one_stage: bool = True

    def student_logits(self, context, rows=None):
        return self.logits if rows is None else self.logits[rows]

    def aliased(self, alias):
        return replace(self, logits=alias(self.logits))

    def teacher_logits(self, context, rows=None):
        return self.teacher if rows is None else self.teacher[rows]


def toy_step(
    counts=(3, 1),
    *,
    one_stage=True,
    equal=False,
    widths=(6, 8),
    seed=0,
    order=None,
    bank=None,
    repeat=1,
    instances="positives",
    fills=(None, None),
    move_boxes=None,
):
    """The context of a step; `leaves(context)` are the student's tensors that it starts from.

    Args:
        counts: annotated boxes of each image.
        one_stage: RetinaNet's heads, or an RPN and a box head.
        equal: teacher and student compute the same.
        widths: channels of student and teacher.
        order: seed of a permutation of each image's boxes and of the positives.
        bank: prototypes.
        repeat: the batch so many times over.
        fills: what to make of student's and teacher's features, logits and deltas.
        move_boxes: what to make of an image's annotated boxes.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = (widths[1], widths[1]) if equal else widths
    student, teacher = (
        _detector(len(counts), d, 4 if one_stage else 1, generator, repeat, fill)
        for d, fill in zip(widths, fills)
    )
    teacher = student if equal else teacher
    gt_instances = [_instances(n, generator, order, move_boxes) for n in counts] * repeat
    ground_truth = InstanceRows.from_ground_truth(gt_instances)
    maps, dense = student[0], student[1]
    if one_stage:
        candidates, positives = _anchors(dense, teacher[1], ground_truth, order)
    else:
        candidates, positives = _proposals(
            ground_truth, len(gt_instances), generator, order, equal, fills
        )
    context = DistillContext(
        levels=[LevelPair(n, n, s, *widths) for n, s in STRIDES.items()],
        student_maps=maps,
        teacher_maps={n: x.detach() for n, x in teacher[0].items()},
        teacher_features={},
        image_sizes=[(SIZE, SIZE)] * len(gt_instances),
        ground_truth=ground_truth,
        positives=positives,
        candidates=candidates,
        instances=positives if instances == "positives" else ground_truth,
        pooler=InstancePooler(2),
        teacher=ToyTeacher(teacher[1]),
        bank=bank,
        student_dense=dense,
        reads=frozenset({"responses"}),
        iteration=10_000,
        batched_inputs=[{"instances": x} for x in gt_instances],
    )
    context.teacher_dense = DenseOutputs(
        dense.anchors,
        {n: x.detach() for n, x in teacher[1].logits.items()},
        {n: x.detach() for n, x in teacher[1].deltas.items()},
        dense.transform,
        {d: [(x.detach(), y.detach()) for x, y in v] for d, v in teacher[1].hidden.items()},
    )
    context.teacher.dense = context.teacher_dense
    return context


@dataclass
class ToyTeacher:
    """Its head says of towers what it says of its own, and how much more than those they hold."""

    dense: DenseOutputs

    def finish_tower(self, maps, tower, depth):
        outputs = []
        own = (self.dense.logits, self.dense.deltas)[tower].values()
        for x, given, held in zip(own, maps, self.dense.hidden[depth]):
            more = (given.relu() - held[tower].relu()).mean(dim=1, keepdim=True)
            outputs.append(x.permute(0, 3, 4, 1, 2).flatten(1, 2) + more)
        return outputs


def moved(value, move, seen=None):
    """A copy with `move(x)` in place of each tensor x, however deep they are."""
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = _moved(value, move, seen), value  # kept: ids of the dead come again
    return seen[id(value)][0]


def _moved(value, move, seen):
    if isinstance(value, torch.Tensor):
        return move(value).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, x in [*module._parameters.items(), *module._buffers.items()]:
                if x is not None and not isinstance(x, nn.Parameter):
                    module._buffers[name] = moved(x, move, seen)
                elif x is not None:
                    own = move(x)
                    module._parameters[name] = nn.Parameter(own, requires_grad=x.requires_grad)
        return value
    if dataclasses.is_dataclass(value):
        new = copy.copy(value)
        for name, x in vars(value).items():  # what was computed and cached, too
            vars(new)[name] = moved(x, move, seen)
        return new
    if isinstance(value, dict):
        return {k: moved(x, move, seen) for k, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(x, move, seen) for x in value)
    if isinstance(value, Boxes):
        return Boxes(moved(value.tensor, move, seen))
    if isinstance(value, Instances):
        return Instances(
            value.image_size, **{k: moved(x, move, seen) for k, x in value.get_fields().items()}
        )
    return value


def leaves(context):
    dense = context.student_dense
    groups = (context.student_maps, dense.logits, dense.deltas)
    tensors = [x for group in groups for x in group.values()] + [context.candidates.logits]
    tensors += [x for level in dense.hidden[DEPTH] for x in level]
    return [x for x in tensors if x.is_leaf]  # RetinaNet's candidates are its dense logits


def in_half(context, dtype):
    """The same context with features, logits and deltas of both detectors in a lower precision."""
    dense = context.student_dense, context.teacher_dense
    groups = [context.student_maps, context.teacher_maps]
    groups += [group for x in dense for group in (x.logits, x.deltas)]
    outputs = [x for group in groups for x in group.values()]
    outputs += [h for x in dense for level in x.hidden[DEPTH] for h in level]
    outputs += [context.candidates.logits]
    ids = {id(x) for x in outputs}
    return moved(context, lambda x: x.detach().to(dtype) if id(x) in ids else x.detach())


def _detector(num_images, channels, num_scores, generator, repeat, fill):
    maps, logits, deltas, anchors, hidden = {}, {}, {}, {}, []
    for name, stride in STRIDES.items():
        n = SIZE // stride
        shape = num_images, n, n, ANCHORS

        def leaf(*shape, scale=1.0):
            x = torch.rand(*shape, generator=generator) * scale
            x = torch.cat([x] * repeat)
            return (fill(x) if fill else x).requires_grad_()

        maps[name] = leaf(num_images, channels, n, n)
        logits[name], deltas[name] = leaf(*shape, num_scores), leaf(*shape, 4, scale=0.1)
        own = maps[name].detach()
        hidden.append([own[:, i : i + HIDDEN].clone().requires_grad_() for i in (0, 3)])
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        centre = (torch.stack([x, y, x, y], dim=-1)[:, :, None] + 0.5) * stride
        wide = torch.tensor([[-2.0, -1, 2, 1], [-1, -2, 1, 2]]) * stride / 2
        anchors[name] = centre + wide
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    return maps, DenseOutputs(anchors, logits, deltas, transform, {DEPTH: hidden})


def _instances(count, generator, order, move_boxes):
    corner = torch.rand(count, 2, generator=generator) * SIZE / 2
    side = torch.rand(count, 2, generator=generator) * SIZE / 3 + SIZE / 8
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    keep = _permutation(count, order)
    boxes = torch.cat([corner, corner + side], dim=1)[keep]
    return Instances(
        (SIZE, SIZE),
        gt_boxes=Boxes(move_boxes(boxes) if move_boxes else boxes),
        gt_classes=classes[keep],
    )


def _permutation(count, order):
    if order is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(order))


def _anchors(dense, teacher, ground_truth, order):
    anchors, num_images = dense.flat_anchors, len(next(iter(dense.logits.values())))
    labels = torch.full((num_images, len(anchors)), CLASSES)
    labels[:, ::7] = -1
    matched = torch.zeros(num_images, len(anchors), dtype=torch.long)
    best = torch.full((num_images, len(anchors)), 0.25)
    for row, box in enumerate(ground_truth.boxes):
        image, iou = ground_truth.image_index[row], box_iou(box[None], anchors)[0]
        near = iou > best[image]
        labels[image, near] = ground_truth.classes[row]
        matched[image, near] = row
        best[image, near] = iou[near]
    rows = (labels.flatten() >= 0) & (labels.flatten() < CLASSES)
    rows = rows.nonzero().squeeze(1)
    rows = rows[_permutation(len(rows), order)]
    strides = [
        torch.full((x[..., 0].numel(),), float(STRIDES[n])) for n, x in dense.anchors.items()
    ]
    positives = Positives(
        boxes=anchors[rows % len(anchors)],
        image_index=rows // len(anchors),
        classes=labels.flatten()[rows],
        gt_boxes=ground_truth.boxes[matched.flatten()[rows]],
        strides=torch.cat(strides)[rows % len(anchors)],
        rows=rows,
    )
    logits = [x.flat_logits.flatten(0, 1) for x in (dense, teacher)]
    candidates = ToyCandidates(
        labels.flatten(), NORMALIZER, logits=logits[0], teacher=logits[1].detach()
    )
    return candidates, positives


def _proposals(ground_truth, num_images, generator, order, equal, fills):
    """Two proposals for each box, and one of the background in each image."""
    twice = torch.arange(len(ground_truth)).repeat_interleave(2)
    background = torch.tensor([[5.0, 5, 40, 30]]).repeat(num_images, 1)
    boxes = ground_truth.boxes[twice] + torch.tensor([[1.0], [-1.0]]).repeat(len(ground_truth), 1)
    image = torch.cat([ground_truth.image_index[twice], torch.arange(num_images)])
    labels = torch.cat([ground_truth.classes[twice], torch.full((num_images,), CLASSES)])
    everything = torch.cat([boxes, background])
    ours, theirs = (
        torch.sin(everything @ torch.rand(4, CLASSES + 1, generator=generator)) for _ in range(2)
    )
    ours, theirs = (fill(x) if fill else x for fill, x in zip(fills, (ours, theirs)))
    candidates = ToyCandidates(
        labels,
        len(labels),
        one_stage=False,
        logits=ours.requires_grad_(),
        teacher=ours.detach() if equal else theirs,
    )
    rows = torch.arange(len(twice))[_permutation(len(twice), order)]
    positives = Positives(
        boxes=boxes[rows],
        image_index=image[rows],
        classes=labels[rows],
        gt_boxes=ground_truth.boxes[twice][rows],
        strides=torch.full((len(rows),), 8.0),
        rows=rows,
    )
    return candidates, positives


def toy_bank(*, equal=False, widths=(6, 8)):
    """Random prototypes, two for each class and level; the same in both spaces if `equal`."""
    widths = (widths[1], widths[1]) if equal else widths
    generator = torch.Generator().manual_seed(5)
    bank = PrototypeBank(
        levels=list(STRIDES),
        num_classes=CLASSES,
        num_prototypes=2,
        student_channels=dict.fromkeys(STRIDES, widths[0]),
        teacher_channels=dict.fromkeys(STRIDES, widths[1]),
        projection="cosine",
        projection_lambda=10.0,
        reliability="max_cosine",
        normalize=True,
    )
    student, teacher = (
        {n: torch.rand(CLASSES, 2, d, generator=generator) for n in STRIDES} for d in widths
    )
    student = teacher if equal else student
    valid = {n: torch.ones(CLASSES, 2, dtype=torch.bool) for n in STRIDES}
    rows = {n: torch.zeros(CLASSES, 2, dtype=torch.long) for n in STRIDES}
    gain = {n: torch.zeros(CLASSES, 2) for n in STRIDES}
    bank.update(PrototypeSet(teacher, student, valid, rows, gain, torch.ones(CLASSES)))
    return bank


def attach(loss, context, *, seed=0):
    """Attach a loss to the pair of a step, with equal random parameters for equal seeds."""
    torch.manual_seed(seed)
    loss.num_classes, loss.hidden_channels = CLASSES, (HIDDEN, HIDDEN)
    loss.attach(context.levels)
    for parameter in loss.parameters():  # some modules start at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return loss


def evaluate(loss, context, *, seed=0):
    """The loss's terms; random draws in it are those of the seed."""
    torch.manual_seed(seed)
    return loss(context)


def close(value, expected):
    """Assert that a tensor is as expected, up to rounding."""
    expected = torch.as_tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def mean(values):
    """The mean of numbers; 0 of none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def divergence(p, q):
    """KL divergence of two distributions, as lists."""
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def row_divergence(student, teacher, temperature, one_stage):
    """T^2 KL(teacher || student) of one row of logits: of its sigmoids, summed, or its softmax."""
    if not one_stage:
        p, q = ((x / temperature).softmax(0).tolist() for x in (teacher, student))
        return temperature**2 * divergence(p, q)
    p, q = ((x / temperature).sigmoid().tolist() for x in (teacher, student))
    return temperature**2 * sum(divergence((a, 1 - a), (b, 1 - b)) for a, b in zip(p, q))
