"""Prototypes: instance features, the choice among them, the bank, and when it is made anew."""

from .bank import PrototypeBank
from .refresh import PrototypeRefresher

__all__ = ["PrototypeBank", "PrototypeRefresher"]
