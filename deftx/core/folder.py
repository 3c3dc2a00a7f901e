"""The folder in which a sparse fine-tuning lives: written whole or not at all, verified when read, never a pickle.

``sft.safetensors`` holds the tensors, ``sft.json`` says what they are (format version, dtype of the values) and
carries the sha256 of the tensor file and of its own other content, so that a truncated or edited byte in either is
noticed; README.md is a model card made from the same facts. Equal content gives equal bytes: no times, no paths,
sorted keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from deftx import atomic
from deftx.errors import DeftxError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
TENSORS, FACTS, CARD = "sft.safetensors", "sft.json", "README.md"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # pickle protocol 2 and later; the zip that torch.save writes
_HEADER_AT = 8  # in a safetensors file
_AGAIN = "fetch or train it again"


def write_folder(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], card: str) -> None:
    """Publish a folder under its final name only when it is complete.

    Args:
        folder: where; must not exist, or be empty. Parents are made.
        tensors: contiguous CPU tensors that share no memory.
        facts: plain JSON; ``format_version`` and ``sha256`` are added.
        card: text of the README.

    Raises:
        DeftxError: something lies at ``folder``, it cannot be written, or the facts are not plain JSON.
    """
    import safetensors.torch

    data = safetensors.torch.save(dict(tensors))
    try:
        # through text and back, so that what is hashed here is what a reader will hash
        plain = json.loads(json.dumps({**facts, "format_version": FORMAT_VERSION}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DeftxError(f"the metadata of a sparse fine-tuning must be plain JSON without NaN: {error}") from error
    plain["sha256"] = {TENSORS: hashlib.sha256(data).hexdigest(), FACTS: _digest(plain)}
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    _publish(folder, {TENSORS: data, FACTS: text.encode(), CARD: card.encode()})


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts of a folder, verified.

    Returns:
        The tensors, by name, memory-mapped: they are read from the file when they are used. And the facts.

    Raises:
        DeftxError: a missing folder or file, a pickle, an unknown format version, or content that was
            truncated or edited after it was written.
    """
    import safetensors.torch

    facts = read_facts(folder)
    try:
        return safetensors.torch.load_file(folder / TENSORS), facts
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DeftxError(f"{folder / TENSORS} is not a safetensors file ({error}): {_AGAIN}") from error


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what ``sft.json`` says, once both files have the sha256 they were written with; needs no torch.

    Raises:
        DeftxError: as :func:`read_folder`, but for a tensor file that is whole and no safetensors file.
    """
    try:
        _check_folder(folder)
        with (folder / TENSORS).open("rb") as file:
            start = file.read(_HEADER_AT + 1)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        text = (folder / FACTS).read_bytes()
    except OSError as error:
        raise DeftxError(f"cannot read the sparse fine-tuning {folder}: {error.strerror or error}") from error
    if _is_pickle(start):
        raise DeftxError(_pickle_message(folder / TENSORS))
    try:
        facts: dict[str, Any] = json.loads(text)
        version, digests = facts["format_version"], dict(facts.pop("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeftxError(f"{folder / FACTS} does not describe a sparse fine-tuning (edited?): {_AGAIN}") from error
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise DeftxError(f"{folder} has format version {version}; this deftx reads versions {readable}: update deftx")
    for name, digest_found in ((TENSORS, digest), (FACTS, _digest(facts))):
        if digests.get(name) != digest_found:
            raise DeftxError(f"{folder / name} was truncated or edited after it was written (sha256 differs): {_AGAIN}")
    return facts


def model_card(
    metadata: Mapping[str, Any], k: int, layers: Mapping[str, int], head: list[str], value_dtype: str
) -> str:
    """Return the README of a folder: front matter as model hubs read it, the facts, and how to use it.

    Args:
        metadata: of the sparse fine-tuning.
        k: how many coordinates it changes.
        layers: changed coordinates by part of the model.
        head: names of its head tensors.
        value_dtype: of its values in the file.
    """
    front: dict[str, Any] = {"library_name": "deftx", "tags": ["sparse-fine-tuning", "deftx"]}
    if metadata.get("base_model"):
        front["base_model"] = metadata["base_model"]
    if isinstance(metadata.get("language"), str):
        front["language"] = [metadata["language"]]
    shown = ("kind", "language", "task", "method", "rank", "residual", "base_model", "base_fingerprint", "labels")
    rows: list[tuple[str, Any]] = [("coordinates changed (K)", k), ("values stored as", value_dtype)]
    rows += [(key.replace("_", " "), metadata[key]) for key in shown if metadata.get(key) is not None]
    if head:
        rows.append(("head tensors", ", ".join(sorted(head))))
    if isinstance(metadata.get("metrics"), Mapping):
        rows += [(f"metric: {key}", value) for key, value in sorted(metadata["metrics"].items())]
    title = " ".join(str(metadata[key]) for key in ("kind", "language", "task") if metadata.get(key))
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
            "---",
            "",
            f"# Sparse fine-tuning{': ' + title if title else ''}",
            "",
            "A sparse fine-tuning (SFT) changes a few coordinates of a pretrained encoder. SFTs of the same base add",
            "up: a language's and a task's together make a zero-shot classifier for that language.",
            "",
            f"`{TENSORS}` holds for each parameter NAME that changes `NAME.gaps` (uint8: its flat indices, as counts",
            "of unchanged entries before each changed one, unsigned LEB128) and `NAME.values` (what is added there),",
            f"and `head.NAME` for each trained head tensor. `{FACTS}` gives the shapes and the sha256 of both files.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {_cell(value)} |" for key, value in rows),
            "",
            "| part of the model | coordinates |",
            "|---|---|",
            *(f"| {part} | {count} |" for part, count in layers.items()),
            "",
            "```python",
            "from deftx import Composition, SparseDelta",
            "",
            'sft = SparseDelta.load("path/to/this/folder")',
            "# parameters: the base encoder's own, by name, float32",
            'model = Composition(parameters, base_fingerprint=sft.metadata["base_fingerprint"])',
            'model.add("sft", sft)',
            "```",
            "",
        ]
    )


def _cell(value: object) -> str:
    text = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False, default=str)
    return str(text).replace("|", "\\|").replace("\n", " ")


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise DeftxError(f"there is no sparse fine-tuning at {folder}: no such folder")
    if not folder.is_dir():
        with folder.open("rb") as file:
            start = file.read(_HEADER_AT + 1)
        if folder.suffix.lower() in PICKLES or _is_pickle(start):
            raise DeftxError(_pickle_message(folder))
        raise DeftxError(f"{folder} is a file; a sparse fine-tuning is the folder that holds {TENSORS} and {FACTS}")
    names = sorted(path.name for path in folder.iterdir())
    missing = [name for name in (TENSORS, FACTS) if name not in names]
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if missing and pickles:
        raise DeftxError(_pickle_message(folder / pickles[0]))
    if missing:
        listing = ", ".join(names[:8]) or "nothing"
        raise DeftxError(f"{folder} is no sparse fine-tuning: {' and '.join(missing)} missing (found: {listing})")


def _is_pickle(start: bytes) -> bool:
    # A safetensors file starts with the length of its JSON header in 8 bytes, whose lowest may be any byte, 0x80 too.
    return start.startswith(_PICKLE_STARTS) and start[_HEADER_AT : _HEADER_AT + 1] != b"{"


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened; deftx reads only {TENSORS} with {FACTS}. "
        "Convert it where it was made: build a SparseDelta from its tensors and call save()"
    )


def _publish(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DeftxError(f"{folder} exists already and is not overwritten: remove it or choose another folder")
        with atomic.folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise DeftxError(
            f"cannot write the sparse fine-tuning to {folder}: {error.strerror or error}; "
            "check permissions and free space, or choose another folder"
        ) from error
