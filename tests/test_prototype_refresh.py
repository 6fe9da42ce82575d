"""When prototypes are made, and starting from a file instead."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT, make_batch
from detectron2.utils.events import EventStorage

from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer
from globalkd.prototypes.fingerprint import fingerprint_settings, with_contents


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


@pytest.mark.faults
def test_features_of_which_none_can_be_a_prototype_end_the_run(tiny_cfg):
    """Else each step would begin with another pass over the data."""
    model = build(tiny_cfg("rcnn"))
    for parameter in model.backbone.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match=r"can become a prototype: .*MODEL\.WEIGHTS"):
        model.distiller.prepare(model, 0)


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
        ("MODEL.GLOBALKD.INHERIT_TEACHER_HEADS", True),
        ("INPUT.MIN_SIZE_TEST", 60),
    ):
        model = build(tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.FILE", path, key, value))
        name = "input" if key.startswith("INPUT") else key.rpartition(".")[2].lower()
        with pytest.raises(ValueError, match=name):
            model.distiller.prepare(model, 0)


def test_a_fingerprint_is_of_what_files_hold_and_not_of_their_names(tmp_path, tiny_cfg):
    def fingerprint(name, content):
        (tmp_path / name).write_bytes(content)
        cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.TEACHER.WEIGHTS", str(tmp_path / name))
        return with_contents(fingerprint_settings(cfg))

    first = fingerprint("a.pth", b"weights")
    assert fingerprint("moved.pth", b"weights") == first
    again = fingerprint("a.pth", b"trained again")
    assert {key for key in first if again[key] != first[key]} == {"teacher_weights"}
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.TEACHER.WEIGHTS", "detectron2://zoo.pkl")
    assert with_contents(fingerprint_settings(cfg))["teacher_weights"] == "detectron2://zoo.pkl"


def test_changed_annotations_change_the_fingerprint(scenes, tmp_path, tiny_cfg):
    annotations = tmp_path / "train.json"
    prints = []
    for suffix in ("", " "):
        annotations.write_text((scenes / "train.json").read_text() + suffix)
        cfg = tiny_cfg("rcnn", "DATASETS.TRAIN", ("changing",))
        cfg.DATASETS.COCO = [["changing", str(annotations), str(scenes / "train")]]
        register_datasets(cfg)
        prints.append(with_contents(fingerprint_settings(cfg))["datasets"]["changing"])
    assert prints[0].startswith("sha256 ") and prints[0] != prints[1]


def test_prototypes_of_a_file_are_those_of_a_student_that_inherits(tmp_path, tiny_cfg, monkeypatch):
    """The tool makes them where training does: after the student has the teacher's heads."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.INHERIT_TEACHER_HEADS", True)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RESNETS.DEPTH", 34]
    model = build(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "start.pth")
    teacher = {"model": model.distiller.teacher.model.state_dict()}
    torch.save(teacher, tmp_path / "teacher.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    cfg.MODEL.GLOBALKD.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    cfg.MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS = True  # its norms are folded
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "p.safetensors"]
    monkeypatch.setattr(sys, "argv", ["generate_prototypes.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    importlib.import_module("generate_prototypes").main()

    trained = build(cfg)
    trained.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    trained.distiller.prepare(trained, 0)
    cfg.MODEL.GLOBALKD.PROTOTYPES.FILE = str(tmp_path / "p.safetensors")
    read = build(cfg)
    read.distiller.prepare(read, 0)
    expected, found = (m.distiller.bank.state_dict() for m in (trained, read))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.faults
@pytest.mark.parametrize("weights", ["none", "a backbone without its FPN"])
def test_the_tool_refuses_a_student_that_a_training_would_draw_anew(
    tmp_path, tiny_cfg, monkeypatch, capsys, weights
):
    cfg = tiny_cfg("rcnn")
    state = build(cfg).state_dict()
    torch.save({"model": {k: v for k, v in state.items() if "fpn" not in k}}, tmp_path / "b.pth")
    cfg.MODEL.WEIGHTS = "" if weights == "none" else str(tmp_path / "b.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "p.safetensors"]
    monkeypatch.setattr(sys, "argv", ["generate_prototypes.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("generate_prototypes").main()
    assert "entries of the student's backbone random, such as backbone." in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()
