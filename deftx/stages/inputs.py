"""What a study starts from: the generated family, unlabelled text, labelled rows, test rows, measures of text.

Each becomes a node, or the fingerprint of something given. Keys use content, never paths: text and rows by their bytes
or the hub's commit, with *everything* that filters them. The same study run from another folder, or with data that was
moved, finds its results again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, StageCache, Workspace
from deftx.data.corpora import MissingTextError, TextSource, build_corpus, resolve_text
from deftx.data.places import Origin, Place, combined_fingerprint
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.data.synthetic import family_data, generate_family
from deftx.errors import DeftxError
from deftx.stages.base import Base, base_of
from deftx.stages.node import ExternalInput, Loggers, Node, check_all, contents, node, stage_seed
from deftx.stages.settings import StudySettings
from deftx.tracking import DataRead

if TYPE_CHECKING:
    import pandas as pd


FAMILY_FOLDER = "family"
REPORT = "report.json"
CONTENT = "content.json"
MEASURES = "profile.json"


@dataclass(frozen=True)
class Needs:
    """What a command reads and makes.

    Attributes:
        lang: Language SFTs of the targets are trained.
        task: A task SFT is trained, and φ_S under it.
        tests: Targets are evaluated.
        base: A model folder is read, or its shape checked.
        text: A base that is pretrained here learns from its languages' text.
    """

    lang: bool = False
    task: bool = False
    tests: bool = False
    base: bool = True
    text: bool = True


NEEDS = {
    "run": Needs(lang=True, task=True, tests=True),
    "sft language": Needs(lang=True),
    "sft task": Needs(task=True),
    "eval": Needs(tests=True),
    "pretrain": Needs(base=False),
    "pretrain text": Needs(base=False, text=False),
}


@dataclass(frozen=True)
class TestRows:
    """Evaluation rows of one target.

    Attributes:
        needs: The node of the generated family, where they are its.
        external: What they are.
        load: Reads them.
    """

    needs: Mapping[str, Node]
    external: ExternalInput
    load: Callable[[], pd.DataFrame]

    @property
    def content(self) -> dict[str, str]:
        """Their fingerprint, for what reads them."""
        return {"rows": self.external.fingerprint}

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The rows: id (str), text, text_pair (str or None), label (int). Read once; what they need has to be there.

        Raises:
            DeftxError: They cannot be read, or were changed since the command began.
        """
        rows = self.load()
        self.external.check()
        return rows


@dataclass
class Inputs:
    """What one study reads.

    Attributes:
        family: The node of the generated family by its input name; empty where nothing is generated.
        base: θ⁰.
        texts: Nodes of unlabelled text by language.
        rows: Nodes of labelled rows by source language.
        tests: Evaluated rows by target and split.
        skipped: Targets without text, and why.
        read: Every piece of data that is read, as it was when the command began.
    """

    family: dict[str, Node]
    base: Base
    texts: dict[str, Node] = field(default_factory=dict)
    rows: dict[str, Node] = field(default_factory=dict)
    tests: dict[tuple[str, str], TestRows] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    read: list[DataRead] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        """Family, rows and text, in the order they are read."""
        return [*self.family.values(), *self.rows.values(), *self.texts.values()]


def inputs_of(study: StudySettings, cache: StageCache, needs: Needs) -> Inputs:
    """Find what a study reads; nothing is read but for fingerprints.

    Args:
        study: Resolved settings.
        cache: Remembers digests of files; where the family will be.
        needs: What the command reads.

    Raises:
        DeftxError: Something is not there.
    """
    data, family = study.data, {}
    if study.generated if needs.base else study.pretrains_on_family:
        generated = node(
            "family",
            1,
            asdict(study.synthetic),
            lambda work, loggers: generate_family(work.out / FAMILY_FOLDER, study.synthetic),
            seed=study.synthetic.seed,
            label="family",
        )
        family = {"family": generated}
        data = family_data(data, study.synthetic, cache.folder(generated.stage) / FAMILY_FOLDER, generated.key)
    inputs = Inputs(family, base_of(study, data, family, cache))
    if needs.base:
        _Reader(study, cache, data, inputs).read(needs)
    return inputs


