#!/usr/bin/env python
"""Look at trained runs: `tools/analyze.py PART ...`; `tools/analyze.py PART --help` for one part.

Each part is a module of `globalkd.analysis` with `add_arguments(parser)` and `main(args)`. It reads
the output folder of a run (config.yaml and a checkpoint) and writes plain files.
"""

import argparse
import inspect

from detectron2.utils.logger import setup_logger

from globalkd.analysis import audit, compare, discrepancy, gallery, noise, reliability, report
from globalkd.engine.command_line import add_import_argument, import_modules, user_errors

PARTS = {
    "audit": audit,
    "discrepancy": discrepancy,
    "gallery": gallery,
    "noise": noise,
    "reliability": reliability,
    "compare": compare,
    "report": report,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="PART", required=True)
    for name, part in PARTS.items():
        text = inspect.getdoc(part)
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_import_argument(command)
        part.add_arguments(command)
        command.set_defaults(main=part.main)
    args = parser.parse_args(argv)
    setup_logger(name="detectron2")
    setup_logger(name="globalkd")
    with user_errors(parser):
        import_modules(args.imports)
        args.main(args)


if __name__ == "__main__":
    main()
