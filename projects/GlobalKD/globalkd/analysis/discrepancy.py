"""How far the two spaces' representations of an instance lie apart, by choice of prototypes.

The right half of the GlobalKD paper's Fig. 1: each annotated instance is represented in both spaces
on the prototypes of its class (PROJECTION.TYPE: cosines, or the pursuit's coefficients), and its
discrepancy is the distance between the two representations. All prototypes are made anew with the
checkpoint's student. Writes discrepancy.png, discrepancy.csv (one row for each generator and level)
and histogram.csv. Where the dataset says how ambiguous instances are, the table also has the AUC
with which reliability tells ambiguous from clean ones.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from ..prototypes.generators import PROTOTYPE_GENERATOR_REGISTRY
from ..prototypes.structures import PairedFeatures
from .annotations import dataset_annotations, make_prototypes, training_instances
from .reliability import ambiguity_auc, level_reliability
from .runs import add_run_arguments, load_run, output_folder, read_config
from .tables import as_text, write_csv

BINS = 40
#: The histograms end at this percentile of all discrepancies.
LAST_PERCENTILE = 99.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "discrepancy")
    parser.add_argument(
        "--generators",
        nargs="+",
        default=[name for name, _ in PROTOTYPE_GENERATOR_REGISTRY],
        metavar="NAME",
        help="default: all of them",
    )


def main(args: argparse.Namespace) -> None:
    model = load_run(args.run, args.checkpoint, distiller=True, opts=args.opts)
    dataset = args.dataset or read_config(args.run, args.opts).DATASETS.TEST[0]
    rows = discrepancy_report(
        model, dataset, generators=args.generators, output=output_folder(args)
    )
    print(as_text(rows))


def discrepancy_report(
    model: nn.Module, dataset: str, *, generators: Sequence[str], output: Path
) -> List[dict]:
    """Compare generators on a dataset and write the figure and both tables.

    Args:
        model: a distilling meta-architecture; its bank holds other prototypes afterwards.
        dataset: a registered name.
        generators: names in PROTOTYPE_GENERATOR_REGISTRY.
        output: an existing folder.

    Returns:
        One dict for each generator and level: "generator", "level"; "area", the area between the
        cumulative curve and 1, which is the mean discrepancy; "median"; "auc" of reliability
        against ambiguity, NaN where the dataset does not say or all are of one kind.
    """
    annotations = dataset_annotations(model, dataset)
    ambiguity = annotations.field("ambiguity", np.nan).astype(float)
    _, instances = training_instances(model)
    found: Dict[str, Dict[str, np.ndarray]] = {}
    rows = []
    for name in tqdm(generators, desc="generators", disable=None):
        make_prototypes(model, instances, name)
        found[name] = instance_discrepancy(model, annotations.features)
        reliability = level_reliability(model, annotations.features)
        for level, values in found[name].items():
            auc = ambiguity_auc(reliability[level], ambiguity > 0)
            area, median = float(values.mean()), float(np.median(values))
            rows.append(
                {"generator": name, "level": level, "area": area, "median": median, "auc": auc}
            )
    write_csv(output / "discrepancy.csv", rows)
    write_csv(output / "histogram.csv", _draw(output / "discrepancy.png", found))
    return rows


def instance_discrepancy(model: nn.Module, features: PairedFeatures) -> Dict[str, np.ndarray]:
    """Level -> (R,) |w_t - w_s| on the prototypes of the instance's own class, >= 0."""
    device = next(model.parameters()).device
    bank, classes = model.distiller.bank, features.classes.to(device)
    result = {}
    for level in features.levels:
        with torch.no_grad():
            w_t, w_s = bank.project(
                {level: features.teacher[level].to(device)},
                {level: features.student[level].to(device)},
                classes,
            )
        distance = torch.linalg.vector_norm(w_t - w_s, dim=-1).squeeze(0)
        result[level] = distance.cpu().numpy()
    return result


def _draw(path: Path, found: Dict[str, Dict[str, np.ndarray]]) -> List[dict]:
    """One panel for each level; returns the histograms as rows."""
    levels = list(next(iter(found.values())))
    figure = Figure(figsize=(2.6 * len(levels) + 1.2, 2.6), layout="constrained")
    rows = []
    for axis, level in zip(np.ravel(figure.subplots(1, len(levels))), levels):
        end = np.percentile(np.concatenate([found[n][level] for n in found]), LAST_PERCENTILE)
        edges = np.linspace(0, max(end, 1e-9), BINS + 1)
        for name, values in ((name, found[name][level]) for name in found):
            counts = np.histogram(values, edges)[0]
            density = (counts / (len(values) * np.diff(edges))).tolist()
            axis.stairs(density, edges, label=name, linewidth=2 if name == "pursuit" else 1)
            bins = zip(edges[:-1].tolist(), edges[1:].tolist(), density)
            rows += [
                {"generator": name, "level": level, "from": a, "to": b, "density": d}
                for a, b, d in bins
            ]
        axis.set(title=level, xlabel="|teacher - student|")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("density")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=80)
    return rows
