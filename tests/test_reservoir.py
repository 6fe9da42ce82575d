"""The reservoir: which instances it holds, that it costs no pass, and that it is a run's state."""

import copy

import pytest
import torch
from conftest import make_batch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from globalkd.data import register_datasets
from globalkd.engine.run_state import RunState
from globalkd.engine.trainer import DistillTrainer
from globalkd.features import LevelPair, to_rois
from globalkd.prototypes import refresh as prototype_refresh
from globalkd.prototypes.reservoir import InstanceReservoir

LEVELS = [LevelPair("p2", "t2", 4, 3, 5), LevelPair("p3", "t3", 8, 3, 4)]


def make_reservoir(size=4, num_classes=3, min_box_size=2.0):
    return InstanceReservoir(LEVELS, num_classes=num_classes, size=size, min_box_size=min_box_size)


def add(reservoir, classes, iteration, side=10.0):
    """Store instances whose student features say when they came and which row they were."""
    count = len(classes)
    student = torch.stack(
        [torch.full((count,), float(iteration)), torch.arange(count), torch.ones(count)], dim=1
    )
    corner = torch.zeros(count, 2)
    reservoir.add(
        {p.student: student.new_ones(count, p.teacher_channels) for p in LEVELS},
        {p.student: student for p in LEVELS},
        classes=torch.tensor(classes, dtype=torch.int64),
        boxes=torch.cat([corner, corner + side], dim=1),
        iteration=iteration,
    )


def stored(reservoir, k, since=0):
    """(iteration, row) of the stored instances of a class, sorted."""
    features = reservoir.features(since)
    return sorted((int(a), int(b)) for a, b, _ in features.student["p3"][features.classes == k])


class TestReservoir:
    def test_rows_are_the_same_instance_on_every_level(self):
        reservoir = make_reservoir()
        add(reservoir, [2, 0, 2], 0)
        features = reservoir.features(0)
        assert features.classes.tolist() == [0, 2, 2]
        assert torch.equal(features.student["p2"], features.student["p3"])
        assert features.teacher["p2"].shape == (3, 5) and features.teacher["p3"].shape == (3, 4)
        assert stored(reservoir, 0) == [(0, 1)] and stored(reservoir, 2) == [(0, 0), (0, 2)]

    def test_each_class_keeps_its_latest_instances(self):
        reservoir = make_reservoir(size=4)
        for iteration in range(7):
            add(reservoir, [0, 1, 1], iteration)
        assert stored(reservoir, 0) == [(i, 0) for i in (3, 4, 5, 6)]
        assert stored(reservoir, 1) == [(i, row) for i in (5, 6) for row in (1, 2)]
        assert stored(reservoir, 2) == []

    def test_more_of_a_class_than_there_is_room_for(self):
        reservoir = make_reservoir(size=4)
        add(reservoir, [1] * 9, 0)
        assert stored(reservoir, 1) == [(0, row) for row in range(4)]
        add(reservoir, [1], 1)
        assert len(stored(reservoir, 1)) == 4 and (1, 0) in stored(reservoir, 1)

    def test_its_size_never_changes(self):
        reservoir = make_reservoir()
        before = {k: v.shape for k, v in reservoir.state_dict().items()}
        for iteration in range(20):
            add(reservoir, [0, 1, 2, 2, 2], iteration)
        assert {k: v.shape for k, v in reservoir.state_dict().items()} == before
        assert len(reservoir.features(0)) == 12

    def test_older_instances_can_be_left_out(self):
        reservoir = make_reservoir()
        for iteration in range(3):
            add(reservoir, [0], iteration)
        assert stored(reservoir, 0, since=1) == [(1, 0), (2, 0)]
        assert len(reservoir.features(3)) == 0
        assert len(reservoir.features(-5)) == 3, "empty slots are no instances"

    def test_small_boxes_are_left_out_and_take_no_room(self):
        reservoir = make_reservoir(size=2)
        add(reservoir, [0, 0], 0)
        add(reservoir, [0, 0], 1, side=1.0)
        assert stored(reservoir, 0) == [(0, 0), (0, 1)]

    def test_features_that_are_not_finite_are_left_out(self):
        reservoir = make_reservoir(size=4)
        teacher = {p.student: torch.ones(3, p.teacher_channels) for p in LEVELS}
        student = {p.student: torch.ones(3, p.student_channels) for p in LEVELS}
        teacher["p3"][1, 0], student["p2"][2, 1] = float("inf"), float("nan")
        boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(3, 1)
        classes = torch.tensor([0, 0, 1])
        reservoir.add(teacher, student, classes=classes, boxes=boxes, iteration=0)
        features = reservoir.features(0)
        assert features.classes.tolist() == [0]
        assert all(x.isfinite().all() for x in features.teacher.values())

    def test_a_step_without_instances(self):
        reservoir = make_reservoir()
        add(reservoir, [], 0)
        assert len(reservoir.features(0)) == 0

    def test_it_draws_no_random_number(self):
        reservoir = make_reservoir()
        before = torch.get_rng_state()
        add(reservoir, [0] * 9, 0)
        assert torch.equal(before, torch.get_rng_state())

    def test_its_state_continues_where_it_was(self):
        first, second = make_reservoir(), make_reservoir()
        for iteration in range(5):
            add(first, [0, 1, 1], iteration)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for reservoir in (first, second):
            add(reservoir, [0, 1], 5)
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name


