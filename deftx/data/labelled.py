"""The table of labelled data sets: what each asks, where its rows are, and what its training rows must be kept from.

A task is a set one can be evaluated on, a training set one that has rows to learn from; both are readings of the one
table :data:`SETS`. A task of one's own is one entry there and a ``conf/task/<name>.yaml``.

A public set is a clone of its upstream repository or its hub form; both give the same rows. Where the two write labels
differently, words are matched by name and the hub's integers by the order it documents: SMSA's are not NusaX's.
Sources: NusaX (Winata et al. 2023), IndoNLU (Wilie et al. 2020), AmericasNLI (Ebrahimi et al. 2022), MultiNLI (Williams
et al. 2018), XNLI (Conneau et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from deftx.data.finding import OwnFiles, PublicSet, file_split
from deftx.data.places import PAIR, SINGLE, Form, Place, label_key
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.errors import DeftxError, did_you_mean

SENTIMENT = ("negative", "neutral", "positive")
NLI = ("entailment", "neutral", "contradiction")

NUSAX_LANGUAGES = ("ace", "ban", "bbc", "bjn", "bug", "eng", "ind", "jav", "mad", "min", "nij", "sun")
AMERICASNLI_LANGUAGES = ("aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar")
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


class Guard(NamedTuple):
    """Evaluation rows that training rows must not resemble.

    Attributes:
        name: The evaluation set.
        splits: Its splits.
        needed: Whether they must be there, local or hub. Others count where they are local files.
    """

    name: str
    splits: tuple[str, ...] = ("dev", "test")
    needed: bool = False


@dataclass(frozen=True)
class TaskSpec:
    """A labelled data set: what it asks, and where its rows are.

    Attributes:
        rows: Finds its rows; has its name, for ``task.name`` and ``task.train``, and its languages.
        form: How they are written: labels (the position is the integer), columns.
        metric: ``macro_f1`` or ``accuracy``.
        head: What predicts, a key of :data:`deftx.training.encoder.HEADS`.
        evaluated: Splits one can be evaluated on; none for a set that is only learnt from.
        validation: Where rows for model selection come from, in this order: ``own`` (its dev split), ``part`` (a
            seeded part of its training rows). None for a set that is not learnt from.
        several: Whether one task SFT can learn from several of its languages.
        guards: What its training rows are kept from.
    """

    rows: OwnFiles | PublicSet
    form: Form
    metric: str
    head: str = "sequence"
    evaluated: tuple[str, ...] = ("test", "dev")
    validation: tuple[str, ...] = ()
    several: bool = True
    guards: tuple[Guard, ...] = ()

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.rows.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Label words; the position is the integer."""
        return self.form.labels

    @property
    def pair(self) -> bool:
        """Whether every row has two texts."""
        return self.form.texts == (PAIR,)

    @property
    def own(self) -> bool:
        """Whether the rows are in files that the user names."""
        return isinstance(self.rows, OwnFiles) and self.rows.named

    @property
    def generated(self) -> bool:
        """Whether the rows are the generated family's alone."""
        return isinstance(self.rows, OwnFiles) and not self.rows.named


def _own(name: str, form: Form, metric: str, folder: str | None = None) -> TaskSpec:
    """Return a task on files of the user's own, kept from the public sets and from its own test rows."""
    guards = (Guard("nusax"), Guard("xnli"), Guard("americasnli"), Guard(name, ("test",)))
    return TaskSpec(OwnFiles(name, folder), form, metric, validation=("own", "part"), guards=guards)


def _multinli_paths(name: str, split: str) -> list[str]:
    release = [f"{folder}multinli_1.0_train.{end}" for end in ("jsonl", "txt") for folder in ("", "multinli_1.0/")]
    translated = [f"{folder}multinli.train.{name}.tsv" for folder in ("", "multinli/", "XNLI-MT-1.0/multinli/")]
    return [f"{split}*-{name}.tsv", *(release if name == "en" else ()), *translated]


