"""demo/demo.py: pictures and JSON of a student, without its teacher."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

spec = importlib.util.spec_from_file_location("demo_on_images", ROOT / "demo" / "demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


@pytest.fixture
def config_file(tiny_cfg, monkeypatch):
    """The config.yaml of a distilled run whose teacher is gone, with random weights beside it."""
    torch.manual_seed(0)
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.TEACHER.CONFIG_FILE", "gone.yaml")
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    folder.joinpath("config.yaml").write_text(cfg.dump())
    cfg.MODEL.GLOBALKD.ENABLED = False
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder / "config.yaml"


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, args)])
    return demo.run(demo.get_parser().parse_args())


def test_a_folder_gives_a_picture_and_detections_an_image(
    config_file, scenes, tmp_path, monkeypatch
):
    found = tmp_path / "found"
    threshold = ("--confidence-threshold", 0.08)
    status = run(monkeypatch, "--config-file", config_file, "--input", scenes / "val", "--output",
                 found, *threshold)  # fmt: skip
    assert status == 0
    results = json.loads((found / "detections.json").read_text())
    assert [Path(r["file_name"]).name for r in results] == sorted(
        p.name for p in (scenes / "val").iterdir()
    )
    assert sum(len(r["detections"]) for r in results) > 0
    for result in results:
        name = Path(result["file_name"]).name
        picture, image = cv2.imread(str(found / name)), cv2.imread(result["file_name"])
        assert picture.shape == image.shape == (result["height"], result["width"], 3)
        assert bool(result["detections"]) == bool((picture != image).any())
        for detection in result["detections"]:
            assert detection["score"] >= 0.08
            assert detection["category"] == str(detection["label"])
            x, y, width, height = detection["bbox"]
            assert x >= 0 and x + width <= 64.01 and y >= 0 and y + height <= 64.01


def test_a_video_gives_a_video(config_file, tmp_path, monkeypatch):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for grey in (0, 80, 160):
        writer.write(np.full((64, 64, 3), grey, np.uint8))
    writer.release()
    found = tmp_path / "found"
    run(monkeypatch, "--config-file", config_file, "--video-input", path, "--output", found)
    results = json.loads((found / "detections.json").read_text())
    assert [r["frame"] for r in results] == [0, 1, 2]
    assert cv2.VideoCapture(str(found / "film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.faults
def test_weights_that_the_training_started_from_are_not_taken(config_file, scenes, monkeypatch):
    config_file.with_name("model_final.pth").unlink()
    with pytest.raises(FileNotFoundError, match="--opts MODEL.WEIGHTS"):
        run(monkeypatch, "--config-file", config_file, "--input", scenes, "--output", scenes)


@pytest.mark.faults
def test_input_that_is_not_there_is_named(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no image there"):
        demo.list_images([str(tmp_path)])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    assert len(demo.list_images([str(tmp_path / "a")])) == 1
    with pytest.raises(FileNotFoundError, match="subfolders are not searched"):
        demo.list_images([str(tmp_path)])
    (tmp_path / "a/deep").mkdir()
    (tmp_path / "a/deep/y.png").touch()
    assert len(demo.list_images([f"{tmp_path}/a/**/*.png"])) == 2
    assert len(demo.list_images([str(tmp_path / "a")])) == 1
    assert "1 images in subfolders are left out" in caplog.text
    with pytest.raises(ValueError, match="files of one name, such as x.png"):
        demo.list_images([str(tmp_path / "*" / "x.png")])


@pytest.fixture
def images(scenes, tmp_path):
    """A folder of two scenes, which a test may spoil."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, path in zip(("a.png", "b.png"), sorted((scenes / "val").iterdir())):
        (folder / name).write_bytes(path.read_bytes())
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.faults
@pytest.mark.parametrize("link", [False, True])
def test_images_are_not_replaced_by_their_pictures(config_file, images, monkeypatch, link):
    output = images
    if link:  # the folder is another, but one of its files is an input
        output = images.parent / "links"
        output.mkdir()
        (output / "b.png").symlink_to(images / "b.png")
    before = contents(images)
    with pytest.raises(ValueError, match=r"would replace the input .*images/(a|b).png"):
        run(monkeypatch, "--config-file", config_file, "--input", images, "--output", output)
    assert contents(images) == before and not (output / "detections.json").exists()


