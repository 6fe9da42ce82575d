"""The pictures of the demo: detections side by side, reliability by kind of instance."""

from pathlib import Path
from typing import Dict

from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from .annotations import dataset_annotations
from .curves import COLOURS
from .detections import annotated_instances, detect
from .error_panels import draw_error_grid
from .reliability import ambiguity_auc, level_reliability
from .runs import load_run, read_config

#: Least score of a detection that is drawn.
THRESHOLD = 0.5


def draw_detections(path, folders: Dict[str, Path], *, count: int = 5):
    """Annotations and each detector's detections on the first validation images.

    The colour of a detection says whether it is correct, or its kind of error.
    """
    cfg = read_config(next(iter(folders.values())))
    dataset = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(dataset)[:count]
    truth = [annotated_instances(record) for record in records]
    found = {
        name: detect(load_run(folder), cfg, records, threshold=THRESHOLD, name=name)
        for name, folder in folders.items()
    }
    draw_error_grid(path, records, truth, found, MetadataCatalog.get(dataset).thing_classes)


def draw_reliability(path, folder: Path) -> Dict[str, float]:
    """Reliability of clean and of ambiguous validation instances, by kind, on the finest level.

    The finest level is the one that boxes of this size are predicted from; the right-hand panel
    shows for every level how well reliability tells ambiguous instances from clean ones. The
    prototypes are made anew first: those of the checkpoint belong to an earlier student.

    Returns:
        level -> area under the ROC curve; 0.5 is chance.
    """
    model = load_run(folder, distiller=True)
    model.distiller.refresh(model)
    annotations = dataset_annotations(model, read_config(folder).DATASETS.TEST[0])
    reliability = level_reliability(model, annotations.features)
    finest = annotations.features.levels[0]
    kind_of = annotations.field("ambiguity_kind", "")
    ambiguous = annotations.field("ambiguity", 0) > 0
    kinds = sorted(set(kind_of), key=lambda kind: (kind != "none", kind))
    labels = [f"{'clean' if k == 'none' else k}\n(n={(kind_of == k).sum()})" for k in kinds]
    auc = {level: ambiguity_auc(weight, ambiguous) for level, weight in reliability.items()}
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    boxes = [reliability[finest][kind_of == kind] for kind in kinds]
    left.boxplot(boxes, tick_labels=labels, showfliers=False)
    left.set(ylabel="reliability", title=f"Reliability weight by kind of instance, level {finest}")
    right.bar(list(auc), list(auc.values()), color=COLOURS["distilled"], alpha=0.8)
    right.axhline(0.5, color="black", linewidth=1)
    right.set(ylim=(0.3, 1.0), ylabel="AUC", title="Ambiguous against clean (0.5: chance)")
    left.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    return auc
