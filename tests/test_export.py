"""Exported students: weights to the bit, graphs up to rounding, on images of any size."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model

from globalkd.export import export_student, graphs
from globalkd.export.comparison import compare
from globalkd.export.graphs import Detections, detect, write_torchscript
from globalkd.meta_arch import DistillGeneralizedRCNN

sys.path.insert(0, str(ROOT / "tools"))
import export_student as export_tool

both = pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
needs_onnx = pytest.mark.skipif(
    any(graphs.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="needs the extra [export]",
)


@pytest.fixture
def run_folder(tiny_cfg, tmp_path):
    """The folder of a run that ended with random weights; thresholds let detections through."""

    def make(kind):
        torch.manual_seed(0)
        cfg = tiny_cfg(
            kind, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.08, "MODEL.RETINANET.NORM", "BN"
        )
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.009
        cfg.MODEL.GLOBALKD.ENABLED = False
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir()
        folder.joinpath("config.yaml").write_text(cfg.dump())
        torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
        return folder

    return make


@pytest.mark.faults
def test_a_detector_that_the_checkpoint_does_not_fill_is_not_exported(run_folder, tmp_path):
    folder, output = str(run_folder("rcnn")), tmp_path / "student.pth"
    with pytest.raises(ValueError, match=r"model_final.pth fills \d+ of \d+ .*cls_score"):
        export_student(folder, str(output), opts=["MODEL.ROI_HEADS.NUM_CLASSES", 9])
    assert not output.exists()


@both
def test_torchscript_detects_the_same_without_detectron2(run_folder, tmp_path, kind):
    path = tmp_path / "student.ts"
    agreement = export_student(str(run_folder(kind)), str(path), num_images=3)
    assert agreement.images == 5 and agreement.detections > 0  # two hard cases on top
    assert agreement.box < 1e-3 and agreement.score < 1e-5
    files = {graphs.ABOUT: ""}
    graph = torch.jit.load(path, _extra_files=files)
    about = json.loads(files[graphs.ABOUT])
    assert about["classes"] == [str(i) for i in range(10)] and about["channels"] == "BGR"
    boxes, scores, classes = graph(torch.zeros(3, 50, 70, dtype=torch.uint8))
    assert len(boxes) == len(scores) == len(classes)


@needs_onnx
@both
def test_onnx_detects_the_same(run_folder, tmp_path, kind):
    import onnx

    path = tmp_path / "student.onnx"
    agreement = export_student(str(run_folder(kind)), str(path), num_images=3)
    assert agreement.images == 5 and agreement.detections > 0
    assert agreement.box < 1e-2 and agreement.score < 1e-4
    graph = onnx.load(path)
    assert [x.name for x in graph.graph.output] == list(Detections._fields)
    about = {x.key: json.loads(x.value) for x in graph.metadata_props}
    assert about["min_size"] == 64 and about["classes"][3] == "3"


@pytest.mark.faults
def test_onnx_that_is_not_installed_is_named_before_anything_runs(
    run_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxruntime: pip install -e '.\[export\]'"):
        export_student(str(run_folder("rcnn")), str(tmp_path / "student.onnx"))
    assert not list(tmp_path.glob("student*"))


@pytest.mark.faults
def test_what_cannot_become_a_graph_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="not of Linear"):
        write_torchscript(torch.nn.Linear(1, 1), torch.zeros(3, 8, 8), str(tmp_path / "x.ts"), {})


@needs_onnx
@pytest.mark.faults
def test_what_onnx_does_not_know_is_an_error_with_a_way_out(run_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("Unsupported: aten::strange")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match=r"aten::strange. TorchScript \(.ts\)"):
        export_student(str(run_folder("rcnn")), str(tmp_path / "student.onnx"))
    assert not list(tmp_path.glob("student*"))


STOCK = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

cfg = get_cfg()
cfg.merge_from_file("student_config.yaml")
model = build_model(cfg)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
saved, loaded = torch.load("student.pth")["model"], model.state_dict()
assert set(saved) == set(loaded) and all(torch.equal(loaded[k], saved[k]) for k in saved)
assert not any("globalkd" in name for name in sys.modules)
print(type(model).__name__, cfg.OUTPUT_DIR)
"""


