"""Data: registration of datasets by config, and the built-in digit scenes."""

from .digit_scenes import make_digit_scenes
from .registration import register_datasets

__all__ = ["make_digit_scenes", "register_datasets"]
