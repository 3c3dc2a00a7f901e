"""Where each labelled data set lies and what its files say, as common rows.

A data set is a clone of its upstream repository or its hub form (``deftx.data.reading``); both give the same rows.
Where the two write labels differently, words are matched by name and the hub's integers by the order it documents:
SMSA's are not NusaX's. Sources: NusaX (Winata et al. 2023), IndoNLU (Wilie et al. 2020), AmericasNLI (Ebrahimi et al.
2022), MultiNLI (Williams et al. 2018), XNLI (Conneau et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deftx.data.corpora import clean_line
from deftx.data.reading import (
    HUB_ID,
    HubRef,
    Table,
    download,
    is_hub_copy,
    label_words,
    load_hub,
    read_jsonl,
    read_table,
    require_hub_columns,
)
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.errors import DeftxError, did_you_mean

SENTIMENT = ("negative", "neutral", "positive")
NLI = ("entailment", "neutral", "contradiction")
SMSA_HUB_ORDER = ("positive", "neutral", "negative")

NUSAX_LANGUAGES = ("ace", "ban", "bbc", "bjn", "bug", "eng", "ind", "jav", "mad", "min", "nij", "sun")
AMERICASNLI_LANGUAGES = ("aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar")
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")

FOLDERS = {"nusax": "nusax", "smsa": "indonlu", "americasnli": "americasnli", "multinli": "multinli", "xnli": "xnli"}
UPSTREAM = {
    "nusax": "https://github.com/IndoNLP/nusax",
    "smsa": "https://github.com/IndoNLP/indonlu",
    "americasnli": "https://github.com/abteen/americasnli",
    "multinli": "https://cims.nyu.edu/~sbowman/multinli/",
    "xnli": "https://github.com/facebookresearch/XNLI",
}
HUB = {
    "nusax": "mteb/NusaX-senti",
    "americasnli": "nala-cub/americas_nli",
    "multinli": "nyu-mll/multi_nli",
    "xnli": "facebook/xnli",
}
SMSA_FOLDER = "dataset/smsa_doc-sentiment-prosa"
SMSA_URL = (
    "https://raw.githubusercontent.com/IndoNLP/indonlu/ce728f6926a36174b9923dfe49d6a6839b6e9bb7/"
    f"{SMSA_FOLDER}/{{split}}_preprocess.tsv"
)


@dataclass(frozen=True)
class TaskSpec:
    """What a task asks.

    Attributes:
        labels: Label words; the position is the integer label.
        metric: ``macro_f1`` or ``accuracy``.
        pair: Whether a row has two sentences.
        languages: Names its languages have in the data set; empty where any language can have files.
    """

    labels: tuple[str, ...]
    metric: str
    pair: bool
    languages: tuple[str, ...] = ()


TASKS: dict[str, TaskSpec] = {
    "synthetic": TaskSpec(SENTIMENT, "macro_f1", pair=False),
    "nusax": TaskSpec(SENTIMENT, "macro_f1", pair=False, languages=NUSAX_LANGUAGES),
    "americasnli": TaskSpec(NLI, "accuracy", pair=True, languages=AMERICASNLI_LANGUAGES),
    "xnli": TaskSpec(NLI, "accuracy", pair=True, languages=XNLI_LANGUAGES),
    "sentiment": TaskSpec(SENTIMENT, "macro_f1", pair=False),
    "nli": TaskSpec(NLI, "accuracy", pair=True),
    "tsv": TaskSpec((), "macro_f1", pair=False),
}
"""Evaluation tasks. ``synthetic``, ``sentiment`` and ``nli`` read
``<root>/<sentiment|nli>/<code>/{train,valid,test}.tsv``; ``sentiment`` and ``nli`` also the files that
``data.train``, ``data.valid`` and ``data.test`` name. ``tsv`` reads those only, with labels of your own
(:func:`task_spec`)."""


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        frame: Columns id, text, text_pair, label.
        dropped: Rows left out: ``empty`` (no text), ``unlabelled`` (NLI pairs without agreement, label ``-``).
    """

    frame: pd.DataFrame
    dropped: dict[str, int]


