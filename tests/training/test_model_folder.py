"""Which files of a model folder are read, counted and refused, and what its config.json says."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import LABELS

from deftx.errors import DeftxError
from deftx.training.encoder import base_fingerprint_of, base_parameters, load_classifier, load_masked_lm
from deftx.training.model_folder import (
    FAMILIES,
    MODEL_FILES,
    bert_facts,
    check_model_folder,
    draws_random_numbers,
    longest_input,
    model_files,
    read_config,
    weight_files,
)
from deftx.training.settings import PretrainSettings
from deftx.training.shapes import shapes_of


def names_of(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in model_files(folder)]


def in_shards(source: Path, target: Path, first: str, second: str) -> Path:
    """A copy whose weights lie in two files of any names, with an index as transformers writes it."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    where = {name: first if name in half else second for name in tensors}
    for shard in (first, second):
        (target / shard).parent.mkdir(exist_ok=True)
        part = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
        if shard.endswith(".safetensors"):
            save_file(part, target / shard, metadata={"format": "pt"})
        else:
            torch.save(part, target / shard)
    index = {"metadata": {}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return target


def test_configuration_weights_and_tokenizer_count_and_nothing_else(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["bert"], folder)
    assert names_of(folder) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in ("README.md", "pytorch_model.bin", "generation_config.json", "chat_template.jinja", "tf_model.h5"):
        (folder / name).write_text("x", "utf-8")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_text("x", "utf-8")
    (folder / "vocab").mkdir()
    assert len(names_of(folder)) == 4
    (folder / "bpe.codes").write_text("x", "utf-8")  # PhoBERT's
    (folder / "special_tokens_map.json").write_text("{}", "utf-8")
    assert set(names_of(folder)) > {"bpe.codes", "special_tokens_map.json"}


def test_the_vocabulary_of_every_tokenizer_counts():
    """Any tokenizer of transformers may be named in tokenizer_config.json."""
    found = set()
    for path in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
        for names in re.findall(r"^VOCAB_FILES_NAMES\b[^{\n]*\{(.*?)\}", path.read_text("utf-8"), re.M | re.S):
            found |= set(re.findall(r':\s*"([^"]+)"', names))
    assert len(found) > 20
    assert not [name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)]


def test_shards_of_any_name_are_read_and_count(folder, family, tmp_path):
    shards = ("a.safetensors", "parts/b.safetensors")
    target = in_shards(folder, tmp_path / "m", *shards)
    assert check_model_folder(target)["model_type"] == family
    assert set(names_of(target)) >= {*shards, "model.safetensors.index.json"}
    whole, _ = load_masked_lm(folder, seed=0)
    parts, _ = load_masked_lm(target, seed=0)
    assert base_fingerprint_of(parts) == base_fingerprint_of(whole)
    assert shapes_of(target, kind="task") == shapes_of(folder, kind="task")
    (target / shards[1]).unlink()
    assert shards[1] not in names_of(target)
    with pytest.raises(DeftxError, match=r"lacks parts/b\.safetensors"):
        check_model_folder(target)


@pytest.mark.parametrize("first", ["weights-1.bin", "weights-1"])
def test_a_pickled_shard_counts_and_is_never_opened(folder, tmp_path, first):
    """Transformers reads whatever an index of safetensors names, by torch.load where the name says nothing else."""
    target = in_shards(folder, tmp_path / "m", first, "z.safetensors")
    transformers.AutoModelForMaskedLM.from_pretrained(target, use_safetensors=True, local_files_only=True)
    assert {first, "z.safetensors"} <= set(names_of(target))
    expected = rf"in pickled files \({first}\), which deftx never opens; convert them once.*save_pretrained"
    with pytest.raises(DeftxError, match=expected):
        check_model_folder(target)
    with pytest.raises(DeftxError, match=expected):
        load_masked_lm(target, seed=0)


def test_the_file_that_the_configuration_names_is_the_one_that_is_read(folders, tmp_path):
    target = tmp_path / "m"
    shutil.copytree(folders["bert"], target)
    tensors = load_file(target / "model.safetensors")
    (target / "other").mkdir()
    moved = {name: tensor + 1 for name, tensor in tensors.items() if "pooler" not in name}
    save_file(moved, target / "other" / "w.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "transformers_weights": "other/w.safetensors"}), "utf-8")
    assert weight_files(target) == [target / "other" / "w.safetensors"]
    assert "other/w.safetensors" in names_of(target)
    model, report = load_classifier(target, labels=LABELS, seed=0)
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(base_parameters(model)[name], tensors[f"bert.{name}"] + 1)
    assert report.pooler_in_head
    assert not any("pooler" in name for name in shapes_of(target, kind="task"))
    (target / "other" / "w.safetensors").unlink()
    with pytest.raises(DeftxError, match=r"lacks other/w\.safetensors"):
        check_model_folder(target)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_said(folders, tmp_path, content):
    shutil.copytree(folders["bert"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(content, "utf-8")
    for read in (check_model_folder, model_files):
        with pytest.raises(DeftxError, match=r"index\.json is not an index of safetensors shards"):
            read(tmp_path / "m")


def test_an_adapter_beside_the_model_is_refused(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(DeftxError, match=r"adapter_config\.json.*peft.*merge"):
        check_model_folder(tmp_path / "m")


FACTS = bert_facts(PretrainSettings(dropout=0.0), 100)
ABSENT = "absent"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"classifier_dropout": None}, False),
        ({"classifier_dropout": 0.0}, False),
        ({"classifier_dropout": 0.1}, True),
        ({"hidden_dropout_prob": 0.1}, True),
        ({"attention_probs_dropout_prob": 1e-3}, True),
        ({"hidden_dropout_prob": 0}, False),
        ({"hidden_dropout_prob": ABSENT}, True),
        ({"attention_probs_dropout_prob": ABSENT}, True),
        ({"hidden_dropout_prob": None}, True),
        ({"hidden_dropout_prob": ABSENT, "classifier_dropout": 0.0}, True),
    ],
)
def test_any_dropout_above_zero_draws_random_numbers(tmp_path, family, change, expected):
    config = {name: value for name, value in {**FACTS, "model_type": family, **change}.items() if value != ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert draws_random_numbers(tmp_path) == draws_random_numbers(config) == expected


def test_an_encoder_pretrained_here_draws_as_its_settings_say():
    assert not draws_random_numbers(bert_facts(PretrainSettings(dropout=0.0), 100))
    assert draws_random_numbers(bert_facts(PretrainSettings(dropout=0.1), 100))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_draws_is_what_the_configuration_says(tmp_path, family):
    """The probabilities named in the table are all there are in the models transformers builds."""
    config = transformers.AutoConfig.for_model(family, **{name: FACTS[name] for name in FACTS if name != "model_type"})
    config.save_pretrained(tmp_path)
    for auto in (transformers.AutoModelForMaskedLM, transformers.AutoModelForSequenceClassification):
        with torch.device("meta"):
            model = auto.from_config(config)
        rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert rates
        assert any(rates) == draws_random_numbers(tmp_path)


@pytest.mark.parametrize(
    ("family", "stated", "expected"),
    [("bert", {}, 64), ("xlm-roberta", {"pad_token_id": 1}, 62), ("camembert", {}, 62), ("roberta", {}, 62)],
)
def test_the_longest_input_leaves_out_positions_before_the_padding_token(tmp_path, family, stated, expected):
    config = {"model_type": family, "max_position_embeddings": 64, **stated}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert longest_input(tmp_path) == expected
    assert read_config(tmp_path) == config
