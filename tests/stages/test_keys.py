"""Every field of every settings class, and whose keys change with it: no more and no less than its results.

The keys are those of the study's graph, as a run, a dry run and a sweep read it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose
from safetensors.numpy import save_file

from deftx.cache import StageCache
from deftx.config import hydra_session
from deftx.config.resolve import study_settings
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings, SyntheticSettings
from deftx.methods.settings import ComposeSettings
from deftx.stages.graph import graph
from deftx.stages.settings import SFTSettings, StudySettings
from deftx.tracking import LoggerSettings
from deftx.training.model_folder import bert_facts
from deftx.training.settings import ModelSettings, PretrainSettings, TrainerSettings, TrainingSettings

PHASES = ("full", "decompose", "select", "sparse")
ROLES = ("lang", "source", "task")
EVALUATE = {"evaluate"}
NOTHING: set[str] = set()


def sft(role: str, stages: tuple[str, ...] = PHASES) -> set[str]:
    """Some stages of one role's SFT, and all that is built on it."""
    own = {f"{stage} {role}" for stage in stages}
    # φ_T is trained on θ⁰ + φ_S: its base is an input, whatever phase of φ_S changed.
    return own | (sft("task") if role == "source" else EVALUATE)


SFTS = sft("lang") | sft("source")
BASE = {"pretrain"} | SFTS
TEXT = {"corpus"} | SFTS
ROWS = {"task"} | sft("task")

SMALL = [
    "budget=smoke",
    "language=[qba]",
    "controls=[]",
    "trainer=cpu",
    "logger=csv",
    *(f"synthetic.{name}" for name in ("lines_high=60", "lines_low=60", "train=24", "valid=12", "test=12")),
    *(f"model.pretrain.{name}" for name in ("hidden=16", "heads=2", "intermediate=32", "vocab_size=300")),
]


@functools.cache
def composed(*overrides: str) -> StudySettings:
    with hydra_session():
        return study_settings(compose("run", overrides=list(overrides)))


PLACES = {"lang": "language_sft", "source": "source_sft", "task": "task_sft"}
PLAIN = {*PLACES, "model.pretrain", "trainer", "corpus", "synthetic", "logger", "seed", "device"}


def settings_of(*overrides: str) -> StudySettings:
    """Resolved settings; single fields are set directly, which spares composing a configuration for each."""
    own = {text for text in overrides if text not in SMALL}
    plain = [
        text
        for text in overrides
        if text in own and text.startswith(tuple(f"{name}{end}" for name in PLAIN for end in ".="))
    ]
    plain = [text for text in plain if not text.startswith(("task=", "task.source=", "source="))]
    study = composed(*(text for text in overrides if text not in plain))
    for text in plain:
        path, _, value = text.partition("=")
        names = path.split(".")
        study = replaced(study, [PLACES.get(names[0], names[0]), *names[1:]], yaml.safe_load(value))
    source = study.source_sft
    return study if source is None else dataclasses.replace(study, source_sft=source.by(source.method))


def replaced(settings: Any, path: list[str], value: Any) -> Any:
    """A copy with one field, however deep, changed; values as ``deftx.config`` resolves them."""
    name = path[0]
    assert name in {field.name for field in dataclasses.fields(settings)}
    if len(path) > 1:
        return dataclasses.replace(settings, **{name: replaced(getattr(settings, name), path[1:], value)})
    if name in ("k", "density") and isinstance(settings, SFTSettings):  # one or the other
        return dataclasses.replace(settings, **{"k": None, "density": None, name: value})
    policies = {"rank": RankPolicy.parse, "residual": ResidualPolicy.parse, "exclude": list}
    value = policies.get(name, lambda it: it)(value)
    assert getattr(settings, name) != value, f"{name} is {value} already"
    return dataclasses.replace(settings, **{name: value})


def weights(folder: Path, text: str) -> None:
    """A file that can be opened and holds nothing but a text."""
    save_file({"pooler.dense.bias": np.zeros(1, np.float32)}, folder / "model.safetensors", metadata={"text": text})


