"""What each supported family gave when its parts were found by name; found by structure, nothing may move.

The statement is written out by hand and the digests were printed by that code. Weights are multiples of 1/128, so a
fingerprint is the same on every machine. The second half holds the rules of structure against families that no table
accepts yet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from deftx.errors import DeftxError
from deftx.training.encoder import (
    base_fingerprint_of,
    base_parameters,
    head_parameters,
    load_classifier,
    load_masked_lm,
    maskable_parameters,
    norm_parameters,
)
from deftx.training.model_folder import FAMILIES, EncoderFamily
from deftx.training.modules import MaskedLM
from deftx.training.settings import TrainerSettings, TrainingSettings
from deftx.training.shapes import shapes_of

LABELS = ("negative", "neutral", "positive")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
HEADS = {"bert": "cls", "roberta": "lm_head", "xlm-roberta": "lm_head", "camembert": "lm_head"}
_ROBERTA = "db63689eaac552c0d5e2657661c72007cbc01129a2a0173a8b3d665274839741"
FINGERPRINTS = {
    "bert": "e768940359b3c62dace10b3cae2b09f9034785f9b5a27bdb762728b55f5d06df",
    "roberta": "cc06d584c1134ae408ba16ed9a2a42d89388e28ac09398e637158325977def06",
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}
_HEADS_OF_ROBERTA = (
    "9b415e34512c0efcaf512c070759e8906cb2dc2ff31f95062decf0658ac40478",
    "0c639785d13e365526fd1506f7b48d0032df74d507d611e27d9d67d5e99f92e1",
)
DRAWN = {
    "bert": (
        "98bda9e6c95821d593f00b7cc667bec971381af0e261fa385b1848b9706b5d2c",
        "8327845e851a4a2fa7679c965f3365794ea73f0f8253e2c94ca8c072a896df16",
    ),
    "roberta": _HEADS_OF_ROBERTA,
    "xlm-roberta": _HEADS_OF_ROBERTA,
    "camembert": _HEADS_OF_ROBERTA,
}


def write_encoder(folder: Path, family: str, **sizes: object) -> Path:
    """A model folder of any family with its MLM head, its pooler where it has one, and weights no machine rounds."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining

    config = AutoConfig.for_model(family, **(sizes or SIZES))
    auto = AutoModelForPreTraining if family in ("bert", "albert") else AutoModelForMaskedLM
    model = auto.from_config(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel()) * 7 + number * 13) % 101 - 50
            parameter.copy_(values.view(parameter.shape) / 128)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", "utf-8")  # only its presence is asked
    return folder


def base_only(folder: Path) -> Path:
    """Leave the encoder's own tensors in a folder: no head, no pooler."""
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n.startswith(("bert.", "roberta.")) and ".pooler." not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def encoder_names(family: str) -> list[str]:
    """The encoder's parameters, in order."""
    word, position, types = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
    norm = ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
    names = [word, position, types, *norm] if family == "bert" else [word, types, *norm, position]
    parts = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    for layer in range(2):
        inside = [f"attention.{part}" for part in parts] + ["intermediate.dense", "output.dense", "output.LayerNorm"]
        names += [f"encoder.layer.{layer}.{part}.{kind}" for part in inside for kind in ("weight", "bias")]
    return names


POOLER = ["pooler.dense.weight", "pooler.dense.bias"]
LM_HEAD = [
    "lm_head.bias",
    "lm_head.dense.weight",
    "lm_head.dense.bias",
    "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias",
]
TRANSFORM = "cls.predictions.transform"
BERT_HEAD = ["cls.predictions.bias", f"{TRANSFORM}.dense.weight", f"{TRANSFORM}.dense.bias"]
CLASSIFIER = [
    "classifier.dense.weight",
    "classifier.dense.bias",
    "classifier.out_proj.weight",
    "classifier.out_proj.bias",
]


@pytest.mark.parametrize("family", HEADS)
def test_names_order_and_what_is_frozen(tmp_path, family):
    folder = write_encoder(tmp_path, family)
    language, said = load_masked_lm(folder, seed=0)
    task, told = load_classifier(folder, labels=LABELS, seed=0)
    names = encoder_names(family)
    pooled = names + POOLER if family == "bert" else names
    assert list(base_parameters(language)) == names
    assert list(base_parameters(task)) == pooled
    assert list(maskable_parameters(language)) == [name for name in names if "LayerNorm" not in name]
    assert list(maskable_parameters(task)) == [name for name in pooled if "LayerNorm" not in name]
    assert list(head_parameters(language)) == (BERT_HEAD if family == "bert" else LM_HEAD)
    classifier = ["classifier.weight", "classifier.bias"] if family == "bert" else CLASSIFIER
    assert list(head_parameters(task)) == classifier
    assert said.drawn == []
    assert told.drawn == sorted(classifier)
    prefix = "bert" if family == "bert" else "roberta"
    frozen = {f"{prefix}.{name}" for name in names if "LayerNorm" in name}
    assert {name for name, p in task.named_parameters() if not p.requires_grad} == frozen
    if family == "bert":
        frozen |= {f"{TRANSFORM}.LayerNorm.weight", f"{TRANSFORM}.LayerNorm.bias", "cls.predictions.decoder.weight"}
    else:
        frozen |= {"lm_head.decoder.weight"}
    assert {name for name, p in language.named_parameters() if not p.requires_grad} == frozen
    assert base_fingerprint_of(language) == base_fingerprint_of(task) == FINGERPRINTS[family]


