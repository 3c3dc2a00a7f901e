"""Data sets and models on the hub: which commit a revision is, and one split of a data set at that commit.

What a hub gives can change under its name, so a reference is read at a full commit (:meth:`HubRef.resolved`); what
is keyed is then what is read. Data sets are read with ``datasets`` 5, which runs no dataset scripts; the id of a data
set and a local folder with its files are interchangeable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx import atomic
from deftx.errors import DeftxError

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
WITHOUT_NETWORK = {
    "dataset": "set data.root to a folder with clones of the data sets, or the data set's own data.<name>=FOLDER",
    "model": "set model.path=FOLDER, or work offline with model=tiny",
}
"""What to do where the hub does not answer, by the kind of repository."""

_SECONDS = 20.0
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class HubRef:
    """One configuration of a hub data set.

    Attributes:
        dataset: Hub id, or a folder with the data set's files.
        config: Configuration name, ``None`` for the only one.
        revision: Commit, branch or tag, ``None`` for the newest commit.
        cache_dir: Cache folder of ``datasets``, ``None`` for its default.
    """

    dataset: str
    config: str | None
    revision: str | None = None
    cache_dir: str | None = None

    def __str__(self) -> str:
        return f"{self.dataset} ({self.config})" if self.config else self.dataset

    @property
    def folder(self) -> Path | None:
        """The folder with the data set's files; ``None`` where they come from the hub."""
        folder = Path(self.dataset)
        return folder if folder.is_dir() else None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the folder by sorted name, without those whose names start with a dot; none for a hub id."""
        folder = self.folder
        if folder is None:
            return ()
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return tuple(folder / name for name in names if not any(part.startswith(".") for part in name.parts))

    def resolved(self) -> HubRef:
        """Return the same reference with the full commit as its revision; a local folder has none and stays as it is.

        Raises:
            DeftxError: As :func:`resolve_commit`.
        """
        if self.folder is not None:
            return self
        return replace(self, revision=resolve_commit(self.dataset, self.revision, "dataset"))


@functools.cache
def resolve_commit(repo_id: str, revision: str | None, repo_type: str) -> str:
    """Return the full commit a revision of a hub repository is; asked once a process.

    Offline, or where the hub does not answer, this is the commit the hub's local cache noted when it was asked last.

    Args:
        repo_id: Hub id ``owner/name``.
        revision: Commit, branch or tag; ``None`` is ``main``. A full commit is returned as it is.
        repo_type: ``dataset`` or ``model``.

    Raises:
        DeftxError: There is no such revision, or the hub does not answer and the local cache does not know it.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    name = revision or "main"
    note = _cached_repo(repo_id, repo_type) / "refs" / name
    try:
        commit = str(HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=_SECONDS).sha)
    except RevisionNotFoundError as error:
        raise DeftxError(
            f"{repo_type} {repo_id!r} has no revision {name!r} on the hub; give a branch, a tag or a full commit"
        ) from error
    except Exception as error:
        noted = ""
        with contextlib.suppress(OSError):
            noted = note.read_text(encoding="utf-8").strip()
        if COMMIT.fullmatch(noted):
            return noted
        raise DeftxError(
            f"{repo_type} {repo_id!r}: the hub does not say which commit {name!r} is ({reason(error)}), and the local "
            f"cache does not know it; without a network, {WITHOUT_NETWORK[repo_type]}"
        ) from error
    # A download by commit leaves no note of its revision; without one, a later command without a network could not
    # tell which cached commit to use.
    with contextlib.suppress(OSError):
        atomic.write(note, commit.encode())
    return commit


