"""Bytes on disk or on the hub, turned into text and tables, with one clear message for whatever is wrong with them.

Reading rules: UTF-8, a byte-order mark is dropped, lines end at LF or CRLF only. ``.csv`` has ordinary quoting;
``.tsv`` (and every other ending) has none, a double quote is text. Nothing becomes NaN. Hub data sets are read with
``datasets`` 5, which runs no dataset scripts; the id of a data set and a local folder with its files are
interchangeable.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.errors import DeftxError

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class HubRef:
    """One configuration of a hub data set.

    Attributes:
        dataset: Hub id, or a folder with the data set's files.
        config: Configuration name, ``None`` for the only one.
        revision: Commit or branch, ``None`` for the newest.
        cache_dir: Cache folder of ``datasets``, ``None`` for its default.
    """

    dataset: str
    config: str | None
    revision: str | None = None
    cache_dir: str | None = None

    def __str__(self) -> str:
        return f"{self.dataset} ({self.config})" if self.config else self.dataset


@dataclass(frozen=True)
class Table:
    """Rows of text cells.

    Attributes:
        origin: File, for messages.
        columns: Column names.
        rows: Cells, as many in each row as there are columns.
    """

    origin: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def column(self, *names: str) -> list[str]:
        """Cells of the first of ``names`` that the table has.

        Raises:
            DeftxError: It has none; the message lists the columns there are.
        """
        for name in names:
            if name in self.columns:
                at = self.columns.index(name)
                return [row[at] for row in self.rows]
        raise DeftxError(
            f"{self.origin}: no column {names[0]!r}; its first line must name the columns, and names "
            f"{', '.join(self.columns)}"
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte-order mark, with LF line ends.

    Raises:
        DeftxError: The file is missing, unreadable, empty or not UTF-8 (with line and byte offset).
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DeftxError(f"no file {path}") from None
    except OSError as error:
        raise DeftxError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from after the byte-order mark.
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw.count(b"\n", 0, offset) + 1
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DeftxError(
            f"{path}: not UTF-8: byte 0x{raw[offset]:02x} at offset {offset}, line {line}; "
            f"convert it first, e.g. iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8"
        ) from None
    if not text.strip():
        raise DeftxError(f"{path} is empty")
    return text.replace("\r\n", "\n")


def read_table(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a CSV (``.csv``) or TSV (anything else) file.

    Args:
        path: The file.
        columns: Names of the columns of a file without header.

    Returns:
        The table; blank lines are left out.

    Raises:
        DeftxError: As :func:`read_text`; or a row has more or fewer cells than there are columns; a column
            is named twice; or there is no row.
    """
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        except csv.Error as error:
            raise DeftxError(f"{path} is not a CSV file: {error}") from error
    else:
        rows = [line.split("\t") for line in text.split("\n") if line]
    header = tuple(columns) if columns is not None else tuple(name.strip() for name in rows.pop(0))
    if twice := sorted(name for name, count in Counter(filter(None, header)).items() if count > 1):
        raise DeftxError(f"{path}: its first line names {', '.join(twice)} more than once")
    if not rows:
        raise DeftxError(f"{path} has a header but no rows")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise DeftxError(
                f"{path}: row {number} has {len(row)} cells, not {len(header)} ({', '.join(header)}); "
                "a .csv is comma-separated with quoting, any other file tab-separated without"
            )
    return Table(str(path), header, rows)


def read_jsonl(path: Path, columns: Sequence[str]) -> Table:
    """Read some fields of a file with one JSON object a line.

    Raises:
        DeftxError: As :func:`read_text`; or a line is not JSON; or lacks a field.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            rows.append([str(item[name]) for name in columns])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DeftxError(f"{path}: line {number} is not a JSON object with {', '.join(columns)}") from None
    return Table(str(path), tuple(columns), rows)


def is_hub_copy(folder: Path) -> bool:
    """Whether a folder holds a hub data set's files (parquet, or a card that configures data files), not a clone."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = text.split("\n---", 1)[0] if text.startswith("---") else ""
        if re.search(r"^(configs|dataset_info):", front, flags=re.MULTILINE):
            return True
    return any(
        next(folder.glob(pattern), None) is not None for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    )


def load_hub(ref: HubRef, split: str) -> datasets.Dataset:
    """Load one split of a hub data set, or of a folder with its files.

    Raises:
        DeftxError: The data set, its configuration or its split is not there, or the hub does not answer.
    """
    import datasets

    try:
        return datasets.load_dataset(
            ref.dataset, ref.config, split=split, revision=ref.revision, cache_dir=ref.cache_dir
        )
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise DeftxError(
            f"{ref}, split {split!r}, could not be loaded with datasets: {reason}; without a network, set data.root to "
            "a folder with clones of the data sets, or the data set's own data.<name>=FOLDER"
        ) from error


def label_words(values: Sequence[Any], feature: Any, order: Sequence[str], origin: str) -> list[str]:
    """Labels of a hub data set as words; an unlabelled row (-1) gives ``"-"``.

    Args:
        values: The label column: integers or words.
        feature: Its feature; a ``ClassLabel`` names the integers.
        order: What the integers 0, 1, 2, ... mean where the data set does not name them.
        origin: Data set, for messages.

    Raises:
        DeftxError: A value is neither a word nor a known integer.
    """
    names = getattr(feature, "names", None) or list(order)
    words = []
    for number, value in enumerate(values, 1):
        if isinstance(value, str):
            words.append(value)
        elif value == -1:
            words.append("-")
        elif value is not None and 0 <= int(value) < len(names):
            words.append(names[int(value)])
        else:
            known = f"0 to {len(names) - 1} ({', '.join(names)})"
            raise DeftxError(f"{origin}: row {number}: unknown label {value!r}; known are {known}")
    return words


def require_hub_columns(dataset: datasets.Dataset, columns: Iterable[str], origin: str) -> None:
    """Raise a :class:`DeftxError` when a hub data set lacks one of ``columns``."""
    for name in columns:
        if name not in dataset.column_names:
            raise DeftxError(f"{origin}: no column {name!r}; its columns are {', '.join(dataset.column_names)}")


def download(url: str, cache_dir: str | None) -> Path:
    """The local copy of a file on the network, from ``datasets``' cache when it is there.

    Raises:
        DeftxError: The file could not be downloaded.
    """
    import datasets

    try:
        config = datasets.DownloadConfig(cache_dir=cache_dir)
        return Path(datasets.DownloadManager(download_config=config).download(url))
    except Exception as error:
        raise DeftxError(
            f"{url} could not be downloaded ({type(error).__name__}); without a network, set data.root to a folder "
            "with clones of the data sets, or the data set's own data.<name>=FOLDER"
        ) from error


def expand(patterns: Sequence[str], root: Path) -> dict[str, list[Path]]:
    """Files named by each file, folder (every ``*.txt`` below it) or glob; relative ones start at ``root``."""
    found: dict[str, list[Path]] = {}
    for pattern in patterns:
        path = root / Path(pattern).expanduser()
        if path.is_dir():
            found[pattern] = sorted(file for file in path.rglob("*.txt") if file.is_file())
        elif path.is_file():
            found[pattern] = [path]
        else:
            # Only the pattern is a pattern: the root's own name may hold brackets.
            anchor = Path(path.anchor) if Path(pattern).expanduser().is_absolute() else root
            found[pattern] = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
    return found
