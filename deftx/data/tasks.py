"""Tasks: labelled rows to train, select and evaluate on, and the evaluation sentences nobody may train on.

Rows are data frames with the columns ``id`` (str), ``text`` (str), ``text_pair`` (str, or None for single sentences)
and ``label`` (int, the position in ``TASKS[task].labels``).

Leakage (``docs/method.md``): NusaX was translated from SMSA, so SMSA loses every row near an Indonesian NusaX valid or
test sentence. AmericasNLI was translated from XNLI, so XNLI's dev and test never train or select; NLI validates on a
seeded part of MultiNLI, split by premise. A missing test file is refused; dev is used on request only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from deftx.data.labelled import (
    AMERICASNLI_LANGUAGES,
    NLI,
    NUSAX_LANGUAGES,
    SENTIMENT,
    TASKS,
    XNLI_LANGUAGES,
    MissingSplitError,
    Place,
    Rows,
    TaskSpec,
    evaluation_places,
    multinli_place,
    place_of,
    read_rows,
    smsa_places,
    task_spec,
)
from deftx.data.leakage import LeakFilter, normalise, summarise
from deftx.data.settings import PROTECTED, DataSettings, LanguageSettings
from deftx.errors import DeftxError, did_you_mean

__all__ = [
    "AMERICASNLI_LANGUAGES",
    "NLI",
    "NUSAX_LANGUAGES",
    "SENTIMENT",
    "TASKS",
    "TRAIN_SETS",
    "XNLI_LANGUAGES",
    "TaskData",
    "TaskSpec",
    "fingerprint_rows",
    "load_test",
    "load_train",
    "own_test_rows",
    "protected_texts",
    "sentences",
    "split_by_text",
    "task_files",
    "task_spec",
]

TRAIN_SETS = ("smsa", "nusax", "multinli", "synthetic", "sentiment", "nli", "tsv")
"""What a task SFT can learn from."""


@dataclass(frozen=True)
class TaskData:
    """Labelled rows of the source language.

    Attributes:
        train: Rows to learn from.
        valid: Rows for model selection.
        report: Counts of what was read, dropped (and why) and kept; plain JSON.
    """

    train: pd.DataFrame
    valid: pd.DataFrame
    report: dict[str, Any] = field(default_factory=dict)


def load_train(
    train: str, language: LanguageSettings, data: DataSettings, seed: int, also: Sequence[pd.DataFrame] = ()
) -> TaskData:
    """Load a source language's labelled rows, without leaks into evaluation sets, split into train and validation.

    Args:
        train: One of :data:`TRAIN_SETS`. ``smsa``: Indonesian, its own validation set. ``nusax``: 500 + 100 rows in any
            NusaX language. ``multinli``: NLI in English or an XNLI language. The others are files of your own.
        language: The source language.
        data: Where the data sets are.
        seed: Seed of the validation split, where the data set has none.
        also: Further evaluation rows that must not be among them (:func:`own_test_rows`).

    Raises:
        DeftxError: Unknown set; the language is not in it; files missing or malformed; too few rows to split.
    """
    places, protected = _train_places(train, language, data)
    train_rows = read_rows(places["train"])
    report: dict[str, Any] = {"source": train, "language": language.code}
    frames = [*(read_rows(place).frame for place in protected), *also]
    shut_out = [text for frame in frames for text in _joined(frame)]
    leak_filter = LeakFilter(shut_out, data.leak_threshold)
    report["leak"] = {"threshold": data.leak_threshold, "protected": len(leak_filter)}
    kept, report["train"] = _without_leaks(train_rows, leak_filter, shut_out)
    if "valid" in places:
        valid, report["valid"] = _without_leaks(read_rows(places["valid"]), leak_filter, shut_out)
        # Rows in both would make validation flatter than it is.
        both = pd.Series(_joined(kept), index=kept.index).isin(set(_joined(valid)))
        kept = kept[~both].reset_index(drop=True)
        report["train"]["in_valid"] = int(both.sum())
    else:
        kept, valid = split_by_text(kept, data.valid_fraction, seed, origin=f"{train} ({language.code})")
    report["train"]["kept"], report.setdefault("valid", {})["kept"] = len(kept), len(valid)
    for split, frame in (("train", kept), ("valid", valid)):
        if frame.empty:
            raise DeftxError(f"{train} ({language.code}): no {split} rows are left; {report[split]}")
    return TaskData(kept, valid, report)


def load_test(task: str, language: LanguageSettings, data: DataSettings, split: str = "test") -> pd.DataFrame:
    """Load a target language's evaluation rows.

    Args:
        task: One of :data:`TASKS`.
        language: The target language.
        data: Where the data sets are.
        split: ``test``, or ``dev`` where a task has it; never chosen silently.

    Returns:
        Rows; ``frame.attrs["dropped"]`` counts rows left out (empty text, no label).

    Raises:
        DeftxError: Unknown task or split; the language is not in the task; the file is missing (the message names
            ``split=dev`` when there is one) or malformed.
    """
    if split not in ("test", "dev"):
        raise DeftxError(f"split={split!r}: must be test or dev")
    task_spec(task, data)
    try:
        place = place_of(task, language, data, split)
    except MissingSplitError as error:
        other = ""
        if split == "test":
            try:
                place_of(task, language, data, "dev")
                other = "; there is a dev file: split=dev evaluates on it, and every table will say so"
            except DeftxError:
                other = "; there is no dev file either"
        raise DeftxError(f"{error}{other}") from None
    rows = read_rows(place)
    if rows.frame.empty:
        raise DeftxError(f"{task}, {language.code}, {split}: no usable rows ({rows.dropped})")
    rows.frame.attrs["dropped"] = rows.dropped
    return rows.frame


def task_files(train: str, language: LanguageSettings, data: DataSettings) -> dict[str, list[Path]]:
    """Local files that :func:`load_train` reads, by their role; no role at all for hub data.

    Roles are ``train``, ``valid`` and ``protected``, the evaluation files of the leak filter.

    Raises:
        DeftxError: As :func:`load_train`, for what can be seen without reading.
    """
    places, protected = _train_places(train, language, data)
    files = {role: sorted(place.local_files) for role, place in places.items()}
    files["protected"] = sorted({path for place in protected for path in place.local_files})
    return {role: paths for role, paths in files.items() if paths}


def protected_texts(language: LanguageSettings, data: DataSettings) -> list[str]:
    """Evaluation sentences of a language, of every task at hand: they must not be in its unlabelled text.

    Dev and test (NusaX: valid and test) of the sets in ``data.protect`` the language is in; premises and hypotheses
    apart. At hand means: the data set's folder is there, or it comes from the hub; a split that a folder lacks is
    skipped. The generated family is left out: its few words and fixed patterns make every line resemble some test
    sentence.

    Raises:
        DeftxError: A file is malformed; the hub does not answer.
    """
    texts: dict[str, None] = {}
    for task in data.protect:
        if task not in PROTECTED:
            raise DeftxError(f"data.protect: {task!r} is not one of {', '.join(PROTECTED)}")
        for place in evaluation_places(task, language, data):
            try:
                frame = read_rows(place).frame
            except DeftxError as error:
                if place.hub is None:
                    raise
                left = [name for name in data.protect if name != task]
                raise DeftxError(
                    f"{error}\nIt is read to keep its sentences out of the text of {language.code!r}; "
                    f"data.protect=[{','.join(left)}] leaves it out"
                ) from error
            texts |= dict.fromkeys(sentences(frame))
    return list(texts)


def own_test_rows(task: str, languages: Sequence[LanguageSettings], data: DataSettings) -> dict[str, pd.DataFrame]:
    """Evaluation rows of the tasks that read files of your own, by language; empty for the public data sets.

    Those are protected by :func:`load_train` and :func:`protected_texts` themselves. Files that are not there are
    skipped: not every command needs them.
    """
    found = {}
    if task in ("sentiment", "nli", "tsv"):
        for language in languages:
            with contextlib.suppress(MissingSplitError):
                found[language.code] = read_rows(place_of(task, language, data, "test")).frame
    return found


def sentences(rows: pd.DataFrame) -> list[str]:
    """Every text of the rows, premises and hypotheses apart."""
    return [*rows["text"], *(text for text in rows["text_pair"] if text is not None)]


def fingerprint_rows(rows: pd.DataFrame) -> str:
    """SHA-256 over id, text, text_pair and label of every row, in order."""
    digest = hashlib.sha256()
    columns = [rows[name] for name in ("id", "text", "text_pair", "label")]
    for number, text, pair, label in zip(*columns, strict=True):
        cells = [str(number), str(text), None if pd.isna(pair) else str(pair), int(label)]
        digest.update(json.dumps(cells, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def split_by_text(rows: pd.DataFrame, fraction: float, seed: int, origin: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Hold out a seeded share of rows for validation; rows with the same text (premise) stay together.

    Args:
        rows: Labelled rows.
        fraction: Share of the rows held out, in (0, 1).
        seed: Seed of the choice.
        origin: Data set, for messages.

    Returns:
        Train and validation rows, both in the order given. Texts count as the same after ``leakage.normalise``.

    Raises:
        DeftxError: The fraction is out of range, or there are fewer distinct texts than the split needs.
    """
    if not 0 < fraction < 1:
        raise DeftxError(f"data.valid_fraction={fraction}: must lie between 0 and 1")
    groups: dict[str, list[int]] = {}
    for position, text in enumerate(rows["text"]):
        groups.setdefault(normalise(text) or text, []).append(position)
    goal = round(fraction * len(rows))
    if goal < 1 or len(groups) < 2:
        raise DeftxError(
            f"{origin}: {len(rows)} rows with {len(groups)} different texts are too few for "
            f"data.valid_fraction={fraction}; give more rows, a larger fraction or a validation file (data.valid=FILE)"
        )
    names = list(groups)
    random.Random(seed).shuffle(names)
    held: set[int] = set()
    for name in names[:-1]:
        if len(held) >= goal:
            break
        held.update(groups[name])
    mask = pd.Series([position in held for position in range(len(rows))], index=rows.index)
    return rows[~mask].reset_index(drop=True), rows[mask].reset_index(drop=True)


