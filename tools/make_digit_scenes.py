#!/usr/bin/env python
"""Write digit scenes: real handwritten digits on textured backgrounds, as COCO JSON and PNG."""

import argparse

from globalkd.data import make_digit_scenes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="datasets/digit_scenes", help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="training scenes")
    parser.add_argument("--val", type=int, default=200, help="validation scenes")
    parser.add_argument("--test", type=int, default=0, help="test scenes, of val's digits")
    parser.add_argument("--image-size", type=int, default=128, help="side of a scene in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument(
        "--ambiguous-share", type=float, default=0.3, help="expected share of ambiguous digits"
    )
    args = parser.parse_args()
    root = make_digit_scenes(
        args.output,
        num_train=args.train,
        num_val=args.val,
        num_test=args.test,
        image_size=args.image_size,
        seed=args.seed,
        ambiguous_share=args.ambiguous_share,
    )
    print("For a config:\nDATASETS:\n  COCO:")
    for split in ("train", "val", *(["test"] if args.test else [])):
        print(f'    - ["digit_scenes_{split}", "{root}/{split}.json", "{root}/{split}"]')


if __name__ == "__main__":
    main()
