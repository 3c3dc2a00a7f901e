"""Tasks: labelled rows to train, select and evaluate on, and the evaluation sentences nobody may train on.

Rows are data frames with the columns ``id`` (str), ``text`` (str), ``text_pair`` (str, or None for single sentences)
and ``label`` (int, the position in ``TASKS[task].labels``). What will be read is known as places before anything is:
each ``load_*`` reads what the ``*_places`` beside it gives.

Leakage (``docs/method.md``): NusaX was translated from SMSA, so SMSA loses every row near an Indonesian NusaX valid or
test sentence. AmericasNLI was translated from XNLI, so XNLI's dev and test never train or select; NLI validates on a
seeded part of MultiNLI, split by premise. A missing test file is refused; dev is used on request only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from deftx.data.finding import NotAtHandError
from deftx.data.labelled import place_of, task_spec, train_spec
from deftx.data.leakage import LeakFilter, normalise, summarise
from deftx.data.places import Form, MissingSplitError, Origin, Place, digest_files
from deftx.data.rows import SENTENCES, Rows, read_rows, read_sentences, sentences_of
from deftx.data.settings import PROTECTED, SPLITS, DataSettings, LanguageSettings
from deftx.errors import DeftxError

_SPLIT_NAMES = {"train": "training", "valid": "validation"}


class Evaluation(NamedTuple):
    """What a study evaluates: nothing that trains may have seen these sentences.

    Attributes:
        task: One of ``labelled.TASKS``.
        splits: The splits that are evaluated; test rows are kept out of training whatever they are.
        languages: Every language of the study. Rows of one language may stand in another one's text.
        sets: Public sets that are protected in every one of the languages, not only in the text's own.
        files: Files of sentences that will be evaluated later: tables with a text column, or a sentence a line.
    """

    task: str
    splits: tuple[str, ...] = ("test",)
    languages: tuple[LanguageSettings, ...] = ()
    sets: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def places(self, data: DataSettings, text: Origin | None = None) -> list[Place]:
        """Return what is protected in every text: rows in files of the user's own, ``sets`` and ``files``.

        Other public sets are protected language by language (:func:`protected_places`): another choice of targets
        changes no key. The generated family's text holds no test sentence, but its few words and fixed patterns make
        every line resemble some; so its rows are protected in text that does not come from it, alone.

        Args:
            data: Where data sets are.
            text: What they are kept out of, where that is unlabelled text.

        Raises:
            DeftxError: One of ``sets`` has no rows at hand.
        """
        foreign = text is not None and not text.generated
        spec = task_spec(self.task, data)
        own = {self.task: sorted({"test", *self.splits})} if spec.own or (spec.generated and foreign) else {}
        wanted = {**own, **{name: ["dev", "test"] for name in self.sets}}
        places: list[Place] = []
        for name, splits in wanted.items():
            rows = [place for spoken in self.languages for place in _evaluation_places(name, spoken, data, splits)]
            if name in self.sets and not rows:
                raise DeftxError(f"protect={name}: there are no rows of it; set data.root=FOLDER or data.{name}=FOLDER")
            places += [place for place in rows if foreign or not place.generated]
        # One file may hold the rows of several languages, and in a combined one each language has its own.
        places = list({(place.files, place.hub, place.language): place for place in places}.values())
        return places + [Place(dataset=SENTENCES, form=Form(()), split="test", files=(path,)) for path in self.files]


class TrainPlaces(NamedTuple):
    """What a training set is made of.

    Attributes:
        train: Rows to learn from.
        valid: Rows for model selection; ``None`` where a seeded part of ``train`` is held out.
        protected: Every place whose sentences are kept out of both; but a dev split may be what validates.
    """

    train: Place
    valid: Place | None
    protected: tuple[Place, ...]


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


def train_places(
    train: str, language: LanguageSettings, data: DataSettings, evaluation: Evaluation | None = None
) -> TrainPlaces:
    """Return where the rows of a training set are, and of the evaluation rows that must not be among them.

    Args:
        train: One of ``labelled.TRAIN_SETS``.
        language: The source language.
        data: Where the data sets are.
        evaluation: What the study evaluates.

    Raises:
        DeftxError: Unknown set; the language is not in it; files missing.
    """
    spec = train_spec(train, data, evaluation.task if evaluation is not None else None)
    rows, valid = place_of(spec, language, data, "train"), None
    # Files that the settings name have no validation file unless they name one, too.
    if "own" in spec.validation and not (spec.own and data.train is not None and data.valid is None):
        try:
            valid = place_of(spec, language, data, "dev")
        except MissingSplitError:
            if "part" not in spec.validation or data.valid is not None:
                raise
    protected: list[Place] = []
    for guard in spec.guards:
        if guard.needed:
            against = task_spec(guard.name, data)
            protected += [place_of(against, language, data, split) for split in guard.splits]
        else:
            places = _evaluation_places(guard.name, language, data, guard.splits)
            protected += [place for place in places if place.local_files]
    if evaluation is not None:
        protected += evaluation.places(data)
        if spec.own and evaluation.task in PROTECTED:
            # Files of one's own may hold sentences of any language. Public training sets have one, and its guards.
            for spoken in evaluation.languages:
                protected += _evaluation_places(evaluation.task, spoken, data, ("dev", "test"))
    return TrainPlaces(rows, valid, tuple(dict.fromkeys(protected)))


def load_train(
    train: str, language: LanguageSettings, data: DataSettings, seed: int, evaluation: Evaluation | None = None
) -> TaskData:
    """Load a source language's labelled rows, without leaks into evaluation sets, split into train and validation.

    Args:
        train: One of ``labelled.TRAIN_SETS``. ``smsa``: Indonesian, its own validation set. ``nusax``: 500 + 100 rows
            in any NusaX language. ``multinli``: NLI in English or an XNLI language. The others are files of your own.
        language: The source language.
        data: Where the data sets are.
        seed: Seed of the validation split, where the data set has none.
        evaluation: What the study evaluates, beside what the training set is kept from anyway.

    Raises:
        DeftxError: Unknown set; the language is not in it; files missing or malformed; no rows left, or too few to
            split.
    """
    places = train_places(train, language, data, evaluation)
    origin = f"{train} ({language.code})"
    texts = {place: _joined(read_rows(place).frame) for place in places.protected}
    protected = [text for place in places.protected for text in texts[place]]
    leak_filter = LeakFilter(protected, data.leak_threshold)
    report: dict[str, Any] = {
        "source": train,
        "language": language.code,
        "leak": {
            "threshold": data.leak_threshold,
            "protected": len(leak_filter),
            "sets": sorted({_digest_texts(texts[place]) for place in places.protected}),
        },
    }
    kept, report["train"] = _without_leaks(read_rows(places.train), leak_filter, protected)
    _need_rows(origin, "train", kept, report)
    if places.valid is not None:
        others = [place for place in places.protected if not _validates_dev(places.valid, place)]
        if len(others) < len(places.protected):  # a study whose validation rows are somebody's dev rows keeps them
            protected = [text for place in others for text in texts[place]]
            leak_filter = LeakFilter(protected, data.leak_threshold)
        valid, report["valid"] = _without_leaks(read_rows(places.valid), leak_filter, protected)
        _need_rows(origin, "valid", valid, report)
        # Rows in both would make validation flatter than it is.
        both = pd.Series(_joined(kept), index=kept.index).isin(set(_joined(valid)))
        kept = kept[~both].reset_index(drop=True)
        report["train"]["in_valid"] = int(both.sum())
        _need_rows(origin, "train", kept, report)
    else:
        kept, valid = split_by_text(kept, data.valid_fraction, seed, origin=origin)
    report["train"]["kept"], report.setdefault("valid", {})["kept"] = len(kept), len(valid)
    together = pd.concat([kept, valid]).sort_values(["id", "text", "label"], kind="stable")
    report["digest"] = fingerprint_rows(together)  # whatever the seed of the split
    return TaskData(kept, valid, report)


def evaluation_place(task: str, language: LanguageSettings, data: DataSettings, split: str = "test") -> Place:
    """Return where a target language's evaluation rows are.

    Args:
        task: One of ``labelled.TASKS``.
        language: The target language.
        data: Where the data sets are.
        split: One of :data:`~deftx.data.settings.SPLITS`; never chosen silently.

    Raises:
        DeftxError: Unknown task or split; the language is not in the task; the file is missing (the message names
            ``split=dev`` when there is one).
    """
    if split not in SPLITS:
        raise DeftxError(f"split={split!r}: must be {' or '.join(SPLITS)}")
    spec = task_spec(task, data)
    try:
        return place_of(spec, language, data, split)
    except MissingSplitError as error:
        other = ""
        if split == "test":
            try:
                place_of(spec, language, data, "dev")
                other = "; there is a dev file: split=dev evaluates on it, and every table will say so"
            except DeftxError:
                other = "; there is no dev file either"
        raise DeftxError(f"{error}{other}") from None


def load_test(task: str, language: LanguageSettings, data: DataSettings, split: str = "test") -> pd.DataFrame:
    """Read :func:`evaluation_place`.

    Returns:
        Rows; ``frame.attrs["dropped"]`` counts rows left out (empty text, no label).

    Raises:
        DeftxError: As :func:`evaluation_place`; or the file is malformed.
    """
    rows = read_rows(evaluation_place(task, language, data, split))
    if rows.frame.empty:
        raise DeftxError(f"{task}, {language.code}, {split}: no usable rows ({rows.dropped})")
    rows.frame.attrs["dropped"] = rows.dropped
    return rows.frame


def protected_places(
    language: LanguageSettings, data: DataSettings, evaluation: Evaluation | None = None, text: Origin | None = None
) -> list[Place]:
    """Return the evaluation rows whose sentences must not be in a language's unlabelled text.

    Dev and test (NusaX: valid and test) in this language of the public sets in ``data.protect`` and of the one that is
    evaluated, as far as they are at hand: the data set's folder is there, or it comes from the hub; a split that a
    folder lacks is skipped. And what is protected in every language (:meth:`Evaluation.places`).

    Raises:
        DeftxError: A set that ``data.protect`` cannot name; ``data.<name>`` is neither a folder nor a hub id.
    """
    for task in data.protect:
        if task not in PROTECTED:
            raise DeftxError(f"data.protect: {task!r} is not one of {', '.join(PROTECTED)}")
    names = dict.fromkeys(data.protect)
    if evaluation is not None and evaluation.task in PROTECTED:
        names[evaluation.task] = None
    places = [place for task in names for place in _evaluation_places(task, language, data, ("dev", "test"))]
    return list(dict.fromkeys([*places, *(evaluation.places(data, text) if evaluation is not None else ())]))


class Protected(NamedTuple):
    """Sentences that nobody may learn from.

    Attributes:
        texts: The sentences; premises and hypotheses apart.
        sets: A :func:`digest_rows` of each set, sorted: whether rows were among them can be told later.
    """

    texts: list[str]
    sets: list[str]


def digest_rows(rows: pd.DataFrame) -> str:
    """SHA-256 of the letters of rows' texts, whatever their order, ids and labels."""
    return _digest_texts(_joined(rows))


