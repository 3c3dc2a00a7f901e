"""θ⁰, the base encoder: a model folder that is given, a model on the hub, or a small encoder pretrained here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deftx.cache import StageCache, Workspace
from deftx.data.corpora import build_corpus, resolve_text
from deftx.data.hub import reason, resolve_commit
from deftx.data.places import combined_fingerprint
from deftx.data.settings import DataSettings
from deftx.errors import DeftxError
from deftx.knobs import refuse
from deftx.stages.node import ExternalInput, InputFolder, Loggers, Node, check_all, contents, node, stage_seed
from deftx.stages.settings import StudySettings
from deftx.training.model_folder import (
    MODEL_FILES,
    bert_facts,
    check_model_folder,
    draws_random_numbers,
    model_files,
    weight_files,
)
from deftx.training.settings import ModelSettings, PretrainSettings
from deftx.training.shapes import shapes_of

MODEL_FOLDER = "model"
PRETRAINING_TEXT = "text.json"
"""Report of the text that a base was pretrained on, by language."""


@dataclass(frozen=True)
class Base(InputFolder):
    """θ⁰, a model folder in the hub's shape: ``config.json``, safetensors weights, a tokenizer.

    Attributes:
        name: Short name or hub id.
        key: Fingerprint of the files of a given base, or key of the node that pretrains it here.
        folder: Folder of a given base; None if it is pretrained here.
        external: Content of that folder; None if it is pretrained here.
        node: The node that pretrains it here; None for a given base.
        revision: Commit of a base from the hub.
        drawing: Whether training it draws random numbers on the device: any dropout above 0.
        task_shapes: Names and shapes of M of a classifier, which may have a pooler.
        language_shapes: Names and shapes of M of a masked language model.
    """

    name: str
    key: str
    folder: Path | None
    external: ExternalInput | None
    node: Node | None
    revision: str | None
    drawing: bool
    task_shapes: Mapping[str, tuple[int, ...]]
    language_shapes: Mapping[str, tuple[int, ...]]

    kind = "base"
    inside = MODEL_FOLDER

    def shapes(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        """Return names and shapes of M for a ``language`` or a ``task`` SFT, from the configuration."""
        return self.task_shapes if kind == "task" else self.language_shapes

    def random_numbers(self, study: StudySettings) -> dict[str, Any]:
        """See :func:`random_numbers`."""
        return random_numbers(study, drawing=self.drawing)


def random_numbers(study: StudySettings, *, drawing: bool) -> dict[str, Any]:
    """Return what decides the random numbers of training, as it enters a key.

    Dropout is drawn on the device, by each of several devices for its own part of a batch: the same seed gives other
    numbers on another kind of device, or on another number of them. Without dropout no device draws.

    Args:
        study: Resolved settings; trainer and device are read.
        drawing: Whether the encoder has any dropout.
    """
    return {"device": device_of(study), "devices": study.trainer.devices} if drawing else {}


def device_of(study: StudySettings) -> str:
    """Return the kind of device that trains, ``cpu`` or ``cuda``: the launcher's choice, else this machine's device."""
    return study.device or {"cpu": "cpu", "gpu": "cuda"}.get(study.trainer.accelerator) or device_here()


def device_here() -> str:
    """Return the kind of device that ``trainer.accelerator=auto`` means on this machine."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(study: StudySettings) -> None:
    """Refuse to train on another kind of device than the sweep was planned for.

    Raises:
        DeftxError: This worker has a GPU that the plan does not use, or none where the plan has one.
    """
    if not study.device:
        return
    device = "cpu" if study.trainer.accelerator == "cpu" else device_here()
    if device != study.device:
        have = "has a GPU" if device == "cuda" else "has no GPU"
        instead = (
            "ask for one (launcher.gpus=1), or choose trainer=cpu"
            if study.device == "cuda"
            else "choose launcher.gpus=1 to train on it, or trainer=cpu to leave it alone"
        )
        raise DeftxError(
            f"the sweep was planned for workers that train on {study.device}, and this one {have}; {instead}"
        )


