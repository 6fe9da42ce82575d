"""What a configuration can name: losses, prototype generators, projections, reliability weights."""

import inspect
import textwrap
from typing import Dict, List, Tuple

from tabulate import tabulate

from ..losses import DISTILL_LOSS_REGISTRY
from ..prototypes.bank import PROJECTIONS, RELIABILITIES
from ..prototypes.generators import PROTOTYPE_GENERATOR_REGISTRY


def list_components() -> Dict[str, List[Tuple[str, str]]]:
    """Configuration key -> the names that it takes, each with the first line of its docstring."""
    choices = {
        "MODEL.GLOBALKD.LOSSES": dict(sorted(DISTILL_LOSS_REGISTRY)),
        "MODEL.GLOBALKD.PROTOTYPES.GENERATOR": dict(PROTOTYPE_GENERATOR_REGISTRY),
        "MODEL.GLOBALKD.PROJECTION.TYPE": PROJECTIONS,
        "MODEL.GLOBALKD.RELIABILITY.TYPE": RELIABILITIES,
    }
    return {
        key: [(name, _first_line(thing)) for name, thing in named.items()]
        for key, named in choices.items()
    }


def _first_line(thing) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")  # its own: not that of its base class
    return " ".join(text.split("\n\n")[0].split())


def components_text() -> str:
    """`list_components` as text, one block a key."""
    blocks = [
        f"{key}\n" + textwrap.indent(tabulate(rows, tablefmt="plain"), "  ")
        for key, rows in list_components().items()
    ]
    return "\n\n".join(blocks)