Keys = Callable[..., dict[str, set[str]]]


def keys_of(study: StudySettings, cache: StageCache) -> dict[str, set[str]]:
    """The keys of a study's nodes, by kind and role."""
    nodes = graph(study, cache)
    roles = {"source": "source", "language": "lang", "task": "task", "task_alone": "task"}
    named = {
        node.key: f"{node.stage.kind} {roles[part.whose.split(':')[0]]}"
        for part in nodes.parts
        if part.whose
        for node in part.nodes
    }
    found: dict[str, set[str]] = defaultdict(set)
    for node in nodes.nodes:
        if node.stage.kind != "profile":  # measures of text have a test of their own
            found[named.get(node.key, node.stage.kind)].add(node.key)
    assert not list(cache.root.glob("*/*/manifest.json")), "keys are known before anything runs"
    return dict(found)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """:func:`keys_of` what overrides say; once for each."""
    cache = StageCache(tmp_path_factory.mktemp("cache"))
    return functools.cache(lambda *overrides: keys_of(settings_of(*overrides), cache))


def changed(before: dict[str, set[str]], after: dict[str, set[str]]) -> set[str]:
    """Kinds some of whose results cannot be used any more; further results beside the old ones change nothing."""
    return {kind for kind in after if before.get(kind, set()) - after[kind]}


# ------------------------------------------------------------------------------------------------------ the tables

Row = tuple[list[str], set[str]]
"""Overrides, and whose keys change."""


def each_role(field: str, value: str, stages: dict[str, tuple[str, ...]]) -> list[Row]:
    return [([f"{role}.{field}={value}"], sft(role, stages[role]) if stages[role] else NOTHING) for role in ROLES]


def training(field: str, value: str, stages: tuple[str, ...] = PHASES, only: tuple[str, ...] = ROLES) -> list[Row]:
    return each_role(f"training.{field}", value, {role: stages if role in only else () for role in ROLES})


def choice(field: str, value: str, *stages: str) -> list[Row]:
    return each_role(field, value, dict.fromkeys(ROLES, stages))


def one(text: str, kinds: set[str]) -> list[Row]:
    return [([text], kinds)]


TRAINING = {
    "learning_rate": training("learning_rate", "0.0007"),
    "weight_decay": training("weight_decay", "0.1"),
    "batch_size": training("batch_size", "5"),
    "accumulate": training("accumulate", "2"),
    "max_length": training("max_length", "17"),
    "epochs": training("epochs", "9"),
    "min_steps": training("min_steps", "1"),
    "max_steps": training("max_steps", "77"),
    "eval_every": training("eval_every", "3"),
    "clip_norm": training("clip_norm", "0.5"),
    "l1_full": training("l1_full", "0.5"),
    "l1_sparse": training("l1_sparse", "0.5", ("sparse",)),
    "mlm_probability": training("mlm_probability", "0.3", only=("lang", "source")),
    "warmup_steps": training("warmup_steps", "1"),
    "length_buckets": training("length_buckets", "4", only=("task",)),
    "log_every": training("log_every", "3", ()),
}

SFT_FIELDS = {
    "rank": choice("rank", "3", "select", "sparse"),
    "residual": choice("residual", "drop", "select", "sparse"),
    "k": choice("k", "17", "select", "sparse"),
    "density": choice("density", "0.5", "select", "sparse"),
    "exclude": choice("exclude", "['embeddings.*']", "decompose", "select", "sparse"),
    "value_dtype": choice("value_dtype", "float16", "sparse"),
    "training": [],  # TRAINING
    "mask": choice("mask", "random", "select", "sparse"),
    # What trains a target's SFT is the study's method; φ_S has its own.
    "method": [
        *[([f"{role}.method=ltsft"], NOTHING) for role in ("lang", "task")],
        (["source.method=random_mask"], sft("source", ("select", "sparse"))),
    ],
    # Another kind of stage makes the SFT then; what is built on it changes.
    "second_phase": [
        (["lang.second_phase=false"], EVALUATE),
        (["source.second_phase=false"], sft("task")),
        (["task.second_phase=false"], EVALUATE),
    ],
}