SENTIMENT_FORM = Form(SENTIMENT)
# XNLI's machine-translated MultiNLI writes "contradictory"; pairs without agreement have no label. Files of XNLI's own
# release hold all languages.
NLI_SPELLINGS = (("contradictory", "contradiction"), ("-", ""), ("-1", ""))
NLI_FORM = Form(NLI, texts=(PAIR,), spellings=NLI_SPELLINGS, combined="xnli.")

_NUSAX = PublicSet(
    "nusax",
    folder="nusax",
    upstream="https://github.com/IndoNLP/nusax",
    code="nusax",
    languages=NUSAX_LANGUAGES,
    paths=lambda name, split: [f"datasets/sentiment/{name}/{file_split(split)}.csv"],
    hub="mteb/NusaX-senti",
    config=lambda language, name: language.nusax_hub or language.code,
)
_SMSA_FOLDER = "dataset/smsa_doc-sentiment-prosa"
_SMSA = PublicSet(
    "smsa",
    folder="indonlu",
    upstream="https://github.com/IndoNLP/indonlu",
    code="nusax",
    languages=("ind",),
    only="indonesian",
    paths=lambda name, split: [f"{_SMSA_FOLDER}/{file_split(split)}_preprocess.tsv"],
    config=lambda language, name: "smsa",
    url="https://raw.githubusercontent.com/IndoNLP/indonlu/ce728f6926a36174b9923dfe49d6a6839b6e9bb7/"
    f"{_SMSA_FOLDER}/{{split}}_preprocess.tsv",
    hint="; use task.source=ind, or train on NusaX (task.train=nusax), which has rows in twelve languages",
)
_AMERICASNLI = PublicSet(
    "americasnli",
    folder="americasnli",
    upstream="https://github.com/abteen/americasnli",
    code="americasnli",
    languages=AMERICASNLI_LANGUAGES,
    paths=lambda name, split: [f"data/anli_final/{split}/{name}.tsv"],
    hub="nala-cub/americas_nli",
)
_XNLI = PublicSet(
    "xnli",
    folder="xnli",
    upstream="https://github.com/facebookresearch/XNLI",
    code="xnli",
    languages=XNLI_LANGUAGES,
    paths=lambda name, split: [f"{split}-{name}.tsv", f"xnli.{split}.tsv", f"XNLI-1.0/xnli.{split}.tsv"],
    hub="facebook/xnli",
)
_MULTINLI = PublicSet(
    "multinli",
    folder="multinli",
    upstream="https://cims.nyu.edu/~sbowman/multinli/",
    code="xnli",
    languages=XNLI_LANGUAGES,
    paths=_multinli_paths,
    hub="nyu-mll/multi_nli",
    config=lambda language, name: None if name == "en" else name,
    translations=(_XNLI.name, _XNLI.hub),
)

SETS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            OwnFiles("synthetic", "sentiment", named=False),
            SENTIMENT_FORM,
            "macro_f1",
            evaluated=("test",),
            validation=("own", "part"),
            several=False,
        ),
        TaskSpec(
            _NUSAX,
            SENTIMENT_FORM,
            "macro_f1",
            validation=("own", "part"),
            # Its valid split selects; only the test sentences must stay unseen.
            guards=(Guard("nusax", ("test",), needed=True),),
        ),
        TaskSpec(
            _SMSA,
            Form(SENTIMENT, header=("text", "label"), hub_labels=("positive", "neutral", "negative")),
            "macro_f1",
            evaluated=(),
            validation=("own",),
            several=False,
            # NusaX was translated from SMSA.
            guards=(Guard("nusax", needed=True),),
        ),
        # AmericasNLI was translated from XNLI, so the dev and test rows of both never train or select.
        TaskSpec(_AMERICASNLI, NLI_FORM, "accuracy"),
        TaskSpec(_XNLI, NLI_FORM, "accuracy"),
        TaskSpec(
            _MULTINLI,
            NLI_FORM,
            "accuracy",
            evaluated=(),
            validation=("part",),
            guards=(Guard("xnli"), Guard("americasnli")),
        ),
        _own("sentiment", SENTIMENT_FORM, "macro_f1", folder="sentiment"),
        _own("nli", NLI_FORM, "accuracy", folder="nli"),
        _own("tsv", Form((), texts=(PAIR, SINGLE)), "macro_f1"),
    )
}
"""Every labelled data set. ``sentiment`` and ``nli`` read ``<root>/<sentiment|nli>/<code>/{train,valid,test}.tsv`` or
the files that ``data.train``, ``data.valid`` and ``data.test`` name; ``tsv`` reads those only, with the labels of
``data.labels``."""