@dataclass(frozen=True)
class _Reader:
    """Finds text and rows, and makes their nodes.

    Attributes:
        study: Resolved settings.
        cache: Remembers digests of files.
        data: Where the data sets are.
        inputs: What was found, to be added to.
    """

    study: StudySettings
    cache: StageCache
    data: DataSettings
    inputs: Inputs

    def read(self, needs: Needs) -> None:
        """Add everything that a command reads."""
        from deftx.data.tasks import evaluation_place, protected_places, train_places

        study, data, inputs = self.study, self.data, self.inputs
        if needs.tests:
            for code, language in study.targets.items():
                for split in study.splits:
                    place = evaluation_place(study.task, language, data, split)
                    inputs.tests[code, split] = self._tests(language, split, place)
                    self._record_read(split, code, place)
        if needs.task:
            for code, language in study.sources.items():
                places = train_places(study.train, language, data, study.evaluation)
                # By role: the same two files as train and valid are other data than as valid and train.
                roles = {"train": places.train} | ({"valid": places.valid} if places.valid is not None else {})
                inputs.rows[code] = self._rows(language, roles, places.protected)
                for role, place in roles.items():
                    self._record_read(role, code, place)
        sources = study.sources if needs.task and study.source_sft is not None else {}
        own_text = {code: item for code, item in study.targets.items() if code not in study.compose.proxy}
        for code, language in {**sources, **(own_text if needs.lang else {})}.items():
            try:
                source = resolve_text(language, data)
            except MissingTextError as error:
                if study.missing_text != "skip" or code in sources:
                    raise
                inputs.skipped[code] = str(error)
                continue
            protected = protected_places(language, data, study.evaluation, source)
            inputs.texts[code] = self._text(language, source, protected)
            self._record_read("text", code, source)

    def _record_read(self, role: str, code: str, origin: Origin) -> None:
        self.inputs.read.append(DataRead(what=role, language=code, **origin.description(self.cache.fingerprint)))

    def _external(self, description: str, origin: Origin) -> ExternalInput:
        return ExternalInput.of(description, partial(origin.fingerprint, self.cache.fingerprint))

    def _protected(self, places: Sequence[Place]) -> ExternalInput:
        """Return evaluation rows that are kept out of what is trained on."""
        again = partial(combined_fingerprint, places, self.cache.fingerprint)
        return ExternalInput.of("a file of evaluation rows", again)

    def _needs(self, *origins: Origin) -> Mapping[str, Node]:
        """Return the family's node, where it makes some of what is read."""
        return self.inputs.family if any(origin.generated for origin in origins) else {}

    def _tests(self, language: LanguageSettings, split: str, place: Place) -> TestRows:
        from deftx.data.tasks import load_test

        study = self.study
        return TestRows(
            self._needs(place),
            self._external(f"the {split} set of {language.code}", place),
            partial(load_test, study.task, language, self.data, split),
        )

    def _text(self, language: LanguageSettings, source: TextSource, places: Sequence[Place]) -> Node:
        """Unlabelled text of one language: cleaned, without evaluation sentences, its first lines held out.

        Reads nothing but what was given, or the generated family. Writes ``train.txt`` and ``valid.txt`` (UTF-8, a
        sentence on each line) and ``report.json`` (how many lines were read, dropped and why, and kept).
        """
        study, data = self.study, self.data
        sources = {"text": self._external(f"text of {language.code}", source), "protected": self._protected(places)}

        def compute(work: Workspace, loggers: Loggers) -> None:
            from deftx.data.tasks import protected_texts

            protected = protected_texts(language, data, study.evaluation, source)
            seed = stage_seed(study.seed, "corpus", language.code)
            built = build_corpus(source, protected.texts, study.corpus, seed=seed)
            built.report["leak"]["sets"] = protected.sets
            check_all(sources)
            for split, lines in (("train", built.train), ("valid", built.valid)):
                (work.out / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            write_json(work.out / REPORT, built.report)

        return node(
            "corpus",
            3,
            {"corpus": asdict(study.corpus), "language": language.code},
            compute,
            needs=self._needs(source, *places),
            content=contents(sources),
            seed=study.seed,
            label=f"text {language.code}",
            product=("train.txt", "valid.txt"),
        )

    def _rows(self, source: LanguageSettings, roles: Mapping[str, Place], protected: Sequence[Place]) -> Node:
        """Return a source language's labelled rows without leaks into evaluation sets, split into train and validation.

        Reads nothing but what was given, or the generated family. Writes ``train.parquet`` and ``valid.parquet``
        (columns ``id``, ``text``, ``text_pair``, ``label``, see :func:`read_rows`), ``content.json`` (a SHA-256 of the
        rows of each) and ``report.json`` (how many rows were read, dropped and why, and kept).
        """
        study, data = self.study, self.data
        sources = {role: self._external(f"{study.train} ({role}) of {source.code}", roles[role]) for role in roles}
        sources["protected"] = self._protected(protected)
        filters = study.data.result_settings()
        if "valid" in roles:
            del filters["valid_fraction"]  # nothing is held out

        def compute(work: Workspace, loggers: Loggers) -> None:
            from deftx.data.tasks import fingerprint_rows, load_train

            seed = stage_seed(study.seed, "task", source.code)
            rows = load_train(study.train, source, data, seed, study.evaluation)
            check_all(sources)
            if rows.train["label"].nunique() == 1:
                raise DeftxError(
                    f"{study.train} ({source.code}): all {len(rows.train)} training rows have one label; a classifier "
                    "needs rows of two"
                )
            splits = {"train": rows.train, "valid": rows.valid}
            for split, frame in splits.items():
                frame.to_parquet(work.out / f"{split}.parquet")
            write_json(work.out / CONTENT, {split: fingerprint_rows(frame) for split, frame in splits.items()})
            write_json(work.out / REPORT, rows.report)

        return node(
            "task",
            2,
            {
                "train": study.train,
                "language": source.code,
                "data": {**filters, "labels": list(study.task_spec.labels)},
            },
            compute,
            needs=self._needs(*roles.values(), *protected),
            content=contents(sources),
            seed=study.seed,
            label=f"rows {study.train} {source.code}",
            # Not the files: their bytes hold versions of libraries.
            product=(CONTENT,),
        )


def measures(language: str, source: Node | TestRows, base: Base) -> Node:
    """Measure a language's text: subword fertility, unknown pieces, type-token ratio, words per sentence.

    Does the best sparsity follow morphology (:mod:`deftx.data.morphology`)? Can the base read the language at all? The
    measures depend on the text and on the base's tokenizer. The node writes ``profile.json``.

    Args:
        language: Code of the language.
        source: The node of its text or of its training rows, or its test rows.
        base: Has the tokenizer.
    """

    def compute(work: Workspace, loggers: Loggers) -> None:
        from deftx.data.morphology import text_measures
        from deftx.training.encoder import load_tokenizer

        if isinstance(source, TestRows):
            lines = _sentences(source.frame)
        elif source.stage.kind == "corpus":
            lines = read_text(work.inputs["text"], "train")
        else:
            lines = _sentences(read_rows(work.inputs["text"], "train"))
        tokenizer = load_tokenizer(base.found_in(work))
        unknown: list[bool] = []

        def count(words: list[str]) -> int:
            # With the space before it: byte-level tokenizers cut a word at the start of a text into more pieces.
            spaced = [f" {word}" for word in words]
            encoded = tokenizer(spaced, add_special_tokens=False)["input_ids"] if words else []
            unknown.extend(piece == tokenizer.unk_token_id for pieces in encoded for piece in pieces)
            return len(unknown)

        content = text_measures(lines, count)
        share = sum(unknown) / len(unknown) if unknown else None
        write_json(work.out / MEASURES, {**content, "unknown": share})

    needs, content = ({"text": source}, {}) if isinstance(source, Node) else (source.needs, source.content)
    return node(
        "profile",
        3,
        {"language": language},
        compute,
        needs={**needs, **base.needs},
        content={**content, **base.content},
        label=f"text measures {language}",
    )


def _sentences(rows: pd.DataFrame) -> list[str]:
    return [*rows["text"], *(text for text in rows["text_pair"] if text is not None)]


# ------------------------------------------------------------------------------------------------------- reading


def read_text(entry: Entry, split: str) -> list[str]:
    """Return the lines of a text's ``train`` or ``valid``."""
    return entry.file(f"{split}.txt").read_text(encoding="utf-8").splitlines()


def read_rows(entry: Entry, split: str) -> pd.DataFrame:
    """Return labelled rows of ``train`` or ``valid``: id, text, text_pair, label."""
    import pandas as pd

    return pd.read_parquet(entry.file(f"{split}.parquet"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, value: object) -> None:
    """Write a value for people and programs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