TRAINER = {
    "accelerator": one("trainer.accelerator=auto", NOTHING),
    "devices": one("trainer.devices=2", NOTHING),
    "precision": one("trainer.precision=bf16-mixed", BASE),
    "threads": one("trainer.threads=3", NOTHING),
    "num_workers": one("trainer.num_workers=2", NOTHING),
    "progress": one("trainer.progress=false", NOTHING),
    "deterministic": one("trainer.deterministic=false", NOTHING),
    "masked_logits": one("trainer.masked_logits=false", NOTHING),
    "fused": one("trainer.fused=false", NOTHING),
    "sparse_gradients": one("trainer.sparse_gradients=false", NOTHING),
    "compile": one("trainer.compile=true", NOTHING),
    "checkpointing": one("trainer.checkpointing=true", NOTHING),
    "profile": one("trainer.profile=true", NOTHING),
    "checkpoint_minutes": one("trainer.checkpoint_minutes=3", NOTHING),
}

CORPUS = {
    "valid_fraction": one("corpus.valid_fraction=0.3", TEXT | {"pretrain"}),
    "max_lines": one("corpus.max_lines=50", TEXT),
    "min_words": one("corpus.min_words=2", TEXT | {"pretrain"}),
    "deduplicate": one("corpus.deduplicate=false", TEXT | {"pretrain"}),
    "leak_threshold": one("corpus.leak_threshold=0.9", TEXT | {"pretrain"}),
}

PRETRAIN = {
    name: one(f"model.pretrain.{name}={value}", BASE)
    for name, value in {
        "layers": 1,
        "hidden": 32,
        "heads": 4,
        "intermediate": 48,
        "vocab_size": 310,
        "positions": 256,
        "dropout": 0.2,
        "steps": 5,
        "batch_size": 4,
        "max_length": 20,
        "learning_rate": 0.01,
        "warmup": 0.2,
        "weight_decay": 0.2,
        "eval_every": 2,
        "valid_fraction": 0.2,
        "mlm_probability": 0.3,
        "lowercase": "true",
    }.items()
}

MODEL = {
    "name": one("model.name=another", NOTHING),
    "path": [],  # test_the_same_model_elsewhere
    "hub": one("model.hub=owner/name", NOTHING),  # not read where a model is pretrained here
    "revision": one("model.revision=abc", NOTHING),
    "pretrain": [],  # PRETRAIN
    "languages": one("model.languages=[qaa,qab]", BASE),
    "vocabulary": one("model.vocabulary=[]", BASE),
    "seed": one("model.seed=1", BASE),
}

# Another family is another everything, as far as its files differ; that it is another is what matters here.
SYNTHETIC = {
    "seed": "1",
    "source": None,  # test_another_source_of_the_family
    "high_resource": "[qac,qab]",
    "targets": "[qbb,qba,qbc]",
    "lines_high": "70",
    "lines_low": "70",
    "clauses": "2",
    "train": "30",
    "valid": "15",
    "test": "15",
    "topics": "2",
    "nouns_per_topic": "5",
    "verbs": "4",
    "synonyms": "4",
    "interjections": "3",
    "cognates": "0.3",
    "evaluative_cognates": "0.3",
    "false_friends": "0.5",
    "purity": "0.9",
    "interjection_rate": "0.7",
}

LANGUAGE = {
    "code": [],  # test_another_target: a code is which language it is
    "name": one("language.qba.name=Other", NOTHING),
    "family": one("language.qba.family=Other", NOTHING),
    "script": one("language.qba.script=Arab", NOTHING),
    # Where a language is found in the data sets: what is found there is an input, by its content.
    "nusax": one("language.qba.nusax=other", NOTHING),
    "nusax_hub": one("language.qba.nusax_hub=other", NOTHING),
    "americasnli": one("language.qba.americasnli=oth", NOTHING),
    "xnli": one("language.qba.xnli=ot", NOTHING),
    "wikipedia": one("language.qba.wikipedia=ot", NOTHING),
    "text": [(["language.qba.text=[unlabelled/qbb.txt]"], sft("lang") | {"corpus"})],
    "local_text": [
        (["language.qba.text=[]", "language.qba.local_text=[unlabelled/qbb.txt]"], sft("lang") | {"corpus"}),
        (["language.qba.text=[]"], NOTHING),  # unlabelled/qba.txt is found anyway
        (["language.qba.local_text=[nothing/*.txt]"], NOTHING),
    ],
}

