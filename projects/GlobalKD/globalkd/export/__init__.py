"""Writing the student of a run alone, proven to detect as the run does."""

from .student import export_student

__all__ = ["export_student"]
