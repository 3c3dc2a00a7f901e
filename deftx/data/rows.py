"""Reads the rows of a place into one common form: id, text, text_pair, label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deftx.data.corpora import clean_line
from deftx.data.hub import HubRef, download, label_words, load_hub, require_hub_columns
from deftx.data.places import PAIR, SINGLE, Form, MissingSplitError, Place, label_key
from deftx.data.reading import read_jsonl, read_table, read_text
from deftx.errors import DeftxError

MULTINLI_FIELDS = ("pairID", "sentence1", "sentence2", "gold_label")
"""What a ``.jsonl`` file holds: MultiNLI's own release is the only one that is read."""


SENTENCES = "sentences"
"""The data set of a file that holds sentences, whatever their labels: :func:`read_sentences` alone reads it."""


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        frame: Columns id, text, text_pair, label.
        dropped: Rows left out: ``empty`` (no text), ``unlabelled`` (NLI pairs without agreement, label ``-``).
    """

    frame: pd.DataFrame
    dropped: dict[str, int]


def read_rows(place: Place) -> Rows:
    """Read the rows of a place.

    Raises:
        DeftxError: A file is malformed or holds an unknown label; the hub does not answer.
    """
    if place.hub is not None:
        origin = f"{place.hub}, {place.split}"
        return _common(_hub_table(place, place.hub, origin), place.form, origin)
    files = (download(place.url, place.cache_dir),) if place.url else place.files
    parts = [_common(_file_table(place, path), place.form, str(path)) for path in files]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    if len(parts) > 1:
        # Row numbers repeat from file to file.
        names = [path.stem for path, part in zip(files, parts, strict=True) for _ in range(len(part.frame))]
        frame["id"] = [f"{name}:{number}" for name, number in zip(names, frame["id"], strict=True)]
    return Rows(frame, {reason: sum(part.dropped[reason] for part in parts) for reason in parts[0].dropped})


def read_sentences(place: Place) -> list[str]:
    """Read every text of a place's rows, premises and hypotheses apart.

    Raises:
        DeftxError: As :func:`read_rows`; or a table of sentences has no column of texts.
    """
    if place.dataset != SENTENCES:
        return sentences_of(read_rows(place).frame)
    texts: list[str] = []
    for path in place.files:
        if path.suffix.lower() in (".tsv", ".csv"):
            table = read_table(path)
            forms = [names for form in (SINGLE, PAIR) for names in form if set(names) & set(table)]
            for names in forms or SINGLE:
                texts += _column(table, names, str(path))
        else:
            texts += read_text(path).split("\n")
    return [text for text in map(clean_line, texts) if text]


def _quoting(labels: Sequence[str]) -> str:
    """Return a hint where labels look like what YAML makes of words that are not quoted."""
    made = {"True", "False", "None", "nan"} & set(labels)
    return "; YAML reads yes, no, on, off and nan as values: quote them in data.labels" if made else ""


def sentences_of(rows: pd.DataFrame) -> list[str]:
    """Return every text of rows, premises and hypotheses apart."""
    return [*rows["text"], *(text for text in rows["text_pair"] if text is not None)]


def _file_table(place: Place, path: Path) -> pd.DataFrame:
    """Return the cells of a file, as text; of a file that holds all languages, those of the place's language."""
    jsonl = path.suffix == ".jsonl"
    table = read_jsonl(path, MULTINLI_FIELDS) if jsonl else read_table(path, columns=place.form.header)
    if place.form.is_combined(path) and "language" in table:
        table = table[table["language"] == place.language]
        if table.empty:
            raise MissingSplitError(f"{path} has no rows in {place.language!r}")
    return table


def _hub_table(place: Place, ref: HubRef, origin: str) -> pd.DataFrame:
    """Return the cells of a hub data set, as text; its labels as words."""
    form = place.form
    dataset = load_hub(ref, place.split)
    columns = [names[0] for names in form.texts[0]]
    require_hub_columns(dataset, (*columns, "label"), origin)
    cells = dataset.select_columns([*columns, "label", *_id_column(dataset.column_names)]).to_dict()
    cells["label"] = label_words(cells["label"], dataset.features["label"], form.hub_labels or form.labels, origin)
    cells |= {name: [text or "" for text in cells[name]] for name in columns}
    return pd.DataFrame({name: list(map(str, column)) for name, column in cells.items()})


def _id_column(columns: Iterable[str]) -> list[str]:
    return [name for name in ("id", "pairID") if name in columns][:1]


def _column(table: pd.DataFrame, names: Sequence[str], origin: str) -> list[str]:
    """Return the cells of the first of ``names`` that a table has."""
    for name in names:
        if name in table:
            return table[name].tolist()
    raise DeftxError(
        f"{origin}: no column {names[0]!r}; its first line must name the columns, and names {', '.join(table.columns)}"
    )


def _common(table: pd.DataFrame, form: Form, origin: str) -> Rows:
    """Clean the texts and turn labels into integers; rows without text or without a label are counted and dropped."""
    texts = next((texts for texts in form.texts if texts[0][0] in table), form.texts[-1])
    columns = [_column(table, names, origin) for names in texts]
    words = _column(table, ("label", "gold_label"), origin)
    named = _id_column(table.columns)
    ids = table[named[0]].tolist() if named else map(str, range(1, len(table) + 1))
    labels = {label_key(word): index for index, word in enumerate(form.labels)}
    labels |= {spelling: labels[word] if word else -1 for spelling, word in form.spellings}
    dropped = {"empty": 0, "unlabelled": 0}
    rows: list[tuple[str, str, str | None, int]] = []
    for number, (row_id, word, *cells) in enumerate(zip(ids, words, *columns, strict=True), 1):
        text, *other = map(clean_line, cells)
        label = labels.get(label_key(word))
        if label is None:
            known = ", ".join(form.labels) + _quoting(form.labels)
            raise DeftxError(f"{origin}: row {number}: unknown label {word!r}; known are {known}")
        if label < 0:
            dropped["unlabelled"] += 1
        elif not all((text, *other)):
            dropped["empty"] += 1
        else:
            rows.append((row_id.strip(), text, other[0] if other else None, label))
    frame = pd.DataFrame(rows, columns=["id", "text", "text_pair", "label"])
    frame["text_pair"] = pd.Series([row[2] for row in rows], dtype=object)
    frame["label"] = frame["label"].astype("int64")
    return Rows(frame, dropped)
