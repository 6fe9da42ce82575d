"""What is run: a table is a list of rows (a configuration and overrides), run with several seeds.

Tables are YAML files in `results/tables/`. All students of a table share one teacher and one start,
as students of ImageNet weights do: rows differ by what they say alone, seeds by the order of the
data and by what is drawn. `teacher` and `start` are configurations, or `{config: ..., opts: ...,
start: ...}` where they have overrides or begin with another training's weights. A table's own
`opts` come before those of each of its trainings. The same run of two tables is run once.

`sweep: {key: KEY, values: [...], opts: [...]}` runs each row that has a teacher once for each value
of the key, with the sweep's `opts` before it: a table of rows by values. A row's own `values` take
the place of the sweep's.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from detectron2.config import CfgNode

TABLE_KEYS = {
    *("title", "note", "data", "results", "teacher", "start", "opts"),
    *("baseline", "metric", "paper", "rows", "sweep"),
}
ROW_KEYS = {"name", "config", "opts", "teacher", "start", "paper", "values"}
NEEDED_KEYS = {"config", "opts", "start"}
SWEEP_KEYS = {"key", "values", "opts"}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        config: path of its configuration, relative to the repository.
        seed: SEED.
        opts: further KEY VALUE pairs, the table's first.
        teacher, start: trainings whose final weights it needs.
    """

    config: str
    seed: int
    opts: Tuple[str, ...] = ()
    teacher: Optional["Run"] = None
    start: Optional["Run"] = None

    @property
    def name(self) -> str:
        """Name of its folder and of its result: configuration, overrides' digest, seed."""
        stem = str(Path(self.config).with_suffix("")).removeprefix("configs/").replace("/", "-")
        about = [*self.opts]
        about += [run.name for run in self.needs]
        digest = hashlib.sha1("\0".join(about).encode()).hexdigest()[:6]
        return f"{stem}{f'-{digest}' if about else ''}_seed{self.seed}"

    @property
    def needs(self) -> List["Run"]:
        """The trainings that must be there before it."""
        return [run for run in (self.teacher, self.start) if run]

    @property
    def depth(self) -> int:
        """How many trainings stand before it, one after the other."""
        return max((1 + run.depth for run in self.needs), default=0)

    def options(self, output: Path) -> List[str]:
        """KEY VALUE pairs of its command; weights lie in folders below `output`."""
        opts = ["SEED", str(self.seed), *self.opts]
        if self.start:
            opts += ["MODEL.WEIGHTS", str(output / self.start.name / "model_final.pth")]
        if self.teacher:
            weights = str(output / self.teacher.name / "model_final.pth")
            opts += ["MODEL.GLOBALKD.TEACHER.WEIGHTS", weights]
        return opts


@dataclass
class Row:
    """A row of a table: its name, its runs by seed, and the paper's value where there is one.

    Of a sweep's row, one for each value: `swept` is its name in the file, and the value.
    """

    name: str
    runs: Dict[int, Run]
    paper: Optional[float] = None
    swept: Optional[Tuple[str, float]] = None


@dataclass
class Table:
    """A matrix of runs.

    Attributes:
        title, note: for the reader.
        data: name of the data set, see `DATA` of tools/reproduce.py.
        rows: in the order of the table.
        results: folder of its trainings and of its result files; tables in one folder share their
            runs. By default the name of `data`; another one for what another machine ran, with
            another teacher.
        baseline: name of the row that the others are compared with, seed by seed.
        metric: the metric of that comparison.
        paper: what the rows' paper values are, for example "AP50, VOC 07+12".
        sweep: the key, its values and further overrides of rows with a teacher; empty for none.
    """

    title: str
    data: str
    rows: List[Row]
    baseline: str
    metric: str = "AP"
    paper: str = ""
    note: str = ""
    results: str = ""
    name: str = ""
    sweep: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.results = self.results or self.data

    def runs(self) -> List[Run]:
        """Every training, those that others need first; each once."""
        found: Dict[str, Run] = {}

        def add(run: Run) -> None:
            for needed in run.needs:
                add(needed)
            found.setdefault(run.name, run)

        for row in self.rows:
            for run in row.runs.values():
                add(run)
        return sorted(found.values(), key=lambda run: (run.depth, run.seed))


