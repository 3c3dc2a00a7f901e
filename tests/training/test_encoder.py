"""Loading: untied embeddings, base names, seeded heads, and refusals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LABELS

from deftx.core.composition import Composition
from deftx.core.delta import SparseDelta
from deftx.errors import DeftxError
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    built_shapes,
    head_parameters,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
    maskable_parameters,
    model_inputs,
)
from deftx.training.model_folder import check_model_folder
from deftx.training.modules import MaskedLM
from deftx.training.settings import TrainingSettings
from deftx.training.shapes import shapes_of

EMBEDDING = "embeddings.word_embeddings.weight"


def edit(source: Path, target: Path, keep) -> Path:
    """Copy a model folder, with the tensors ``keep`` returns."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({n: t for n, t in keep(tensors).items()}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def bare(source: Path, target: Path) -> Path:
    """A folder as sentence-transformers writes it: the encoder alone, without prefix."""
    prefix = (
        "bert." if "bert.embeddings.word_embeddings.weight" in load_file(source / "model.safetensors") else "roberta."
    )
    return edit(source, target, lambda ts: {n.removeprefix(prefix): t for n, t in ts.items() if n.startswith(prefix)})


def test_the_embedding_has_its_base_name_and_the_decoder_is_a_frozen_clone(folder):
    model, report = load_masked_lm(folder, seed=0)
    embedding = maskable_parameters(model)[EMBEDDING]
    decoder = model.get_output_embeddings().weight
    assert embedding is model.get_input_embeddings().weight
    assert torch.equal(decoder, embedding)
    assert decoder.data_ptr() != embedding.data_ptr()
    assert not decoder.requires_grad
    assert not any("decoder" in name for name in head_parameters(model))
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.drawn == []
    # the clone stays when the embedding moves
    with torch.no_grad():
        embedding.add_(1.0)
    assert not torch.equal(decoder, embedding)


@pytest.mark.parametrize("kind", ["roberta", "camembert"])
def test_the_other_families_of_xlm_roberta_s_shape(folders, tmp_path, kind):
    """Every supported family: base names, frozen clone, both kinds of model, the model's own loss."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    source, target = folders["xlm-roberta"], tmp_path / kind
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "model_type": kind, "architectures": None}), "utf-8")
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    language, _ = load_masked_lm(target, seed=0)
    task, _ = load_classifier(target, labels=LABELS, seed=0)
    assert set(maskable_parameters(language)) == set(maskable_parameters(task)) == set(shapes_of(target, kind="task"))
    assert not language.get_output_embeddings().weight.requires_grad
    module = MaskedLM(language, TrainingSettings()).eval()
    tokens = torch.randint(5, language.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(18).view(2, 9) % 4 == 0, tokens, -100)
    positions = (labels.view(-1) >= 0).nonzero().flatten()
    batch = {"input_ids": tokens, "positions": positions, "targets": tokens.view(-1)[positions]}
    assert torch.allclose(module.loss(batch), language(input_ids=tokens, labels=labels).loss, rtol=1e-6)


def test_layer_norms_of_the_base_are_frozen_and_heads_are_complete(folder, family):
    model, _ = load_masked_lm(folder, seed=0)
    assert not any("LayerNorm" in name for name in maskable_parameters(model))
    assert any("LayerNorm" in name for name in base_parameters(model))
    expected = {
        "bert": {
            "cls.predictions.bias",
            "cls.predictions.transform.dense.weight",
            "cls.predictions.transform.dense.bias",
        },
        "xlm-roberta": {
            "lm_head.bias",
            "lm_head.dense.weight",
            "lm_head.dense.bias",
            "lm_head.layer_norm.weight",
            "lm_head.layer_norm.bias",
        },
    }[family]
    assert set(head_parameters(model)) == expected
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    named = [*maskable_parameters(model).values(), *head_parameters(model).values()]
    assert trained == {id(p) for p in named}


def test_masked_lm_and_classifier_share_names_fingerprint_and_bits(folder, family):
    language, _ = load_masked_lm(folder, seed=0)
    task, _ = load_classifier(folder, labels=LABELS, seed=0)
    first, second = base_parameters(language), base_parameters(task)
    assert set(second) - set(first) == ({"pooler.dense.weight", "pooler.dense.bias"} if family == "bert" else set())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert base_fingerprint_of(language) == base_fingerprint_of(task)
    with torch.no_grad():
        second[EMBEDDING][5, 0] += 1
    assert base_fingerprint_of(language) != base_fingerprint_of(task)


def test_a_language_sft_of_the_embedding_changes_the_classifier(folder):
    """The tied-embedding trap: an SFT keyed by the training model's name would change nothing here."""
    language, _ = load_masked_lm(folder, seed=0)
    task, _ = load_classifier(folder, labels=LABELS, seed=0)
    base = {name: p.detach().clone() for name, p in maskable_parameters(language).items()}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned[EMBEDDING][7] += torch.linspace(-1, 1, 16)  # a constant would vanish in the LayerNorm
    delta = SparseDelta.from_states(base, tuned, metadata={"base_fingerprint": base_fingerprint_of(language)})
    assert set(delta.indices) >= {EMBEDDING}
    ids = {"input_ids": torch.tensor([[2, 7, 7, 3]])}
    task.eval()
    before = task(**ids).logits
    composition = Composition(base_parameters(task), base_fingerprint=base_fingerprint_of(task))
    composition.add("language", delta)
    assert torch.equal(base_parameters(task)[EMBEDDING], tuned[EMBEDDING])
    assert not torch.equal(task(**ids).logits, before)
    composition.clear()
    assert torch.equal(task(**ids).logits, before)


