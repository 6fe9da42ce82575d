"""Results of runs as tables: mean and spread over seeds, paired differences, Markdown and CSV."""

import csv
import functools
import io
import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from scipy.stats import t as student_t

from .matrix import Row, Table, config_digest

Results = Dict[str, dict]  # name of a run -> its result file's content

COLUMNS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_clean": "AP clean",
    "AP_ambiguous": "AP ambiguous",
    "seconds_per_step": "s / step",
}


def read_results(folder: Path) -> Results:
    """The result files of a folder, by the name of their run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def outdated_rows(table: Table, results: Results, root: Path) -> List[str]:
    """Rows with a result whose configuration has been changed since; `root`: the repository."""
    digest = functools.cache(lambda config: config_digest(Path(root, config)))

    def is_outdated(run) -> bool:
        recorded = results.get(run.name, {}).get("config_digest")
        return recorded is not None and recorded != digest(run.config)

    return [row.name for row in table.rows if any(map(is_outdated, row.runs.values()))]


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Dict[str, float]:
    """Mean difference of pairs and half the width of its 95 % confidence interval (Student's t).

    Returns:
        {"mean", "half_width"}; half_width is NaN for a single pair.
    """
    differences = [a - b for a, b in zip(values, baseline)]
    count = len(differences)
    half_width = math.nan
    if count > 1:
        quantile = float(student_t.ppf(0.975, count - 1))
        half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": statistics.mean(differences), "half_width": half_width}


def summarize_rows(table: Table, results: Results) -> List[dict]:
    """One record for each row: its seeds, its metrics, and its difference from the baseline.

    Runs without a result are left out, and `seeds` says which are there.
    """
    baseline = next(row for row in table.rows if row.name == table.baseline)
    teachers = {run.teacher for row in table.rows for run in row.runs.values()}
    return [_summarize(row, baseline, teachers, table.metric, results) for row in table.rows]


def _summarize(row: Row, baseline: Row, teachers: set, metric: str, results: Results) -> dict:
    found = {seed: results[run.name] for seed, run in row.runs.items() if run.name in results}
    metrics = {
        name: [r["metrics"][name] for r in found.values()]
        for name in COLUMNS
        if found and all(name in r["metrics"] for r in found.values())
    }
    pairs = [
        (found[seed]["metrics"][metric], results[run.name]["metrics"][metric])
        for seed, run in baseline.runs.items()
        if row is not baseline and seed in found and run.name in results
    ]
    is_teacher = not teachers.isdisjoint(row.runs.values())
    paired = pairs and not is_teacher and len(pairs) == len(baseline.runs)  # every seed of both
    difference = paired_difference(*zip(*pairs)) if paired else None
    return {
        "name": row.name,
        "seeds": sorted(found),
        "missing": sorted(set(row.runs) - set(found)),
        "metrics": metrics,
        "is_teacher": is_teacher,
        "difference": difference,
        "paper": row.paper,
    }


def render_markdown(table: Table, results: Results, root: Optional[Path] = None) -> str:
    """The table, its note, what is missing, and what is outdated where `root` is given."""
    records = summarize_rows(table, results)
    lines = [f"### {table.title}", "", *([table.note.strip(), ""] if table.note else [])]
    lines += _lines_by_value(table, records) if table.sweep else _lines_by_row(table, records)
    lines += ["", _footnote(table, records)]
    if root and (outdated := outdated_rows(table, results, root)):
        lines[-1] += f" Of an earlier version of their configuration: {', '.join(outdated)}."
    return "\n".join(lines) + "\n"


def _lines_by_row(table: Table, records: List[dict]) -> List[str]:
    """Header and rows: each row's metrics and its difference from the baseline."""
    columns = [name for name in COLUMNS if any(name in r["metrics"] for r in records)]
    papers = any(r["paper"] is not None for r in records)
    header = ["", *(COLUMNS[c] for c in columns), f"{table.metric} - {table.baseline}"]
    header += [f"paper ({table.paper})"] if papers else []
    lines = [_line(header), "|---" * len(header) + "|"]
    for record in (r for r in records if r["metrics"] or papers):
        cells = [record["name"]]
        cells += [mean_and_spread(record["metrics"].get(column)) for column in columns]
        cells.append(_difference(record["difference"]))
        if papers:
            cells.append("" if record["paper"] is None else f"{record['paper']:g}")
        lines.append(_line(cells))
    return lines


def _lines_by_value(table: Table, records: List[dict]) -> List[str]:
    """Header and rows of a sweep: the metric by value of its key, the best of a row in bold.

    A value that is planned and not run has "-", one that the row does not have an empty cell.
    """
    values = list(dict.fromkeys(row.swept[1] for row in table.rows if row.swept))
    header = [f"{table.metric}, by `{table.sweep['key']}`", *(f"{value:g}" for value in values)]
    lines = [_line(header), "|---" * len(header) + "|"]
    metrics: Dict[str, Dict[Optional[float], Optional[Sequence[float]]]] = {}  # row, value -> seeds
    for row, record in zip(table.rows, records):
        name, value = row.swept or (row.name, None)
        metrics.setdefault(name, {})[value] = record["metrics"].get(table.metric)
    for name, own in metrics.items():
        if not (measured := [seeds for seeds in own.values() if seeds]):
            continue
        best = mean_and_spread(max(measured, key=statistics.mean))
        if None in own:  # not swept
            cells = [f"{name}: {best}", *[""] * len(values)]
        else:
            cells = [name, *(mean_and_spread(own[v]) if v in own else "" for v in values)]
            cells = [f"**{c}**" if c == best else c for c in cells]
        lines.append(_line(cells))
    return lines


def render_summary(tables: Dict[str, Tuple[Table, Results]], rows: Sequence[str]) -> str:
    """One line a table: the metric of some rows and, below it, their difference from the baseline.

    Args:
        tables: what a line is called -> a table and its results.
        rows: the columns, by the name of their row; a table without such a row has "-" there. A
            row that lacks seeds says which it has.
    """
    metric = next(iter(tables.values()))[0].metric
    lines = [_line([metric, *rows]), "|---" * (len(rows) + 1) + "|"]
    for name, (table, results) in tables.items():
        records = {record["name"]: record for record in summarize_rows(table, results)}
        lines.append(_line([name, *(_summary_cell(records.get(row), metric) for row in rows)]))
    return "\n".join(lines) + "\n"


def detector_rows(
    results: Dict[str, Dict[str, Sequence[float]]],
) -> Tuple[List[str], List[List[str]]]:
    """Header and rows of a table of detectors.

    Args:
        results: what a detector is called -> metric -> its values, one for each seed.
    """
    header = ["detector", *COLUMNS.values()]
    rows = [[name, *(mean_and_spread(own[c]) for c in COLUMNS)] for name, own in results.items()]
    return header, rows


def render_detectors(results: Dict[str, Dict[str, Sequence[float]]]) -> str:
    """`detector_rows` in Markdown."""
    header, rows = detector_rows(results)
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, rows)]) + "\n"


