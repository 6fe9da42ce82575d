"""Tables as CSV files and as text for the terminal."""

import csv
from pathlib import Path
from typing import List, Union

from tabulate import tabulate


def write_csv(path: Union[str, Path], rows: List[dict]) -> None:
    """Write dicts with equal keys; floats get four decimals, NaN is an empty cell.

    Args:
        path: the file.
        rows: the keys of the first one are the header; no rows make an empty line.
    """
    with Path(path).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def as_text(rows: List[dict]) -> str:
    """The rows of `write_csv` as aligned columns under their header."""
    cells = [{key: _cell(value) for key, value in row.items()} for row in rows]
    return tabulate(cells, headers="keys", disable_numparse=True)


def _cell(value) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4f}"
    return str(value)