LOGGER = {
    "wandb": one("logger.wandb=online", NOTHING),
    "project": one("logger.project=other", NOTHING),
    "entity": one("logger.entity=other", NOTHING),
    "group": one("logger.group=other", NOTHING),
    "name": one("logger.name=other", NOTHING),
    "tags": one("logger.tags=[a]", NOTHING),
    "dir": one("logger.dir=other", NOTHING),
    "artifacts": one("logger.artifacts=true", NOTHING),
    "curves": one("logger.curves=false", NOTHING),
    "pictures": one("logger.pictures=false", NOTHING),
}

STUDY = {
    "name": one("study=other", NOTHING),
    "seed": one("seed=1", TEXT | ROWS),
    "methods": one("compare=[ltsft]", NOTHING),
    "model": [],  # MODEL
    "task": [],  # tests/stages/test_plan.py: tasks that learn from the same rows share their SFT
    "train": [],  # the same
    "splits": [],  # OWN_FILES
    "source": [],  # test_another_source_of_the_family
    "more_sources": [],  # OWN_FILES
    "targets": one("language=[qba,qbb]", NOTHING),
    "pretrain_languages": [],  # MODEL: languages, vocabulary
    "language_sft": [],  # SFT_FIELDS
    "source_sft": one(
        "source=none", {"corpus", "full task", "decompose task", "select task", "sparse task", "evaluate"}
    ),
    "source_shared": [],  # test_every_column_has_its_own_source_sft
    "task_sft": [],  # SFT_FIELDS
    "corpus": [],  # CORPUS
    "data": [],  # DATA
    "synthetic": [],  # SYNTHETIC
    "controls": one("controls=[no_language_sft,source_sft]", NOTHING),
    "compose": [],  # COMPOSE
    "missing_text": one("missing_text=skip", NOTHING),
    "trainer": [],  # TRAINER
    "logger": [],  # LOGGER
    "cache_root": one("paths.cache=/elsewhere", NOTHING),
    "only": one("only=[base]", NOTHING),
    "protect": [],  # deftx pretrain alone; tests/study/test_leaks.py
    "protect_languages": [],  # the same
    "device": one("device=cuda", NOTHING),  # RANDOM_NUMBERS
}

# Of files of the user's own: ROOT is the data folder, OTHER a folder with the same names and other contents, COPY one
# with the same contents.
OWN = [
    "task=tsv",
    "task.source=qaa",
    "model=minilm",
    "model.path=MODEL",
    "data.root=ROOT",
    "data.train=ROOT/sentiment/qaa/train.tsv",
    "data.valid=ROOT/sentiment/qaa/valid.tsv",
    "data.test='ROOT/sentiment/{language}/test.tsv'",
    "data.labels=[negative,neutral,positive]",
    "budget=smoke",
    "sparsity=share",
    "language=[qba]",
    "controls=[]",
]
DATA = {
    "root": [(["data.root=COPY"], NOTHING), (["data.root=OTHER"], TEXT)],
    "nusax": one("data.nusax=COPY", NOTHING),
    "smsa": one("data.smsa=COPY", NOTHING),
    "americasnli": one("data.americasnli=COPY", NOTHING),
    "multinli": one("data.multinli=COPY", NOTHING),
    "xnli": one("data.xnli=COPY", NOTHING),
    "wikipedia": one("data.wikipedia=COPY", NOTHING),
    "train": [
        (["data.train=COPY/sentiment/qaa/train.tsv"], NOTHING),
        (["data.train=OTHER/sentiment/qaa/train.tsv"], ROWS),
    ],
    "valid": [
        (["data.valid=COPY/sentiment/qaa/valid.tsv"], NOTHING),
        (["data.valid=OTHER/sentiment/qaa/valid.tsv"], ROWS),
    ],
    "test": [
        (["data.test='COPY/sentiment/{language}/test.tsv'"], NOTHING),
        # Test sentences are kept out of text and rows.
        (["data.test='OTHER/sentiment/{language}/test.tsv'"], TEXT | ROWS),
    ],
    "labels": one("data.labels=[positive,neutral,negative]", ROWS),
    "valid_fraction": one("data.valid_fraction=0.2", NOTHING),  # they have validation rows of their own
    "leak_threshold": one("data.leak_threshold=0.9", ROWS),
    "protect": one("data.protect=[]", NOTHING),  # none of those sets is in the folder; their sentences are the input
    "revisions": one("++data.revisions.nusax=abc", NOTHING),
    "cache_dir": one("data.cache_dir=/elsewhere", NOTHING),
    "text": one("++data.text.qba=[unlabelled/qbb.txt]", sft("lang") | {"corpus"}),
}