def resolve_model(model: ModelSettings, *, weights: bool = True) -> tuple[Path, str | None]:
    """Return the folder of a pretrained model and its commit; downloads a hub id that the hub's cache lacks.

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

    # So that one commit is fingerprinted and read, whatever is pushed meanwhile.
    commit = resolve_commit(model.hub, model.revision, "model")
    patterns = list(MODEL_FILES) if weights else ["config.json"]
    try:
        folder = Path(snapshot_download(model.hub, revision=commit, allow_patterns=patterns))
        if weights and not weight_files(folder):  # many encoders of small languages exist only so
            snapshot_download(model.hub, revision=commit, allow_patterns=["pytorch_model*.bin*"])
        return folder, commit
    except Exception as error:
        raise DeftxError(
            f"model {model.hub!r} could not be downloaded from the hub ({reason(error)}); download it where there is a "
            "network and set model.path=FOLDER, or work offline with model=tiny"
        ) from error


def model_key(folder: Path, cache: StageCache) -> str:
    """Fingerprint the files of a model folder that change a result: configuration, weights, tokenizer."""
    return cache.fingerprint(model_files(folder), root=folder)


def described(model: ModelSettings) -> Path | dict[str, Any]:
    """Return the model's folder, or the future ``config.json`` of an encoder that is pretrained here.

    Raises:
        DeftxError: There is no such model, its folder lacks a file, or ``model.pretrain`` is out of range.
    """
    if model.pretrained_here is not None:
        refuse(model.pretrained_here, "model.pretrain.")
        return bert_facts(model.pretrained_here, model.pretrained_here.vocab_size)
    folder, _ = resolve_model(model, weights=model.path is not None)
    if model.path is not None:
        check_model_folder(folder)
    return folder


def base_of(study: StudySettings, data: DataSettings, family: Mapping[str, Node], cache: StageCache) -> Base:
    """Return θ⁰: the pretrained model the study names, or a small one pretrained here.

    Args:
        study: Resolved settings.
        data: Locations of the text for pretraining.
        family: The node of the generated family by its input name, if the text is the family's.
        cache: Remembers digests of files.

    Raises:
        DeftxError: The model, or the text to pretrain it on, is missing.
    """
    model = study.model
    if model.pretrained_here is not None:
        facts = _about(described(model))
        pretrain = _pretrained_here(study, model.pretrained_here, data, family, cache)
        return Base(model.name, pretrain.key, None, None, pretrain, None, **facts)
    folder, commit = resolve_model(model)
    check_model_folder(folder)
    content = ExternalInput.of(f"the model in {folder}", partial(model_key, folder, cache))
    name = model.hub if model.path is None and model.hub else model.name
    return Base(name, content.fingerprint, folder, content, None, commit, **_about(folder))


def _about(description: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Facts of :class:`Base` that an encoder's configuration gives."""
    return {
        "drawing": draws_random_numbers(description),
        "task_shapes": shapes_of(description, kind="task"),
        "language_shapes": shapes_of(description, kind="language"),
    }


def _pretrained_here(
    study: StudySettings,
    settings: PretrainSettings,
    data: DataSettings,
    family: Mapping[str, Node],
    cache: StageCache,
) -> Node:
    from deftx.data.tasks import protected_places, protected_texts

    if not study.pretrain_languages:
        raise DeftxError("model.pretrain needs model.languages=[...]: the languages whose text the encoder learns from")
    sources = {code: resolve_text(language, data) for code, language in study.pretrain_languages.items()}
    external = {
        f"text.{code}": ExternalInput.of(f"text of {code}", partial(source.fingerprint, cache.fingerprint))
        for code, source in sources.items()
    }
    external |= {
        f"protected.{code}": ExternalInput.of(
            f"evaluation rows of {code}",
            partial(
                combined_fingerprint,
                protected_places(language, data, study.evaluation, sources[code]),
                cache.fingerprint,
            ),
        )
        for code, language in study.pretrain_languages.items()
    }
    # As the language SFTs' text is cleaned and split, so that no base has learnt from lines that choose their
    # checkpoints. A budget's max_lines must not give another base.
    fraction = max(settings.valid_fraction, study.corpus.valid_fraction)
    cleaning = replace(study.corpus, max_lines=None, valid_fraction=fraction)
    languages = study.model.languages or list(sources)
    seed = stage_seed(study.model.seed, "pretrain", "+".join(languages))

    def compute(work: Workspace, loggers: Loggers) -> None:
        from deftx.data.module import TextDataModule
        from deftx.training.pretrain import pretrain, train_tokenizer

        check_device(study)
        texts = {
            code: build_corpus(
                source,
                protected_texts(study.pretrain_languages[code], data, study.evaluation, source).texts,
                cleaning,
                seed,
            )
            for code, source in sources.items()
        }
        check_all(external)
        report = {code: text.report for code, text in texts.items()}
        (work.out / PRETRAINING_TEXT).write_text(
            json.dumps(report, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
        )
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
        4,
        {
            "pretrain": asdict(settings),
            "corpus": asdict(cleaning),
            "languages": list(study.model.languages),
            "precision": study.trainer.precision,
            **random_numbers(study, drawing=settings.dropout > 0),
        },
        compute,
        needs=family,
        content=contents(external),
        # Like a downloaded base, it does not depend on the study's seed.
        seed=study.model.seed,
        label="base " + "+".join(study.model.languages or sources),
        # The other files name versions of libraries; the settings decide the rest of them.
        product=(f"{MODEL_FOLDER}/model.safetensors", f"{MODEL_FOLDER}/tokenizer.json"),
    )