@dataclass(frozen=True)
class Place:
    """Where the rows of one data set, language and split are: files, or a split of a hub data set.

    Attributes:
        dataset: Name of the task or training set.
        labels: Label words by integer.
        split: Split; for a hub data set, its name there.
        files: Files of an upstream layout.
        hub: The hub data set.
        language: Code in the data set, for files that hold several languages.
    """

    dataset: str
    labels: tuple[str, ...]
    split: str
    files: tuple[Path, ...] = ()
    hub: HubRef | None = None
    language: str = ""

    @property
    def local_files(self) -> tuple[Path, ...]:
        """Local files the rows come from: upstream's, or all of a local copy of the hub data set."""
        if self.hub is not None and Path(self.hub.dataset).is_dir():
            return tuple(sorted(path for path in Path(self.hub.dataset).rglob("*") if path.is_file()))
        return self.files


def task_spec(task: str, data: DataSettings) -> TaskSpec:
    """The task's labels and metric; for ``tsv``, with the labels of ``data.labels``.

    Raises:
        DeftxError: Unknown task, or ``tsv`` without ``data.labels``.
    """
    if task not in TASKS:
        raise DeftxError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; available: {', '.join(sorted(TASKS))}")
    if task != "tsv":
        return TASKS[task]
    if len(data.labels) < 2:
        raise DeftxError("task=tsv needs at least two labels: data.labels=[no,yes]")
    if len({label.strip().casefold() for label in data.labels}) < len(data.labels):
        raise DeftxError(f"data.labels={data.labels}: labels must differ, in more than case")
    return TaskSpec(tuple(data.labels), "macro_f1", pair=False)


class MissingSplitError(DeftxError):
    """A data set is there and the language belongs to it, but not this split."""


def _locate(name: str, data: DataSettings) -> Path | str:
    """Folder or hub id of a public data set."""
    given = getattr(data, name)
    if given is not None:
        folder = Path(given).expanduser()
        if folder.is_dir():
            return folder
        if HUB_ID.fullmatch(given):
            return str(given)
        raise DeftxError(f"data.{name}={given}: no such folder, and not a hub id (owner/name)")
    if data.root is not None:
        root = Path(data.root).expanduser()
        if not root.is_dir():
            raise DeftxError(f"data.root={data.root}: no such folder")
        folder = root / FOLDERS[name]
        if not folder.is_dir():
            hub = f" or data.{name}={HUB[name]}" if name in HUB else ""
            raise DeftxError(f"no folder {folder}; clone {UPSTREAM[name]} there, or set data.{name}=FOLDER{hub}")
        return folder
    return HUB.get(name, "")


def place_of(task: str, language: LanguageSettings, data: DataSettings, split: str) -> Place:
    """Where the rows of a task are.

    Args:
        task: A task.
        language: Language of the rows.
        data: Where data sets are.
        split: ``train``, ``dev`` or ``test``.

    Raises:
        MissingSplitError: The language is in the data set, the split is not there.
        DeftxError: Unknown task, the language is not in it, or the data set is not there.
    """
    labels = task_spec(task, data).labels
    if task in ("synthetic", "sentiment", "nli", "tsv"):
        return _own_place(task, labels, language, data, split)
    code = language.nusax if task == "nusax" else getattr(language, task)
    if code is None:
        raise DeftxError(
            f"language {language.code!r} is not in {task}; its languages are {', '.join(TASKS[task].languages)}"
        )
    where = _locate(task, data)
    if isinstance(where, str) or is_hub_copy(where):
        config = (language.nusax_hub or language.code) if task == "nusax" else code
        name = {"dev": "validation"}.get(split, split)
        return Place(task, labels, name, hub=_ref(where, config, task, data))
    return Place(task, labels, split, files=(_upstream_file(task, where, code, split),), language=code)


def _upstream_file(task: str, folder: Path, code: str, split: str) -> Path:
    if task == "nusax":
        options = [folder / "datasets/sentiment" / code / f"{'valid' if split == 'dev' else split}.csv"]
    elif task == "americasnli":
        options = [folder / "data/anli_final" / split / f"{code}.tsv"]
    else:
        options = [folder / f"{split}-{code}.tsv", *(folder / part / f"xnli.{split}.tsv" for part in ("", "XNLI-1.0"))]
    for path in options:
        if path.is_file():
            return path
    raise MissingSplitError(f"{task} has no {split} file for {code!r}: {' or '.join(map(str, options))}")


