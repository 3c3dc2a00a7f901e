"""Names of a run's config and summary values in W&B; the tracker writes them and the dashboard reads them.

Both take them from here, so that no panel asks for a value that no run has. ``docs/tracking.md`` lists them with their
units. W&B reads a dot as nesting, so ``/`` separates levels.
"""

from __future__ import annotations

from deftx.methods.settings import LABELLED

KNOBS = ("method", "task", "language", *LABELLED, "seed")
"""Config values that every run has at the top level under exactly these names; None where they do not apply."""

METHOD, BASELINE = "deftx", "ltsft"
"""Conditions whose difference is logged: the first minus the second."""

MEAN = "mean"
"""Replaces a language (mean over the targets) or a role (all SFTs of the job's own method)."""

STATUS = "status"
CACHE_HITS = "cache/hits"
CACHE_COMPUTED = "cache/computed"
RESULTS = "results"
MASK_DENSITY = "media/mask_density"
SPECTRA = "media/spectra"


def condition_score(metric: str, language: str, condition: str, split: str = "test") -> str:
    """Score of one condition; the split is named unless it is ``test``."""
    return _split(f"{metric}/{language}/{condition}", split)


def own_score(metric: str, language: str = MEAN, split: str = "test") -> str:
    """Score of the composed model of the job's own method."""
    return _split(f"score/{metric}/{language}", split)


def difference(metric: str, language: str = MEAN, split: str = "test") -> str:
    """DeFT-X minus LT-SFT, where one job evaluated both."""
    return _split(f"diff/{metric}/{language}", split)


def energy(role: str = MEAN) -> str:
    """Retained energy of the denoised matrices."""
    return f"energy/{role}"


def rank_kept(role: str = MEAN) -> str:
    """Directions kept of the denoised matrices."""
    return f"rank_kept/{role}"


def density(role: str = MEAN) -> str:
    """Selected coordinates as a share of all parameters."""
    return f"mask_density/{role}"


def sft_bytes(role: str = MEAN) -> str:
    """Size of an SFT's file."""
    return f"sft_bytes/{role}"


def jaccard(language: str = MEAN) -> str:
    """Shared coordinates of the task's and a language's mask over their union."""
    return f"jaccard/{language}"


def sign_conflicts(language: str = MEAN) -> str:
    """Share of the shared coordinates that task and language SFT move in opposite directions."""
    return f"sign_conflicts/{language}"


def seconds(part: str = "total") -> str:
    """Wall time of the job, or of the imports before it."""
    return f"seconds/{part}"


def stage_seconds(kind: str) -> str:
    """Wall time of all stages of one kind."""
    return f"seconds/stage/{kind}"


def memory(device: str) -> str:
    """Peak memory of a device."""
    return f"memory/{device}"


def curve(stage: str, name: str) -> str:
    """A training curve of one stage; the name ``step`` is its axis."""
    return f"{stage}/{name}"


def _split(name: str, split: str) -> str:
    return name if split == "test" else f"{name}/{split}"
