"""Training and evaluation: the trainer of train_net.py, its hooks, checkpoints and evaluators."""

from .trainer import DistillTrainer

__all__ = ["DistillTrainer"]
