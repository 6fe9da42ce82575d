"""Checks of a configuration before a long run: its keys, data, detectors, losses and cost."""

from .check import check_run

__all__ = ["check_run"]