def _own_place(task: str, labels: tuple[str, ...], language: LanguageSettings, data: DataSettings, split: str) -> Place:
    name = "valid" if split == "dev" else split
    template: str | None = None if task == "synthetic" else getattr(data, name)
    root = Path(data.root).expanduser() if data.root is not None else Path.cwd()
    if template is None:
        if data.root is None or task == "tsv":
            raise MissingSplitError(f"task {task} has no {split} file: set data.{name}=FILE ({{language}} is the code)")
        template = f"{'nli' if task == 'nli' else 'sentiment'}/{{language}}/{name}.tsv"
    path = root / Path(template.replace("{language}", language.code)).expanduser()
    if not path.is_file():
        raise MissingSplitError(f"{task} has no {split} file for {language.code!r}: {path}")
    return Place(task, labels, split, files=(path,), language=language.code)


def _ref(where: Path | str, config: str | None, name: str, data: DataSettings) -> HubRef:
    return HubRef(str(where), config, None if isinstance(where, Path) else data.revisions.get(name), data.cache_dir)


def smsa_places(language: LanguageSettings, data: DataSettings) -> dict[str, Place]:
    """SMSA's train and valid rows; Indonesian only."""
    if language.nusax != "indonesian":
        raise DeftxError(
            f"smsa is Indonesian, not {language.code!r}: use task.source=ind, or train on NusaX (task.train=nusax)"
        )
    where = _locate("smsa", data)
    places = {}
    for split in ("train", "valid"):
        if where == "":
            files = (download(SMSA_URL.format(split=split), data.cache_dir),)
            places[split] = Place("smsa", SENTIMENT, split, files=files)
        elif isinstance(where, str) or is_hub_copy(where):
            name = "validation" if split == "valid" else split
            places[split] = Place("smsa", SENTIMENT, name, hub=_ref(where, "smsa", "smsa", data))
        else:
            path = where / SMSA_FOLDER / f"{split}_preprocess.tsv"
            if not path.is_file():
                raise DeftxError(f"no file {path}; data.smsa must be a clone of {UPSTREAM['smsa']}")
            places[split] = Place("smsa", SENTIMENT, split, files=(path,))
    return places


def multinli_place(language: LanguageSettings, data: DataSettings) -> Place:
    """MultiNLI's training pairs, or their machine translation, in English or another XNLI language."""
    code = language.xnli
    if code is None:
        raise DeftxError(
            f"there is no MultiNLI in {language.code!r}; it is in XNLI's languages: {', '.join(XNLI_LANGUAGES)}"
        )
    where = _locate("multinli", data)
    if isinstance(where, Path) and not is_hub_copy(where):
        options: list[list[Path]] = [sorted(where.glob(f"train*-{code}.tsv"))]
        if code == "en":
            names = ("multinli_1.0_train.jsonl", "multinli_1.0_train.txt")
            options += [[where / part / name] for name in names for part in ("", "multinli_1.0")]
        translated = f"multinli.train.{code}.tsv"
        options += [[where / part / translated] for part in ("", "multinli", "XNLI-MT-1.0/multinli")]
        for files in options:
            if files and all(path.is_file() for path in files):
                return Place("multinli", NLI, "train", files=tuple(files), language=code)
        raise DeftxError(
            f"no NLI training file for {code!r} below {where}: looked for train*-{code}.tsv"
            + (", multinli_1.0_train.jsonl" if code == "en" else "")
            + f", {translated}"
        )
    if code != "en" and data.multinli is None:
        # The machine-translated MultiNLI is the train split of XNLI on the hub.
        return Place("multinli", NLI, "train", hub=_ref(HUB["xnli"], code, "xnli", data))
    config = code if code != "en" else None
    return Place("multinli", NLI, "train", hub=_ref(where, config, "multinli", data))


def evaluation_places(task: str, language: LanguageSettings, data: DataSettings) -> list[Place]:
    """Dev and test of a public set in a language; nothing where the language, the folder or the split is not there."""
    if getattr(language, task) is None:
        return []
    if (
        data.root is not None
        and getattr(data, task) is None
        and not (Path(data.root).expanduser() / FOLDERS[task]).is_dir()
    ):
        return []
    places = []
    for split in ("dev", "test"):
        try:
            places.append(place_of(task, language, data, split))
        except MissingSplitError:
            continue
    return places