@pytest.mark.faults
def test_a_film_is_not_replaced_by_its_pictures(config_file, tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"a film")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="film.mp4 would replace the input film.mp4"):
        run(monkeypatch, "--config-file", config_file, "--video-input", "film.mp4", "--output", ".")
    assert film.read_bytes() == b"a film"


@pytest.mark.faults
def test_an_image_that_cannot_be_read_costs_no_other(config_file, images, monkeypatch):
    said = []
    monkeypatch.setattr(demo.logger, "error", said.append)
    whole = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(whole[: len(whole) // 2])
    (images / "c.png").write_bytes(b"no image")
    found = images.parent / "found"
    status = run(monkeypatch, "--config-file", config_file, "--input", images, "--output", found)
    assert status == 1
    assert [text.split(" cannot")[0] for text in said] == [f"{images / x}.png" for x in "ac"]
    (result,) = json.loads((found / "detections.json").read_text())
    assert result["file_name"] == str(images / "b.png")
    assert sorted(contents(found)) == ["b.png", "detections.json"]


@pytest.mark.faults
def test_detections_outlive_a_picture_that_cannot_be_written(config_file, images, monkeypatch):
    said = []
    monkeypatch.setattr(demo.logger, "error", said.append)
    (images / "a.png").rename(images / "a.strange")
    found = images.parent / "found"
    both = (images / "a.strange", images / "b.png")
    status = run(monkeypatch, "--config-file", config_file, "--input", *both, "--output", found)
    assert status == 1 and len(said) == 1 and "a.strange cannot be written" in said[0]
    assert len(json.loads((found / "detections.json").read_text())) == 2
    assert sorted(contents(found)) == ["b.png", "detections.json"]


def test_a_class_without_a_name_is_a_number(config_file, monkeypatch):
    found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9], [9, 9, 20, 20]])))
    found.pred_classes, found.scores = torch.tensor([1, 7]), torch.tensor([0.9, 0.8])
    assert [row["category"] for row in demo.as_json(found, ["RBC", "WBC"])] == ["WBC", "7"]
    assert [row["category"] for row in demo.as_json(found, [])] == ["1", "7"]
    assert demo.as_json(found[:0], ["RBC"]) == []
    # Drawn as well: Detectron2's visualizer looks every label up.
    monkeypatch.setattr(demo, "known_names", lambda cfg: ["RBC", "WBC"])
    args = demo.get_parser().parse_args(
        ["--config-file", str(config_file), "--input", "x", "--output", "x"]
    )
    model = demo.Demo(demo.setup(args))
    model.predictor = lambda image: {"instances": found}
    picture, rows = model(np.zeros((64, 64, 3), np.uint8))
    assert picture.any() and len(rows) == 2


def test_labels_are_written_in_the_letters_of_their_language():
    """Not as one empty box a letter, which is what a font gives for letters that it lacks."""
    found = Instances((100, 200), pred_boxes=Boxes(torch.tensor([[150.0, 60, 199, 99]])))
    found.pred_classes, found.scores = torch.tensor([0]), torch.tensor([0.9])
    pictures = []
    for name in ("红红红", "红细胞"):
        np.random.seed(0)  # of the boxes' colours
        drawing = demo.Drawing(
            np.full((100, 200, 3), 128, np.uint8), demo.Metadata(thing_classes=[name])
        )
        drawing.draw_instance_predictions(found)
        pictures.append(drawing.picture())
    reds, cells = pictures
    assert reds.shape == cells.shape == (100, 200, 3) and (reds != cells).any()
    assert (cells == 0).all(axis=2).any(axis=0)[:150].any()  # moved to the left, into the image


def test_class_names_come_from_the_config_where_the_data_are_not_here(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn")
    name = f"blood_{tmp_path.name}"
    cfg.DATASETS.VOC = [[name, str(tmp_path / "gone"), "train", ["RBC", "WBC"]]]
    cfg.DATASETS.TEST = (name,)
    assert demo.known_names(cfg) == ["RBC", "WBC"]
    cfg.DATASETS.VOC, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (), ()
    assert demo.known_names(cfg) == []
