"""Bytes on disk, turned into text and tables, with one clear message for whatever is wrong with them.

Reading rules: UTF-8, a byte-order mark is dropped, lines end at LF or CRLF only. ``.csv`` has ordinary quoting;
``.tsv`` (and every other ending) has none, a double quote is text. Nothing becomes NaN.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deftx.errors import DeftxError


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