def _digest_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(map(normalise, texts)))).encode()).hexdigest()


def protected_texts(
    language: LanguageSettings, data: DataSettings, evaluation: Evaluation | None = None, text: Origin | None = None
) -> Protected:
    """Read the sentences of :func:`protected_places`.

    Raises:
        DeftxError: As :func:`protected_places`; or a file is malformed; or the hub does not answer.
    """
    texts: dict[str, None] = {}
    sets = set()
    for place in protected_places(language, data, evaluation, text):
        try:
            if place.dataset == SENTENCES:
                read = read_sentences(place)
            else:
                rows = read_rows(place).frame
                sets.add(digest_rows(rows))
                read = sentences_of(rows)
        except DeftxError as error:
            if place.hub is None or place.dataset not in data.protect:
                raise
            left = [name for name in data.protect if name != place.dataset]
            raise DeftxError(
                f"{error}\nIt is read to keep its sentences out of the text of {language.code!r}; "
                f"data.protect=[{','.join(left)}] leaves it out"
            ) from error
        texts |= dict.fromkeys(read)
    return Protected(list(texts), sorted(sets))


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


def _evaluation_places(task: str, language: LanguageSettings, data: DataSettings, splits: Sequence[str]) -> list[Place]:
    """Return the splits of a set in a language; nothing where the language, the folder or the split is not there."""
    places = []
    for split in splits:
        with contextlib.suppress(NotAtHandError, MissingSplitError):
            places.append(place_of(task_spec(task, data), language, data, split))
    return places


