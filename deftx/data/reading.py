"""Turns bytes on disk into text and tables, and says what is wrong with a file in one clear message.

Files are UTF-8; a byte-order mark is dropped, and lines end at LF or CRLF only. ``.csv`` files have ordinary quoting.
``.tsv`` files, and files with any other ending, have none: there a double quote is text. No cell becomes NaN.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deftx.errors import DeftxError

if TYPE_CHECKING:
    import pandas as pd


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without byte-order mark, with LF line ends.

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


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a CSV (``.csv``) or TSV (anything else) file.

    Args:
        path: The file.
        columns: Names of the columns of a file without header.

    Returns:
        Cells as text; blank lines are left out.

    Raises:
        DeftxError: As :func:`read_text`; or a row has more or fewer cells than there are columns; a column
            is named twice; or there is no row.
    """
    import pandas as pd

    text = read_text(path)
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path, text)
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
    return pd.DataFrame(rows, columns=list(header))


def _csv_rows(path: Path, text: str) -> list[list[str]]:
    """Return the rows of a CSV file; a quote out of place is an error, for it would swallow the rows after it."""
    rows: list[list[str]] = []
    # csv's own strict mode takes a quote inside an unquoted cell as text, which is what it is.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DeftxError(
            f"{path}: row {len(rows)}, from line {line}, is not CSV ({error}); put a cell that begins with a "
            'double quote into double quotes, and double those inside: "say ""no"" to it"'
        ) from error
    return rows


def read_jsonl(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read some fields, as text, of a file with one JSON object a line.

    Raises:
        DeftxError: As :func:`read_text`; or a line is not JSON, or lacks a field.
    """
    import pandas as pd

    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            rows.append([_json_text(fields[name]) for name in columns])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DeftxError(
                f"{path}: line {number} is not a JSON object with texts or numbers as {', '.join(columns)}"
            ) from None
    return pd.DataFrame(rows, columns=list(columns))


def _json_text(value: object) -> str:
    """Return a text, or a whole number as text; anything else has no text that a person wrote."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(value)
    return str(value)


def expand(patterns: Sequence[str], root: Path) -> dict[str, list[Path]]:
    """Return files that each pattern names: a file, a folder (every ``*.txt`` below it) or a glob.

    Relative patterns start at ``root``.
    """
    files: dict[str, list[Path]] = {}
    for pattern in patterns:
        path = root / Path(pattern).expanduser()
        if path.is_file():
            files[pattern] = [path]
            continue
        # Only the pattern may hold wildcards: brackets in the root's own name are ordinary letters.
        anchor = Path(path.anchor) if Path(pattern).expanduser().is_absolute() else root
        matches = path.rglob("*.txt") if path.is_dir() else anchor.glob(str(path.relative_to(anchor)))
        files[pattern] = sorted(file for file in matches if file.is_file())
    return files
