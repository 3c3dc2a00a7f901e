"""θ⁰, the base encoder: a model folder that is given, a model on the hub, or a small encoder pretrained here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deftx.cache import Entry, StageCache, Workspace
from deftx.data.corpora import build_corpus, resolve_text
from deftx.data.hub import resolve_commit
from deftx.data.places import combined_fingerprint
from deftx.data.settings import CorpusSettings, DataSettings
from deftx.errors import DeftxError
from deftx.knobs import refuse
from deftx.stages.node import Given, Loggers, Node, node, stage_seed
from deftx.stages.settings import StudySettings
from deftx.training.model_folder import (
    MODEL_FILES,
    bert_facts,
    check_model_folder,
    draws_random_numbers,
    model_files,
)
from deftx.training.settings import ModelSettings
from deftx.training.shapes import shapes_of

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Base:
    """θ⁰.

    Attributes:
        name: Short name or hub id.
        key: Fingerprint of the files of a given one, key of the node that makes one here.
        folder: Model folder of a given one, in the hub's shape; None for one that is made here.
        given: What is in that folder; None for one that is made here.
        node: Makes it; None for a given one.
        revision: Commit of one from the hub.
        drawing: Whether training it draws random numbers on the device: any dropout above 0.
        task_shapes: Names and shapes of M of a classifier; what a pooler adds is not in a masked language model's.
        language_shapes: The same of a masked language model.
    """

    name: str
    key: str
    folder: Path | None
    given: Given | None
    node: Node | None
    revision: str | None
    drawing: bool
    task_shapes: Mapping[str, tuple[int, ...]]
    language_shapes: Mapping[str, tuple[int, ...]]

    @property
    def needs(self) -> dict[str, Node]:
        """The node that makes it, for what reads it."""
        return {} if self.node is None else {"base": self.node}

    @property
    def content(self) -> dict[str, str]:
        """The fingerprint of a given one, for what reads it."""
        return {"base": self.key} if self.node is None else {}

    def shapes(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of M for a ``language`` or a ``task`` SFT, as the configuration says."""
        return self.task_shapes if kind == "task" else self.language_shapes

    def found_in(self, work: Workspace) -> Path:
        """Its folder, where a node that needs it is computed.

        Raises:
            DeftxError: A given one was changed since the command began.
        """
        if self.folder is None:
            return self.made(work.inputs["base"])
        if self.given is not None:
            self.given.check()
        return self.folder

    def digest(self, work: Workspace) -> str:
        """What it is, bit for bit, where a node that needs it is computed."""
        return self.key if self.folder is not None else work.inputs["base"].digest

    @staticmethod
    def made(entry: Entry) -> Path:
        """The model folder in the result of the node that makes it."""
        return entry.path / MODEL_FOLDER

    def random_numbers(self, study: StudySettings) -> dict[str, Any]:
        """See :func:`random_numbers`."""
        return random_numbers(study, drawing=self.drawing)


def random_numbers(study: StudySettings, *, drawing: bool) -> dict[str, Any]:
    """What decides the random numbers of training, as it enters a key.

    Dropout is drawn on the device, by each of several devices for its own part of a batch: the same seed gives other
    numbers on another kind of device, or on another number of them. Without dropout no device draws.

    Args:
        study: Its trainer and device are read.
        drawing: Whether the encoder has any dropout.
    """
    return {"device": device_of(study), "devices": study.trainer.devices} if drawing else {}


def device_of(study: StudySettings) -> str:
    """The kind of device that trains, ``cpu`` or ``cuda``: what a sweep's launcher decided, else what is here."""
    return study.device or {"cpu": "cpu", "gpu": "cuda"}.get(study.trainer.accelerator) or device_here()


