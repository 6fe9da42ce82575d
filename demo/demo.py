#!/usr/bin/env python
"""Run a student, or any detector of a configuration here, on images, folders or a video.

    demo/demo.py --config-file output/gkd_R101_R50/config.yaml --input photos/ --output found/

As in Detectron2's demo; no teacher is needed. Written are a picture for each image (or a video)
and detections.json. Exit status 1 if a file could not be read or written. The weights are those of
the run: model_final.pth in OUTPUT_DIR, unless `--opts MODEL.WEIGHTS ...` says otherwise.
"""

import argparse
import glob
import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb
from tqdm import tqdm

from globalkd.analysis.runs import load_whole, warn_if_not_last
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.data.class_names import class_names
from globalkd.data.unreadable import UNREADABLE
from globalkd.engine.command_line import (
    add_import_argument,
    add_opts_argument,
    import_modules,
    user_errors,
)

logger = logging.getLogger("globalkd.demo")

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def setup(args):
    """The configuration of the detector alone, with the weights that it ends a run with."""
    cfg = load_config(args.config_file, args.opts)
    fall_back_to_cpu(cfg)
    cfg.MODEL.GLOBALKD.ENABLED = False
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    if "MODEL.WEIGHTS" not in args.opts:  # the config names what the training starts from
        cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        if not os.path.isfile(cfg.MODEL.WEIGHTS):
            raise FileNotFoundError(
                f"There is no {cfg.MODEL.WEIGHTS}. Say which weights to use: "
                "--opts MODEL.WEIGHTS path/to/checkpoint.pth"
            )
    cfg.freeze()
    return cfg


def known_names(cfg):
    """Names of the classes by the datasets of the config; empty where none of them is here."""
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if names := class_names(cfg, dataset):
            return names
    logger.warning("No dataset of the config is here to name the classes: shown are numbers.")
    return []


def list_images(inputs):
    """The image files that paths, folders and glob patterns stand for."""
    files = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
            below = sum(p.suffix.lower() in IMAGES for p in path.rglob("*")) - len(found)
            if found and below:
                logger.warning(
                    f"--input {name}: {below} images in subfolders are left out; "
                    f"'{name}/**/*.jpg' has them."
                )
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            deeper = (
                f" Its subfolders are not searched: '{name}/**/*.jpg'." if path.is_dir() else ""
            )
            raise FileNotFoundError(f"--input {name}: no image there.{deeper}")
        files += found
    name, times = Counter(path.name for path in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"--input holds files of one name, such as {name}: run them apart.")
    return files


def refuse_inputs_as_targets(inputs, targets):
    """Raise ValueError where a file to write is one of the inputs, under whatever name."""

    def identity(path):
        status = os.stat(path)
        return status.st_dev, status.st_ino

    known = {identity(path): path for path in inputs if os.path.exists(path)}
    for target in filter(os.path.exists, targets):
        if path := known.get(identity(target)):
            raise ValueError(f"--output: {target} would replace the input {path}.")


def name_classes(names, labels):
    """Names of all classes up to the largest label: a number where there is no name."""
    return [*names, *map(str, range(len(names), 1 + max(labels, default=-1)))]


def as_json(instances, names):
    """Detections as a list of dicts: label, category, score, bbox (x, y, width, height)."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    labels = instances.pred_classes.tolist()
    names = name_classes(names, labels)
    rows = zip(labels, instances.scores.tolist(), boxes.tolist())
    return [
        {
            "label": label,
            "category": names[label],
            "score": round(score, 4),
            "bbox": [round(x, 2) for x in box],
        }
        for label, score, box in rows
    ]


class Drawing(Visualizer):
    """Detectron2's drawing, with OpenCV's letters: Chinese and Cyrillic ones are among them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.texts = []

    def draw_text(self, text, position, *, font_size, color, **_):
        """Keep a label for `picture`: the corner to write it at, its size in points."""
        self.texts.append((text, position, font_size * self.output.dpi / 72, to_rgb(color)))

    def picture(self):
        """(H, W, 3) RGB: what is drawn, and above it the labels, each inside the image."""
        canvas = self.output.get_image().copy()
        for text, (x, y), pixels, colour in self.texts:
            scale = pixels / 26  # about OpenCV's letters of scale 1
            width, height = cv2.getTextSize(text, 0, scale, 1)[0]
            x = int(max(min(x, self.output.width - width), 0))
            y = int(max(min(y, self.output.height - height - 4), 0))
            cv2.rectangle(canvas, (x, y), (x + width, y + height + 4), (0, 0, 0), -1)
            ink = (127.5 * (1 + np.array(colour))).tolist()  # light, as the patch is black
            cv2.putText(canvas, text, (x, y + height + 1), 0, scale, ink, 1, cv2.LINE_AA)
        return canvas


