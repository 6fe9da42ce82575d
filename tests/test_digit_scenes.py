"""Digit scenes: what their files promise."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from globalkd.data import digit_scenes, make_digit_scenes
from globalkd.data.scene_composition import AMBIGUITY_KINDS, draw_kinds
from globalkd.data.scene_drawing import bar_over, draw_background, draw_digit, ink_box, pick_colour

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_train": 6, "num_val": 3, "image_size": 96}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=150, num_val=30)


def load(root, split):
    return json.loads((root / f"{split}.json").read_text())


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def overlap_of_boxes(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def annotations_by_image(content):
    images = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        images[annotation["image_id"]].append(annotation)
    return images


def test_same_arguments_give_the_same_bytes_whatever_the_number_of_threads(tmp_path):
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        one = files(make_digit_scenes(tmp_path / "one", **SMALL))
        cv2.setNumThreads(4)
        four = files(make_digit_scenes(tmp_path / "four", **SMALL))
    finally:
        cv2.setNumThreads(threads)
    assert one == four
    assert len(one) == 2 + 6 + 3


def test_another_seed_gives_other_scenes(tmp_path):
    one = files(make_digit_scenes(tmp_path / "one", **SMALL, seed=1))
    two = files(make_digit_scenes(tmp_path / "two", **SMALL, seed=2))
    assert all(one[name] != two[name] for name in one)


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path):
    few = files(make_digit_scenes(tmp_path / "few", num_train=2, num_val=1))
    many = files(make_digit_scenes(tmp_path / "many", num_train=4, num_val=2))
    assert few["train/000001.png"] == many["train/000001.png"]
    assert few["val/000000.png"] == many["val/000000.png"]


def test_train_and_val_share_no_handwritten_sample(root):
    train, val = (
        {annotation["sample"] for annotation in load(root, split)["annotations"]}
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_labels_are_those_of_the_samples(root):
    from sklearn.datasets import load_digits

    target = load_digits().target
    annotations = load(root, "train")["annotations"]
    assert all(target[a["sample"]] == a["category_id"] - 1 for a in annotations)
    assert {a["category_id"] for a in annotations} == set(range(1, 11))


def test_files_are_valid_coco(root):
    for split, number in (("train", 150), ("val", 30)):
        content = load(root, split)
        assert [c["name"] for c in content["categories"]] == [str(n) for n in range(10)]
        assert [c["id"] for c in content["categories"]] == list(range(1, 11))
        assert len(content["images"]) == number
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
        for image in content["images"]:
            pixels = cv2.imread(str(root / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3)
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in content["annotations"])


def test_every_box_lies_inside_its_image(root):
    for annotation in load(root, "train")["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0 and min(width, height) >= 3
        assert x + width <= 128 and y + height <= 128


def test_every_scene_has_its_number_of_digits_but_for_the_few_that_find_no_place(root):
    counts = [len(a) for a in annotations_by_image(load(root, "train")).values()]
    assert min(counts) >= 2 and max(counts) == 7
    assert np.mean(counts) > 4.7  # uniform on 3 to 7 has mean 5


def test_boxes_are_tight_around_what_was_drawn(tmp_path):
    """Against the background alone, digits change every side of their box and nothing outside."""
    root = make_digit_scenes(tmp_path / "x", num_train=20, num_val=0, ambiguous_share=0.0)
    for index, annotations in enumerate(annotations_by_image(load(root, "train")).values()):
        background = draw_background(np.random.default_rng([0, 0, index]), 128)
        scene = cv2.imread(str(root / f"train/{index:06d}.png"))[..., ::-1] / 255
        changed = np.abs(scene - background).max(-1) > 0.03
        for x, y, width, height in (annotation["bbox"] for annotation in annotations):
            patch = changed[y : y + height, x : x + width]
            assert all(side.any() for side in (patch[0], patch[-1], patch[:, 0], patch[:, -1]))
            changed[y : y + height, x : x + width] = False
        assert not changed.any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_ambiguous_digits_is_the_one_asked_for(tmp_path, share):
    root = make_digit_scenes(tmp_path / "x", num_train=120, num_val=0, ambiguous_share=share)
    ambiguity = np.array([a["ambiguity"] for a in load(root, "train")["annotations"]])
    assert np.mean(ambiguity > 0) == pytest.approx(share, abs=0.03)
    assert ambiguity.min() >= 0 and ambiguity.max() <= 1


def test_kinds_are_on_average_the_share_asked_for():
    rng = np.random.default_rng(0)
    kinds = [kind for _ in range(3000) for kind in draw_kinds(rng, 5, 0.37)]
    assert np.mean([kind != "none" for kind in kinds]) == pytest.approx(0.37, abs=0.01)


def test_every_kind_of_ambiguity_occurs_and_agrees_with_the_number(root):
    annotations = load(root, "train")["annotations"]
    kinds = [a["ambiguity_kind"] for a in annotations]
    for kind in AMBIGUITY_KINDS:
        assert kinds.count(kind) >= 0.03 * len(kinds)
    assert all((a["ambiguity_kind"] == "none") == (a["ambiguity"] == 0) for a in annotations)


def test_tiny_digits_are_smaller_than_clean_ones(root):
    sides = {"none": [], "tiny": []}
    for annotation in load(root, "train")["annotations"]:
        sides.get(annotation["ambiguity_kind"], []).append(max(annotation["bbox"][2:]))
    assert max(sides["tiny"]) <= 16 <= min(sides["none"])


def test_clean_digits_are_never_covered(root):
    for annotations in annotations_by_image(load(root, "train")).values():
        for clean in (a for a in annotations if not a["ambiguity"]):
            others = (other for other in annotations if other is not clean)
            assert not any(overlap_of_boxes(clean["bbox"], other["bbox"]) for other in others)


def test_only_overlapping_digits_meet_and_some_do(root):
    met = 0
    for annotations in annotations_by_image(load(root, "train")).values():
        for i, first in enumerate(annotations):
            for second in annotations[i + 1 :]:
                if overlap_of_boxes(first["bbox"], second["bbox"]):
                    met += 1
                    assert {first["ambiguity_kind"], second["ambiguity_kind"]} == {"overlap"}
    assert met >= 5


def test_scenes_on_disk_are_kept_for_the_same_settings_only(tmp_path):
    root = make_digit_scenes(tmp_path / "x", **SMALL)
    marker = root / "train" / "marker"
    marker.touch()
    make_digit_scenes(root, **SMALL)
    assert marker.exists()
    make_digit_scenes(root, **{**SMALL, "num_train": 7})
    assert not marker.exists()
    assert len(load(root, "train")["images"]) == 7


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photos.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no digit scenes"):
        make_digit_scenes(tmp_path, **SMALL)
    assert (tmp_path / "photos.txt").read_text() == "mine"


def test_an_interruption_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    before = files(make_digit_scenes(tmp_path / "x", **SMALL))

    def interrupt(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(digit_scenes, "encode_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(tmp_path / "x", **SMALL, seed=5)
    assert files(tmp_path / "x") == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_second_process_that_was_first_is_no_error(tmp_path, monkeypatch):
    ready = make_digit_scenes(tmp_path / "ready", **SMALL)
    write = digit_scenes._write_split

    def write_while_another_finishes(folder, split, settings):
        write(folder, split, settings)
        if split == "val":
            shutil.copytree(ready, tmp_path / "x")

    monkeypatch.setattr(digit_scenes, "_write_split", write_while_another_finishes)
    monkeypatch.setattr(digit_scenes.shutil, "rmtree", lambda *args, **kwargs: None)
    make_digit_scenes(tmp_path / "x", **SMALL)
    assert files(tmp_path / "x") == files(ready)


def test_the_tool_prints_entries_that_a_config_takes(tmp_path, monkeypatch, capsys):
    arguments = [
        "--output",
        str(tmp_path / "x"),
        "--train",
        "2",
        "--val",
        "1",
        "--image-size",
        "64",
    ]
    monkeypatch.setattr(sys, "argv", ["make_digit_scenes.py", *arguments])
    runpy.run_path(str(ROOT / "tools/make_digit_scenes.py"), run_name="__main__")
    printed = capsys.readouterr().out.split("\n", 1)[1]
    (train, val) = yaml.safe_load(printed)["DATASETS"]["COCO"]
    assert train == ["digit_scenes_train", f"{tmp_path}/x/train.json", f"{tmp_path}/x/train"]
    for (_, json_file, folder), number in ((train, 2), (val, 1)):
        assert len(json.loads(Path(json_file).read_text())["images"]) == number
        assert len(list(Path(folder).iterdir())) == number


def test_no_scenes_are_a_valid_dataset(tmp_path):
    root = make_digit_scenes(tmp_path / "x", num_train=0, num_val=0)
    assert load(root, "train")["images"] == load(root, "val")["annotations"] == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_val": -1}, "num_val"),
        ({"image_size": 32}, "image_size"),
        ({"ambiguous_share": 1.2}, "1.2"),
        ({"digits_per_scene": (4, 3)}, r"\(4, 3\)"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=named):
        make_digit_scenes(tmp_path / "x", **{**SMALL, **wrong})


def test_a_drawn_digit_is_cropped_to_its_ink():
    sample = np.zeros((8, 8))
    sample[2:6, 3:5] = 1
    alpha = draw_digit(sample, height=40, angle=0.1, shear=0.1)
    assert ink_box(alpha) == (0, 0, alpha.shape[1], alpha.shape[0])
    assert alpha.max() == pytest.approx(1)


def test_a_bar_covers_the_share_of_ink_asked_for():
    alpha = np.zeros((64, 64), np.float32)
    alpha[10:40, 20:50] = 1
    bar = bar_over(np.random.default_rng(3), alpha, share=0.4, reach=4)
    assert bar[alpha > 0].mean() == pytest.approx(0.4, abs=0.03)
    rows, columns = np.nonzero(bar)
    assert rows.min() >= 6 and rows.max() <= 43 and columns.min() >= 16 and columns.max() <= 53


@pytest.mark.parametrize(("grey", "contrast"), [(0.0, 0.4), (0.2, 0.4), (0.5, 0.15)])
def test_colours_are_lighter_than_the_backdrop(grey, contrast):
    rng = np.random.default_rng(0)
    for _ in range(20):
        colour = pick_colour(rng, np.full((5, 5, 3), grey))
        assert colour @ [0.299, 0.587, 0.114] - grey >= contrast
