"""DRKD: relations between pixels and between boxes, and instance features."""

import copy
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, make_batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from globalkd.data import register_datasets
from globalkd.features import InstancePooler, LevelPair
from globalkd.losses import DistillContext, InstanceFeature, InstanceRelation, PixelRelation
from globalkd.losses import instance_feature as instance_feature_module
from globalkd.losses.anchored_sum import anchored_sum
from globalkd.losses.base import InstanceRows
from globalkd.losses.box_relation import BoxRelation, RelationFilter, relation_matrix, to_padded
from globalkd.losses.instance_feature import ground_truth_grids, instance_feature_error
from globalkd.losses.pixel_relation import GlobalReasoning, reason_globally

SIZE = 64
STRIDES = {"p3": 8, "p4": 16, "p5": 32}
NAMES = ["PixelRelation", "InstanceRelation", "InstanceFeature"]
TERMS = ["loss_kd_pixel_relation", "loss_kd_instance_relation", "loss_kd_instance_feature"]
both_detectors = pytest.mark.parametrize("kind", list(KINDS))
both_matches = pytest.mark.parametrize("match", ["matrix", "features"])


def levels(student=6, teacher=8):
    return [LevelPair(name, name, stride, student, teacher) for name, stride in STRIDES.items()]


def random_maps(num_images, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = {name: (num_images, channels, SIZE // s, SIZE // s) for name, s in STRIDES.items()}
    return {name: torch.randn(*x, generator=generator) for name, x in shape.items()}


def make_context(counts, *, student=None, teacher=None, channels=(6, 8), **given):
    """A context with random maps and random boxes, as many an image as `counts` says."""
    student = student or random_maps(len(counts), channels[0], seed=1)
    teacher = teacher or random_maps(len(counts), channels[1], seed=2)
    batch = make_batch(counts, size=SIZE)
    values = {
        "levels": levels(*channels),
        "student_maps": {k: v.requires_grad_() for k, v in student.items()},
        "teacher_maps": teacher,
        "image_sizes": [(SIZE, SIZE)] * len(counts),
        "ground_truth": InstanceRows.from_ground_truth([x["instances"] for x in batch]),
        "batched_inputs": batch,
        **given,
    }
    names = [f.name for f in fields(DistillContext) if f.default is f.default_factory is MISSING]
    return DistillContext(**{**dict.fromkeys(names), **values})


def make_loss(cls, *, channels=(6, 8), seed=0, **settings):
    """An attached loss; parameters that start at 0 are moved, so that every part has an effect."""
    torch.manual_seed(seed)
    sizes = {PixelRelation: {"num_nodes": [5], "state_channels": [7]}, InstanceFeature: {}}
    defaults = {"embedding_channels": 10, "filter_channels": 4}
    loss = cls(**{**sizes.get(cls, defaults), **settings})
    loss.attach(levels(*channels))
    for name, p in loss.named_parameters():
        if name.endswith("gain"):
            nn.init.uniform_(p, 0.3, 1.0)
    return loss


def value(loss, context):
    (term,) = loss(context).values()
    return term


def all_losses(**settings):
    yield make_loss(PixelRelation)
    for match in ("matrix", "features"):
        yield make_loss(InstanceRelation, match=match, **settings)
    yield make_loss(InstanceFeature, **settings)


# Reasoning over pixels


def test_reasoning_equals_the_equations_in_loops():
    torch.manual_seed(0)
    cells, b = torch.randn(2, 6, 4).double(), torch.randn(2, 6, 3).double()
    phi, a, w, back = (torch.randn(*s).double() for s in [(5, 4), (3, 3), (5, 5), (4, 5)])
    ours = reason_globally(cells, b, reduce=phi, adjacency=a, update=w, expand=back)
    for image in range(2):
        x = torch.stack([phi @ cell for cell in cells[image]], dim=1)  # (S, H W)
        v = torch.stack(
            [sum(x[:, c] * b[image, c, m] for c in range(6)) / 6 for m in range(3)]
        )  # V = X B'
        z = (torch.eye(3).double() - a) @ v @ w.T
        for c in range(6):
            projected = sum(z[m] * b[image, c, m] for m in range(3))
            torch.testing.assert_close(ours[image, c], back @ projected)


def test_the_pixel_term_is_the_error_of_adapted_maps_after_reasoning():
    loss, context = make_loss(PixelRelation), make_context([1, 0])
    of_levels = []
    for name, teacher in context.teacher_maps.items():
        output = loss.student_units[name](context.student_maps[name])
        target = loss.teacher_units[name](teacher)
        adapter, errors = loss.adapters[name], []
        for n in range(2):
            for cell, wanted in zip(output[n].flatten(1).T, target[n].flatten(1).T):
                adapted = adapter.weight[:, :, 0, 0] @ cell + adapter.bias
                errors.append((adapted - wanted).square().mean())
        of_levels.append(sum(errors) / len(errors))
    torch.testing.assert_close(value(loss, context), sum(of_levels) / 3)


def test_a_tiled_image_is_reasoned_about_as_the_image():
    unit = make_loss(PixelRelation).student_units["p3"]
    maps = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(unit(maps.repeat(1, 1, 2, 3)), unit(maps).repeat(1, 1, 2, 3))


def test_a_unit_starts_as_the_identity():
    maps = torch.randn(1, 6, 4, 4)
    assert torch.equal(GlobalReasoning(6, num_nodes=5, state_channels=7)(maps), maps)


def spread(items):
    return items.var(dim=1, unbiased=False).mean().sqrt()


def test_the_branch_of_an_anchored_sum_cannot_cancel_the_values():
    values = torch.randn(1, 50, 6) + 3
    mean = values.mean(dim=1, keepdim=True)
    summed = anchored_sum(values, -100 * (values - mean), torch.full((6,), 0.5))
    torch.testing.assert_close(spread(summed), 0.5 * spread(values))


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5])
def test_the_branch_is_as_small_as_the_spread_of_items_that_lie_close_together(distance):
    values = 3 + distance * torch.randn(1, 50, 6)
    mask = torch.arange(50)[None] < 40
    values = values * mask[:, :, None]
    branch = torch.randn(1, 50, 6) * mask[:, :, None]
    change = anchored_sum(values.double(), branch.double(), torch.tensor(0.5), mask) - values
    single = anchored_sum(values, branch, torch.tensor(0.5), mask) - values
    assert change.norm() <= 0.51 * (values[:, :40] - values[:, :40].mean(dim=1)).norm()
    assert single.norm() == pytest.approx(change.norm().item(), rel=0.01)


def test_an_anchored_sum_of_one_item_is_the_item_and_has_a_gradient():
    values = torch.randn(1, 1, 6, requires_grad=True)
    summed = anchored_sum(values, values * 2, torch.ones(6))
    torch.testing.assert_close(summed, values, rtol=1e-3, atol=1e-3)
    summed.sum().backward()
    assert values.grad.isfinite().all()


def test_the_target_does_not_collapse_where_only_a_constant_would_help():
    """The student knows nothing of the teacher and cannot move: the loss pulls at the target."""
    loss = make_loss(PixelRelation, num_nodes=[16], state_channels=[16])
    student = {k: torch.zeros_like(v) for k, v in random_maps(2, 6, seed=3).items()}
    context = make_context([0, 0], student=student)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    first = value(loss, context).item()
    for _ in range(150):
        optimizer.zero_grad()
        last = value(loss, context)
        last.backward()
        optimizer.step()
    assert last < 0.8 * first  # it does pull
    for name, unit in loss.teacher_units.items():
        maps = context.teacher_maps[name]
        ratio = spread(unit(maps).flatten(2).mT) / spread(maps.flatten(2).mT)
        assert 0.5 <= ratio < 0.95, (name, ratio)


# Relations between boxes


def test_padding_keeps_each_images_rows_in_their_order():
    image_index = torch.tensor([2, 0, 2, 0, 0])
    rows = torch.arange(5.0)[:, None] + 1
    (padded, flat), mask = to_padded([rows, rows[:, 0]], image_index, 4, 3)
    assert padded.squeeze(2).tolist() == [[2, 4, 5], [0, 0, 0], [1, 3, 0], [0, 0, 0]]
    assert torch.equal(mask, padded.squeeze(2) > 0) and torch.equal(flat, padded.squeeze(2))


def test_padding_of_no_rows_has_no_slots():
    (padded,), mask = to_padded([torch.zeros(0, 3)], torch.zeros(0, dtype=torch.long), 2, 0)
    assert padded.shape == (2, 0, 3) and mask.shape == (2, 0)


def reference_relation(boxes, relation):
    """psi of one image, in loops; boxes: (n, F)."""
    n = len(boxes)
    q, k = relation.query(boxes), relation.key(boxes)
    logits = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            m = 1.0
            if relation.filter is not None:
                f = relation.filter
                hidden = f.first(q[i]) + f.second(k[j])
                m = torch.sigmoid(f.score(torch.relu(hidden)))
            logits[i, j] = m * (q[i] @ k[j])
    logits = logits - torch.stack([sum(row) / n for row in logits])[:, None]
    scale = (sum(x**2 for x in logits.flatten()) / n**2).sqrt()
    return torch.stack([torch.exp(row / scale) / torch.exp(row / scale).sum() for row in logits])


@pytest.mark.parametrize("hidden", [0, 4])
def test_relations_of_a_padded_batch_equal_loops_over_each_image(hidden):
    torch.manual_seed(0)
    relation = BoxRelation(12, embedding_channels=8, filter_channels=hidden)
    images = [torch.randn(n, 12) for n in (3, 1, 5)]
    index = torch.tensor([0] * 3 + [1] + [2] * 5)
    (boxes,), mask = to_padded([torch.cat(images)], index, 3, max(map(len, images)))
    ours = relation(boxes, mask)
    for image, own in zip(images, ours):
        n = len(image)
        if n > 1:
            torch.testing.assert_close(own[:n, :n], reference_relation(image, relation))
        torch.testing.assert_close(own.sum(dim=1)[:n], torch.ones(n))
        assert not own[n:].any() and not own[:, n:].any()


def test_a_constant_filter_and_the_features_scale_change_no_relation():
    q, k, mask = torch.randn(2, 4, 6), torch.randn(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    plain = relation_matrix(q, k, 1.0, mask)
    torch.testing.assert_close(relation_matrix(q, k, 0.2, mask), plain)
    torch.testing.assert_close(relation_matrix(30 * q, k, 1.0, mask), plain)


def test_the_filters_size_is_independent_of_the_number_of_boxes():
    relevance = RelationFilter(6, 4)
    few, many = torch.randn(1, 2, 6), torch.randn(1, 30, 6)
    many[:, :2] = few
    torch.testing.assert_close(relevance(many, many)[:, :2, :2], relevance(few, few))


def test_the_matrix_term_equals_its_definition_in_loops():
    loss, context = make_loss(InstanceRelation), make_context([3, 0, 2])
    total = 0
    for pair in context.levels[:2]:
        student, teacher = (x.flatten(1) for x in ground_truth_grids(context, pair, 3))
        match = loss.matches[pair.student]
        for image in (0, 2):
            rows = context.ground_truth.image_index == image
            psi_s = reference_relation(student[rows], match.student)
            psi_t = reference_relation(teacher[rows], match.teacher)
            total = total + sum((a - b) ** 2 for a, b in zip(psi_s.flatten(), psi_t.flatten()))
    torch.testing.assert_close(value(loss, context), total / 5 / 2)


def reference_aggregation(boxes, aggregation):
    """f_i + share * scale * out(sum_j psi_ij g(f_j)) of one image, in loops; boxes: (n, F)."""
    psi, values = reference_relation(boxes, aggregation.relation), aggregation.value(boxes)
    branch = torch.stack([aggregation.out(sum(p * v for p, v in zip(r, values))) for r in psi])
    scale = spread(boxes[None]) / branch.square().mean().sqrt()
    return boxes + 0.5 * aggregation.add.gain.tanh() * scale * branch


def test_the_feature_term_equals_its_definition_in_loops():
    loss, context = make_loss(InstanceRelation, match="features"), make_context([3, 0, 2])
    total = 0
    for pair in context.levels[:2]:
        student, teacher = ground_truth_grids(context, pair, 3)
        match = loss.matches[pair.student]
        for image in (0, 2):
            rows = context.ground_truth.image_index == image
            target = reference_aggregation(teacher[rows].flatten(1), match.teacher)
            output = reference_aggregation(student[rows].flatten(1), match.student)
            for box, wanted in zip(output.view(-1, 6, 9), target.view(-1, 8, 9)):
                adapted = torch.stack([match.adapter(bin) for bin in box.T], dim=1)
                total = total + (adapted - wanted).square().mean()
    torch.testing.assert_close(value(loss, context), total / 5 / 2)


@both_matches
def test_relations_of_two_images_do_not_mix(match):
    loss = make_loss(InstanceRelation, match=match).matches["p3"]
    student, teacher = torch.randn(2, 4, 6, 3, 3), torch.randn(2, 4, 8, 3, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    before = loss(student, teacher, mask)[0]
    student[1], teacher[1], mask[1, 2:] = 5.0, torch.randn(4, 8, 3, 3), False
    torch.testing.assert_close(loss(student, teacher, mask)[0], before)


def test_a_single_box_has_no_relation_to_match():
    assert value(make_loss(InstanceRelation), make_context([1, 1])) == 0


# Instance features


def test_boxes_are_pooled_from_their_own_image():
    teacher = {k: torch.zeros(2, 8, *v.shape[2:]) for k, v in random_maps(2, 8, 0).items()}
    for maps in teacher.values():
        maps[1] = 1
    context = make_context([2, 3], teacher=teacher)
    _, grids = ground_truth_grids(context, context.levels[0], 3)
    assert grids.flatten(1).mean(dim=1).tolist() == [0, 0, 1, 1, 1]


def test_grids_are_computed_once_a_step_and_level(monkeypatch):
    calls = []
    original = instance_feature_module.roi_align
    monkeypatch.setattr(
        instance_feature_module, "roi_align", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    context = make_context([2, 3])
    value(make_loss(InstanceRelation), context)
    value(make_loss(InstanceFeature), context)
    assert len(calls) == 2 * 2  # detectors, levels


def test_the_feature_error_is_a_mean_over_channels_and_bins():
    teacher = torch.randn(3, 8, 2, 2)
    error = instance_feature_error(teacher + 2, teacher)
    torch.testing.assert_close(error, torch.full((3,), 4.0))


# All three


def share_weights(loss):
    """Give the student's modules the teacher's weights, and make the adapters identities."""
    parts = {"student_units": "teacher_units", ".student.": ".teacher."}
    state = loss.state_dict()
    for key in state:
        for student, teacher in parts.items():
            if student in key:
                state[key] = state[key.replace(student, teacher)]
        if "adapter" in key:
            state[key] = torch.eye(8).view(state[key].shape) if "weight" in key else 0 * state[key]
    loss.load_state_dict(state)
    return loss


@pytest.mark.parametrize(
    "cls, settings",
    [
        (PixelRelation, {}),
        (InstanceRelation, {"filter_channels": 0}),
        (InstanceRelation, {"match": "features"}),
        (InstanceFeature, {}),
    ],
)
def test_zero_when_the_student_equals_the_teacher_and_its_modules_too(cls, settings):
    loss = share_weights(make_loss(cls, channels=(8, 8), **settings))
    maps = random_maps(2, 8, seed=5)
    twin = {k: v.clone() for k, v in maps.items()}
    context = make_context([3, 4], student=maps, teacher=twin, channels=(8, 8))
    assert value(loss, context) < 1e-10
    other = make_context([3, 4], teacher=twin, channels=(8, 8))
    assert value(loss, other) > 1e-3


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [1, 1], [0, 5], [30, 2]], ids=str)
def test_any_number_of_boxes_gives_finite_terms_and_gradients(counts):
    for loss in all_losses():
        context = make_context(counts)
        term = value(loss, context)
        term.backward()
        assert term.isfinite() and (sum(counts) or term == 0 or isinstance(loss, PixelRelation))
        trained = [p for p in loss.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert context.student_maps["p3"].grad.isfinite().all()


def test_gradient_reaches_the_students_maps_and_every_trained_parameter():
    for loss in all_losses():
        context = make_context([4, 6])
        value(loss, context).backward()
        for name, p in loss.named_parameters():
            assert not p.requires_grad or p.grad.abs().max() > 0, (type(loss).__name__, name)
        assert all(context.student_maps[name].grad.abs().max() > 0 for name in ("p3", "p4"))


@both_matches
def test_one_step_moves_the_filter(match):
    loss = make_loss(InstanceRelation, match=match)
    filters = {k: v for k, v in loss.state_dict().items() if ".filter." in k}
    before = copy.deepcopy(filters)
    value(loss, make_context([4, 6])).backward()
    torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1).step()
    # The last bias adds nearly the same to all pairs, which relations hardly feel.
    moved = {k: (v - before[k]).abs().max() for k, v in filters.items()}
    assert moved and all(x > 0 for x in moved.values()), moved


def permuted(rows, order):
    return InstanceRows(rows.boxes[order], rows.image_index[order], rows.classes[order])


def test_the_order_of_boxes_does_not_matter():
    context = make_context([4, 6])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = make_context([4, 6], ground_truth=permuted(context.ground_truth, order))
    for loss in all_losses():
        torch.testing.assert_close(value(loss, context), value(loss, shuffled))


def test_a_batch_twice_gives_the_same_terms():
    context = make_context([4, 2])
    rows = context.ground_truth
    twice = make_context(
        [4, 2, 4, 2],
        student={k: v.detach().repeat(2, 1, 1, 1) for k, v in context.student_maps.items()},
        teacher={k: v.repeat(2, 1, 1, 1) for k, v in context.teacher_maps.items()},
        ground_truth=InstanceRows(
            rows.boxes.repeat(2, 1),
            torch.cat([rows.image_index, rows.image_index + 2]),
            rows.classes.repeat(2),
        ),
    )
    for loss in all_losses():
        torch.testing.assert_close(value(loss, context), value(loss, twice))


def class_reliability(_teacher, student, classes):
    return (classes.float() / 10).expand(len(student), -1)


def test_boxes_are_weighted_by_their_own_reliability_whatever_the_instances_are():
    bank = SimpleNamespace(reliability=class_reliability)
    pooler = InstancePooler(2)
    rows = make_context([4, 6]).ground_truth
    for instances in (rows, permuted(rows, [3, 1])):
        context = make_context(
            [4, 6], ground_truth=rows, instances=instances, bank=bank, pooler=pooler
        )
        loss = make_loss(InstanceFeature, num_levels=1, use_reliability=True)
        student, teacher = ground_truth_grids(context, context.levels[0], 3)
        errors = instance_feature_error(loss.adapters["p3"](student), teacher)
        torch.testing.assert_close(value(loss, context), (errors * rows.classes / 10).mean())


@pytest.mark.faults
@pytest.mark.parametrize(
    "cls, settings, message",
    [
        (PixelRelation, {"num_nodes": []}, r"PIXEL_RELATION.NUM_NODES is \[\]"),
        (PixelRelation, {"state_channels": [8, 0]}, "PIXEL_RELATION.STATE_CHANNELS"),
        (InstanceRelation, {"match": "both"}, r"MATCH is 'both'.*\['matrix', 'features'\]"),
        (InstanceRelation, {"embedding_channels": 0}, "EMBEDDING_CHANNELS is 0.*1 or more"),
        (InstanceFeature, {"resolution": 0}, "INSTANCE_FEATURE.RESOLUTION is 0.*1 or more"),
    ],
)
def test_a_wrong_setting_names_its_key(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


# In the detectors


def build(tiny_cfg, kind, *opts):
    cfg = tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", NAMES, *opts)
    register_datasets(cfg)
    torch.manual_seed(0)
    return build_model(cfg).train()


def step(model, batch):
    torch.manual_seed(1)
    with EventStorage(0):
        return model(copy.deepcopy(batch))


@both_detectors
@both_matches
def test_a_detector_trains_with_all_terms_and_without_prototypes(kind, match, tiny_cfg, batch):
    model = build(tiny_cfg, kind, "MODEL.GLOBALKD.INSTANCE_RELATION.MATCH", match)
    assert model.distiller.bank is None
    assert any(".filter." in key for key in model.distiller.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)  # a random teacher's p7 is large
    values = []
    for _ in range(2):
        losses = step(model, batch)
        values.append(sum(losses[name] for name in TERMS))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0]
    assert all(p.grad is not None for p in model.distiller.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.distiller.teacher.model.parameters())


@both_detectors
def test_a_batch_without_boxes_and_autocast_give_finite_float32_terms(kind, tiny_cfg):
    model = build(tiny_cfg, kind)
    for counts in ([0, 0], [3, 1]):
        with torch.autocast("cpu", torch.bfloat16):
            losses = step(model, make_batch(counts))
        assert all(losses[name].dtype == torch.float32 for name in TERMS)
        assert all(losses[name].isfinite() for name in TERMS)
        sum(losses.values()).backward()


@both_detectors
def test_reliability_of_boxes_builds_the_prototypes(kind, tiny_cfg, batch):
    keys = [
        f"MODEL.GLOBALKD.{x}.USE_RELIABILITY" for x in ("INSTANCE_RELATION", "INSTANCE_FEATURE")
    ]
    plain = step(build(tiny_cfg, kind), batch)
    model = build(tiny_cfg, kind, keys[0], True, keys[1], True)
    weighted = step(model, batch)
    assert model.distiller.bank.is_ready
    for name in TERMS[1:]:
        assert 0 < weighted[name] < plain[name], name