def read_rows(place: Place) -> Rows:
    """Read the rows of a place.

    Raises:
        DeftxError: A file is malformed or holds an unknown label; the hub does not answer.
    """
    if place.hub is not None:
        return _read_hub(place, place.hub)
    parts = [_read_file(place, path) for path in place.files]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    if len(parts) > 1:
        # Row numbers repeat from file to file.
        names = [path.stem for path, part in zip(place.files, parts, strict=True) for _ in range(len(part.frame))]
        frame["id"] = [f"{name}:{number}" for name, number in zip(names, frame["id"], strict=True)]
    return Rows(frame, {key: sum(part.dropped[key] for part in parts) for key in ("empty", "unlabelled")})


def _read_file(place: Place, path: Path) -> Rows:
    pair = place.labels == NLI
    if path.suffix == ".jsonl":
        table = read_jsonl(path, ("pairID", "sentence1", "sentence2", "gold_label"))
    elif place.dataset == "smsa":
        table = read_table(path, columns=("text", "label"))
    else:
        table = read_table(path)
    if path.name.startswith("xnli."):
        at = table.columns.index("language") if "language" in table.columns else None
        rows = [row for row in table.rows if at is None or row[at] == place.language]
        if not rows:
            raise MissingSplitError(f"{path} has no rows in {place.language!r}")
        table = Table(table.origin, table.columns, rows)
    if place.dataset == "tsv":
        pair = "premise" in table.columns
    first = table.column("premise", "sentence1") if pair else table.column("text")
    second = table.column("hypothesis", "hypo", "sentence2") if pair else None
    words = table.column("label", "gold_label")
    named = next((name for name in ("id", "pairID") if name in table.columns), None)
    ids = table.column(named) if named else [str(number) for number in range(1, len(table.rows) + 1)]
    return _rows(ids, first, second, words, place.labels, str(path))


def _read_hub(place: Place, ref: HubRef) -> Rows:
    dataset = load_hub(ref, place.split)
    origin = f"{ref}, {place.split}"
    pair = place.labels == NLI
    columns = ("premise", "hypothesis") if pair else ("text",)
    require_hub_columns(dataset, (*columns, "label"), origin)
    order = SMSA_HUB_ORDER if place.dataset == "smsa" else place.labels
    named = next((name for name in ("id", "pairID") if name in dataset.column_names), None)
    cells = dataset.select_columns([*columns, "label", *([named] if named else [])]).to_dict()
    words = label_words(cells["label"], dataset.features["label"], order, origin)
    ids = [str(value) for value in cells[named]] if named else [str(number) for number in range(1, len(dataset) + 1)]
    texts = [[str(text or "") for text in cells[name]] for name in columns]
    return _rows(ids, texts[0], texts[1] if pair else None, words, place.labels, origin)


def _rows(
    ids: Sequence[str],
    first: Sequence[str],
    second: Sequence[str] | None,
    words: Sequence[str],
    labels: tuple[str, ...],
    origin: str,
) -> Rows:
    """Common rows: texts cleaned, labels as integers; rows without text or (NLI) without a label are counted out."""
    known = {word.casefold(): index for index, word in enumerate(labels)}
    if labels == NLI:
        # XNLI's machine-translated MultiNLI writes "contradictory".
        known["contradictory"] = known["contradiction"]
    dropped = {"empty": 0, "unlabelled": 0}
    kept: list[tuple[str, str, str | None, int]] = []
    for number, (row_id, word) in enumerate(zip(ids, words, strict=True), 1):
        text = clean_line(first[number - 1])
        other = None if second is None else clean_line(second[number - 1])
        label = word.strip().casefold()
        if labels == NLI and label in ("-", "-1"):
            dropped["unlabelled"] += 1
        elif label not in known:
            raise DeftxError(f"{origin}: row {number}: unknown label {word!r}; known are {', '.join(labels)}")
        elif not text or other == "":
            dropped["empty"] += 1
        else:
            kept.append((row_id.strip(), text, other, known[label]))
    frame = pd.DataFrame(kept, columns=["id", "text", "text_pair", "label"])
    frame["text_pair"] = pd.Series([row[2] for row in kept], dtype=object)
    frame["label"] = frame["label"].astype("int64")
    return Rows(frame, dropped)
