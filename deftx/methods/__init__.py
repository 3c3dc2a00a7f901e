"""What is learnt for a language or a task: the table of methods, and how what was learnt is put on a model."""

from deftx.methods.table import (
    BY_PROXY,
    METHODS,
    SCORED,
    SECOND_PHASES,
    UNDENOISED,
    WITHOUT_LANGUAGE_SFT,
    Evidence,
    Scored,
    SparseMethod,
)

__all__ = [
    "BY_PROXY",
    "METHODS",
    "SCORED",
    "SECOND_PHASES",
    "UNDENOISED",
    "WITHOUT_LANGUAGE_SFT",
    "Evidence",
    "Scored",
    "SparseMethod",
]
