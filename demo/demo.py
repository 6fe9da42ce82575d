#!/usr/bin/env python
"""Run a student, or any detector of a configuration here, on images, folders or a video.

    demo/demo.py --config-file output/gkd_R101_R50/config.yaml --input photos/ --output found/

As in Detectron2's demo; no teacher is needed. Written are a picture for each image (or a video)
and detections.json. The weights are those of the run: model_final.pth in OUTPUT_DIR, unless
`--opts MODEL.WEIGHTS ...` says otherwise.
"""

import argparse
import glob
import json
import logging
import os
from pathlib import Path

import cv2
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from globalkd import register_datasets
from globalkd.config_reading import load_config
from globalkd.engine.trainer import fall_back_to_cpu
from globalkd.safe_loading import SafeCheckpointer

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


def class_names(cfg):
    """Names of the classes by the datasets of the config; empty where those are not here."""
    try:
        register_datasets(cfg)
    except FileNotFoundError as error:
        logger.warning(f"{error}. Classes are shown as numbers where no dataset names them.")
    listed = {entry[0]: entry[3] for entry in cfg.DATASETS.VOC}
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = MetadataCatalog.get(dataset).get("thing_classes") or listed.get(dataset)
        if names:
            return list(names)
    return []


def list_images(inputs):
    """The image files that paths, folders and glob patterns stand for."""
    files = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        if not found:
            raise FileNotFoundError(f"--input {name}: no image there.")
        files += found
    twice = {p.name for p in files if [q.name for q in files].count(p.name) > 1}
    if twice:
        raise ValueError(f"--input holds files of one name, such as {min(twice)}: run them apart.")
    return files


def as_json(instances, names):
    """Detections as a list of dicts: category_id, category, score, bbox (x, y, width, height)."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    rows = zip(instances.pred_classes.tolist(), instances.scores.tolist(), boxes.tolist())
    return [
        {
            "category_id": label,
            "category": names[label] if names else str(label),
            "score": round(score, 4),
            "bbox": [round(x, 2) for x in box],
        }
        for label, score, box in rows
    ]


class Demo:
    """A detector that draws what it finds."""

    def __init__(self, cfg):
        without = cfg.clone()
        without.defrost()
        without.MODEL.WEIGHTS = ""  # Detectron2's predictor would run code that is in the file
        self.predictor = DefaultPredictor(without)
        SafeCheckpointer(self.predictor.model, allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE).load(
            cfg.MODEL.WEIGHTS
        )
        self.names = class_names(cfg)
        self.metadata = MetadataCatalog.get("__globalkd_demo")
        if self.names:
            self.metadata.set(thing_classes=self.names)

    def __call__(self, image):
        """(H, W, 3) BGR image -> the picture, likewise, and the detections for JSON."""
        found = self.predictor(image)["instances"].to("cpu")
        drawing = Visualizer(image[:, :, ::-1], self.metadata).draw_instance_predictions(found)
        return drawing.get_image()[:, :, ::-1], as_json(found, self.names)


def run_on_images(demo, files, folder):
    """Detections of every file, in order; a picture of each is written into the folder."""
    results = []
    for path in tqdm(files, unit="image", disable=None):
        image = read_image(str(path), format="BGR")
        picture, detections = demo(image)
        cv2.imwrite(str(folder / path.name), picture)
        size = {"width": image.shape[1], "height": image.shape[0]}
        results.append({"file_name": str(path), **size, "detections": detections})
    return results


def run_on_video(demo, path, folder):
    """Detections of every frame, in order; the drawn frames are written as one MP4 file."""
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise FileNotFoundError(f"--video-input {path}: OpenCV cannot read it.")
    size = int(video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
    target = str(folder / f"{Path(path).stem}.mp4")
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
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides; the last option"
    )
    return parser


def main():
    args = get_parser().parse_args()
    setup_logger(name="fvcore")
    setup_logger(name="globalkd")
    demo = Demo(setup(args))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if args.video_input:
        results = run_on_video(demo, args.video_input, folder)
    else:
        results = run_on_images(demo, list_images(args.input), folder)
    (folder / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    count = sum(len(r["detections"]) for r in results)
    print(f"{count} detections in {len(results)} images; pictures and detections.json in {folder}")


if __name__ == "__main__":
    main()
