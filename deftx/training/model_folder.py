"""A model folder in the hub's shape, read without torch or transformers: what lies in it, and the shapes of M.

The four supported families are one architecture, BERT's, so names and shapes follow from six numbers of
``config.json``. A configuration that says anything else (a decoder, relative positions, a number that is missing) is
built by transformers on the meta device instead; both ways give the same names in the same order, and a test holds
them together. Stage keys and checks read this, so a study that is all in the cache loads neither library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError, did_you_mean
from deftx.training.settings import PretrainSettings

# model type -> attribute of the masked language model that holds its head
FAMILIES = {"bert": "cls", "roberta": "lm_head", "xlm-roberta": "lm_head", "camembert": "lm_head"}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder in the hub's shape, or say what is missing.

    Args:
        folder: holds ``config.json``, safetensors weights (one file or shards) and a tokenizer.

    Raises:
        DeftxError: a file is missing, only pickled weights are there, or the family is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DeftxError(
            f"model folder {folder} does not exist; give a folder with config.json, model.safetensors and a tokenizer"
        )
    found = sorted(entry.name for entry in folder.iterdir())
    missing = []
    if "config.json" not in found:
        missing.append("config.json")
    pickled = [name for name in found if name.endswith(PICKLES)]
    if not any(name in found for name in WEIGHTS):
        if pickled:
            raise DeftxError(
                f"{folder} has pickled weights only ({', '.join(pickled)}), which deftx never opens; convert them once "
                "where you trust the file: AutoModelForMaskedLM.from_pretrained(FOLDER).save_pretrained(FOLDER) "
                "writes model.safetensors"
            )
        missing.append("model.safetensors (or model.safetensors.index.json with its shards)")
    elif WEIGHTS[0] not in found:
        missing += _missing_shards(folder)
    if not any(name in found for name in TOKENIZERS):
        missing.append(f"a tokenizer ({', '.join(TOKENIZERS[:3])})")
    if missing:
        raise DeftxError(
            f"model folder {folder} lacks {'; '.join(missing)}\nfound: {', '.join(found) or 'nothing'}\n"
            "next: download the whole model (hf download MODEL --local-dir FOLDER) or write one with deftx pretrain"
        )
    return _read_config(folder)


def _missing_shards(folder: Path) -> list[str]:
    try:
        shards = set(json.loads((folder / WEIGHTS[1]).read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise DeftxError(f"{folder / WEIGHTS[1]} is not an index of safetensors shards: {error!r}") from error
    return sorted(shard for shard in shards if not (folder / shard).is_file())


def _read_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DeftxError(f"{path} does not exist; give a model folder in the hub's shape") from error
    except ValueError as error:
        raise DeftxError(f"{path} is not JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in FAMILIES:
        raise DeftxError(
            f"model type {model_type!r} in {path} is not supported{did_you_mean(str(model_type), FAMILIES)}; "
            f"supported families: {', '.join(FAMILIES)}"
        )
    return dict(config)


def shapes_of(folder: Path, *, kind: str) -> dict[str, tuple[int, ...]]:
    """Return M's names and shapes from ``config.json`` alone, in the order of the model's own parameters.

    Args:
        folder: model folder; weights are not loaded (a BERT's file is asked whether it has a pooler).
        kind: ``"language"`` (MaskedLM) or ``"task"`` (classifier; includes BERT's pooler).

    Raises:
        DeftxError: no readable ``config.json``, or an unsupported family.
    """
    if kind not in ("language", "task"):
        raise ValueError(f"kind is {kind!r}; available: language, task")
    found = _encoder_shapes(_read_config(folder), kind)
    if found is None:
        from deftx.training.encoder import built_shapes

        found = built_shapes(folder, kind=kind)
    if any(name.startswith("pooler.") for name in found) and not _has_pooler(Path(folder)):
        return {name: shape for name, shape in found.items() if not name.startswith("pooler.")}
    return found


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_PLAIN: dict[str, tuple[object, ...]] = {
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "position_embedding_type": (None, "absolute"),
    "pruned_heads": (None, {}),
}


def _encoder_shapes(config: dict[str, Any], kind: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a plain BERT encoder; None where the configuration does not describe one."""
    sizes = [config.get(name) for name in _SIZES]
    if any(config.get(name) not in usual for name, usual in _PLAIN.items()):
        return None
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    hidden, layers, heads, intermediate, vocabulary, positions, types = map(int, sizes)  # type: ignore[arg-type]
    if hidden % heads:
        return None
    bert = config["model_type"] == "bert"
    embeddings = {"word": vocabulary, "position": positions, "token_type": types}
    order = ("word", "position", "token_type") if bert else ("word", "token_type", "position")
    found: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (embeddings[name], hidden) for name in order
    }
    dense = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (intermediate, hidden),
        "output.dense": (hidden, intermediate),
    }
    for layer in range(layers):
        for name, shape in dense.items():
            found[f"encoder.layer.{layer}.{name}.weight"] = shape
            found[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    if bert and kind == "task":
        found["pooler.dense.weight"], found["pooler.dense.bias"] = (hidden, hidden), (hidden,)
    return found


def bert_facts(settings: PretrainSettings, vocab_size: int, *, pad_token_id: int = 0) -> dict[str, Any]:
    """Return what ``config.json`` says of an encoder that is pretrained here."""
    return {
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.intermediate,
        "max_position_embeddings": settings.positions,
        "type_vocab_size": 2,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
        "pad_token_id": pad_token_id,
    }


def longest_input(folder: Path) -> int:
    """Return how many tokens the model of a folder accepts at once, from ``config.json`` alone.

    RoBERTa's kin number positions from behind the padding token's, so two of XLM-R's 514 are never used.

    Raises:
        DeftxError: no readable ``config.json``, or an unsupported family.
    """
    config = _read_config(folder)
    positions = int(config.get("max_position_embeddings", 512))
    return positions if config["model_type"] == "bert" else positions - int(config.get("pad_token_id", 1)) - 1


def _has_pooler(folder: Path) -> bool:
    """Whether the checkpoint holds a pooler; yes where there are no weights to ask."""
    from safetensors import safe_open

    index = folder / WEIGHTS[1]
    if (folder / WEIGHTS[0]).is_file():
        try:
            with safe_open(folder / WEIGHTS[0], "np") as file:
                names = list(file.keys())
        except Exception as error:
            raise DeftxError(f"the weights in {folder} cannot be read ({type(error).__name__}: {error})") from error
    elif index.is_file():
        names = list(json.loads(index.read_text("utf-8"))["weight_map"])
    else:
        return True
    return any("pooler." in name for name in names)
