#!/usr/bin/env python
"""Write the student of a distilled run alone, and prove that stock Detectron2 reads it.

    tools/export_student.py output/gkd_R101_R50 --output student.pth

The file holds the stock detector's weights (`.pth` for Detectron2's checkpointer, or
`.safetensors`). It is loaded back into the stock meta-architecture, and its detections on test
images must equal the run's, else nothing is written.
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
    parser.add_argument("--output", default="student.pth", help=".pth or .safetensors")
    parser.add_argument("--images", type=int, default=4, help="test images to compare on")
    args = parser.parse_args()
    count = export_student(
        args.run, args.output, checkpoint=args.checkpoint, num_images=args.images
    )
    size = os.path.getsize(args.output) / 2**20
    print(f"{args.output}: {size:.1f} MB; {count} equal detections on {args.images} images.")


if __name__ == "__main__":
    main()