def _summary_cell(record: Optional[dict], metric: str) -> str:
    if record is None:
        return "-"
    seeds = f" (seeds {record['seeds']})" if record["seeds"] and record["missing"] else ""
    difference = _difference(record["difference"])
    value = mean_and_spread(record["metrics"].get(metric)) + seeds
    return f"{value}<br>{difference}" if difference else value


def _footnote(table: Table, records: List[dict]) -> str:
    shown = [r for r in records if r["difference"] or r["name"] == table.baseline]
    count = max((len(r["seeds"]) for r in shown), default=0)
    text = f"Mean ± standard deviation over {count} seeds"
    if not table.sweep:
        text += "; differences are paired by seed, with 95 % confidence intervals (Student's t)"
    text += "."
    if count < 2:
        text = "One seed: the spread is not known."
    elif count == 2 and not table.sweep:
        text += " With two seeds such an interval is 12.7 standard errors to each side: a hint."
    missing = [f"{r['name']} (seeds {r['missing']})" for r in records if r["missing"]]
    return text + (f" Not run yet: {', '.join(missing)}." if missing else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def mean_and_spread(values: Optional[Sequence[float]]) -> str:
    """A table's cell: mean and, of several, standard deviation; "-" without values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _difference(difference: Optional[dict]) -> str:
    if difference is None:
        return ""
    if math.isnan(difference["half_width"]):
        return f"{difference['mean']:+.2f}"
    return f"{difference['mean']:+.2f} ± {difference['half_width']:.2f}"


def render_csv(table: Table, results: Results) -> str:
    """One line for each run: row, seed, metrics, command, commit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "row", "seed", *COLUMNS, "commit", "command"])
    for row in table.rows:
        for seed, run in row.runs.items():
            if run.name in results:
                result = results[run.name]
                metrics = [result["metrics"].get(name, "") for name in COLUMNS]
                line = [table.name, row.name, seed, *metrics, result["commit"], result["command"]]
                writer.writerow(line)
    return stream.getvalue()
