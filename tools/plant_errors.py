#!/usr/bin/env python
"""Copy a COCO JSON with planted errors, to measure `tools/analyze.py audit` on it.

    tools/plant_errors.py datasets/digit_scenes/val.json val_planted.json --seed 0

Each kept annotation says what was done to it ("planted_error": none, label or box); the true
annotations stand under info.planted_errors.
"""

import argparse
from collections import Counter

from globalkd.analysis.planted_errors import plant_errors
from globalkd.engine.command_line import user_errors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", help="COCO JSON to read")
    parser.add_argument("output", help="COCO JSON to write")
    for kind in ("label", "box", "missing"):
        parser.add_argument(f"--{kind}", type=float, default=0.05, help=f"share of {kind} errors")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    args = parser.parse_args()
    with user_errors(parser):
        changed = plant_errors(
            args.annotations,
            args.output,
            label_share=args.label,
            box_share=args.box,
            missing_share=args.missing,
            seed=args.seed,
        )
    counts = Counter(annotation["planted_error"] for annotation in changed)
    print(f"{args.output}: planted {dict(counts)}")


if __name__ == "__main__":
    main()
