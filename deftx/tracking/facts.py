"""What a result says as fields: SFTs, the cells that compose them, remarks, data that was read, provenance of stages.

Readers look at these fields alone. Names and sentences are made from them for people, and nobody reads those back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

__all__ = [
    "DATA_READ",
    "CellFacts",
    "DataRead",
    "Provenance",
    "Remark",
    "SFTFacts",
    "Term",
    "data_read",
    "data_setting",
    "gather_provenances",
    "provenance_differences",
    "provenance_remark",
]

DATA_READ = "data.read"
"""The setting that says what data a run read: name -> fields of a :class:`DataRead`."""

_VERSIONS = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One SFT as a term of a composition.

    Attributes:
        kind: ``language`` or ``task``.
        key: What tells it from the other SFTs of a result, and names it in ``diagnostics.parquet``: the key of the
            stage that made it, or the sha256 of its tensors where the user gave it.
        method: ``deftx``, ``ltsft`` or ``random_mask``.
        rank: Canonical rank policy; None without denoising.
        residual: Canonical residual policy; None without denoising.
        exclude: Patterns of parameters that are not denoised.
        k: Coordinates it changes.
        density: What was asked for as a share of the maskable parameters; None where K was, or nobody knows.
        mask: ``magnitude`` or ``random``.
        second_phase: Whether the selected coordinates were trained again.
        value_dtype: Dtype of the values in its file.
        languages: Those it was trained on.
        task: What a task SFT learnt from; None for a language SFT.
        seed: Of its training.
        base: Fingerprint of θ⁰.
        on: Keys of the φ_S it was trained on; empty where it was trained on θ⁰.
    """

    kind: str
    key: str
    method: str | None = None
    rank: str | None = None
    residual: str | None = None
    exclude: tuple[str, ...] = ()
    k: int | None = None
    density: float | None = None
    mask: str = "magnitude"
    second_phase: bool = True
    value_dtype: str = "float32"
    languages: tuple[str, ...] = ()
    task: str | None = None
    seed: int | None = None
    base: str | None = None
    on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("exclude", "languages", "on"):  # JSON has lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class SFTFacts(Term):
    """One SFT that a run made or read.

    Attributes:
        name: What tables and messages call it.
        bytes: Size of its file.
        sha256: Of its file.
        metrics: Of its sparse phase (score, steps, seconds, tokens a second, padding, peak memory, parts of a step
            where ``trainer.profile`` asked for them) and, under ``full``, of its full phase.
    """

    name: str = ""
    bytes: int | None = None
    sha256: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def term(self) -> Term:
        """What a composition says of it."""
        return Term(**{attribute.name: getattr(self, attribute.name) for attribute in fields(Term)})


