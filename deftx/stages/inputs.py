"""What a study starts from: base encoder, unlabelled text, labelled rows. Each becomes a folder or a cached stage.

Keys use content, never paths: the base by the hashes of its files, text and rows by their bytes. The same study run
from another folder, or with data that was moved, finds its results again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.cache import Entry, Stage, StageCache, Workspace
from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings
from deftx.data.synthetic import generate_family
from deftx.errors import DeftxError
from deftx.stages.settings import ModelSettings, StudySettings

if TYPE_CHECKING:
    import pandas as pd

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Base:
    """The base encoder θ⁰.

    Attributes:
        name: Short name or hub id.
        folder: Model folder in the hub's shape.
        key: Fingerprint of weights, configuration and tokenizer files.
    """

    name: str
    folder: Path
    key: str


@dataclass(frozen=True)
class Corpus:
    """Unlabelled text of one language, cleaned and split: ``train.txt`` and ``valid.txt`` of a cached stage.

    ``entry`` is None in a plan, where nothing is read.
    """

    key: str
    entry: Entry | None

    def lines(self, split: str) -> list[str]:
        """Lines of ``train`` or ``valid``."""
        return _there(self.entry).file(f"{split}.txt").read_text(encoding="utf-8").splitlines()

    @property
    def report(self) -> dict[str, Any]:
        """How many lines were read, dropped (and why) and kept."""
        return dict(json.loads(_there(self.entry).file("report.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class TaskRows:
    """Labelled rows of a task's source language: ``train.parquet`` and ``valid.parquet`` of a cached stage.

    ``entry`` is None in a plan, where nothing is read.
    """

    key: str
    entry: Entry | None

    def rows(self, split: str) -> pd.DataFrame:
        """Rows of ``train`` or ``valid``: id, text, text_pair, label."""
        import pandas as pd

        return pd.read_parquet(_there(self.entry).file(f"{split}.parquet"))

    @property
    def report(self) -> dict[str, Any]:
        """How many rows were read, dropped (and why) and kept."""
        return dict(json.loads(_there(self.entry).file("report.json").read_text(encoding="utf-8")))


def _there(entry: Entry | None) -> Entry:
    if entry is None:
        raise RuntimeError("a plan has no results to read")
    return entry


def stage_seed(seed: int, kind: str, language: str) -> int:
    """Seed of a stage, from (seed, stage kind, language) and nothing else: the rank never moves the data's order."""
    digest = hashlib.sha256(f"{seed}/{kind}/{language}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 over texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def data_settings(study: StudySettings, cache: StageCache) -> DataSettings:
    """The study's data settings; for the generated family, with its folder as the root."""
    return family(study, cache) if study.generated else study.data


def family(study: StudySettings, cache: StageCache) -> DataSettings:
    """The data settings of the generated family, written by a cached stage the first time it is needed."""
    stage = Stage(
        kind="family",
        version=1,
        settings=asdict(study.synthetic),
        inputs={},
        seed=study.synthetic.seed,
        label="family",
    )
    entry = cache.get_or_compute(stage, lambda work: generate_family(work.out / "family", study.synthetic))
    return replace(study.data, root=str(entry.path / "family"))


def resolve_model(model: ModelSettings, *, weights: bool = True) -> Path:
    """The folder of a pretrained model; a hub id is downloaded (or found in the hub's own cache).

    Args:
        model: Where the model is.
        weights: Whether the weights are needed, or only the configuration.

    Raises:
        DeftxError: No such folder, or the hub does not answer.
    """
    if model.path is not None:
        return Path(model.path).expanduser().resolve()
    if model.hub is None:
        raise DeftxError("no model: set model.path=FOLDER or model.hub=ID")
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, *TOKENIZER_FILES] if weights else ["config.json"]
    try:
        return Path(snapshot_download(model.hub, revision=model.revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeftxError(
            f"model {model.hub!r} could not be had from the hub ({reason}); download it where there is a network and "
            "set model.path=FOLDER, or work offline with model=tiny"
        ) from error


def model_key(folder: Path, cache: StageCache) -> str:
    """Fingerprint of everything in a model folder that changes a result: configuration, weights, tokenizer."""
    names = {path for pattern in (*MODEL_FILES, *TOKENIZER_FILES) for path in folder.glob(pattern) if path.is_file()}
    return cache.fingerprint(sorted(names), root=folder)


def base_model(study: StudySettings, data: DataSettings, cache: StageCache) -> Base:
    """θ⁰: the pretrained model the study names, or a small one pretrained as a cached stage."""
    model = study.model
    if model.path is None and model.pretrain is not None:
        return _pretrained_here(study, data, cache)
    from deftx.training.model_folder import check_model_folder

    folder = resolve_model(model)
    check_model_folder(folder)
    return Base(model.hub if model.path is None and model.hub else model.name, folder, model_key(folder, cache))


def _pretrained_here(study: StudySettings, data: DataSettings, cache: StageCache) -> Base:
    from deftx.data.corpora import resolve_text
    from deftx.data.tasks import protected_texts

    settings = study.model.pretrain
    if settings is None or not study.pretrain_languages:
        raise DeftxError("model.pretrain needs model.languages=[...]: the languages whose text the encoder learns from")
    sources = {code: resolve_text(language, data) for code, language in study.pretrain_languages.items()}
    protected = {code: protected_texts(language, data) for code, language in study.pretrain_languages.items()}
    # Not the study's own cleaning: a budget's max_lines must not give another base.
    cleaning = CorpusSettings(valid_fraction=settings.valid_fraction)
    inputs = {f"text.{code}": source.fingerprint for code, source in sources.items()}
    inputs |= {f"protected.{code}": hash_texts(texts) for code, texts in protected.items()}
    stage = Stage(
        kind="pretrain",
        version=2,  # 1 chose by a mean over batches, not over tokens
        settings={
            "pretrain": asdict(settings),
            "corpus": asdict(cleaning),
            "languages": list(study.model.languages),
            "precision": study.trainer.precision,
        },
        inputs=inputs,
        # A base model is given, like a download: it does not move with the study's seed.
        seed=study.model.seed,
        label="base " + "+".join(study.model.languages or sources),
    )

    languages = study.model.languages or list(sources)
    seed = stage_seed(study.model.seed, "pretrain", "+".join(languages))

    def compute(work: Workspace) -> None:
        from deftx.data.corpora import build_corpus
        from deftx.data.module import TextDataModule
        from deftx.training.pretrain import pretrain, train_tokenizer

        texts = {code: build_corpus(source, protected[code], cleaning, seed) for code, source in sources.items()}
        train = [line for code, text in texts.items() if code in languages for line in text.train]
        valid = [line for code, text in texts.items() if code in languages for line in text.valid]
        seen = [line for text in texts.values() for line in text.train]
        tokenizer = train_tokenizer(
            seen, settings.vocab_size, lowercase=settings.lowercase, max_length=settings.positions
        )
        blocks = TextDataModule.for_language(
            train,
            valid,
            tokenizer,
            block_length=settings.max_length,
            seed=seed,
            mlm_probability=settings.mlm_probability,
        )
        pretrain(
            blocks,
            tokenizer,
            settings,
            study.trainer,
            work.out / "model",
            seed=seed,
            scratch=work.scratch / "checkpoints",
            label="base · pretraining",
        )

    entry = cache.get_or_compute(stage, compute)
    folder = entry.path / "model"
    return Base(study.model.name, folder, model_key(folder, cache))


def corpus(
    study: StudySettings,
    language: LanguageSettings,
    data: DataSettings,
    cache: StageCache,
    tests: Mapping[str, pd.DataFrame],
) -> Corpus:
    """Unlabelled text of one language: cleaned, without evaluation sentences, split by the seed.

    Args:
        study: Resolved settings.
        language: The language.
        data: Where the data sets are.
        cache: Where the stage is.
        tests: Evaluation rows in files of the user's own, by language.
    """
    from deftx.data.corpora import build_corpus, resolve_text
    from deftx.data.tasks import protected_texts, sentences

    source = resolve_text(language, data)
    protected = protected_texts(language, data)
    if language.code in tests:
        protected += sentences(tests[language.code])
    stage = Stage(
        kind="corpus",
        version=1,
        settings={"corpus": asdict(study.corpus), "language": language.code},
        inputs={"text": source.fingerprint, "protected": hash_texts(protected)},
        seed=study.seed,
        label=f"text {language.code}",
    )

    def compute(work: Workspace) -> None:
        built = build_corpus(source, protected, study.corpus, seed=stage_seed(study.seed, "corpus", language.code))
        for split, lines in (("train", built.train), ("valid", built.valid)):
            (work.out / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        _write_json(work.out / "report.json", built.report)

    entry = cache.get_or_compute(stage, compute)
    return Corpus(stage.key, entry)


def task_rows(
    study: StudySettings,
    source: LanguageSettings,
    data: DataSettings,
    cache: StageCache,
    tests: Mapping[str, pd.DataFrame],
) -> TaskRows:
    """Labelled rows of a source language, without leaks into any evaluation set, split into train and validation.

    Args:
        study: Resolved settings.
        source: The source language.
        data: Where the data sets are.
        cache: Where the stage is.
        tests: Evaluation rows in files of the user's own, by language; all are kept out.

    Raises:
        DeftxError: As :func:`deftx.data.tasks.load_train`; or all training rows have one label.
    """
    from deftx.data.tasks import TaskData, fingerprint_rows, load_train, task_files

    also = [tests[code] for code in sorted(tests)]

    def load() -> TaskData:
        return load_train(study.train, source, data, stage_seed(study.seed, "task", source.code), also)

    files = task_files(study.train, source, data)
    if "train" in files:
        # By role: the same two files as train and valid are other data than as valid and train.
        inputs = {role: cache.fingerprint(paths) for role, paths in files.items()}
    else:
        # A hub data set can change under its name: what it gives today is the input.
        loaded = load()
        inputs = {"train": fingerprint_rows(loaded.train), "valid": fingerprint_rows(loaded.valid)}
    if also:
        inputs["tests"] = hash_texts([fingerprint_rows(rows) for rows in also])
    stage = Stage(
        kind="task",
        version=1,
        settings={
            "train": study.train,
            "language": source.code,
            "data": {**data.result_settings(), "labels": list(study.task_spec.labels)},
        },
        inputs=inputs,
        seed=study.seed,
        label=f"rows {study.train} {source.code}",
    )

    def compute(work: Workspace) -> None:
        rows = load()
        if rows.train["label"].nunique() == 1:
            raise DeftxError(
                f"{study.train} ({source.code}): all {len(rows.train)} training rows have one label; a classifier "
                "needs rows of two"
            )
        rows.train.to_parquet(work.out / "train.parquet")
        rows.valid.to_parquet(work.out / "valid.parquet")
        _write_json(work.out / "report.json", rows.report)

    entry = cache.get_or_compute(stage, compute)
    return TaskRows(stage.key, entry)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