def _validates_dev(valid: Place, protected: Place) -> bool:
    """Tell whether a protected place is a dev split that the study also validates on: its rows may choose, as dev does.

    Files are compared by content, as keys compare them; a copy under another name is the same rows.
    """
    if protected.split not in ("dev", "validation"):
        return False
    if (valid.files, valid.hub) == (protected.files, protected.hub):
        return True
    if valid.hub or protected.hub or valid.url or protected.url:
        return False
    return digest_files(valid.files) == digest_files(protected.files)


def _joined(frame: pd.DataFrame) -> list[str]:
    """Return one text a row; of a pair, premise and hypothesis together: either alone may be anyone's."""
    return [
        text if pair is None else f"{text} {pair}" for text, pair in zip(frame["text"], frame["text_pair"], strict=True)
    ]


def _need_rows(origin: str, split: str, rows: pd.DataFrame, report: Mapping[str, Any]) -> None:
    """Refuse an empty split, and say where its rows went."""
    if not rows.empty:
        return
    counts = report[split]
    why = {
        "have no text": counts["empty"],
        "have no label": counts["unlabelled"],
        "are sentences of evaluation sets, or close to one": counts["leak"]["dropped"],
        "are validation rows, too": counts.get("in_valid", 0),
    }
    reasons = " and ".join(f"{count} {reason}" for reason, count in why.items() if count)
    example = "".join(
        f"; such as {item['text']!r}, where an evaluation set has {item['protected']!r}"
        for item in counts["leak"]["examples"][-1:]
    )
    off = "; data.leak_threshold=2 turns the filter off" if counts["leak"]["dropped"] else ""
    raise DeftxError(
        f"{origin}: none of {counts['rows']} {_SPLIT_NAMES[split]} rows is left: {reasons}{example}; "
        f"give other rows{off}"
    )


def _without_leaks(
    rows: Rows, leak_filter: LeakFilter, protected: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    texts = _joined(rows.frame)
    matches = leak_filter.matches(texts)
    clean = pd.Series([match is None for match in matches], index=rows.frame.index, dtype=bool)
    report: dict[str, Any] = {"rows": len(texts) + sum(rows.dropped.values()), **rows.dropped}
    report["leak"] = summarise(matches, texts, protected)
    return rows.frame[clean].reset_index(drop=True), report