def test_a_missing_mlm_head_is_loud_and_drawn_from_the_seed_alone(folder, tmp_path, caplog):
    lone = bare(folder, tmp_path / "bare")
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(1)
        first, report = load_masked_lm(lone, seed=3)
    assert "no trained masked-language-model head" in caplog.text
    assert report.warnings
    assert set(head_parameters(first)) <= set(report.drawn)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, _ = load_masked_lm(lone, seed=3)
    other, _ = load_masked_lm(lone, seed=4)
    heads = [head_parameters(model) for model in (first, second, other)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    weight = next(name for name in heads[0] if name.endswith("dense.weight"))
    assert not torch.equal(heads[0][weight], heads[2][weight])
    assert 0.01 < heads[0][weight].std() < 0.03
    # tying still holds: the decoder is the embedding's clone, its bias the head's
    assert torch.equal(first.get_output_embeddings().weight, first.get_input_embeddings().weight)
    assert (
        first.get_output_embeddings().bias
        is heads[0][next(n for n in heads[0] if n.endswith(("head.bias", "predictions.bias")))]
    )
    full, _ = load_masked_lm(folder, seed=3)
    assert base_fingerprint_of(first) == base_fingerprint_of(full)
    assert state is not None


def test_loading_draws_nothing_from_the_global_generator(folder):
    torch.manual_seed(0)
    first, _ = load_classifier(folder, labels=LABELS, seed=1)
    torch.manual_seed(99)
    second, _ = load_classifier(folder, labels=LABELS, seed=1)
    third, _ = load_classifier(folder, labels=LABELS, seed=2)
    name = next(n for n in head_parameters(first) if n.endswith(("classifier.weight", "out_proj.weight")))
    assert torch.equal(head_parameters(first)[name], head_parameters(second)[name])
    assert not torch.equal(head_parameters(first)[name], head_parameters(third)[name])


def test_a_missing_pooler_belongs_to_the_head(folders, tmp_path):
    lone = edit(folders["bert"], tmp_path / "m", lambda ts: {n: t for n, t in ts.items() if "pooler" not in n})
    model, report = load_classifier(lone, labels=LABELS, seed=1)
    again, _ = load_classifier(lone, labels=LABELS, seed=1)
    assert report.pooler_in_head
    assert not any("pooler" in name for name in base_parameters(model))
    assert set(head_parameters(model)) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert all(torch.equal(p, head_parameters(again)[n]) for n, p in head_parameters(model).items())
    assert not any("pooler" in name for name in shapes_of(lone, kind="task"))


@pytest.mark.parametrize("kind", ["language", "task"])
def test_shapes_need_no_weights(folder, kind):
    load = load_masked_lm(folder, seed=0) if kind == "language" else load_classifier(folder, labels=LABELS, seed=0)
    expected = {name: tuple(p.shape) for name, p in maskable_parameters(load[0]).items()}
    found = shapes_of(folder, kind=kind)
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("kind", ["language", "task"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize(
    ("change", "light"),
    [
        ({}, True),
        ({"num_hidden_layers": 3, "intermediate_size": 40, "type_vocab_size": 1}, True),
        ({"type_vocab_size": None}, False),  # left out: transformers knows its default
        ({"is_decoder": True, "add_cross_attention": True}, False),
    ],
)
def test_shapes_are_those_of_the_model_transformers_builds(
    folders, tmp_path, monkeypatch, model_type, kind, change, light
):
    config = json.loads((folders["bert"] / "config.json").read_text("utf-8")) | {"model_type": model_type} | change
    config = {name: value for name, value in config.items() if value is not None and name != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    expected = built_shapes(tmp_path, kind=kind)
    asked = []
    monkeypatch.setattr("deftx.training.encoder.built_shapes", lambda *_, **__: asked.append(1) or expected)
    assert list(shapes_of(tmp_path, kind=kind).items()) == list(expected.items())
    assert bool(asked) != light
    assert any("crossattention" in name for name in expected) == ("add_cross_attention" in change)


def test_checkpoints_in_shards_and_in_half_precision_load_as_float32(folder, tmp_path):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    target = tmp_path / "m"
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    model.save_pretrained(target, max_shard_size="10KB")
    assert (target / "model.safetensors.index.json").is_file()
    loaded, _ = load_masked_lm(target, seed=0)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    next(target.glob("model-*.safetensors")).unlink()
    with pytest.raises(DeftxError, match=r"(?s)lacks model-0.*next:"):
        check_model_folder(target)


def test_what_a_folder_lacks_is_said(folders, tmp_path):
    source = folders["bert"]
    with pytest.raises(DeftxError, match="does not exist"):
        check_model_folder(tmp_path / "none")
    no_weights = tmp_path / "a"
    shutil.copytree(source, no_weights)
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(DeftxError, match=r"(?s)lacks model\.safetensors.*found: config\.json.*next:"):
        check_model_folder(no_weights)
    (no_weights / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        DeftxError, match=r"pytorch_model.bin is damaged, or a pickle that holds more than tensors.*save_pretrained"
    ):
        check_model_folder(no_weights)
    (no_weights / "pytorch_model.bin").rename(no_weights / "model.ckpt")
    with pytest.raises(
        DeftxError, match=r"pickled weights only \(model.ckpt\), which deftx never opens.*save_pretrained"
    ):
        check_model_folder(no_weights)
    no_tokenizer = tmp_path / "b"
    shutil.copytree(source, no_tokenizer)
    (no_tokenizer / "tokenizer.json").unlink()
    with pytest.raises(DeftxError, match="lacks a tokenizer"):
        check_model_folder(no_tokenizer)
    (no_tokenizer / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(DeftxError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(no_tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5'.*supported families: bert, roberta, xlm-roberta, camembert"),
        ({"model_type": "xlmroberta"}, "did you mean 'xlm-roberta'"),
        ({"hidden_size": 32, "intermediate_size": 64}, "does not fit its config.json"),
    ],
)
def test_other_families_and_damaged_checkpoints_are_refused(folder, tmp_path, change, message):
    target = tmp_path / "m"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    with pytest.raises(DeftxError, match=message):
        load_masked_lm(target, seed=0)


def test_missing_base_tensors_and_unreadable_weights_are_refused(folder, tmp_path):
    lost = edit(
        folder, tmp_path / "a", lambda ts: {n: t for n, t in ts.items() if "layer.1.attention.self.query" not in n}
    )
    with pytest.raises(DeftxError, match="2 base tensors missing"):
        load_classifier(lost, labels=LABELS, seed=0)
    cut = tmp_path / "b"
    shutil.copytree(folder, cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DeftxError, match=r"weights in .* cannot be read"):
        load_masked_lm(cut, seed=0)


def test_padding_masks_give_the_model_s_own_output(folder):
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    model.eval()
    tokenizer = load_tokenizer(folder)
    texts = ["ba", "bada gulo keti " * 3]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    expected = model(**encoded).logits
    assert torch.allclose(model(**model_inputs(encoded)).logits, expected, atol=1e-6)
    assert not torch.allclose(model(input_ids=encoded["input_ids"]).logits, expected, atol=1e-6)
