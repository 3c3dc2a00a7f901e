"""What the files of a place say, as common rows: id, text, text_pair, label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deftx.data.corpora import clean_line
from deftx.data.hub import HubRef, download, label_words, load_hub, require_hub_columns
from deftx.data.places import Form, MissingSplitError, Place
from deftx.data.reading import Table, read_jsonl, read_table
from deftx.errors import DeftxError

MULTINLI_FIELDS = ("pairID", "sentence1", "sentence2", "gold_label")
"""What a ``.jsonl`` file holds: MultiNLI's own release is the only one that is read."""


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
        return _read_hub(place, place.hub)
    files = (download(place.url, place.cache_dir),) if place.url else place.files
    parts = [_read_file(place, path) for path in files]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    if len(parts) > 1:
        # Row numbers repeat from file to file.
        names = [path.stem for path, part in zip(files, parts, strict=True) for _ in range(len(part.frame))]
        frame["id"] = [f"{name}:{number}" for name, number in zip(names, frame["id"], strict=True)]
    return Rows(frame, {key: sum(part.dropped[key] for part in parts) for key in ("empty", "unlabelled")})


def _read_file(place: Place, path: Path) -> Rows:
    form = place.form
    table = read_jsonl(path, MULTINLI_FIELDS) if path.suffix == ".jsonl" else read_table(path, columns=form.header)
    if form.is_combined(path):
        at = table.columns.index("language") if "language" in table.columns else None
        rows = [row for row in table.rows if at is None or row[at] == place.language]
        if not rows:
            raise MissingSplitError(f"{path} has no rows in {place.language!r}")
        table = Table(table.origin, table.columns, rows)
    texts = next((texts for texts in form.texts if texts[0][0] in table.columns), form.texts[-1])
    columns = [table.column(*names) for names in texts]
    words = table.column("label", "gold_label")
    named = next((name for name in ("id", "pairID") if name in table.columns), None)
    ids = table.column(named) if named else [str(number) for number in range(1, len(table.rows) + 1)]
    return _rows(ids, columns, words, form, str(path))


def _read_hub(place: Place, ref: HubRef) -> Rows:
    form = place.form
    dataset = load_hub(ref, place.split)
    origin = f"{ref}, {place.split}"
    columns = [names[0] for names in form.texts[0]]
    require_hub_columns(dataset, (*columns, "label"), origin)
    named = next((name for name in ("id", "pairID") if name in dataset.column_names), None)
    cells = dataset.select_columns([*columns, "label", *([named] if named else [])]).to_dict()
    words = label_words(cells["label"], dataset.features["label"], form.hub_labels or form.labels, origin)
    ids = [str(value) for value in cells[named]] if named else [str(number) for number in range(1, len(dataset) + 1)]
    return _rows(ids, [[str(text or "") for text in cells[name]] for name in columns], words, form, origin)


def _rows(ids: Sequence[str], columns: Sequence[Sequence[str]], words: Sequence[str], form: Form, origin: str) -> Rows:
    """Common rows: texts cleaned, labels as integers; rows without text or without a label are counted out."""
    known = {word.casefold(): index for index, word in enumerate(form.labels)}
    known |= {spelling: known[word] if word else -1 for spelling, word in form.spellings}
    dropped = {"empty": 0, "unlabelled": 0}
    kept: list[tuple[str, str, str | None, int]] = []
    for number, (row_id, word, *cells) in enumerate(zip(ids, words, *columns, strict=True), 1):
        text, *other = map(clean_line, cells)
        label = known.get(word.strip().casefold())
        if label is None:
            raise DeftxError(f"{origin}: row {number}: unknown label {word!r}; known are {', '.join(form.labels)}")
        if label < 0:
            dropped["unlabelled"] += 1
        elif not all((text, *other)):
            dropped["empty"] += 1
        else:
            kept.append((row_id.strip(), text, other[0] if other else None, label))
    frame = pd.DataFrame(kept, columns=["id", "text", "text_pair", "label"])
    frame["text_pair"] = pd.Series([row[2] for row in kept], dtype=object)
    frame["label"] = frame["label"].astype("int64")
    return Rows(frame, dropped)
