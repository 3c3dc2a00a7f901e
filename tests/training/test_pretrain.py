"""A small encoder from raw text: tokenizer, fit, folder, and its use as a base."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from restart import Clock, Killed, RestartEqualsOneShot
from tiny_models import LABELS, make_lines

from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.knobs import problems
from deftx.training.encoder import (
    base_fingerprint_of,
    head_parameters,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
)
from deftx.training.model_folder import check_model_folder
from deftx.training.modules import MaskedLM
from deftx.training.pretrain import build_encoder, pretrain, train_tokenizer
from deftx.training.settings import PretrainSettings

SETTINGS = PretrainSettings(
    layers=1,
    hidden=16,
    heads=2,
    intermediate=32,
    vocab_size=160,
    positions=32,
    dropout=0.0,
    steps=40,
    batch_size=32,
    max_length=16,
    learning_rate=1e-2,
    eval_every=10,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_lines(200, 0), SETTINGS.vocab_size, max_length=SETTINGS.positions)


def run(tokenizer, trainer, folder, seed=1, **options):
    train, valid = make_lines(200, 0)[:150], make_lines(200, 0)[150:]
    data = TextDataModule.for_language(train, valid, tokenizer, block_length=SETTINGS.max_length, seed=seed)
    return pretrain(data, tokenizer, SETTINGS, trainer, folder, seed=seed, **options)


def test_it_learns_and_loads_as_a_base_of_both_kinds(tokenizer, trainer, tmp_path):
    result = run(tokenizer, trainer, tmp_path / "model")
    folder = tmp_path / "model"
    assert result.checkpoint == folder
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert check_model_folder(folder)["model_type"] == "bert"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    losses = [entry["val/loss"] for entry in result.history if "val/loss" in entry]
    assert losses[-1] < math.log(SETTINGS.vocab_size) - 0.4  # guessing costs log(vocabulary)
    language, report = load_masked_lm(folder, seed=0)
    assert report.drawn == []  # the head was trained with it
    task, report = load_classifier(folder, labels=LABELS, seed=0)
    assert report.pooler_in_head
    assert base_fingerprint_of(task) == base_fingerprint_of(language)
    assert "bert.pooler.dense.weight" in head_parameters(task)
    # everything trained, LayerNorm and the tied embedding included
    start = build_encoder(SETTINGS, len(tokenizer), seed=1)
    now = dict(language.named_parameters())
    assert all(not torch.equal(now[name], p) for name, p in start.named_parameters())
    assert load_tokenizer(folder)("bada gulo")["input_ids"] == tokenizer("bada gulo")["input_ids"]


def test_same_seed_same_bytes_and_nothing_is_overwritten(tokenizer, trainer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        run(tokenizer, trainer, tmp_path / name, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    with pytest.raises(DeftxError, match="not empty"):
        run(tokenizer, trainer, tmp_path / "a")


class TestAPretraining(RestartEqualsOneShot):
    """Its scratch folder outlives the attempt; the tied output embedding is restored once."""

    cases: ClassVar = {"two steps before its end": SETTINGS.steps - 2}

    @pytest.fixture(autouse=True)
    def pretrainings(self, tokenizer, trainer, tmp_path, monkeypatch, caplog):
        self.folder, self.caplog, self.clock = tmp_path, caplog, Clock()
        step, often = MaskedLM.training_step, replace(trainer, checkpoint_minutes=0)

        def watched(module, batch, batch_idx):
            self.clock("training_step")
            return step(module, batch, batch_idx)

        monkeypatch.setattr(MaskedLM, "training_step", watched)
        self.run = lambda name: run(tokenizer, often, tmp_path / name, 1, scratch=tmp_path / f"scratch of {name}")

    def start(self, folder, case, kill=None):
        self.clock.reset(kill)
        try:
            return self.run(folder).history
        except Killed:
            return None

    def histories(self, case, whole):
        yield [case]

    def check(self, folder, case, resumed, whole):
        assert f"resumes at step {case} of {SETTINGS.steps}" in self.caplog.text
        assert resumed == whole
        weights, expected = (self.folder / name / "model.safetensors" for name in (folder, "whole"))
        assert weights.read_bytes() == expected.read_bytes()


def test_the_vocabulary_is_a_function_of_the_text():
    """The trainer alone numbers letters as a hash map gives them, another way in each run."""
    runs = [train_tokenizer(make_lines(200, 0), 160).backend_tokenizer.to_str() for _ in range(4)]
    assert len(set(runs)) == 1


def test_characters_and_case():
    tokenizer = train_tokenizer(["Ñandú 漢字 été été", "zu zu"], 64)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Ñandú 漢字 été Ω")["input_ids"])
    assert pieces.count("[UNK]") == 1  # Ω alone is new
    assert pieces[0] == "[CLS]"
    assert "漢" in pieces
    folded = train_tokenizer(["Ñandú été"], 64, lowercase=True)
    assert (
        folded.convert_ids_to_tokens(folded("ÉTÉ")["input_ids"])[1:-1]
        == folded.convert_ids_to_tokens(folded("ete")["input_ids"])[1:-1]
    )
    crowded = train_tokenizer(["abcdefghijklmnopqrstuvwxyz" * 2 + "a" * 50], 32)
    assert len(crowded) <= 32
    with pytest.raises(DeftxError, match="no text"):
        train_tokenizer(["", " "], 64)


def test_settings_are_refused_together():
    bad = PretrainSettings(hidden=15, heads=2, vocab_size=3, max_length=600)
    assert len(problems(bad)) == 3