@both
def test_the_configuration_beside_weights_is_one_of_stock_detectron2(
    run_folder, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    folder = run_folder(kind)
    export_student(str(folder), "student.pth", num_images=1)
    command = [sys.executable, "-W", "ignore", "-c", STOCK]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    names = {"rcnn": "GeneralizedRCNN", "retinanet": "RetinaNet"}
    assert result.stdout.split() == [names[kind], str(folder)]


@pytest.fixture
def moved_run(run_folder, scenes):
    """A run whose configuration names a data set that is not there, and a GPU."""
    folder = run_folder("rcnn")
    path = folder / "config.yaml"
    text = path.read_text().replace(str(scenes), str(scenes / "moved"))
    path.write_text(text.replace("DEVICE: cpu", "DEVICE: cuda:0"))
    return folder


@pytest.fixture
def warned():
    """The texts of all warnings, whatever has set up logging before."""
    texts = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("globalkd").addHandler(handler)
    yield texts
    logging.getLogger("globalkd").removeHandler(handler)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_need_neither_the_data_nor_the_device_of_the_run(
    moved_run, tmp_path, warned, ending
):
    agreement = export_student(str(moved_run), str(tmp_path / f"student{ending}"))
    assert (agreement.images, agreement.detections) == (0, 0)
    assert (tmp_path / f"student{ending}").is_file()
    assert "DEVICE: cuda:0" in (tmp_path / "student_config.yaml").read_text()
    text = " ".join(warned)
    assert "Comparing detections on test images is skipped" in text and "moved/val.json" in text
    assert "MODEL.DEVICE is cpu instead of cuda:0" in text and "nothing was compared" in text


@pytest.mark.faults
def test_a_graph_needs_an_image(moved_run, tmp_path):
    path = str(tmp_path / "student.ts")
    with pytest.raises(FileNotFoundError, match="moved"):
        export_student(str(moved_run), path)
    with pytest.raises(ValueError, match="--images is 0"):
        export_student(str(moved_run), path, num_images=0)
    assert not list(tmp_path.glob("student*"))


def test_overrides_say_where_the_data_lie_now(moved_run, scenes, tmp_path, warned):
    datasets = repr([["export_here", str(scenes / "val.json"), str(scenes / "val")]])
    opts = ["DATASETS.COCO", datasets, "DATASETS.TEST", "['export_here']", "MODEL.DEVICE", "cpu"]
    agreement = export_student(str(moved_run), str(tmp_path / "student.pth"), opts=opts)
    assert agreement.images == 4 and agreement.detections > 0 and warned == []


def test_where_nothing_is_detected_nothing_is_said_to_agree(
    run_folder, tmp_path, monkeypatch, warned, capsys
):
    path = str(tmp_path / "student.pth")
    opts = ["--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99"]
    monkeypatch.setattr(sys, "argv", ["x", str(run_folder("rcnn")), "--output", path, *opts])
    export_tool.main()
    assert any("nothing was compared: no detection on 4 test images" in text for text in warned)
    said = capsys.readouterr().out
    assert "NOT compared" in said and "equal detections" not in said


@pytest.mark.faults
def test_weights_that_are_read_back_otherwise_are_not_written(run_folder, tmp_path, monkeypatch):
    folder, save = run_folder("rcnn"), torch.save

    def forget_one(content, path):
        content["model"].popitem()
        save(content, path)

    monkeypatch.setattr(torch, "save", forget_one)
    with pytest.raises(RuntimeError, match="not read back as they were"):
        export_student(str(folder), str(tmp_path / "student.pth"), num_images=0)
    assert not list(tmp_path.glob("student*"))


@pytest.mark.faults
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".ts"])
def test_a_full_disk_is_told_and_nothing_is_left(run_folder, tmp_path, ending):
    path = tmp_path / f"student{ending}"
    Path(f"{path}.partial{ending}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"student\..* could not be written: .*MiB are free there"):
        export_student(str(run_folder("rcnn")), str(path), num_images=1)
    assert not list(tmp_path.glob("student*"))


class OwnRCNN(GeneralizedRCNN):
    """A user's own detector."""


class DistillOwnRCNN(DistillGeneralizedRCNN, OwnRCNN):
    """The same with a distiller."""


def test_a_detector_of_the_users_own_is_exported_as_what_it_distils(
    run_folder, tmp_path, monkeypatch
):
    folder, path = run_folder("rcnn"), tmp_path / "student.pth"
    opts = ["MODEL.META_ARCHITECTURE", "DistillOwnRCNN"]
    with pytest.raises(ValueError, match="'DistillOwnRCNN', which is not registered: --import"):
        export_student(str(folder), str(path), opts=opts)
    for architecture, stock in ((DistillOwnRCNN, "GeneralizedRCNN"), (OwnRCNN, "OwnRCNN")):
        names = {**META_ARCH_REGISTRY._obj_map, architecture.__name__: architecture}
        monkeypatch.setattr(META_ARCH_REGISTRY, "_obj_map", names)
        export_student(str(folder), str(path), opts=opts, num_images=1)
        cfg = get_cfg()
        cfg.merge_from_file(str(tmp_path / "student_config.yaml"))
        assert stock == cfg.MODEL.META_ARCHITECTURE
        first = (tmp_path / "student_config.yaml").read_text().splitlines()[0]
        assert first.startswith('# The classes by their labels: ["0", "1", ')


def detections(boxes, scores, classes):
    return Detections(
        torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores), torch.tensor(classes)
    )