def _cached_repo(repo_id: str, repo_type: str) -> Path:
    """Return where the hub's local cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)


def reason(error: Exception) -> str:
    """Return the first line of what an error says, else its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_hub_copy(folder: Path) -> bool:
    """Return whether a folder holds a hub data set's files (parquet, or a card that names data files), not a clone."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = text.split("\n---", 1)[0] if text.startswith("---") else ""
        if re.search(r"^(configs|dataset_info):", front, flags=re.MULTILINE):
            return True
    return any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))


def load_hub(ref: HubRef, split: str) -> datasets.Dataset:
    """Load one split of a hub data set at its commit, or of a folder with its files.

    Raises:
        DeftxError: The data set, its configuration or its split is not there, or the hub does not answer and its
            cache does not hold this commit.
    """
    ref = ref.resolved()
    try:
        builder = _builder(ref, split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except Exception as error:
        raise DeftxError(
            f"{ref}, split {split!r}, could not be loaded with datasets: {reason(error)}; without a network, "
            f"{WITHOUT_NETWORK['dataset']}"
        ) from error


def _builder(ref: HubRef, split: str) -> datasets.DatasetBuilder:
    import datasets

    if ref.folder is not None:
        return _folder_builder(ref)
    try:
        builder = datasets.load_dataset_builder(ref.dataset, ref.config, revision=ref.revision, cache_dir=ref.cache_dir)
        if builder.hash != ref.revision:
            # Where the hub does not answer, ``datasets`` takes what it prepared last, whatever the revision.
            raise DeftxError(f"the cache of datasets holds commit {builder.hash}, not {ref.revision}")
    except Exception:
        builder = _snapshot_builder(ref, split)
        if builder is None:
            raise
    return builder


def _folder_builder(ref: HubRef) -> datasets.DatasetBuilder:
    """Return a folder's data set, read anew: ``datasets`` alone would take what it once prepared of changed files."""
    import datasets

    stats = [(path.as_posix(), path.stat()) for path in ref.files]
    marks = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats]
    state = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
    prepared = Path(ref.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "folders" / state
    return datasets.load_dataset_builder(ref.dataset, ref.config, cache_dir=str(prepared))


def _snapshot_builder(ref: HubRef, split: str) -> datasets.DatasetBuilder | None:
    """Return the data set in the hub's local cache, at the very commit; ``None`` where it holds nothing of it.

    Raises:
        DeftxError: It holds a part of the split: that is not the split.
    """
    snapshot = _cached_repo(ref.dataset, "dataset") / "snapshots" / str(ref.revision)
    builder = None
    with contextlib.suppress(Exception):
        builder = _folder_builder(replace(ref, dataset=str(snapshot), revision=None))
    if builder is None:
        return None
    names = [Path(file).name for file in (builder.config.data_files or {}).get(split, [])]
    shards = {numbers.groups() for numbers in map(_SHARD.search, names) if numbers}
    for total, present in Counter(total for _, total in shards).items():
        if present < int(total):
            raise DeftxError(f"the hub's local cache holds {present} of its {int(total)} files")
    return builder


def label_words(values: Sequence[Any], feature: Any, order: Sequence[str], origin: str) -> list[str]:
    """Return the labels of a hub data set as words; an unlabelled row (-1) gives ``"-"``.

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
            expected = f"0 to {len(names) - 1} ({', '.join(names)})"
            raise DeftxError(f"{origin}: row {number}: unknown label {value!r}; known are {expected}")
    return words


def require_hub_columns(dataset: datasets.Dataset, columns: Iterable[str], origin: str) -> None:
    """Raise a :class:`DeftxError` when a hub data set lacks one of ``columns``."""
    for name in columns:
        if name not in dataset.column_names:
            raise DeftxError(f"{origin}: no column {name!r}; its columns are {', '.join(dataset.column_names)}")


def download(url: str, cache_dir: str | None) -> Path:
    """Return the local copy of a file on the network, from ``datasets``' cache when it is there.

    Raises:
        DeftxError: The file could not be downloaded.
    """
    import datasets

    try:
        config = datasets.DownloadConfig(cache_dir=cache_dir)
        return Path(datasets.DownloadManager(download_config=config).download(url))
    except Exception as error:
        raise DeftxError(
            f"{url} could not be downloaded ({type(error).__name__}); without a network, {WITHOUT_NETWORK['dataset']}"
        ) from error
