"""When prototypes are made, and starting from a file instead."""

import pytest
import torch
from conftest import make_batch
from detectron2.utils.events import EventStorage

from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer


def build(cfg):
    register_datasets(cfg)
    torch.manual_seed(0)
    return DistillTrainer.build_model(cfg).train()


def due_iterations(model, count):
    model.distiller.refresh(model)
    refresher = model.distiller.refresher
    return [i for i in range(count) if refresher.is_due(i, model.distiller.bank)]


@pytest.mark.parametrize(
    "epochs, expected", [(1.0, [6, 12, 18]), (0.5, [3, 6, 9, 12, 15, 18]), (0.0, [])]
)
def test_due_every_t_epochs_whatever_was_before(epochs, expected, tiny_cfg):
    """Twelve images, two a step: an epoch is six steps."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", epochs)
    assert due_iterations(build(cfg), 20) == expected


def test_always_due_without_prototypes(tiny_cfg):
    model = build(tiny_cfg("rcnn"))
    assert model.distiller.refresher.is_due(17, model.distiller.bank)


def test_a_second_preparation_of_an_iteration_does_nothing(tiny_cfg):
    model = build(tiny_cfg("rcnn"))
    model.distiller.prepare(model, 0)
    model.distiller.refresher.refresh = lambda *a, **k: pytest.fail("made again")
    model.distiller.prepare(model, 0)


def test_equal_seeds_give_equal_prototypes(tiny_cfg):
    first, second = build(tiny_cfg("rcnn")), build(tiny_cfg("rcnn"))
    first.distiller.prepare(first, 0)
    second.distiller.prepare(second, 0)
    for name, value in first.distiller.bank.state_dict().items():
        assert torch.equal(value, second.distiller.bank.state_dict()[name]), name


@pytest.fixture
def file(tiny_cfg, tmp_path):
    """A prototype file of the tiny Faster R-CNN, and the bank that wrote it."""
    model = build(tiny_cfg("rcnn"))
    distiller = model.distiller
    prototypes = distiller.refresh(model)
    path = str(tmp_path / "prototypes.safetensors")
    distiller.bank.save(path, distiller.refresher.fingerprint, prototypes.counts)
    return path, distiller.bank


def test_training_starts_from_a_file(file, tiny_cfg):
    path, bank = file
    model = build(tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.FILE", path))
    model.distiller.refresher.refresh = lambda *a, **k: pytest.fail("made, not read")
    with EventStorage():
        assert model(make_batch([3, 2]))["loss_kd_global"] > 0
    for name, value in bank.state_dict().items():
        assert torch.equal(value, model.distiller.bank.state_dict()[name])


@pytest.mark.faults
def test_a_file_made_with_other_settings_is_refused(file, tiny_cfg):
    path, _ = file
    for key, value in (
        ("MODEL.GLOBALKD.PROTOTYPES.LAMBDA", 1.0),
        ("MODEL.GLOBALKD.POOLER_RESOLUTION", 5),
        ("INPUT.MIN_SIZE_TEST", 60),
    ):
        model = build(tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.FILE", path, key, value))
        name = "input_size" if key.startswith("INPUT") else key.rpartition(".")[2].lower()
        with pytest.raises(ValueError, match=name):
            model.distiller.prepare(model, 0)