def device_here() -> str:
    """The kind of device that ``trainer.accelerator=auto`` means on this machine."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(study: StudySettings) -> None:
    """Refuse to train on another kind of device than the sweep was planned for.

    Raises:
        DeftxError: This worker has a GPU that the plan does not use, or none where the plan has one.
    """
    if not study.device:
        return
    found = {"cpu": "cpu"}.get(study.trainer.accelerator) or device_here()
    if found != study.device:
        have = "has a GPU" if found == "cuda" else "has no GPU"
        instead = (
            "ask for one (launcher.gpus=1), or choose trainer=cpu"
            if study.device == "cuda"
            else "choose launcher.gpus=1 to train on it, or trainer=cpu to leave it alone"
        )
        raise DeftxError(
            f"the sweep was planned for workers that train on {study.device}, and this one {have}; {instead}"
        )


def resolve_model(model: ModelSettings, *, weights: bool = True) -> tuple[Path, str | None]:
    """The folder of a pretrained model, and its commit; a hub id is downloaded (or found in the hub's own cache).

    Args:
        model: Where the model is.
        weights: Whether the weights are needed, or only the configuration.

    Raises:
        DeftxError: No such folder, or the hub does not answer.
    """
    if model.path is not None:
        return Path(model.path).expanduser().resolve(), None
    if model.hub is None:
        raise DeftxError("no model: set model.path=FOLDER or model.hub=ID")
    from huggingface_hub import snapshot_download

    # What is fingerprinted and what is read are then one commit, whatever is pushed meanwhile.
    commit = resolve_commit(model.hub, model.revision, "model")
    patterns = list(MODEL_FILES) if weights else ["config.json"]
    try:
        return Path(snapshot_download(model.hub, revision=commit, allow_patterns=patterns)), commit
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeftxError(
            f"model {model.hub!r} could not be downloaded from the hub ({reason}); download it where there is a "
            "network and set model.path=FOLDER, or work offline with model=tiny"
        ) from error


def model_key(folder: Path, cache: StageCache) -> str:
    """Fingerprint of everything in a model folder that changes a result: configuration, weights, tokenizer."""
    return cache.fingerprint(model_files(folder), root=folder)


@contextmanager
def described(study: StudySettings) -> Iterator[Path]:
    """A folder with the model's ``config.json``; of a model still to be pretrained, one written for it."""
    model = study.model
    if model.path is None and model.pretrain is not None:
        refuse(model.pretrain, "model.pretrain.")
        with tempfile.TemporaryDirectory() as scratch:
            facts = bert_facts(model.pretrain, model.pretrain.vocab_size)
            (Path(scratch) / "config.json").write_text(json.dumps(facts), encoding="utf-8")
            yield Path(scratch)
        return
    folder, _ = resolve_model(model, weights=model.path is not None)
    if model.path is not None:
        check_model_folder(folder)
    yield folder


def expected_shapes(study: StudySettings, folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of M, before a base that is pretrained here is there.

    Args:
        study: Resolved settings.
        folder: From :func:`described`.
        kind: ``language`` or ``task``.
    """
    # Pretrained here by MLM alone, it has no pooler: that belongs to the classifier's head.
    here = study.model.path is None and study.model.pretrain is not None
    return shapes_of(folder, kind="language" if here else kind)


def base_of(study: StudySettings, data: DataSettings, family: Mapping[str, Node], cache: StageCache) -> Base:
    """θ⁰: the pretrained model the study names, or a small one pretrained here.

    Args:
        study: Resolved settings.
        data: Where text for pretraining is.
        family: The node of the generated family by its input name, where the text is the family's.
        cache: Remembers digests of files.
    """
    model = study.model
    if model.path is None and model.pretrain is not None:
        with described(study) as folder:
            made = _pretrained_here(study, data, family, cache)
            return Base(
                model.name,
                made.key,
                None,
                None,
                made,
                None,
                draws_random_numbers(folder),
                expected_shapes(study, folder, "task"),
                expected_shapes(study, folder, "language"),
            )
    folder, commit = resolve_model(model)
    check_model_folder(folder)
    given = Given.of(f"the model in {folder}", partial(model_key, folder, cache))
    return Base(
        model.hub if model.path is None and model.hub else model.name,
        given.fingerprint,
        folder,
        given,
        None,
        commit,
        draws_random_numbers(folder),
        shapes_of(folder, kind="task"),
        shapes_of(folder, kind="language"),
    )


def _pretrained_here(study: StudySettings, data: DataSettings, family: Mapping[str, Node], cache: StageCache) -> Node:
    from deftx.data.tasks import protected_places, protected_texts

    settings = study.model.pretrain
    if settings is None or not study.pretrain_languages:
        raise DeftxError("model.pretrain needs model.languages=[...]: the languages whose text the encoder learns from")
    sources = {code: resolve_text(language, data) for code, language in study.pretrain_languages.items()}
    given = {
        f"text.{code}": Given.of(f"text of {code}", partial(source.fingerprint, cache.fingerprint))
        for code, source in sources.items()
    }
    given |= {
        f"protected.{code}": Given.of(
            f"evaluation rows of {code}",
            partial(combined_fingerprint, protected_places(language, data), cache.fingerprint),
        )
        for code, language in study.pretrain_languages.items()
    }
    # Not the study's own cleaning: a budget's max_lines must not give another base.
    cleaning = CorpusSettings(valid_fraction=settings.valid_fraction)
    languages = study.model.languages or list(sources)
    seed = stage_seed(study.model.seed, "pretrain", "+".join(languages))

    def compute(work: Workspace, loggers: Loggers) -> None:
        from deftx.data.module import TextDataModule
        from deftx.training.pretrain import pretrain, train_tokenizer

        check_device(study)
        texts = {
            code: build_corpus(source, protected_texts(study.pretrain_languages[code], data), cleaning, seed)
            for code, source in sources.items()
        }
        for item in given.values():
            item.check()
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
            work.out / MODEL_FOLDER,
            seed=seed,
            scratch=work.scratch / "checkpoints",
            label="base · pretraining",
        )

    return node(
        "pretrain",
        3,
        {
            "pretrain": asdict(settings),
            "corpus": asdict(cleaning),
            "languages": list(study.model.languages),
            "precision": study.trainer.precision,
            **random_numbers(study, drawing=settings.dropout > 0),
        },
        compute,
        needs=family,
        content={name: item.fingerprint for name, item in given.items()},
        # A base model is given, like a download: it does not move with the study's seed.
        seed=study.model.seed,
        label="base " + "+".join(study.model.languages or sources),
        # Its other files name versions of libraries; what they hold of the model, the settings say.
        product=(f"{MODEL_FOLDER}/model.safetensors", f"{MODEL_FOLDER}/tokenizer.json"),
    )