@pytest.mark.parametrize("family", HEADS)
def test_heads_a_checkpoint_lacks_are_drawn_with_the_same_bits(tmp_path, family):
    folder = base_only(write_encoder(tmp_path, family))
    language, said = load_masked_lm(folder, seed=3)
    task, told = load_classifier(folder, labels=LABELS, seed=3)
    if family == "bert":
        assert said.drawn == sorted([*BERT_HEAD, f"{TRANSFORM}.LayerNorm.weight", f"{TRANSFORM}.LayerNorm.bias"])
        assert told.drawn == sorted(["classifier.weight", "classifier.bias", *(f"bert.{name}" for name in POOLER)])
    else:
        assert said.drawn == sorted(LM_HEAD)
        assert told.drawn == sorted(CLASSIFIER)
    assert set(head_parameters(task)) == set(told.drawn)
    assert told.pooler_in_head == (family == "bert")
    assert (digest_of(language, said.drawn), digest_of(task, told.drawn)) == DRAWN[family]
    assert base_fingerprint_of(language) == base_fingerprint_of(task) == FINGERPRINTS[family]


def digest_of(model, names) -> str:
    """The drawn tensors of a model: names, shapes and bits."""
    tensors = dict(model.named_parameters())
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", HEADS)
def test_an_untied_decoder_keeps_its_weight_and_shares_the_head_s_bias(tmp_path, family):
    folder = write_encoder(tmp_path, family, **SIZES, tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    model, report = load_masked_lm(folder, seed=0)
    path = "cls.predictions" if family == "bert" else "lm_head"
    decoder = model.get_output_embeddings()
    assert torch.equal(decoder.weight, stored[f"{path}.decoder.weight"])
    assert not torch.equal(decoder.weight, model.get_input_embeddings().weight)
    assert not decoder.weight.requires_grad
    assert torch.equal(decoder.bias, stored[f"{path}.bias"])
    assert not torch.equal(decoder.bias, stored[f"{path}.decoder.bias"])
    assert decoder.bias is head_parameters(model)[f"{path}.bias"]
    assert list(head_parameters(model)) == (BERT_HEAD if family == "bert" else LM_HEAD)
    assert report.drawn == []


@pytest.mark.parametrize("family", HEADS)
def test_a_classifier_of_other_labels_makes_way_for_a_fresh_one(tmp_path, family):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(family, **SIZES, num_labels=5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    model, report = load_classifier(tmp_path, labels=LABELS, seed=3)
    assert set(report.drawn) == set(head_parameters(model))
    tensors = load_file(tmp_path / "model.safetensors")
    cut = next(name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    tensors[cut] = tensors[cut][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeftxError, match=rf"0 base tensors missing, 1 with another shape \({cut}\)"):
        load_classifier(tmp_path, labels=LABELS, seed=3)


@pytest.mark.parametrize("family", HEADS)
def test_the_head_by_its_old_name_gives_the_same_bits(tmp_path, family):
    model, _ = load_masked_lm(write_encoder(tmp_path, family), seed=0)
    module = MaskedLM(model, TrainingSettings()).eval()
    tokens = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 4, 11, 26])
    batch = {"input_ids": tokens, "positions": positions, "targets": tokens.flatten()[positions]}
    encoder = model.bert if family == "bert" else model.roberta
    hidden = encoder(input_ids=tokens).last_hidden_state.flatten(0, 1)[positions]
    logits = getattr(model, HEADS[family])(hidden)
    assert torch.equal(module(batch), logits)
    assert torch.equal(module.loss(batch), cross_entropy(logits, batch["targets"]))
    trained = [*module.maskable.values(), *module.head.values()]
    expected = torch.autograd.grad(cross_entropy(logits, batch["targets"], reduction="sum"), trained, allow_unused=True)
    found = torch.autograd.grad(module.loss(batch, reduction="sum"), trained, allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# ------------------------------------------------------------------ families that no table accepts yet: structure alone

PLAIN = {**SIZES, "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, dict[str, object]] = {
    "distilbert": {
        "vocab_size": 40,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 12,
        "max_position_embeddings": 24,
    },
    "modernbert": {**PLAIN, "cls_token_id": 1, "sep_token_id": 2},
    "xlm-roberta-xl": PLAIN,
    "electra": {**PLAIN, "embedding_size": 8},
    "albert": {**PLAIN, "embedding_size": 8},
    "eurobert": PLAIN,
}
WORDS = {"modernbert": "embeddings.tok_embeddings.weight", "eurobert": "embed_tokens.weight"}
UNTIED = {"eurobert"}
# Tensors of norms inside the base, how many of them a rule by the name LayerNorm finds, and norms of the MLM head that
# train, because the reference freezes heads by that name.
NORMS = {
    "distilbert": (10, 2, {"vocab_layer_norm.weight", "vocab_layer_norm.bias"}),
    "modernbert": (5, 0, {"head.norm.weight"}),
    "xlm-roberta-xl": (10, 6, {"lm_head.layer_norm.weight", "lm_head.layer_norm.bias"}),
    "electra": (10, 10, set()),
    "albert": (6, 4, set()),
    "eurobert": (5, 0, set()),
}


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in the table of families is all that loading needs."""
    for family in OTHERS:
        monkeypatch.setitem(FAMILIES, family, EncoderFamily())


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize("family", OTHERS)
def test_structure_says_what_is_base_embedding_norm_and_head(tmp_path, family):
    folder = write_encoder(tmp_path, family, **OTHERS[family])
    language, said = load_masked_lm(folder, seed=0)
    task, _ = load_classifier(folder, labels=LABELS, seed=0)
    count, named, trained_norms = NORMS[family]
    frozen = {name for name, p in base_parameters(language).items() if not p.requires_grad}
    assert len(frozen) == count
    assert all("norm" in name.lower() for name in frozen)
    assert sum("LayerNorm" in name for name in frozen) == named
    words = WORDS.get(family, "embeddings.word_embeddings.weight")
    embedding = language.get_input_embeddings().weight
    assert maskable_parameters(language)[words] is embedding
    assert maskable_parameters(task)[words] is task.get_input_embeddings().weight
    decoder = language.get_output_embeddings().weight
    assert not decoder.requires_grad
    assert decoder.data_ptr() != embedding.data_ptr()
    assert torch.equal(decoder, embedding) == (family not in UNTIED)
    heads = head_parameters(language)
    assert said.drawn == []
    assert {name for name in heads if "norm" in name.lower()} == trained_norms
    assert {id(p) for p in language.parameters() if p.requires_grad} == {
        id(p) for p in (*maskable_parameters(language).values(), *heads.values())
    }
    pooler = {"pooler.weight", "pooler.bias"} if family == "albert" else set()
    assert set(base_parameters(task)) - set(base_parameters(language)) == pooler
    assert base_fingerprint_of(language) == base_fingerprint_of(task)
    for kind, model in (("language", language), ("task", task)):
        shapes = {name: tuple(p.shape) for name, p in maskable_parameters(model).items()}
        assert list(shapes_of(folder, kind=kind).items()) == list(shapes.items())


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_loss_is_the_model_s_own_however_its_head_is_chained(tmp_path, family, everywhere):
    model, _ = load_masked_lm(write_encoder(tmp_path, family, **OTHERS[family]), seed=0)
    module = MaskedLM(model, TrainingSettings()).eval()
    module.options = TrainerSettings(masked_logits=not everywhere)
    base = model.base_model
    tokens = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(18).view(2, 9) % 4 == 0, tokens, -100)
    positions = (labels.view(-1) >= 0).nonzero().flatten()
    batch = {"input_ids": tokens, "positions": positions, "targets": tokens.view(-1)[positions]}
    assert torch.allclose(module.loss(batch), model(input_ids=tokens, labels=labels).loss, rtol=1e-5)
    assert model.base_model is base


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize("family", OTHERS)
def test_a_classifier_s_head_is_the_seed_s_whatever_the_checkpoint_holds(tmp_path, family):
    """ModernBERT's two models share ``head.*``: a trained MLM head must not become part of h⁰."""
    folder = write_encoder(tmp_path, family, **OTHERS[family])
    full, told = load_classifier(folder, labels=LABELS, seed=1)
    prefix = f"{full.base_model_prefix}."
    tensors = load_file(folder / "model.safetensors")
    bare = {n: t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(f"{prefix}pooler.")}
    assert len(bare) < len(tensors)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    alone, lone = load_classifier(folder, labels=LABELS, seed=1)
    assert told.drawn == [name for name in lone.drawn if ".pooler." not in name]
    assert all(torch.equal(p, head_parameters(alone)[name]) for name, p in head_parameters(full).items())
    assert lone.pooler_in_head == (family == "albert")
    assert list(base_parameters(alone)) == list(base_parameters(load_masked_lm(folder, seed=0)[0]))
    state = torch.random.get_rng_state()
    assert list(shapes_of(folder, kind="task")) == list(maskable_parameters(alone))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_norm_is_known_by_its_class_alone():
    class Scale(nn.LayerNorm):
        """Inherits from a norm and is called otherwise."""

    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    class PreNormBlock(nn.Module):
        """Holds a norm and is none."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.LayerNorm = RMSNorm(), nn.Linear(4, 4)

    module = nn.Sequential(Scale(4), PreNormBlock(), nn.Embedding(3, 4))
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in norm_parameters(module)] == ["0.weight", "0.bias", "1.inner.gain"]


def test_a_model_without_output_embeddings_is_refused(tmp_path):
    model, _ = load_classifier(write_encoder(tmp_path, "bert"), labels=LABELS, seed=0)
    with pytest.raises(DeftxError, match="needs output embeddings; BertForSequenceClassification has none"):
        MaskedLM(model, TrainingSettings())