TWO = detections([[0, 0, 9, 9], [20, 20, 30, 30]], [0.9, 0.8], [1, 2])


def agree(ours, theirs, box=0.1, score=1e-3):
    return compare(lambda _: ours, lambda _: theirs, iter([torch.zeros(3, 8, 8)]), box, score)


def test_the_order_of_detections_does_not_matter():
    turned = Detections(*(x.flip(0) for x in TWO))
    assert agree(TWO, turned).box == agree(TWO, turned, 0, 0).score == 0
    moved = TWO._replace(boxes=turned.boxes.flip(0) + 0.05)
    assert agree(TWO, moved).box == pytest.approx(0.05, abs=1e-4)
    assert agree(TWO, moved).detections == 2


@pytest.mark.parametrize(
    "other",
    [
        TWO._replace(boxes=TWO.boxes + 1),
        TWO._replace(scores=TWO.scores - 0.1),
        TWO._replace(classes=TWO.classes.flip(0)),
        Detections(*(x[1:] for x in TWO)),
        Detections(*(x[:0] for x in TWO)),
    ],
)
def test_a_detection_without_partner_is_an_error(other):
    for pair in ((TWO, other), (other, TWO)):
        with pytest.raises(RuntimeError, match="detects otherwise on image 0"):
            agree(*pair)


def test_rounding_may_decide_what_is_kept_at_all():
    last = detections([[0, 0, 9, 9], [20, 20, 30, 30], [1, 5, 9, 9]], [0.9, 0.8, 0.7999], [1, 2, 1])
    assert agree(last, TWO).detections == 3
    with pytest.raises(RuntimeError):
        agree(last, TWO, 0.0, 0.0)  # weights must agree to the bit
    empty = Detections(*(x[:0] for x in TWO))
    assert agree(empty, empty).detections == 0


def test_boxes_are_in_pixels_of_the_image_that_was_given(tiny_cfg):
    cfg = tiny_cfg("rcnn", distill=False)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = torch.randint(0, 255, (3, 40, 90), dtype=torch.uint8)
    boxes = detect(model, image).boxes
    assert len(boxes) and (boxes >= 0).all()
    assert (boxes[:, 2] <= 90).all() and (boxes[:, 3] <= 40).all() and boxes[:, 2].max() > 40
