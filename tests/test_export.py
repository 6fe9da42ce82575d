"""Exported students: weights to the bit, graphs up to rounding, on images of any size."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from globalkd.analysis import graph_export
from globalkd.analysis.export import compare, export_student
from globalkd.analysis.graph_export import Detections, detect, write_torchscript

both = pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
needs_onnx = pytest.mark.skipif(
    any(graph_export.find_spec(name) is None for name in ("onnx", "onnxruntime")),
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


@both
def test_torchscript_detects_the_same_without_detectron2(run_folder, tmp_path, kind):
    path = tmp_path / "student.ts"
    agreement = export_student(str(run_folder(kind)), str(path), num_images=3)
    assert agreement.images == 5 and agreement.detections > 0  # two hard cases on top
    assert agreement.box < 1e-3 and agreement.score < 1e-5
    files = {graph_export.ABOUT: ""}
    graph = torch.jit.load(path, _extra_files=files)
    about = json.loads(files[graph_export.ABOUT])
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
    monkeypatch.setattr(graph_export, "find_spec", lambda name: None)
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
