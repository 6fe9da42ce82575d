"""What the commands have in common: `--import MODULE`, and how they meet a mistake of the user's.

The modules register losses or other parts. The command line alone names them; a configuration does
not: reading one runs no code.
"""

import argparse
import importlib
import os
import sys
import traceback
from contextlib import contextmanager, suppress
from typing import Callable, Iterator, Sequence, Type

from detectron2.utils import comm


@contextmanager
def user_errors(parser: argparse.ArgumentParser, *more: Type[Exception]) -> Iterator[None]:
    """End the command with status 2 and one message, no traceback, where its input is wrong.

    Args:
        more: exceptions beside OSError and ValueError whose messages tell the user enough.
    """
    try:
        yield
    except (OSError, ValueError, *more) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


@contextmanager
def user_errors_of_a_run(
    folder: str, meanwhile: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """As `user_errors`, in the process of a run; the traceback goes to its log.txt.

    With several processes the error is passed on: whoever started them tells of it. Detectron2 also
    tells of wrong values by assertions, and of unknown names by a KeyError.

    Args:
        folder: OUTPUT_DIR.
        meanwhile: whether an error may still be of the user's input.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, AssertionError, ImportError) as error:
        if comm.get_world_size() > 1 or not meanwhile():
            raise
        with suppress(OSError), open(os.path.join(folder, "log.txt"), "a") as log:
            traceback.print_exc(file=log)
            print(f"The traceback is in {log.name}.", file=sys.stderr)
        text = error
        if isinstance(error, (KeyError, AssertionError)):
            text = f"{type(error).__name__}: {error}"
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
        raise SystemExit(2) from error


def positive(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer of 1 or more")
    return int(text)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--import`, whose values `import_modules` takes as `args.imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers your own parts: my_project.norm_loss; repeatable",
    )


def add_opts_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--opts KEY VALUE ...`, overrides of a configuration; it takes all that follows it."""
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides; the last option"
    )


def import_modules(names: Sequence[str]) -> None:
    """Import modules by their dotted names, from the working directory or installed.

    To be called in each process: one that is spawned does not have what its parent imported.

    Args:
        names: such as ["my_project.norm_loss"]; empty imports nothing.

    Raises:
        ValueError: there is no such module. What the module itself raises is passed on.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"--import {name}: it must be a dotted name, my_project.norm_loss.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # one that the module imports
            raise ValueError(
                f"--import {name}: there is no module {error.name!r}, neither in the working "
                f"directory ({os.getcwd()}) nor installed."
            ) from error