class Demo:
    """A detector that draws what it finds."""

    def __init__(self, cfg):
        without = cfg.clone()
        without.defrost()
        without.MODEL.WEIGHTS = ""  # Detectron2's predictor would run code that is in the file
        self.predictor = DefaultPredictor(without)
        warn_if_not_last(Path(cfg.MODEL.WEIGHTS))
        load_whole(
            self.predictor.model,
            cfg.MODEL.WEIGHTS,
            allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE,
        )
        self.names = known_names(cfg)

    def __call__(self, image):
        """(H, W, 3) BGR image -> the picture, likewise, and the detections for JSON."""
        found = self.predictor(image)["instances"].to("cpu")
        names = name_classes(self.names, found.pred_classes.tolist())
        drawing = Drawing(image[:, :, ::-1], Metadata(thing_classes=names))
        drawing.draw_instance_predictions(found)
        return drawing.picture()[:, :, ::-1], as_json(found, self.names)


def run_on_images(demo, files, folder):
    """Write a picture of each file into the folder; what fails is named and left out.

    Returns:
        The detections in the files that could be read, in order, and the number of failures.
    """
    results, failures = [], 0
    for path in tqdm(files, unit="image", disable=None):
        try:
            image = read_image(str(path), format="BGR")
        except UNREADABLE as error:
            logger.error(f"{path} cannot be read: {type(error).__name__}: {error}")
            failures += 1
            continue
        picture, detections = demo(image)
        if not write_picture(folder / path.name, picture):
            logger.error(f"{folder / path.name} cannot be written; its detections are kept.")
            failures += 1
        size = {"width": image.shape[1], "height": image.shape[0]}
        results.append({"file_name": str(path), **size, "detections": detections})
    return results, failures


def write_picture(path, picture):
    """Whether a picture could be written: OpenCV must know its ending, and there must be room."""
    try:
        return cv2.imwrite(str(path), picture)
    except cv2.error:
        return False


def video_target(path, folder):
    """The MP4 file that is made of a video."""
    return folder / f"{Path(path).stem}.mp4"


def run_on_video(demo, path, folder):
    """Detections of every frame, in order; the drawn frames are written as one MP4 file."""
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise FileNotFoundError(f"--video-input {path}: OpenCV cannot read it.")
    size = int(video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
    target = str(video_target(path, folder))
    rate = video.get(cv2.CAP_PROP_FPS)
    writer = cv2.VideoWriter(target, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    results = []
    with tqdm(total=int(video.get(cv2.CAP_PROP_FRAME_COUNT)), unit="frame", disable=None) as bar:
        while True:
            more, frame = video.read()
            if not more:
                break
            picture, detections = demo(frame)
            writer.write(cv2.resize(picture, size))
            results.append({"frame": len(results), "detections": detections})
            bar.update()
    video.release()
    writer.release()
    return results


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a run's config.yaml, or any config")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, folders or glob patterns")
    source.add_argument("--video-input", help="a video file")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="least score shown")
    add_import_argument(parser)
    add_opts_argument(parser)
    return parser


def main():
    parser = get_parser()
    args = parser.parse_args()
    setup_logger(name="fvcore")
    setup_logger(name="globalkd")
    with user_errors(parser):
        return run(args)


def run(args):
    """Detect, draw and write; returns the exit status."""
    import_modules(args.imports)
    cfg, folder = setup(args), Path(args.output)
    if args.video_input:
        files, targets = [args.video_input], [video_target(args.video_input, folder)]
    else:
        files = list_images(args.input)
        targets = [folder / path.name for path in files]
    refuse_inputs_as_targets(files, [*targets, folder / "detections.json"])
    demo = Demo(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    if args.video_input:
        results, failures = run_on_video(demo, args.video_input, folder), 0
    else:
        results, failures = run_on_images(demo, files, folder)
    (folder / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    count = sum(len(r["detections"]) for r in results)
    print(f"{count} detections in {len(results)} images; pictures and detections.json in {folder}")
    if failures:
        print(f"{failures} files could not be read or written: see above.")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