COMPOSE = {
    "rule": one("compose.rule=ties", EVALUATE),
    "task": one("compose.task=0.5", EVALUATE),
    "language": one("compose.language=0.5", EVALUATE),
    "task_layers": one("+compose.task_layers.embeddings=0.5", EVALUATE),
    "language_layers": one("+compose.language_layers.embeddings=0.5", EVALUATE),
    # test_an_option_of_a_rule_changes_what_it_merges
    "density": [],
    "elect": [],
    "drop": [],
    "rank": [],
    "average": one("compose.average=[1,2]", sft("lang")),
    "proxy": [],  # test_a_proxy_takes_the_place_of_a_languages_own_text
}

CLASSES: dict[type, dict[str, Any]] = {
    ComposeSettings: COMPOSE,
    TrainingSettings: TRAINING,
    SFTSettings: SFT_FIELDS,
    TrainerSettings: TRAINER,
    CorpusSettings: CORPUS,
    PretrainSettings: PRETRAIN,
    ModelSettings: MODEL,
    SyntheticSettings: SYNTHETIC,
    LanguageSettings: LANGUAGE,
    LoggerSettings: LOGGER,
    StudySettings: STUDY,
    DataSettings: DATA,
}


def rows(*tables: dict[str, list[Row]]) -> list[Any]:
    return [pytest.param(*row, id=" ".join(row[0])) for table in tables for found in table.values() for row in found]


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_classified(kind: type) -> None:
    """A new field fails here until the table says whose keys change with it."""
    assert set(CLASSES[kind]) == {field.name for field in dataclasses.fields(kind)}


def test_every_class_of_settings_is_there() -> None:
    reachable, queue = set(), [StudySettings]
    known = {kind.__name__: kind for kind in CLASSES}
    while queue:
        kind = queue.pop()
        reachable.add(kind)
        for field in dataclasses.fields(kind):
            for name in set(str(field.type).replace("|", " ").replace("[", " ").replace("]", " ").split()):
                if name.endswith("Settings"):
                    assert name in known, f"{kind.__name__}.{field.name}"
                    queue += [known[name]] if known[name] not in reachable else []
    assert reachable == set(CLASSES)


def test_the_study_has_every_kind_of_stage(keys: Keys) -> None:
    assert set(keys(*SMALL)) == {"family", "pretrain", "corpus", "task", *EVALUATE} | {
        f"{stage} {role}" for stage in PHASES for role in ROLES
    }
    assert keys(*SMALL) == keys(*SMALL, "study=study"), "keys repeat"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    rows(TRAINING, SFT_FIELDS, TRAINER, CORPUS, PRETRAIN, MODEL, LANGUAGE, LOGGER, STUDY, COMPOSE),
)
def test_a_field_changes_the_keys_of_what_it_changes(keys: Keys, overrides: list[str], expected: set[str]) -> None:
    assert changed(keys(*SMALL), keys(*SMALL, *overrides)) == expected


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, value in SYNTHETIC.items() if value is not None])
def test_the_generated_family_is_one_of_its_settings(keys: Keys, field: str, value: str) -> None:
    assert "family" in changed(keys(*SMALL), keys(*SMALL, f"synthetic.{field}={value}"))


