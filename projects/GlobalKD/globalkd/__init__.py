"""GlobalKD for Detectron2: knowledge distillation of object detectors.

Importing this package registers `DistillGeneralizedRCNN` and `DistillRetinaNet` with Detectron2.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "globalkd needs Detectron2, which is not on the package index: run `python "
        "tools/install_detectron2.py` (or `make setup`) in a checkout of this project, or install "
        "upstream's own build with `pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'`."
    ) from error

from .config import add_globalkd_config
from .data import register_datasets
from .distiller import Distiller
from .losses import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .meta_arch import DistillGeneralizedRCNN, DistillRetinaNet
from .prototypes import PrototypeBank, PrototypeRefresher
from .teacher import Teacher, build_teacher

__version__ = "0.1.0"

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DistillContext",
    "DistillGeneralizedRCNN",
    "DistillLoss",
    "DistillRetinaNet",
    "Distiller",
    "PrototypeBank",
    "PrototypeRefresher",
    "Teacher",
    "add_globalkd_config",
    "build_teacher",
    "register_datasets",
]