TASKS = {name: spec for name, spec in SETS.items() if spec.evaluated}
"""What one can be evaluated on."""

TRAIN_SETS = tuple(name for name, spec in SETS.items() if spec.validation)
"""What a task SFT can learn from."""


def task_spec(task: str, data: DataSettings) -> TaskSpec:
    """Return the task's labels and metric; for ``tsv``, with the labels of ``data.labels``.

    Raises:
        DeftxError: Unknown task, or ``tsv`` without ``data.labels``.
    """
    if task not in TASKS:
        raise DeftxError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; available: {', '.join(sorted(TASKS))}")
    return _with_labels(TASKS[task], data)


def train_spec(train: str, data: DataSettings, task: str | None = None) -> TaskSpec:
    """Return the training set, with its labels; for a task, with the task's integers.

    Args:
        train: One of :data:`TRAIN_SETS`.
        data: Where data sets are.
        task: What will be predicted, one of :data:`TASKS`; null for the training set's own order of labels.

    Raises:
        DeftxError: Unknown training set; ``tsv`` without ``data.labels``; its labels are not the task's.
    """
    if train not in TRAIN_SETS:
        raise DeftxError(
            f"unknown training set {train!r}{did_you_mean(train, TRAIN_SETS)}; available: {', '.join(TRAIN_SETS)}"
        )
    spec = _with_labels(SETS[train], data)
    return spec if task is None else _in_order_of(spec, task_spec(task, data))


def _in_order_of(spec: TaskSpec, task: TaskSpec) -> TaskSpec:
    """Return a training set whose integers mean what the task's do: a label's position in both is the same."""
    if spec.labels == task.labels:
        return spec
    if set(map(label_key, spec.labels)) != set(map(label_key, task.labels)):
        raise DeftxError(
            f"task.train={spec.name} has the labels {', '.join(spec.labels)}, and task={task.name} asks for "
            f"{', '.join(task.labels)}; choose a training set with the task's labels"
        )
    return replace(
        spec, form=replace(spec.form, labels=task.labels, hub_labels=spec.form.hub_labels or spec.form.labels)
    )


def _with_labels(spec: TaskSpec, data: DataSettings) -> TaskSpec:
    if spec.labels:
        return spec
    labels = tuple(data.labels)
    if len(labels) < 2:
        raise DeftxError(f"task={spec.name} needs at least two labels: data.labels=[no,yes]")
    if len(set(map(label_key, labels))) < len(labels):
        raise DeftxError(f"data.labels={data.labels}: labels must differ, in more than case or Unicode form")
    # Labels that another set has, too, may be spelt as there.
    spellings = next((other.form.spellings for other in SETS.values() if other.labels == labels), ())
    return replace(spec, form=replace(spec.form, labels=labels, spellings=spellings))


def place_of(spec: TaskSpec, language: LanguageSettings, data: DataSettings, split: str) -> Place:
    """Return where the rows of a data set are; nothing is read or downloaded.

    Args:
        spec: The data set, with its labels.
        language: Language of the rows.
        data: Where data sets are.
        split: ``train``, ``dev`` or ``test``.

    Raises:
        MissingSplitError: The language is in the data set, the split is not there.
        NotAtHandError: The language is not in it, or there is no such folder below ``data.root``.
        DeftxError: ``data.<name>`` is neither a folder nor a hub id.
    """
    return spec.rows.place(spec.form, language, data, split)
