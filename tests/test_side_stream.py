"""The teacher's pass on a stream of its own: what waits for what, and the same maps."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd.data import register_datasets
from globalkd.teacher.side_stream import SideStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Stream:
    """Stands for a CUDA stream; what happens is written to one list."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


class Map:
    def __init__(self, events):
        self.events = events

    def record_stream(self, stream):
        self.events.append(f"read on {stream.name}")


@pytest.fixture
def streams(monkeypatch):
    """The list of events, and how to make a stream the current one."""
    events = []
    current = [Stream("main", events)]

    @contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side", events))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: current[-1])
    monkeypatch.setattr("torch.cuda.stream", use)
    return events, lambda name: use(Stream(name, events)), lambda: current[-1].name


def test_the_pass_waits_for_what_is_there_and_its_reader_waits_for_the_pass(streams):
    events, _, current = streams
    side = SideStream(torch.device("cuda"))

    def compute():
        events.append(f"computed on {current()}")
        return {"p2": Map(events), "p3": Map(events)}

    finish = side.begin(compute)
    events.append(f"student on {current()}")
    assert list(finish()) == ["p2", "p3"]
    assert events == [
        "side waits for main",
        "computed on side",
        "student on main",
        "main waits for side",
        "read on main",
        "read on main",
    ]


def test_the_reader_is_the_stream_that_asks(streams):
    events, use, _ = streams
    finish = SideStream(torch.device("cuda")).begin(lambda: {"p2": Map(events)})
    with use("third"):
        finish()
    assert events == ["side waits for main", "third waits for side", "read on third"]


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_cpu_has_no_streams_and_the_same_losses(tiny_cfg, kind):
    losses = []
    for side_stream in (False, True):
        cfg = tiny_cfg(kind, "MODEL.GLOBALKD.TEACHER.SIDE_STREAM", side_stream)
        register_datasets(cfg)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model(make_batch([4, 2])))
        assert model.distiller.teacher._side_stream is None
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])


def test_a_copy_of_a_teacher_has_no_stream_yet(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    model = build_model(cfg)
    model.distiller.teacher._side_stream = (x for x in "what cannot be copied")
    assert copy.deepcopy(model).distiller.teacher._side_stream is None


def test_the_pass_begins_before_the_student(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    model = build_model(cfg).train()
    order, begin = [], model.distiller.teacher.begin
    model.backbone.register_forward_pre_hook(lambda *_: order.append("student"))
    model.distiller.teacher.begin = lambda *args: order.append("teacher") or begin(*args)
    model.distiller.prepare = lambda *_: None
    model.distiller.teacher.model.backbone.register_forward_pre_hook(
        lambda *_: order.append("teacher's backbone")
    )
    with EventStorage():
        model(make_batch([4, 2]))
    assert order[:2] == ["teacher", "student"]


@needs_gpu
@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_training_on_a_gpu_is_the_same_with_it(tiny_cfg, kind):
    """Many steps, so that a block of memory that is reused too early would show."""
    found = []
    for side_stream in (False, True):
        cfg = tiny_cfg(kind, "MODEL.GLOBALKD.TEACHER.SIDE_STREAM", side_stream)
        cfg.MODEL.DEVICE = "cuda"
        register_datasets(cfg)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        teacher = model.distiller.teacher
        maps = []
        for seed in range(20):
            batch = make_batch([4, 2 + seed % 3])
            finish = teacher.begin(batch, "BGR")
            torch.randn(1000, 1000, device="cuda") @ torch.randn(1000, 1000, device="cuda")
            maps += [x.clone() for x in finish().values()]
        found.append(maps)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
