"""What a check of a configuration collects: text as it comes, warnings, problems."""

import logging
import re
from contextlib import contextmanager
from typing import Callable, Iterator, List, Sequence

#: Loggers whose warnings go into a report.
LOGGERS = ("globalkd", "detectron2", "fvcore")
#: Loggers whose warnings do not: they name each entry that a file of weights lacks or has beyond
#: the model's (`detectors` tells their number), or late SOLVER.STEPS (`check` warns of them).
SAID_OTHERWISE = ("detectron2.checkpoint", "fvcore.common.checkpoint", "detectron2.solver.build")


class CheckReport:
    """What a check found: problems, with which a run fails, and warnings, with which it may not."""

    def __init__(self, echo: Callable[[str], None] = print):
        self.echo = echo
        self.problems: List[str] = []
        self.warnings: List[str] = []

    def section(self, title: str, *lines: str) -> None:
        """Say lines under a title."""
        self.echo("\n".join([f"\n== {title}", *lines]))

    def problem(self, text: str) -> None:
        """Note what makes the run fail; once, however often it is met."""
        if text not in self.problems:
            self.problems.append(text)

    def warn(self, text: str) -> None:
        """Note what the run survives but its author may not have meant."""
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """An exception inside is a problem of the run, and not the end of the check."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            self.problem(f"{name}: {kind}{text}")

    @contextmanager
    def log_warnings(self) -> Iterator[None]:
        """Turn what this package and Detectron2 log as warnings into warnings of the report.

        Such as dropped boxes. Not what the check says in its own words.
        """
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warn(record.getMessage().strip())
        handler.addFilter(lambda record: not _is_said_otherwise(record))
        loggers = [logging.getLogger(name) for name in LOGGERS]
        propagate = [logger.propagate for logger in loggers]
        disabled = logging.root.manager.disable
        for logger in loggers:
            logger.propagate = False
            logger.addHandler(handler)
        logging.disable(logging.INFO)  # Detectron2's trainer prints the whole model
        try:
            yield
        finally:
            logging.disable(disabled)
            for logger, before in zip(loggers, propagate):
                logger.removeHandler(handler)
                logger.propagate = before

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Warnings inside are forgotten: they are of a trial, and not of the run."""
        known = list(self.warnings)
        try:
            yield
        finally:
            self.warnings = known

    def finish(self) -> None:
        """Say all warnings and problems."""
        for title, texts in (("Warnings", self.warnings), ("Problems", self.problems)):
            self.section(f"{title}: {len(texts)}", *(f"* {text}" for text in texts))


def _is_said_otherwise(record: logging.LogRecord) -> bool:
    # Where Detectron2's own handler comes first, it has written its short name into the record.
    name = re.sub(r"^d2\.", "detectron2.", record.name)
    return name.startswith(SAID_OTHERWISE)


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    count = 12
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" * (len(names) > count))