@dataclass(frozen=True)
class CellFacts:
    """One evaluation: a target language under one condition.

    Attributes:
        language: Code of the target.
        condition: What was composed; one of :data:`deftx.tracking.CONDITIONS`.
        variant: Tells cells of one condition apart (whose φ_L it is), else empty.
        method: The method whose SFTs it composes; a control's is the main method.
        key: Key of the evaluation's stage.
        terms: What it composes: task, then language.
        split: Which rows of the language.
    """

    language: str
    condition: str
    variant: str
    method: str | None
    key: str
    terms: tuple[Term, ...] = ()
    split: str = "test"

    @property
    def pair(self) -> tuple[str, str] | None:
        """Keys of its task and its language SFT, in this order; None where it does not compose both."""
        by_kind = {term.kind: term.key for term in self.terms}
        return (by_kind["task"], by_kind["language"]) if len(by_kind) == 2 else None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Return a cell from the content of ``result.json``."""
        return cls(**{**content, "terms": tuple(Term(**term) for term in content["terms"])})


@dataclass(frozen=True)
class Remark:
    """What a reader should see beside the numbers.

    Attributes:
        kind: A stable word: ``split``, ``no_text``, ``not_zero_shot``, ``no_source_sft``, ``one_target``,
            ``constant_predictions``, ``drawn_head``,
            ``unknown_pieces``, ``absent_labels``, ``untrained_labels``, ``other_language``, ``other_length``,
            ``unfiltered``, ``unknown_tokenizer``, ``provenances_differ``; ``other`` in older results.
        text: One sentence, without what it lists.
        about: The cells, languages or files that it lists.
    """

    kind: str
    text: str
    about: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "about", tuple(self.about))

    @property
    def line(self) -> str:
        """The sentence with its list."""
        return f"{self.text}: {', '.join(self.about)}" if self.about else self.text


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class DataRead:
    """One piece of data that a run read, where it was found, and what was in it.

    Attributes:
        what: ``train`` or ``valid`` (rows of a source language), ``test`` (rows of a target) or ``text``.
        language: Code of its language.
        digest: Of the content.
        kept: Digest of what filters left of it, whatever the seed; None where nothing is filtered, or where the seed
            decides what is read.
        path: Where a local file or folder lies.
        hub: Id on the hub.
        config: Configuration of a hub data set.
        revision: Resolved commit on the hub.
    """

    what: str
    language: str
    digest: str
    kept: str | None = None
    path: str | None = None
    hub: str | None = None
    config: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """``train ind``."""
        return f"{self.what} {self.language}"


def data_setting(reads: Iterable[DataRead]) -> dict[str, dict[str, str]]:
    """Return the value of the setting :data:`DATA_READ`; fields that do not apply are left out."""
    return {read.name: {name: value for name, value in vars(read).items() if value is not None} for read in reads}


def data_read(settings: Mapping[str, Any]) -> list[DataRead]:
    """Return what data a run read, from its settings; empty for results that do not say it."""
    return [DataRead(**content) for content in (settings.get(DATA_READ) or {}).values()]


# ---------------------------------------------------------------------------------------------------- provenance


@dataclass(frozen=True)
class Provenance:
    """What some of the stages that a result stands on were computed under.

    Attributes:
        versions: Of torch, transformers and tokenizers.
        threads: How many torch used.
        device: Name of the GPU, or ``cpu``.
        stages: Kind of stage -> how many.
    """

    versions: Mapping[str, str]
    threads: int | None
    device: str | None
    stages: Mapping[str, int]


def gather_provenances(stages: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Provenance]:
    """Count stages by what they were computed under, in the order in which each was first met.

    Args:
        stages: Kind of each stage, and the provenance in its manifest (:func:`deftx.tracking.provenance`).
    """
    provenances: list[Provenance] = []
    counts: list[dict[str, int]] = []
    for kind, manifest in stages:
        versions = manifest.get("versions") or {}
        device = (manifest["gpu"] or "cpu") if "gpu" in manifest else None
        torch_versions = {name: versions[name] for name in _VERSIONS if name in versions}
        provenance = Provenance(torch_versions, manifest.get("threads"), device, stages={})
        if provenance not in provenances:
            provenances.append(provenance)
            counts.append({})
        count = counts[provenances.index(provenance)]
        count[kind] = count.get(kind, 0) + 1
    return [replace(each, stages=count) for each, count in zip(provenances, counts, strict=True)]


def provenance_differences(provenances: Sequence[Provenance]) -> list[str]:
    """Return what differs, each with its values: ``torch 2.8.0 / 2.9.1``; empty where nothing does."""
    values: dict[str, dict[str, None]] = {}
    for provenance in provenances:
        for name, value in {**provenance.versions, "threads": provenance.threads, "device": provenance.device}.items():
            if value is not None:
                values.setdefault(name, {})[str(value)] = None
    return [f"{name} {' / '.join(sorted(seen))}" for name, seen in values.items() if len(seen) > 1]


def provenance_remark(provenances: Sequence[Provenance]) -> Remark | None:
    """Return a remark where the stages of one result were computed under several versions, thread counts or devices."""
    differing = provenance_differences(provenances)
    text = "stages behind these numbers were computed under several versions, thread counts or devices"
    return Remark("provenances_differ", text, tuple(differing)) if differing else None
