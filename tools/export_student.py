#!/usr/bin/env python
"""Write the student of a run alone, and prove that the file detects as the run does.

    tools/export_student.py output/gkd_R101_R50 --output student.pth

The ending says what is written:

    .pth, .safetensors   the stock detector's weights, and NAME_config.yaml, for Detectron2
    .ts                  a TorchScript graph, for PyTorch without Detectron2
    .onnx                an ONNX graph (needs the packages onnx and onnxruntime)

Weights must give the run's detections exactly, a graph up to rounding; else nothing is written.
Where no test image is there, weights are written all the same, read back but not compared.
"""

import argparse
import os

from globalkd.engine.command_line import (
    add_import_argument,
    add_opts_argument,
    import_modules,
    positive,
    user_errors,
)
from globalkd.export import export_student


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a run (holds config.yaml and checkpoints)")
    parser.add_argument("--checkpoint", default="model_final.pth", help="file name in the folder")
    parser.add_argument("--output", default="student.pth", help=".pth, .safetensors, .ts or .onnx")
    parser.add_argument("--images", type=positive, default=4, help="test images to compare on")
    add_import_argument(parser)
    add_opts_argument(parser)
    args = parser.parse_args()
    with user_errors(parser):
        import_modules(args.imports)
    with user_errors(parser, ImportError, RuntimeError):
        agreement = export_student(
            args.run,
            args.output,
            checkpoint=args.checkpoint,
            num_images=args.images,
            opts=args.opts,
        )
    print(f"{args.output}: {os.path.getsize(args.output) / 2**20:.1f} MB; {summary(agreement)}.")


def summary(agreement):
    """What the comparison found, in words."""
    images = f"on {agreement.images} images"
    if agreement.detections == 0:
        return f"detections NOT compared: there are none {images}"
    return (
        f"{agreement.detections} equal detections {images} (largest difference: "
        f"{agreement.box:.2g} pixels, {agreement.score:.2g} of score)"
    )


if __name__ == "__main__":
    main()