def test_another_source_of_the_family(keys: Keys) -> None:
    other = ["synthetic.source=qab", "synthetic.high_resource=[qaa,qac]", "task.source=qab"]
    assert {"family", "task"} | sft("source") <= changed(keys(*SMALL), keys(*SMALL, *other))


@pytest.mark.parametrize(
    ("rule", "option"), [("ties", "density=0.1"), ("ties", "elect=count"), ("dare", "drop=0.1"), ("tsv", "rank=2")]
)
def test_an_option_of_a_rule_changes_what_it_merges(keys: Keys, rule: str, option: str) -> None:
    merged = keys(*SMALL, f"compose={rule}")
    assert changed(merged, keys(*SMALL, f"compose={rule}", f"compose.{option}")) == EVALUATE


def test_a_proxy_takes_the_place_of_a_languages_own_text(keys: Keys) -> None:
    two = "language=[qba,qbb]"
    own, proxy = keys(*SMALL, two), keys(*SMALL, two, "+compose.proxy.qbb.qba=0.5")
    assert changed(own, proxy) == {"corpus", *(f"{stage} lang" for stage in PHASES), *EVALUATE}
    assert len(proxy["full lang"]) == 1
    assert changed(proxy, keys(*SMALL, two, "+compose.proxy.qbb.qba=0.4")) == {"merge lang", *EVALUATE}


def test_another_target_shares_what_is_not_its_own(keys: Keys) -> None:
    one, other = keys(*SMALL), keys(*SMALL, "language=[qbb]")
    assert {kind for kind in one if not one[kind] & other[kind]} == {f"{stage} lang" for stage in PHASES} | EVALUATE


