"""Pictures of a training step, and the writers that send them on."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage, TensorboardXWriter, get_event_storage

from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer
from globalkd.engine.wandb_writer import WandbWriter
from globalkd.visualization import draw_boxes, panel_grid

RED = (255, 0, 0)


def test_a_box_is_drawn_where_it_lies_in_the_scaled_image():
    panel = draw_boxes(
        np.zeros((50, 100, 3), np.uint8), [[10, 10, 40, 40]], [""], [RED], height=100
    )
    assert panel.shape == (104, 204, 3)
    reds = np.argwhere((panel == RED).all(axis=2)) - 2  # without the rim
    assert np.abs(reds.min(axis=0) - [20, 20]).max() <= 1
    assert np.abs(reds.max(axis=0) - [80, 80]).max() <= 1


def test_an_image_without_boxes_is_left_as_it_is():
    image = np.full((20, 30, 3), 7, np.uint8)
    panel = draw_boxes(image, np.zeros((0, 4)), [], [], height=20)
    assert (panel[2:-2, 2:-2] == image).all() and (panel[0] == 255).all()
    assert (image == 7).all()


def test_panels_of_any_size_make_a_grid():
    sizes = {"a": [(10, 20), (30, 5)], "b": [(12, 8), (1, 1)]}
    columns = {n: [np.zeros((*s, 3), np.uint8) for s in column] for n, column in sizes.items()}
    assert panel_grid(columns).shape == (24 + 2 * 30, 2 * 20, 3)


@pytest.fixture
def step(tiny_cfg, batch):
    """Runs training steps of a tiny student: step(vis_period, iteration) -> (losses, storage)."""
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()

    def run(vis_period, iteration, inputs=batch):
        model.distiller.vis_period = vis_period
        torch.manual_seed(1)
        with EventStorage(iteration) as storage:
            losses = model(copy.deepcopy(inputs))
        return losses, storage

    run.cfg = cfg
    return run


def test_pictures_come_at_their_period_alone_and_change_nothing(step):
    _, storage = step(0, 0)
    assert not storage._vis_data and not storage._histograms
    plain, storage = step(0, 2)
    assert not storage._vis_data and not storage._histograms
    shown, storage = step(2, 2)
    ((name, image, iteration),) = storage._vis_data
    assert (name, iteration) == ("kd/reliability_boxes", 2)
    assert image.shape == (3, 516, 516) and image.dtype == np.uint8
    histograms = {h["tag"]: h for h in storage._histograms}
    assert sorted(histograms) == [f"kd/reliability/p{i}" for i in range(2, 7)]
    for histogram in histograms.values():
        assert 0 <= histogram["min"] <= histogram["max"] <= 1
    assert {k: v.item() for k, v in plain.items()} == {k: v.item() for k, v in shown.items()}
    _, storage = step(2, 3)
    assert not storage._vis_data and not storage._histograms


def test_the_boxes_shown_are_those_of_the_first_image_that_has_some(step, batch):
    _, storage = step(1, 0, inputs=batch[::-1])
    assert len(storage._vis_data) == 1


def test_a_batch_without_boxes_shows_nothing(step, batch):
    step(0, 0)
    _, storage = step(1, 1, inputs=batch[1:] * 2)
    assert not storage._vis_data


def test_tensorboard_gets_them(step, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, storage = step(1, 0)
    with storage:
        writer = TensorboardXWriter(str(tmp_path))
        writer.write()
        writer.close()
    assert not storage._vis_data and not storage._histograms
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["kd/reliability_boxes"]
    assert "kd/reliability/p2" in events.Tags()["histograms"]


def test_the_period_is_detectron2s(tiny_cfg):
    cfg = tiny_cfg("rcnn", "VIS_PERIOD", 5)
    register_datasets(cfg)
    assert build_model(cfg).distiller.vis_period == 5


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.logged, self.finished = arguments, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb; `wandb.run` is what `init` gave."""
    module = ModuleType("wandb")

    def init(**arguments):
        module.run = FakeRun(**arguments)
        return module.run

    module.init = init
    module.Image = lambda pixels: SimpleNamespace(pixels=pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_scalars_and_images_once_in_order(tiny_cfg, wandb):
    writer = WandbWriter(tiny_cfg("rcnn", "WANDB.PROJECT", "mine"))
    assert wandb.run.arguments["project"] == "mine" and wandb.run.arguments["name"] == "run"
    assert wandb.run.arguments["config"]["MODEL"]["GLOBALKD"]["PROTOTYPES"]["NUM"] == 3
    with EventStorage(0):
        storage = get_event_storage()
        storage.put_image("picture", np.zeros((3, 4, 5), np.uint8))
        storage.step()
        storage.put_scalar("loss", 2.0)
        writer.write()
        storage.clear_images()
        writer.write()  # nothing new
        storage.step()
        storage.put_scalar("loss", 4.0, smoothing_hint=True)
        writer.write()
    writer.close()
    (first, picture), (second, loss), (third, later) = wandb.run.logged
    assert (first, second, third) == (0, 1, 2)
    assert picture["picture"].pixels.shape == (4, 5, 3)
    assert loss == {"loss": 2.0} and later == {"loss": 3.0}  # the median of both
    assert wandb.run.finished


def test_wandb_stands_before_the_writer_that_clears_the_images(tiny_cfg, wandb):
    trainer = DistillTrainer.__new__(DistillTrainer)
    trainer.cfg, trainer.max_iter = tiny_cfg("rcnn", "WANDB.ENABLED", True), 4
    kinds = [type(writer).__name__ for writer in trainer.build_writers()]
    assert kinds.index("WandbWriter") < kinds.index("TensorboardXWriter")
    trainer.cfg.WANDB.ENABLED = False
    assert "WandbWriter" not in [type(writer).__name__ for writer in trainer.build_writers()]


@pytest.mark.faults
def test_a_missing_wandb_is_named_with_its_key(tiny_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="WANDB.ENABLED is True.*pip install wandb"):
        WandbWriter(tiny_cfg("rcnn"))
