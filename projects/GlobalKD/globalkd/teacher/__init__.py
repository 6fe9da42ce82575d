"""The frozen teacher: how it is built and loaded, and what it says of a batch."""

from .building import build_teacher
from .teacher import Teacher

__all__ = ["Teacher", "build_teacher"]
