#!/usr/bin/env python
"""Find out before a long run what can be known of it.

    tools/check.py --config-file configs/quick/gkd_R34_R18.yaml [KEY VALUE ...]
    tools/check.py --list

Reports datasets, weights, matched levels, the size of each distillation term in one real step,
seconds a step, memory and a forecast; then warnings, and the problems with which the run would
fail. Exit status 1 if there is a problem. Nothing is written.
"""

import argparse
import sys

from globalkd.checks.check import check_run
from globalkd.checks.components import components_text
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.engine.command_line import (
    add_import_argument,
    import_modules,
    positive,
    user_errors,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", help="the configuration that train_net.py is to run")
    parser.add_argument("--list", action="store_true", help="list what a configuration can name")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs that the run is to have")
    parser.add_argument("--steps", type=positive, default=3, help="training steps to time")
    parser.add_argument(
        "--prototype-images", type=positive, default=64, help="images to make trial prototypes from"
    )
    add_import_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    with user_errors(parser):
        import_modules(args.imports)
    if args.list:
        print(components_text())
        return 0
    if not args.config_file:
        parser.error("--config-file or --list is needed")
    try:
        cfg = load_config(args.config_file, args.opts)
    except (OSError, ValueError) as error:
        print(f"== Problems: 1\n* Configuration: {error}")
        return 1
    fall_back_to_cpu(cfg)
    report = check_run(
        cfg, steps=args.steps, prototype_images=args.prototype_images, num_gpus=args.num_gpus
    )
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
