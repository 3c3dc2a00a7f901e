"""Text to token ids: labelled rows, blocks for language modelling (cached by ``datasets``), padded batches."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from deftx import atomic
from deftx.errors import DeftxError

TOKENISER_VERSION = 1  # part of the cache's names: raise it when the same lines give other tokens
Batch = dict[str, Any]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int
) -> dict[str, list[list[int]]]:
    """Tokenise texts or pairs, truncated to ``max_length`` (the longer of a pair first), without padding.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: first texts.
        pairs: second texts, or None; a column of missing values (None, NaN) counts as None.
        max_length: tokens, special tokens included.

    Returns:
        ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``.

    Raises:
        DeftxError: some rows have a second text and others have none.
    """
    second = None
    if pairs is not None:
        present = [isinstance(pair, str) for pair in pairs]
        if any(present) and not all(present):
            lone = present.index(False)
            raise DeftxError(f"row {lone} has no second text (text_pair) while other rows have one")
        second = list(pairs) if all(present) and present else None
    encoded = tokenizer(
        list(texts),
        second,
        truncation="longest_first" if second is not None else True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def pad(columns: Mapping[str, Sequence[Sequence[int]]], padding: Mapping[str, int]) -> Batch:
    """Pad rows to the longest: int64 [B, T], ``attention_mask`` only where there is padding, ``tokens`` counted."""
    batch: Batch = {
        name: pad_sequence(
            [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=padding.get(name, 0)
        )
        for name, rows in columns.items()
    }
    lengths = torch.tensor([len(row) for row in columns["input_ids"]])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).to(torch.int64)
    batch["tokens"] = int(lengths.sum())
    return batch


def padding_of(tokenizer: Any) -> dict[str, int]:
    """Return what :func:`pad` fills each column with."""
    return {"input_ids": int(tokenizer.pad_token_id), "token_type_ids": int(tokenizer.pad_token_type_id)}


def batches_by_length(
    columns: Mapping[str, Sequence[Sequence[int]]], padding: Mapping[str, int], size: int
) -> list[tuple[list[int], Batch]]:
    """Cut encoded rows into padded batches of ``size`` rows of like length, each with its rows' places.

    Longest first: the largest batch comes at once, and memory only falls from there. On short texts this saves most
    of the padding.
    """
    lengths = [len(row) for row in columns["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    parts = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        (rows, pad({name: [column[row] for row in rows] for name, column in columns.items()}, padding))
        for rows in parts
    ]


def tokenise_blocks(lines: Sequence[str], tokenizer: Any, block: int, cache_dir: Path | None) -> Any:
    """Concatenate tokenised lines and cut them into blocks of ``block`` tokens; the rest at the end is left out.

    Args:
        lines: text, one sequence with its special tokens each.
        tokenizer: a fast transformers tokenizer.
        block: tokens of a block.
        cache_dir: folder for the result, named by its content (tokenizer, block, lines); None: in memory.

    Returns:
        A ``datasets`` dataset in numpy format with the column ``input_ids``, int32 [block].
    """
    import datasets

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    if not lines:
        return datasets.Dataset.from_dict({"input_ids": []}, features=features)
    digest = hashlib.sha256(f"{TOKENISER_VERSION}/{block}/{tokenizer_identity(tokenizer)}".encode())
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    name = digest.hexdigest()[:32]
    target = None
    if cache_dir is not None:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        file = Path(cache_dir) / f"blocks-{name}.arrow"
        target = str(file)
        if not _intact(file):
            file.unlink(missing_ok=True)
    rest: list[int] = []

    def cut(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        nonlocal rest
        # A line may be longer than the model: it is cut into blocks, so no warning is due.
        encoded = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)
        stream = rest + [token for line in encoded["input_ids"] for token in line]
        whole = len(stream) // block * block
        rest = stream[whole:]
        return {"input_ids": [stream[i : i + block] for i in range(0, whole, block)]}

    with _quiet_datasets():
        blocks = datasets.Dataset.from_dict({"text": list(lines)}).map(
            cut,
            batched=True,
            remove_columns=["text"],
            features=features,
            keep_in_memory=target is None,
            cache_file_name=target,
            new_fingerprint=name,
            load_from_cache_file=target is not None,
        )
    if target is not None and not _intact(file):
        atomic.write(_seal(file), _digest(file).encode("ascii"))
    return blocks.with_format("numpy")


def _seal(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _intact(file: Path) -> bool:
    """Return whether a cached file is there with the bytes it was written with; ``datasets`` does not look."""
    try:
        return _seal(file).read_text(encoding="ascii") == _digest(file)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """Return the digest of what decides the tokens; truncation and padding, which the last call left, do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    lasting = {name: value for name, value in parts.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
