"""Knobs: what a declaration says, and that everything which lists knobs reads the declarations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
from hydra import compose
from omegaconf import OmegaConf

from deftx.config import hydra_session
from deftx.errors import DeftxError
from deftx.knobs import (
    SEED,
    Range,
    above,
    at_least,
    between,
    declared,
    knob,
    matching,
    one_of,
    problems,
    read_settings,
    refuse,
    table,
    values,
)
from deftx.methods.settings import DENOISING, LABELLED, SFTKnobs, ShortKnobs
from deftx.report.knobs import read_by, score_settings
from deftx.settings import KNOBS, READS, RunConfig
from deftx.training.settings import TrainingSettings


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "sentence"),
    [
        (at_least(1), [1, 2.5, math.inf], [0, -1, math.nan], "must be at least 1"),
        (at_least(8, " tokens"), [8], [7], "must be at least 8 tokens"),
        (above(0), [1e-9], [0, -0.0, math.nan], "must be more than 0"),
        (between(0, 1), [0.5], [0, 1, math.nan], "must lie between 0 and 1"),
        (between(0, 1, "(]"), [0.5, 1], [0, 1.5, math.nan], "must lie in (0, 1]"),
        (between(0, 1, "[)"), [0, 0.5], [-0.5, 1], "must lie in [0, 1)"),
        (between(0, 1, "[]"), [0, 1], [-0.5, 1.5, math.nan], "must lie in [0, 1]"),
        (
            one_of("auto", "cpu", "gpu"),
            ["cpu", ["cpu", "gpu"], []],
            ["tpu", ["cpu", "tpu"]],
            "must be auto, cpu or gpu",
        ),
        (matching("[a-z]{3}", "three letters"), ["abc"], ["ab", "abcd", "../"], "three letters"),
        (SEED, [0, 2**32 - 1], [-1, 2**32], "must lie in [0, 2**32)"),
    ],
)
def test_ranges(allowed: Range, inside: list[Any], outside: list[Any], sentence: str) -> None:
    assert [allowed.problem("a.b", value) for value in [*inside, None]] == [None] * (len(inside) + 1)
    for value in outside:
        assert str(allowed.problem("a.b", value)).startswith(f"a.b={value!r}: {sentence}")


def test_a_misspelt_word_is_guessed() -> None:
    assert one_of("float32", "float16").problem("x", "float61") == (
        "x='float61': must be float32 or float16; did you mean 'float16'?"
    )


@dataclass
class More(TrainingSettings):
    """Training with one knob more, as a later release would have it."""

    label_smoothing: float = knob(0.0, between(0, 1, "[)"), since=4, ignored_by={"language"})


@dataclass
class MoreSFT(SFTKnobs):
    training: More = knob(More)


def test_one_more_knob_is_one_more_field() -> None:
    """Checks, keys, results and the table know it from its declaration."""
    unset, set_ = More(), More(label_smoothing=0.1)
    assert problems(More(label_smoothing=2.0), "task.training.") == [
        "task.training.label_smoothing=2.0: must lie in [0, 1)"
    ]
    # A key says it only where it is set and read: what was made before stays the same result.
    assert read_settings(unset, "task", "full") == read_settings(TrainingSettings(), "task", "full")
    assert read_settings(set_, "language", "full") == read_settings(TrainingSettings(), "language", "full")
    assert read_settings(set_, "task", "full") == {**read_settings(unset, "task", "full"), "label_smoothing": 0.1}
    assert values(MoreSFT(training=set_), "task.")["task.training.label_smoothing"] == 0.1
    assert values(MoreSFT(training=set_), "lang.", "language")["lang.training.label_smoothing"] is None
    known = table(MoreSFT, "task.")["task.training.label_smoothing"]
    assert (known.default, known.since, known.ignored_by) == (0.0, 4, {"language"})


def test_every_field_of_the_configuration_is_a_knob() -> None:
    def groups(kind: Any) -> Any:
        yield kind
        for item in fields(kind):
            if isinstance(item.default_factory, type) and is_dataclass(item.default_factory):
                yield from groups(item.default_factory)

    undeclared = {f"{g.__name__}.{f.name}" for g in groups(RunConfig) for f in fields(g) if f.name not in declared(g)}
    assert not undeclared


def test_the_table_is_the_configuration() -> None:
    def names(node: Any, prefix: str = "") -> Any:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict) and f"{prefix}{name}" != "language":
                yield from names(value, f"{prefix}{name}.")

    with hydra_session():
        config = OmegaConf.to_container(compose("run"))
    assert set(names(config)) == set(KNOBS)


def test_defaults_lie_in_their_ranges() -> None:
    for group in (RunConfig, SFTKnobs, *(type(item) for item in vars(RunConfig()).values() if is_dataclass(item))):
        assert problems(group()) == []


def test_a_knob_that_follows_another_is_reported_there() -> None:
    top = ShortKnobs(value_dtype="float61", mask="odd")
    own = SFTKnobs(value_dtype="float61", mask="strange")
    assert problems(own, "lang.", follows=top) == ["lang.mask='strange': must be magnitude or random"]
    with pytest.raises(DeftxError, match=r"k=1 and density=0\.5: give one of the two"):
        refuse(SFTKnobs(k=1, density=0.5))


def test_what_reads_the_table() -> None:
    assert LABELLED == ("rank", "residual", "density", "k")
    assert DENOISING == ("rank", "residual", "exclude")
    assert set().union(*READS.values()) == {name for name in KNOBS if "." not in name}
    assert "rank" not in READS["eval"]
    assert "kind" in READS["sft"]
    assert set(READS["pretrain"]) < set(READS["run"]) | {"text", "out", "protect"}


def test_what_ignores_a_knob() -> None:
    settings = score_settings(
        {f"{scope}.rank": "16" for scope in ("lang", "task", "source")}
        | {"corpus.max_lines": 5, "lang.training.epochs": 3, "model.seed": 1, "language": ["ace"]}
    )
    assert set(read_by("deftx", settings)) == set(settings) - {"targets"}
    # LT-SFT reads no rank; φ_S has a method of its own.
    assert not {"lang.rank", "task.rank"} & set(read_by("ltsft", settings))
    assert read_by("ltsft", settings)["source.rank"] == "16"
    assert set(read_by("source_sft", settings)) == set(settings) - {
        name for name in settings if name.startswith("lang.") or name == "targets"
    }
    assert not [n for n in read_by("no_language_sft", settings) if n.startswith(("lang.", "source.", "corpus."))]
    assert settings["task.second_phase"] is True  # older than the knob
