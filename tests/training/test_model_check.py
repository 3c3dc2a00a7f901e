"""Files of a model folder that do not belong together are refused before anything runs; ``.bin`` weights are read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deftx.errors import DeftxError
from deftx.training.encoder import load_classifier, load_masked_lm, load_tokenizer
from deftx.training.model_folder import check_model_folder, model_files, tensor_facts
from deftx.training.shapes import shapes_of

Change = Callable[[Path], None]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model folder of each family that may be changed."""
    return Path(shutil.copytree(folder, tmp_path / "m"))


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Change:
    def write(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        change(content)
        path.write_text(json.dumps(content), "utf-8")

    return write


def to_int8(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
    tensors[name] = (tensors[name] * 100).to(torch.int8)


def add_tokens(content: dict[str, Any]) -> None:
    names = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = [(5000 + number, f"<new{number}>", False, False, False, False, False) for number in range(50)]
    content["added_tokens"] += [dict(zip(names, token, strict=True)) for token in added]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(num_hidden_layers=1), r"have 2 layers, and config\.json counts 1 \(num_hidden_layers\)"),
        (config(num_hidden_layers=0), r"have 2 layers, and config\.json counts 0"),
        (
            weights(to_int8),
            r"1 tensors of the encoder .* are I8 \(.*layer\.0\.output\.dense\.weight\): a quantised model",
        ),
        (tokenizer(add_tokens), r"has ids up to 5049, and the embedding has \d+ rows.*resize_token_embeddings"),
        (config(pad_token_id=3), r"pads with \d, and config\.json says pad_token_id=3"),
    ],
    ids=["one layer of two", "no layer of two", "int8", "50 added tokens", "another padding token"],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_loaded(copy: Path, change: Change, message: str) -> None:
    assert check_model_folder(copy)["model_type"]
    change(copy)
    with pytest.raises(DeftxError, match=message):
        check_model_folder(copy)


def test_a_tokenizer_without_tokenizer_json_is_checked_when_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    assert load_tokenizer(copy) is not None
    words = json.loads((copy / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("\n".join([*sorted(words, key=words.__getitem__), "more", "words"]) + "\n", "utf-8")
    check_model_folder(copy)
    with pytest.raises(DeftxError, match=rf"has ids up to {len(words) + 1}, and the embedding has {len(words)} rows"):
        load_tokenizer(copy)
    config(type_vocab_size=1)(Path(shutil.copytree(folders["bert"], tmp_path / "n")))
    with pytest.raises(DeftxError, match=r"tells 2 segments apart, the encoder 1 \(type_vocab_size\)"):
        load_tokenizer(tmp_path / "n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(copy: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if name.endswith("layer.1.output.dense.bias"))[3] = value

    weights(spoil)(copy)
    for load in (lambda: load_masked_lm(copy, seed=0), lambda: load_classifier(copy, labels=["a", "b"], seed=0)):
        with pytest.raises(
            DeftxError, match=r"1 tensors with NaN or infinite numbers \(.*layer\.1\.output\.dense\.bias\)"
        ):
            load()


def test_parts_of_an_encoder_that_nothing_would_use_are_refused(copy: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "encoder.layer.0.output.dense.bias" in name)
        tensors[name.replace("output.dense", "output.adapter")] = tensors[name].clone()

    weights(add)(copy)
    with pytest.raises(
        DeftxError, match=r"1 tensors of the encoder that config\.json has no place for .*output\.adapter"
    ):
        load_masked_lm(copy, seed=0)


# --- pytorch_model.bin


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def as_bin(folder: Path, content: Any = None) -> None:
    tensors = load_file(folder / "model.safetensors") if content is None else content
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_a_bin_file_gives_the_same_model(copy: Path) -> None:
    before, _ = load_masked_lm(copy, seed=0)
    names, shapes = set(tensor_facts(copy) or ()), shapes_of(copy, kind="task")
    as_bin(copy)
    assert check_model_folder(copy)["model_type"]
    assert set(tensor_facts(copy) or ()) == names
    assert shapes_of(copy, kind="task") == shapes
    after, report = load_masked_lm(copy, seed=0)
    assert report.drawn == []
    for (name, one), (other_name, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    load_classifier(copy, labels=["a", "b"], seed=0)
    assert copy / "pytorch_model.bin" in model_files(copy), "its content is in the key"


def test_safetensors_beside_a_bin_file_are_read(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_masked_lm(copy, seed=0)
    assert copy / "pytorch_model.bin" not in model_files(copy)


def test_bin_shards_give_the_same_model(copy: Path) -> None:
    before, _ = load_masked_lm(copy, seed=0)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    where = {name: f"pytorch_model-{number}.bin" for number, shard in enumerate(shards) for name in shard}
    for number, shard in enumerate(shards):
        torch.save(shard, copy / f"pytorch_model-{number}.bin")
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), "utf-8")
    after, _ = load_masked_lm(copy, seed=0)
    assert all(map(torch.equal, before.parameters(), after.parameters()))


@pytest.mark.parametrize("how", ["pickle", "beside tensors", "no mapping", "truncated"])
def test_a_payload_is_refused_and_never_run(
    copy: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = load_file(copy / "model.safetensors")
    as_bin(copy, {"beside tensors": {**tensors, "x": Bomb()}, "no mapping": [Bomb()]}.get(how, tensors))
    file = copy / "pytorch_model.bin"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    for read in (lambda: check_model_folder(copy), lambda: load_masked_lm(copy, seed=0)):
        with pytest.raises(DeftxError, match=r"pytorch_model\.bin|cannot be read"):
            read()
    assert not (tmp_path / "exploded").exists()


# --- SentencePiece alone


def test_a_sentencepiece_model_alone_names_what_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["xlm-roberta"], tmp_path / "m"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    (copy / "sentencepiece.bpe.model").write_bytes(b"no model")
    with pytest.raises(DeftxError) as refused:
        load_tokenizer(copy)
    text = str(refused.value)
    assert "sentencepiece.bpe.model is a SentencePiece model without tokenizer.json" in text
    assert "save_pretrained(FOLDER) writes tokenizer.json" in text