def _train_places(train: str, language: LanguageSettings, data: DataSettings) -> tuple[dict[str, Place], list[Place]]:
    """Places of the train (and validation) rows, and of the evaluation rows that must not be among them."""
    if train not in TRAIN_SETS:
        raise DeftxError(
            f"unknown training set {train!r}{did_you_mean(train, TRAIN_SETS)}; available: {', '.join(TRAIN_SETS)}"
        )
    if train == "smsa":
        return smsa_places(language, data), [place_of("nusax", language, data, split) for split in ("dev", "test")]
    if train == "multinli":
        return {"train": multinli_place(language, data)}, _local_evaluation(("xnli", "americasnli"), language, data)
    places = {"train": place_of(train, language, data, "train")}
    try:
        places["valid"] = place_of(train, language, data, "dev")
    except MissingSplitError:
        if data.valid is not None:
            raise
    if train == "synthetic":
        return places, []
    if train == "nusax":
        # Its valid split selects; only the test sentences must stay unseen.
        return places, [place_of("nusax", language, data, "test")]
    protected = _local_evaluation(("nusax", "xnli", "americasnli"), language, data)
    with contextlib.suppress(MissingSplitError):
        protected.append(place_of(train, language, data, "test"))
    return places, protected


def _local_evaluation(tasks: Sequence[str], language: LanguageSettings, data: DataSettings) -> list[Place]:
    return [place for task in tasks for place in evaluation_places(task, language, data) if place.local_files]


def _joined(frame: pd.DataFrame) -> list[str]:
    """One text a row; of a pair, premise and hypothesis together: either alone may be anyone's."""
    return [
        text if pair is None else f"{text} {pair}" for text, pair in zip(frame["text"], frame["text_pair"], strict=True)
    ]


def _without_leaks(
    rows: Rows, leak_filter: LeakFilter, protected: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    texts = _joined(rows.frame)
    matches = leak_filter.matches(texts)
    clean = pd.Series([match is None for match in matches], index=rows.frame.index, dtype=bool)
    report: dict[str, Any] = {"rows": len(texts) + sum(rows.dropped.values()), **rows.dropped}
    report["leak"] = summarise(matches, texts, protected)
    return rows.frame[clean].reset_index(drop=True), report
