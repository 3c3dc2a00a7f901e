"""What the command left, and result folders with known random predictions, as runs write them, without any training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deftx import tracking

LABELS = ("negative", "neutral", "positive")
N = 60
MODULES = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclass
class Outcome:
    """What ``deftx report`` left."""

    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Output on one line: the terminal's wrapping does not matter."""
        return " ".join(self.out.split())


Report = Callable[..., Outcome]


def macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean F1 of the classes of the gold rows, by counting; what a run would have written."""
    found = []
    for label in sorted({*gold}):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        both = sum(g == label for g in gold) + sum(p == label for p in predicted)
        found.append(2 * hits / both)
    return sum(found) / len(found)


def settings(**knobs: Any) -> dict[str, Any]:
    """Flat settings as a run shows them; ``rank=None`` is LT-SFT."""
    rank, density = knobs.pop("rank", "energy:0.9"), knobs.pop("density", 0.1)
    flat: dict[str, Any] = {
        "study": "demo",
        "seed": 0,
        "task": "nusax",
        "split": "test",
        "language": ["ace", "min"],
        "model": "tiny",
        "precision": "32-true",
        "data.labels": list(LABELS),
        "method": "deftx" if rank is not None else "ltsft",
        "compare": [],
        "controls": [],
        "missing_text": "error",
        "corpus.leak_threshold": 0.7,
        "source.rank": "energy:0.9",
        "source.residual": "prune:0.05",
    }
    for prefix in ("", "lang.", "task."):
        flat |= {f"{prefix}rank": rank, f"{prefix}residual": None if rank is None else "prune:0.05"}
        flat |= {f"{prefix}density": density, f"{prefix}k": None}
    return flat | {"lang.training.epochs": 3, "task.training.epochs": 5} | knobs


def predictions(rng: np.random.Generator, gold: np.ndarray[Any, Any], skill: float) -> np.ndarray[Any, Any]:
    """Right with probability ``skill``, else any class."""
    guess = rng.integers(0, len(LABELS), len(gold))
    return np.where(rng.random(len(gold)) < skill, gold, guess)


def write_run(
    folder: Path,
    *,
    conditions: Mapping[str, float] | None = None,
    on_dev: Mapping[str, float] | None = None,
    seed: int = 0,
    n: int = N,
    ids: Sequence[str] | None = None,
    diagnostics: bool = False,
    metric: str = "macro_f1",
    draw: int | None = None,
    languages_facts: Mapping[str, Mapping[str, float]] | None = None,
    record: Mapping[str, Any] | None = None,
    variants: Sequence[str] = ("",),
    with_predictions: bool = True,
    **knobs: Any,
) -> Path:
    """Write one run.

    Args:
        folder: Its directory.
        conditions: Condition -> how often it is right.
        on_dev: The same on dev rows, which are then evaluated, too.
        seed: The run's seed, which also decides its predictions.
        n: Examples of each language; the same gold labels for all runs.
        ids: Of the examples.
        diagnostics: Whether to write diagnostics.parquet, too.
        metric: The first metric.
        draw: Decides the predictions in place of seed and settings.
        languages_facts: What ``languages`` says of a code.
        record: Other fields of the record.
        variants: Cells of each condition.
        with_predictions: Whether to write predictions.parquet.
        **knobs: Of :func:`settings`.
    """
    flat = settings(seed=seed, **knobs)
    conditions = conditions or {"ltsft" if flat["rank"] is None else "deftx": 0.6}
    frames, metrics = [], []
    splits = {flat["split"]: conditions} | ({"dev": on_dev} if on_dev else {})
    for (split, skills), language in product(splits.items(), flat["language"]):
        name = language if split == flat["split"] else f"{language} {split}"
        gold = np.random.default_rng([7, n, zlib.crc32(name.encode())]).integers(0, len(LABELS), n)
        for condition, skill in skills.items():
            read = (flat["rank"], flat["residual"]) if condition == "deftx" else ()
            key = draw if draw is not None else zlib.crc32(repr((read, flat["density"], condition, name)).encode())
            rng = np.random.default_rng([seed, key])
            values = []
            for variant in variants:
                predicted = predictions(rng, gold, skill)
                values.append((macro_f1(gold, predicted), float((gold == predicted).mean())))
                frames.append(
                    pd.DataFrame(
                        {
                            "id": list(ids) if ids is not None else [f"{number:04d}" for number in range(n)],
                            "label": [LABELS[item] for item in gold],
                            "prediction": [LABELS[item] for item in predicted],
                            "score_negative": np.zeros(n, dtype=np.float32),
                            "language": language,
                            "condition": condition,
                            "split": split,
                            "variant": variant,
                        }
                    )
                )
            f1, accuracy = np.mean(values, axis=0)
            metrics += [
                tracking.Metric(language, condition, "macro_f1", float(f1), n, split),
                tracking.Metric(language, condition, "accuracy", float(accuracy), n, split),
            ]
    metrics.sort(key=lambda item: item.metric != metric)
    trained = sfts(flat, list(conditions))
    made = tracking.RunRecord(
        study=flat["study"],
        job=f"run-{folder.name}",
        settings=flat,
        seed=seed,
        status="done",
        metrics=metrics,
        fingerprints={"base": "b" * 64, **{f"test {code}": "f" * 64 for code in flat["language"]}},
        provenance={
            "git": {"deftx": {"commit": "a" * 40, "dirty": False}, "working_directory": None},
            "versions": {"deftx": "0.1.0", "torch": "2.13.0"},
            "python": "3.11.7",
            "gpu": None,
        },
        sfts=trained,
        cells=cells(flat, list(conditions), variants, trained),
        languages={code: {"name": code.title(), **(languages_facts or {}).get(code, {})} for code in flat["language"]},
        finished=f"2026-01-01T00:00:{seed:02d}+00:00",
    )
    for name, value in (record or {}).items():
        setattr(made, name, value)
    tracking.write_result(folder, made)
    if with_predictions:
        tracking.write_predictions(folder, pd.concat(frames, ignore_index=True))
    if diagnostics:
        tracking.write_diagnostics(folder, diagnostic_rows(flat, list(conditions)))
    return folder


def sfts(flat: Mapping[str, Any], conditions: Sequence[str]) -> list[tracking.SFTFacts]:
    """What a result says of its SFTs: φ_S where ``task.source`` is given, and the task SFT of ``no_language_sft``."""
    size = int(1e6 * (flat["density"] or 0.1))
    found: list[tracking.SFTFacts] = []

    def add(label: str, method: str, rank: Any, **facts: Any) -> tracking.SFTFacts:
        name = f"{label} ltsft" if method == "ltsft" else f"{label} deftx rank={rank} residual=prune:0.05"
        facts |= {"key": f"{zlib.crc32(name.encode()):064x}", "rank": None if method == "ltsft" else rank}
        facts["mask"] = flat.get("task.mask" if facts["kind"] == "task" else "lang.mask", "magnitude")
        found.append(tracking.SFTFacts(name=name, method=method, seed=flat["seed"], base="b" * 64, **facts))
        return found[-1]

    on: tuple[str, ...] = ()
    if source := flat.get("task.source"):
        cost = {"seconds": 1000.0, "peak_memory": 2**28}
        facts = {"kind": "language", "languages": (source,), "bytes": 77 * size, "metrics": cost}
        on = (add(f"language {source}", "deftx", flat["source.rank"], **facts).key,)
    if "no_language_sft" in conditions:
        cost = {"seconds": 7000.0, "peak_memory": 2**33}
        facts = {"kind": "task", "languages": ("ind",), "bytes": 99 * size, "metrics": cost}
        add("task on θ⁰", "deftx", flat["rank"], **facts)
    for method in [name for name in conditions if name in ("deftx", "ltsft")]:
        seconds = 60.0 if method == "ltsft" else 70.0 + len(str(flat["rank"]))
        cost = {"seconds": seconds, "peak_memory": 2**30, "full": {"seconds": 2 * seconds}}
        facts = {"k": size, "bytes": 5 * size, "metrics": cost}
        for code in flat["language"]:
            add(f"language {code}", method, flat["rank"], kind="language", languages=(code,), **facts)
        add("task on θ⁰+ind", method, flat["rank"], kind="task", languages=("ind",), on=on, **facts)
    return found


def own(trained: Sequence[tracking.SFTFacts], method: str, language: str | None = None) -> tracking.SFTFacts | None:
    """The SFT of a target (φ_S of the same language stands before it), or a method's task SFT (a control's, too)."""
    kind = "task" if language is None else "language"
    return next(
        (
            sft
            for sft in reversed(trained)
            if (sft.kind, sft.method) == (kind, method) and language in (None, *sft.languages)
        ),
        None,
    )


def cells(
    flat: Mapping[str, Any], conditions: Sequence[str], variants: Sequence[str], trained: Sequence[tracking.SFTFacts]
) -> list[tracking.CellFacts]:
    """What each condition of each target composes."""
    found = []
    for language in flat["language"]:
        for condition in conditions:
            method = condition if condition in ("deftx", "ltsft") else flat["method"]
            parts = [own(trained, method), own(trained, method, language)]
            if condition == "no_language_sft":
                parts = [sft for sft in trained if sft.kind == "task"][:1]
            terms = tuple(sft.term for sft in parts if sft is not None)
            for name in variants:
                key = f"{zlib.crc32(repr((language, condition, name, terms)).encode()):064x}"
                found.append(tracking.CellFacts(language, condition, name, method, key, terms))
    return found


def diagnostic_rows(flat: Mapping[str, Any], conditions: Sequence[str]) -> pd.DataFrame:
    """Spectra, ranks, energies, masks and overlaps of four layers."""
    rng = np.random.default_rng(flat["seed"])
    rows: list[dict[str, Any]] = []
    trained = sfts(flat, conditions)
    control = next((s.key for s in trained if s.kind == "task"), None) if "no_language_sft" in conditions else None
    for sft in trained:
        for layer in (-1, 0, 1, 2, 3):
            for module in MODULES if layer >= 0 else ("embeddings.word_embeddings", "embeddings.LayerNorm"):
                size = 4096 if layer >= 0 else 20_000
                slow = 9 if sft.key == control else 0  # a control's own energy
                spectrum = np.exp(-np.arange(32) / (6 + slow + 2 * layer + len(module) % 5)) * (1 + 0.1 * rng.random())
                count = int(size * (flat["density"] or 0.1) * (0.5 + rng.random()))
                row = {"what": "sft", "sft": sft.name, "key": sft.key, "parameter": f"{layer}.{module}"}
                row |= {"layer": layer, "module": module, "size": size, "selected": count, "density": count / size}
                row |= {"sample": np.sort(rng.choice(size, count, replace=False)) + 1}
                if sft.rank is not None and module != "embeddings.LayerNorm":
                    kept = int(sft.rank) if sft.rank.isdigit() else int(10 + 3 * layer + 2 * len(sft.rank) % 7)
                    squares = spectrum**2
                    energy = float(squares[:kept].sum() / squares.sum())
                    row |= {"rank": kept, "energy": energy, "singular_values": spectrum.tolist()}
                rows.append(row)
    for method in [name for name in conditions if name in ("deftx", "ltsft")]:
        task = own(trained, method)
        for language in (own(trained, method, code) for code in flat["language"]):
            for layer in range(4):
                both = int(40 * (1 + rng.random()))
                row = {"what": "pair", "sft": task.name, "other": language.name, "key": task.key}
                row |= {"other_key": language.key, "layer": layer, "module": MODULES[0]}
                rows.append(row | {"overlap": both, "jaccard": 0.05, "sign_conflicts": both // 3})
    columns = ["what", "sft", "other", "key", "other_key", "parameter", "layer", "module", "size", "selected"]
    columns += ["density", "rank", "energy", "singular_values", "sample", "overlap", "jaccard", "sign_conflicts"]
    return pd.DataFrame(rows, columns=columns)


def write_sweep(folder: Path, jobs: Sequence[tuple[Sequence[str], str]], **fields: Any) -> Path:
    """A sweep.json over jobs given as (swept, status); folders are their numbers."""
    made = [
        tracking.SweepJob(
            number=number,
            overrides=["experiment=demo", *swept],
            swept=list(swept),
            folder=str(number),
            status=status,
            knobs=dict(text.split("=", 1) if "=" in text else (text, "") for text in swept),
            error="the disk is full" if status == "failed" else None,
        )
        for number, (swept, status) in enumerate(jobs)
    ]
    record = tracking.SweepRecord("demo", "run", made, shared=["experiment=demo"], **fields)
    return tracking.write_sweep(folder, record)
