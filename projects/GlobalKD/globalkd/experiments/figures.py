"""A table of results as a picture: a point for each row and seed."""

import statistics

from matplotlib.figure import Figure
from PIL import Image

from .matrix import Table
from .tables import Results, render_markdown, summarize_rows

COLOURS = {True: "#d62728", False: "#1f77b4"}  # this project's two papers, and others
OURS = ("GlobalKD", "DRKD")  # how their rows begin


def draw_table(path, table: Table, results: Results) -> None:
    """Draw a table's metric by row, the best row on top: large the mean, small each seed.

    The baseline and the teacher are lines through all rows. The PNG says in its metadata what it
    was drawn from: see `drawn_from`.

    Args:
        path: the file to write.
        table, results: see `summarize_rows`. Rows without a result are left out.
    """
    records = [r for r in summarize_rows(table, results) if table.metric in r["metrics"]]
    values = {r["name"]: r["metrics"][table.metric] for r in records}
    means = {name: statistics.mean(own) for name, own in values.items()}
    lines = [r["name"] for r in records if r["is_teacher"] or r["name"] == table.baseline]
    rows = sorted((name for name in values if name not in lines), key=means.get)
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(rows)), layout="tight")
    axis = figure.subplots()
    for y, name in enumerate(rows):
        colour = COLOURS[name.startswith(OURS)]
        axis.plot(values[name], [y] * len(values[name]), ".", color=colour, alpha=0.4, markersize=5)
        axis.plot(means[name], y, "o", color=colour, markersize=6)
    for name, style in zip(lines, ("--", ":", "-.")):
        axis.axvline(means[name], color="#7f7f7f", linestyle=style, label=name)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xlabel(table.metric)
    axis.set_title(table.title, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    if lines:
        axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Description": render_markdown(table, results)})


def drawn_from(path, table: Table, results: Results) -> bool:
    """Whether a picture exists and shows these results."""
    try:
        with Image.open(path) as image:
            return image.text.get("Description") == render_markdown(table, results)
    except FileNotFoundError:
        return False