def config_digest(path: Path) -> str:
    """Digest of what a configuration and its bases say; comments and order do not count."""
    settings = CfgNode.load_yaml_with_base(str(path))
    settings.pop("OUTPUT_DIR", None)
    return hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def load_table(path: Path, seeds: int) -> Table:
    """Read a table's YAML file.

    Args:
        path: the file.
        seeds: 1 to this number are run for each row.

    Raises:
        FileNotFoundError: no such table; the message lists those that there are.
        ValueError: an unknown key, or a row without a name or configuration.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"There is no table '{path.stem}'. There are: {known}.")
    content = yaml.safe_load(path.read_text())
    _check_keys(path, "", content, TABLE_KEYS, {"title", "data", "baseline", "rows"})
    if "sweep" in content:
        _check_keys(path, "sweep: ", content["sweep"], SWEEP_KEYS, {"key", "values"})
    rows = [swept for row in content["rows"] for swept in _read_row(path, content, row, seeds)]
    names = [row.name for row in rows]
    if content["baseline"] not in names or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: the rows' names must differ and 'baseline' be one of them; names are {names},"
            f" baseline is {content['baseline']!r}."
        )
    texts = {k: v for k, v in content.items() if k not in ("rows", "teacher", "start", "opts")}
    return Table(rows=rows, name=path.stem, **texts)


def _read_row(path: Path, table: dict, row: dict, seeds: int) -> List[Row]:
    """A row; where the table has a sweep and the row a teacher, one for each value."""
    _check_keys(path, f"row {row.get('name')!r}: ", row, ROW_KEYS, {"name", "config"})
    teacher, start = (
        _read_needed(path, table, row.get(key, table.get(key))) for key in ("teacher", "start")
    )
    if teacher and row["config"] == teacher.config:  # the teacher's own row
        if "opts" in row and _read_opts(table, row) != teacher.opts:
            raise ValueError(
                f"{path}: row {row['name']!r} has the teacher's config and other opts. The "
                "teacher's belong to 'teacher'; another training of that config needs "
                "teacher: false."
            )
        return [Row(row["name"], {1: teacher}, row.get("paper"))]

    def of(name: str, opts: Tuple[str, ...], swept=None) -> Row:
        runs = {
            seed: Run(row["config"], seed, opts, teacher, start) for seed in range(1, seeds + 1)
        }
        return Row(name, runs, row.get("paper"), swept)

    sweep = table.get("sweep")
    if "values" in row and not (sweep and teacher):
        raise ValueError(
            f"{path}: row {row['name']!r} has 'values', which are of a sweep's rows with a teacher."
        )
    if not (sweep and teacher):
        return [of(row["name"], _read_opts(table, row))]
    further = tuple(map(str, sweep.get("opts", ())))
    return [
        of(
            f"{row['name']}, {sweep['key']} {value:g}",
            (*_read_opts(table, row), *further, sweep["key"], str(value)),
            swept=(row["name"], value),
        )
        for value in row.get("values", sweep["values"])
    ]


def _read_needed(path: Path, table: dict, entry: Any) -> Optional[Run]:
    """A teacher or a start: a configuration, or one with overrides or a start; False for none."""
    if not entry:
        return None
    if isinstance(entry, str):
        entry = {"config": entry}
    _check_keys(path, f"{entry}: ", entry, NEEDED_KEYS, {"config"})
    start = _read_needed(path, table, entry.get("start"))
    return Run(entry["config"], 1, _read_opts(table, entry), start=start)


def _read_opts(table: dict, entry: dict) -> Tuple[str, ...]:
    """KEY VALUE pairs of one training: the table's, then its own, which prevail."""
    return tuple(str(opt) for opt in (*table.get("opts", ()), *entry.get("opts", ())))


def _check_keys(path: Path, where: str, found: dict, known: set, needed: set) -> None:
    if extra := sorted(set(found) - known):
        raise ValueError(f"{path}: {where}unknown keys {extra}; known are {sorted(known)}.")
    if missing := sorted(needed - set(found)):
        raise ValueError(f"{path}: {where}lacks {missing}.")