# ----------------------------------------------------------------------------------------- files of the user's own


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Overrides with the names of folders filled in."""
    from deftx.data.synthetic import generate_family

    top = tmp_path_factory.mktemp("own")
    sizes = {"lines_high": 60, "lines_low": 60, "train": 24, "valid": 12, "test": 12}
    generate_family(top / "ROOT", SyntheticSettings(**sizes))
    generate_family(top / "OTHER", SyntheticSettings(seed=5, **sizes))
    shutil.copytree(top / "ROOT", top / "COPY")
    (top / "MODEL").mkdir()
    (top / "MODEL" / "config.json").write_text(json.dumps(bert_facts(PretrainSettings(hidden=16, intermediate=32), 90)))
    weights(top / "MODEL", "weights")
    (top / "MODEL" / "tokenizer.json").write_text("{}")

    def fill(texts: list[str]) -> list[str]:
        for name in ("ROOT", "OTHER", "COPY", "MODEL"):
            texts = [text.replace(name, str(top / name)) for text in texts]
        return texts

    return fill


OWN_FILES: dict[str, list[Row]] = {
    # The dev rows, too, are kept out of all that trains.
    "split": one("split=dev", {"corpus", "task"} | sft("lang") | sft("source")),
    "more_sources": [],
}


@pytest.mark.parametrize(("overrides", "expected"), rows(DATA, OWN_FILES))
def test_files_are_known_by_content_and_not_by_place(
    keys: Keys, own: Callable[..., list[str]], overrides: list[str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deftx.training.model_folder.check_model_folder", lambda folder: None)
    before = keys(*own(OWN))
    assert set(before) == {"corpus", "task", *EVALUATE} | {f"{stage} {role}" for stage in PHASES for role in ROLES}
    assert changed(before, keys(*own([*OWN, *overrides]))) == expected


def test_a_share_that_is_held_out_counts(
    keys: Keys, own: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deftx.training.model_folder.check_model_folder", lambda folder: None)
    alone = [text for text in own(OWN) if not text.startswith("data.valid=")]
    alone += [f"data.train={own(['ROOT'])[0]}/sentiment/qab/test.tsv", "data.leak_threshold=2"]
    assert changed(keys(*alone), keys(*alone, "data.valid_fraction=0.2")) == ROWS


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", SFTS),
        ("model.safetensors", SFTS),
        ("tokenizer.json", SFTS),
        ("README.md", NOTHING),
        ("", NOTHING),  # only the place
    ],
)
def test_the_same_model_elsewhere(
    keys: Keys,
    own: Callable[..., list[str]],
    tmp_path: Path,
    file: str,
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deftx.training.model_folder.check_model_folder", lambda folder: None)
    (place,) = own(["MODEL"])
    elsewhere = Path(shutil.copytree(place, tmp_path / "elsewhere"))
    if file == "model.safetensors":
        weights(elsewhere, "other")
    elif file:
        with (elsewhere / file).open("a") as stream:
            stream.write(" ")
    assert changed(keys(*own(OWN)), keys(*own(OWN), f"model.path={elsewhere}")) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.devices=2"], BASE),
        (["device=cuda"], BASE),
        (["device=cpu"], NOTHING),
        (["trainer.accelerator=gpu"], BASE),
    ],
)
def test_what_draws_random_numbers_is_in_the_keys_of_what_trains(
    keys: Keys, overrides: list[str], expected: set[str]
) -> None:
    """Dropout is drawn on the device; without it (the other rows of this file) no device draws."""
    drawing = [*SMALL, "model.pretrain.dropout=0.1"]
    assert changed(keys(*drawing), keys(*drawing, *overrides)) == expected


def measured(study: StudySettings, root: Path) -> dict[str, str]:
    return {code: node.key for code, node in graph(study, StageCache(root)).measures.items()}


def test_measures_of_a_text_depend_on_text_and_tokenizer(tmp_path: Path) -> None:
    usual = measured(settings_of(*SMALL), tmp_path)
    assert measured(settings_of(*SMALL, "lang.rank=3", "model.name=another"), tmp_path) == usual
    for other in ("corpus.min_words=2", "model.seed=1", "language=[qbb]"):
        assert not set(measured(settings_of(*SMALL, other), tmp_path).values()) & set(usual.values())


# ------------------------------------------------------------------------------------------------------------ hub

HUB = [
    "task=nusax",
    "language=[ace]",
    "model=minilm",
    "model.path=MODEL",
    "sparsity=share",
    "budget=smoke",
    "controls=[]",
    "data.smsa=owner/smsa",
    "data.nusax=owner/nusax",
]
COMMITS = {"owner/nusax": "1" * 40, "owner/smsa": "2" * 40, "wikimedia/wikipedia": "3" * 40, "other/nusax": "1" * 40}
HUB_ROWS = ROWS | {"corpus", *sft("lang"), *sft("source")}  # NusaX filters text and rows


@pytest.mark.parametrize(
    ("overrides", "commits", "expected"),
    [
        ([], {}, NOTHING),
        (["data.nusax=other/nusax"], {}, HUB_ROWS),
        ([], {"owner/nusax": "4" * 40}, HUB_ROWS),
        (["++data.revisions.nusax=" + "1" * 40], {}, NOTHING),
        (["++data.revisions.nusax=" + "5" * 40], {}, HUB_ROWS),
        ([], {"owner/smsa": "4" * 40}, ROWS),
        ([], {"wikimedia/wikipedia": "4" * 40}, {"corpus", *sft("lang"), *sft("source")}),
    ],
)
def test_a_hub_enters_keys_by_its_resolved_commit(
    own: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    commits: dict[str, str],
    expected: set[str],
) -> None:
    monkeypatch.setattr("deftx.stages.base.check_model_folder", lambda folder: None)

    def of(known: dict[str, str], *texts: str) -> dict[str, set[str]]:
        resolved = lambda name, revision, kind: revision or known[name]  # noqa: E731
        monkeypatch.setattr("deftx.data.hub.resolve_commit", resolved)
        return keys_of(settings_of(*own([*HUB, *texts])), StageCache(tmp_path))

    assert changed(of(COMMITS), of({**COMMITS, **commits}, *overrides)) == expected
