"""One HTML page for a run, in a single file: configuration, results, curves, and what parts found.

The parts named by --parts are computed first, each into its own folder inside the run's. The page
shows what lies in the folders of all parts, so that a part which takes long need not run again.
Written: report.html, unless --output says another file.
"""

import argparse
import csv
import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg

from ..config import add_globalkd_config
from ..engine.command_line import add_opts_argument
from ..meta_arch import is_distilled
from . import audit, compare, discrepancy, gallery, noise
from .curves import draw_distillation
from .html import Page
from .runs import read_config, read_metrics

#: In the order of the page. Each has add_arguments(parser) and main(args).
PARTS = {
    "compare": compare,
    "noise": noise,
    "discrepancy": discrepancy,
    "gallery": gallery,
    "audit": audit,
}
#: A number from 10 on, as the CSV files have it: the page has two decimals of it.
_LARGE = re.compile(r"^-?\d{2,}\.\d{4}$")
#: A table of more rows is named on the page and not shown.
MAX_ROWS = 40


def build_report(
    run,
    *,
    plain="",
    parts: Sequence[str] = (),
    opts: Sequence[str] = (),
    page: Optional[Page] = None,
) -> Page:
    """Compute parts and make the page, for the caller to write or to add to.

    Args:
        run: the run's output folder.
        plain: output folder of the plain student to compare with; empty for none.
        parts: names in PARTS to compute now.
        opts: overrides of the runs' configurations.
        page: one to go on with; None for a new one.

    Raises:
        ValueError: a part needs a distilled run, and this one is not.
        FileNotFoundError: no such run.
    """
    run = Path(run)
    cfg = read_config(run, opts)
    for name in parts:
        compute_part(name, run, plain, opts)
    page = page or Page(f"Report of {run.resolve().name}")
    page.paragraph(_about(run, cfg))
    add_part(page, "compare", run / "compare", title="Results")
    if is_distilled(cfg):
        page.heading("Distillation")
        _add_distillation_curves(page, run)
    page.heading("Configuration")
    _add_configuration(page, cfg)
    for name in list(PARTS)[1:]:
        add_part(page, name, run / name)
    return page


def _add_distillation_curves(page: Page, run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "terms.png")
        draw_distillation(path, run)
        page.image(path, "Distillation terms and reliability over the training steps.")


def compute_part(name: str, run: Path, plain="", opts: Sequence[str] = ()) -> None:
    """Compute a part with its default settings, into a folder of its name inside the run's."""
    part = PARTS[name]
    parser = argparse.ArgumentParser()
    part.add_arguments(parser)
    beside = {"compare": [str(plain)], "noise": ["--plain", str(plain)]} if plain else {}
    arguments = [str(run), *beside.get(name, []), "--output", str(run / name), "--opts", *opts]
    part.main(parser.parse_args(arguments))


def add_part(page: Page, name: str, folder: Path, title: str = "") -> None:
    """Add a part's section: its texts, tables and pictures; nothing where it left no files."""
    files = sorted(folder.glob("*.*"))
    if not files:
        return
    page.heading(title or name.capitalize())
    page.paragraph(inspect.getdoc(PARTS[name]).split("\n\n")[0])
    show = {
        ".txt": lambda path: page.paragraph(path.read_text()),
        ".jpg": lambda path: page.image(path, path.name),
        ".csv": lambda path: _add_table(page, path),
        ".png": lambda path: page.image(path, path.name),
        ".html": lambda path: page.paragraph(f"More in {name}/{path.name}."),
    }
    for ending, add in show.items():
        for path in files:
            if path.suffix == ending:
                add(path)


def _add_table(page: Page, path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    if len(rows) <= MAX_ROWS:
        page.table(header, [[_rounded(cell) for cell in row] for row in rows])
    else:
        page.paragraph(f"{path.parent.name}/{path.name} has {len(rows)} rows: {', '.join(header)}.")


def _rounded(cell: str) -> str:
    return f"{float(cell):.2f}" if _LARGE.match(cell) else cell


def _about(run: Path, cfg: CfgNode) -> str:
    steps = max((record["iteration"] for record in read_metrics(run)), default=0)
    kind = "distilled" if is_distilled(cfg) else "not distilled"
    return (
        f"{cfg.MODEL.META_ARCHITECTURE}, {kind}, {steps} of {cfg.SOLVER.MAX_ITER} steps of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images; trained on {', '.join(cfg.DATASETS.TRAIN)}, evaluated "
        f"on {', '.join(cfg.DATASETS.TEST)}."
    )


def _add_configuration(page: Page, cfg: CfgNode) -> None:
    defaults = get_cfg()
    add_globalkd_config(defaults)
    page.paragraph("Keys that differ from their defaults.")
    page.table(["key", "value", "default"], config_differences(cfg, defaults))
    page.details("The whole configuration", cfg.dump())


def config_differences(cfg: CfgNode, defaults: CfgNode) -> List[Tuple[str, str, str]]:
    """(key, value, default) of every leaf that differs, with dots in the key."""
    rows = []
    for key, value in cfg.items():
        default = defaults.get(key, "")
        if isinstance(value, CfgNode):
            below = config_differences(value, default or CfgNode())
            rows += [(f"{key}.{name}", v, d) for name, v, d in below]
        elif json.dumps(value) != json.dumps(default):  # a tuple and a list of it are the same
            rows.append((key, repr(value), repr(default)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a run")
    parser.add_argument("--plain", default="", help="output folder of the plain student")
    parser.add_argument("--output", default="", help="file to write; default: RUN/report.html")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=list(PARTS),
        default=["compare"],
        help="to compute now; default: compare. None of them: show what is there",
    )
    add_opts_argument(parser)


def main(args: argparse.Namespace) -> None:
    path = args.output or Path(args.run, "report.html")
    page = build_report(args.run, plain=args.plain, parts=args.parts, opts=args.opts)
    print(page.write(path))
