#!/usr/bin/env python
"""Write the student of a run alone, and prove that the file detects as the run does.

    tools/export_student.py output/gkd_R101_R50 --output student.pth

The ending says what is written:

    .pth, .safetensors   the stock detector's weights, for Detectron2
    .ts                  a TorchScript graph, for PyTorch without Detectron2
    .onnx                an ONNX graph (needs the packages onnx and onnxruntime)

Weights must give the run's detections exactly, a graph up to rounding; else nothing is written.
"""

import argparse
import os

from globalkd.analysis.export import export_student


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a run (holds config.yaml and checkpoints)")
    parser.add_argument("--checkpoint", default="model_final.pth", help="file name in the folder")
    parser.add_argument("--output", default="student.pth", help=".pth, .safetensors, .ts or .onnx")
    parser.add_argument("--images", type=int, default=4, help="test images to compare on")
    args = parser.parse_args()
    agreement = export_student(
        args.run, args.output, checkpoint=args.checkpoint, num_images=args.images
    )
    size = os.path.getsize(args.output) / 2**20
    print(
        f"{args.output}: {size:.1f} MB; {agreement.detections} equal detections on "
        f"{agreement.images} images (largest difference: {agreement.box:.2g} pixels, "
        f"{agreement.score:.2g} of score)."
    )


if __name__ == "__main__":
    main()