@pytest.fixture
def model(tiny_cfg):
    cfg = tiny_cfg(
        "rcnn",
        "SOLVER.MAX_ITER",
        20,
        "MODEL.GLOBALKD.PROTOTYPES.REFRESH",
        "harvest",
        "MODEL.GLOBALKD.PROTOTYPES.RESERVOIR_SIZE",
        6,
    )
    register_datasets(cfg)
    torch.manual_seed(0)
    return DistillTrainer.build_model(cfg).train()


def step(model, batch, iteration):
    with EventStorage(iteration):
        return model(batch)


def same_rows(prototypes, valid, features):
    """Whether every prototype is one of the features."""
    return all((features == x).all(dim=1).any() for x in prototypes[valid])


def test_a_step_stores_its_annotated_boxes_as_both_detectors_see_them(model):
    batch = make_batch([3, 2])
    step(model, batch, 0)
    features = model.distiller.reservoir.features(0)
    classes = torch.cat([x["instances"].gt_classes for x in batch])
    assert sorted(features.classes.tolist()) == sorted(classes.tolist())
    maps = model.distiller.teacher.features(batch, "BGR")
    rois = to_rois([x["instances"].gt_boxes.tensor for x in batch])
    pair = model.distiller.levels[1]
    expected = model.distiller.pooler(maps[pair.teacher], rois, pair.stride)
    found = features.teacher[pair.student]
    torch.testing.assert_close(
        found[found[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=1e-4, atol=1e-5
    )


def test_boxes_are_measured_in_the_original_image(model):
    batch = make_batch([2])
    for record in batch:
        record["height"], record["width"] = 128, 32
    step(model, batch, 0)
    found = model.distiller.reservoir.features(0).boxes
    boxes = batch[0]["instances"].gt_boxes.tensor * torch.tensor([0.5, 2.0, 0.5, 2.0])
    assert {tuple(x) for x in found.tolist()} == {tuple(x) for x in boxes.tolist()}


def test_the_first_prototypes_come_from_a_pass_and_later_ones_from_training(model, monkeypatch):
    step(model, make_batch([3, 2]), 0)
    distiller = model.distiller
    before = copy.deepcopy(distiller.bank.state_dict())
    monkeypatch.setattr(prototype_refresh, "extract_features", lambda *a, **k: pytest.fail("pass"))
    step(model, make_batch([4, 4], seed=1), 5)
    features = distiller.reservoir.features(0)
    distiller.prepare(model, 6)  # twelve images, two a step: an epoch is six steps
    seen = torch.bincount(features.classes, minlength=10) > 0
    for level in distiller.bank.levels:
        now, valid = distiller.bank.levels[level], distiller.bank.valid(level)
        for k in seen.nonzero().flatten().tolist():
            assert same_rows(now.teacher_prototypes[k], valid[k], features.teacher[level])
            assert same_rows(now.student_prototypes[k], valid[k], features.student[level])
        old = before[f"levels.{level}.teacher_prototypes"]
        assert torch.equal(now.teacher_prototypes[~seen], old[~seen]), "not seen: kept"
        assert not torch.equal(now.teacher_prototypes[seen], old[seen])


def test_instances_older_than_an_epoch_are_not_used(model):
    step(model, make_batch([3, 2]), 0)
    before = copy.deepcopy(model.distiller.bank.state_dict())
    assert (
        model.distiller.refresher.refresh_from(
            model.distiller.reservoir, model.distiller.bank, 7
        ).counts.tolist()
        == [0] * 10
    )
    for name, value in model.distiller.bank.state_dict().items():
        assert torch.equal(value, before[name])


def test_harvesting_costs_no_forward_pass_and_changes_no_loss(model, tiny_cfg):
    register_datasets(tiny_cfg("rcnn"))
    plain = copy.deepcopy(model)
    plain.distiller.reservoir = None
    calls = {"harvest": 0, "pass": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    losses = {}
    for name, net in (("harvest", model), ("pass", plain)):
        net.distiller.prepare(net, 0)
        for backbone in (net.backbone, net.distiller.teacher.model.backbone):
            backbone.register_forward_hook(count(name))
        torch.manual_seed(0)
        losses[name] = step(net, make_batch([3, 2]), 0)
    assert calls["harvest"] == calls["pass"]
    for name, value in losses["pass"].items():
        assert torch.equal(value, losses["harvest"][name]), name


def test_it_is_part_of_the_distillers_checkpoint_and_of_no_student(model):
    step(model, make_batch([3, 2]), 0)
    state = model.distiller.state_dict()
    assert any(name.startswith("reservoir.") for name in state)
    assert not any("reservoir" in name for name in model.state_dict())


def test_none_without_refreshes(tiny_cfg):
    for key, value in (("REFRESH", "pass"), ("REFRESH_EPOCHS", 0.0)):
        cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.REFRESH", "harvest")
        cfg.merge_from_list([f"MODEL.GLOBALKD.PROTOTYPES.{key}", value])
        register_datasets(cfg)
        assert DistillTrainer.build_model(cfg).distiller.reservoir is None


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("REFRESH", "scan", "'scan'; it must be one of .*'pass', 'harvest'"),
        ("RESERVOIR_SIZE", 0, "0; it must"),
    ],
)
def test_a_wrong_setting_is_named(key, value, message, tiny_cfg):
    cfg = tiny_cfg("rcnn", f"MODEL.GLOBALKD.PROTOTYPES.{key}", value)
    with pytest.raises(ValueError, match=rf"PROTOTYPES\.{key} is {message}"):
        prototype_refresh.PrototypeRefresher(cfg)


@pytest.mark.parametrize(("rank", "kept"), [(0, True), (1, False)])
def test_a_process_that_was_not_there_begins_with_an_empty_reservoir(rank, kept, monkeypatch):
    """Saved by one process and resumed by two: else both would have the same instances."""
    model = nn.Module()
    model.distiller = nn.Module()
    model.distiller.reservoir = filled = InstanceReservoir(
        [], num_classes=2, size=3, min_box_size=1
    )
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    filled.add({}, {}, classes=torch.tensor([1]), boxes=boxes, iteration=5)
    own = {"loss_normalizer": None, "buffers": {}}
    state = {"seed": 1, "batches": None, "settings": {}, "processes": [own]}
    RunState(model, 1).load_state_dict(state)
    assert len(filled.features(0)) == kept
