"""A model folder in the hub's shape, read without torch or transformers: its family, its files, what its config says.

The table of families is the one place that names them. The files are those that transformers 5.23 opens for a local
folder; stage keys count them, downloads ask for them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError, did_you_mean, listed
from deftx.training.settings import PretrainSettings


@dataclass(frozen=True)
class EncoderFamily:
    """What a study needs to know of an encoder family before a model is built, and ``config.json`` does not say.

    Everything else is found by the structure of the model (:mod:`~deftx.training.encoder`). ``Family()`` describes an
    architecture that is not BERT's.

    Attributes:
        embeddings: BERT's embedding tables in the order of the model's parameters, by which ties in a mask are broken.
            Empty where the architecture is not BERT's: transformers then builds the model to see its shapes.
        pooler: whether a classifier of BERT's architecture has a pooler, which its masked language model lacks.
        counts_behind_padding: whether the first position has the number after the padding token's, so that the table
            of positions has rows that are never used.
        dropouts: names of the probabilities of dropout, without ``classifier_dropout``, which follows them if null.
    """

    embeddings: tuple[str, ...] = ()
    pooler: bool = False
    counts_behind_padding: bool = False
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


_ROBERTA = EncoderFamily(embeddings=("word", "token_type", "position"), counts_behind_padding=True)
FAMILIES = {
    "bert": EncoderFamily(embeddings=("word", "position", "token_type"), pooler=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights in the order in which transformers looks for them. A ``.bin`` file is a pickle: of those, tensors alone are
read (``weights_only=True``), and one that asks for anything else is refused."""
_TENSOR_FILES = (".safetensors", ".bin")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json")
PICKLES = (".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
MODEL_FILES = (
    "config.json",
    "config.*.json",  # of other versions of transformers, where config.json lists them
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    # Vocabularies of rarer tokenizers, any of which tokenizer_config.json may name: PhoBERT's is bpe.codes.
    "*.codes",
    "*.spm",
    "*.tokenizer",
    "*_vocab.json",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "tekken.json",
)
"""Patterns of what is read from a model folder and changes a result, for keys and for downloads."""
_OF_THE_ENCODER = re.compile(r"(?:^|\.)((?:encoder|embeddings)\..*)$")
_LAYER = re.compile(r"encoder\.layers?\.(\d+)\.")
BUFFERS = ("position_ids", "token_type_ids")
"""Ends of the names of integer tensors that older versions of transformers wrote, and that no model needs."""
_CONVERT = "AutoModelForMaskedLM.from_pretrained(FOLDER).save_pretrained(FOLDER) writes model.safetensors"
_NEVER = f"which deftx never opens; convert them once where you trust the file: {_CONVERT}"


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder in the hub's shape, or say what is missing.

    Args:
        folder: holds ``config.json``, weights (one file or shards; safetensors, else ``pytorch_model.bin``) and a
            tokenizer.

    Raises:
        DeftxError: a file is missing, weights are of another kind, an adapter lies beside them, the family is not
            supported, or the files do not fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DeftxError(
            f"model folder {folder} does not exist; give a folder with config.json, model.safetensors and a tokenizer"
        )
    names = sorted(entry.name for entry in folder.iterdir())
    missing = []
    if "config.json" not in names:
        missing.append("config.json")
    weights = {os.path.relpath(path, folder): path for path in weight_files(folder)}
    if not weights:
        pickled = [name for name in names if name.endswith(PICKLES)]
        if pickled:
            raise DeftxError(f"{folder} has pickled weights only ({', '.join(pickled)}), {_NEVER}")
        missing.append("model.safetensors (or model.safetensors.index.json with its shards)")
    # An index of safetensors names such files alone, and transformers unpickles whatever has another ending.
    allowed = (
        _TENSOR_FILES if all(not name.endswith(".safetensors.index.json") for name in weights) else (".safetensors",)
    )
    pickled = [name for name in weights if not name.endswith((*allowed, ".index.json"))]
    if pickled:
        raise DeftxError(f"the weights of {folder} are in pickled files ({', '.join(pickled)}), {_NEVER}")
    missing += [name for name, path in weights.items() if not path.is_file()]
    if not any(name in names for name in TOKENIZERS):
        missing.append(f"a tokenizer ({', '.join(TOKENIZERS[:3])})")
    if missing:
        raise DeftxError(
            f"model folder {folder} lacks {'; '.join(missing)}\nfound: {', '.join(names) or 'nothing'}\n"
            "next: download the whole model (hf download MODEL --local-dir FOLDER) or write one with deftx pretrain"
        )
    if "adapter_config.json" in names:
        raise DeftxError(
            f"{folder} holds an adapter beside the model (adapter_config.json), which transformers applies on machines "
            "with peft and ignores on others; merge it into the weights (PeftModel.merge_and_unload) or remove the file"
        )
    config = read_config(folder)
    _check_contents(folder, config)
    return config


def model_files(folder: Path) -> list[Path]:
    """Return every file of a model folder that is read and changes a result: configuration, weights, tokenizer.

    Weights count under any name that an index or ``config.json`` gives them. A chat template does not count: it is
    read, but no text passes through it.

    Raises:
        DeftxError: the index of the weights cannot be read.
    """
    folder = Path(folder)
    paths = {path for pattern in MODEL_FILES for path in folder.glob(pattern)} | set(weight_files(folder))
    return sorted(path for path in paths if path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers opens for a folder's weights; empty if there are none.

    It opens the file that ``config.json`` names as ``transformers_weights``, else ``model.safetensors``, else the
    index with all its shards. Shards may have any name; those that are missing are returned too.

    Raises:
        DeftxError: the index cannot be read.
    """
    first = _first_weights(Path(folder))
    if first is None or not first.name.endswith(".index.json"):
        return [first] if first else []
    shards = set(_weight_map(first).values()) if first.is_file() else ()
    return [first, *(Path(folder) / shard for shard in sorted(shards))]


@dataclass(frozen=True)
class TensorFacts:
    """What a file of weights says of a tensor.

    Attributes:
        dtype: As safetensors writes it: ``F32``, ``BF16``, ``I8``, ...
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether it holds numbers that training can start from."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def tensor_facts(folder: Path) -> dict[str, TensorFacts] | None:
    """Return dtypes and shapes of a checkpoint's tensors without reading them; None where there are no weights to ask.

    Raises:
        DeftxError: the weights cannot be read, or hold something that is no tensor.
    """
    files = [path for path in weight_files(Path(folder)) if not path.name.endswith(".index.json")]
    if not files:
        return None
    facts: dict[str, TensorFacts] = {}
    for path in files:
        try:
            facts |= _safetensors_facts(path) if path.suffix == ".safetensors" else _pickled_facts(path)
        except DeftxError:
            raise
        except Exception as error:
            raise DeftxError(f"the weights in {folder} cannot be read ({type(error).__name__}: {error})") from error
    return facts


def _safetensors_facts(path: Path) -> dict[str, TensorFacts]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: TensorFacts(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _pickled_facts(path: Path) -> dict[str, TensorFacts]:
    """Return what a ``.bin`` file holds; torch reads tensors alone, and their numbers stay in the file."""
    import torch

    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DeftxError(
            f"{path} is damaged, or a pickle that holds more than tensors, and deftx reads tensors alone; convert it "
            f"once where you trust it: {_CONVERT}"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise DeftxError(
            f"{path} holds other things than tensors by name. Convert it once where you trust it: {_CONVERT}"
        )
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        str(name): TensorFacts(names.get(value.dtype, str(value.dtype).removeprefix("torch.")), tuple(value.shape))
        for name, value in content.items()
    }


def _first_weights(folder: Path) -> Path | None:
    """Return the weights or the index that transformers opens first."""
    try:
        named = json.loads((folder / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):  # read_config says what is wrong with it
        named = None
    if named is not None:
        return folder / str(named)
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, by the tensor's name."""
    try:
        shards = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeftxError(f"{index} is not an index of safetensors shards: {error!r}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder.

    Raises:
        DeftxError: there is none, it cannot be read, or its family is not supported.
    """
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


def config_of(model: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``config.json`` says of a model.

    Args:
        model: model folder, or the content of its ``config.json`` (such as :func:`bert_facts`).

    Raises:
        DeftxError: no readable ``config.json``, or an unsupported family.
    """
    return model if isinstance(model, Mapping) else read_config(model)


def longest_input(model: Path | Mapping[str, Any]) -> int:
    """Return how many tokens a model accepts at once, from its configuration alone (see :func:`config_of`).

    Two of XLM-R's 514 positions are never used, see :class:`EncoderFamily`.
    """
    config = config_of(model)
    positions = int(config.get("max_position_embeddings", 512))
    if FAMILIES[config["model_type"]].counts_behind_padding:
        return positions - int(config.get("pad_token_id", 1)) - 1
    return positions


def draws_random_numbers(model: Path | Mapping[str, Any]) -> bool:
    """Return whether training an encoder draws random numbers on the device: whether any dropout is above 0.

    A probability that is not stated counts as above 0, because transformers' default may be 0.1. A
    ``classifier_dropout`` that is absent or null follows the encoder's own (see :func:`config_of`).
    """
    config = config_of(model)
    dropouts = [config.get(name) for name in FAMILIES[config["model_type"]].dropouts]
    dropouts.append(config.get("classifier_dropout") or 0)
    return any(probability is None or probability > 0 for probability in dropouts)


def _check_contents(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that weights, tokenizer and ``config.json`` of a model folder fit each other.

    Raises:
        DeftxError: They do not.
    """
    _check_weights(folder, config)
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer_file(folder, config)


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that are no floats, and layers beyond those that the configuration counts.

    What is missing or has another shape is found when the weights are loaded.
    """
    stored = tensor_facts(folder) or {}
    parts = {match[1]: facts for name, facts in stored.items() if (match := _OF_THE_ENCODER.search(name))}
    whole = [name for name, facts in parts.items() if not (facts.floating or name.endswith(BUFFERS))]
    if whole:
        kinds = ", ".join(sorted({parts[name].dtype for name in whole}))
        raise DeftxError(
            f"{len(whole)} tensors of the encoder in {folder} are {kinds} ({listed(whole, 3)}): a quantised model "
            "cannot be fine-tuned; give the model that it was made from"
        )
    layers, counted = (
        {int(match[1]) for name in parts if (match := _LAYER.search(name))},
        config.get("num_hidden_layers"),
    )
    if layers and isinstance(counted, int) and max(layers) >= counted:
        raise DeftxError(
            f"the weights in {folder} have {max(layers) + 1} layers, and config.json counts {counted} "
            f"(num_hidden_layers): the others would be left out; download the model again"
        )


def _check_tokenizer_file(folder: Path, config: Mapping[str, Any]) -> None:
    """Check ``tokenizer.json`` against the configuration; other forms are checked when the tokenizer is loaded."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or ()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return  # load_tokenizer says what is wrong with it
    ids = (
        {str(token): int(number) for token, number in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    ) | ids
    highest = max([*ids.values(), len(vocabulary) - 1])
    settings = [_json(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    pad = next((token for facts in settings if (token := facts.get("pad_token")) is not None), None)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    refuse_misfit(folder, config, highest=highest, pad=ids.get(str(pad)))


def refuse_misfit(
    folder: Path, config: Mapping[str, Any], *, highest: int, pad: int | None = None, segments: int = 1
) -> None:
    """Refuse a tokenizer whose ids the encoder does not have.

    Args:
        folder: Model folder, for messages.
        config: Its ``config.json``.
        highest: Highest token id.
        pad: Id of the padding token, if it is known.
        segments: How many segment ids (``token_type_ids``) the tokenizer gives.

    Raises:
        DeftxError: An id lies beyond the embedding, or padding is another token than the encoder's.
    """
    rows, own_pad = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(rows, int) and highest >= rows:
        raise DeftxError(
            f"the tokenizer in {folder} has ids up to {highest}, and the embedding has {rows} rows: "
            "tokens were added and the embedding was not resized, or the tokenizer is another model's; give the "
            "model's own, or save the model after model.resize_token_embeddings(len(tokenizer))"
        )
    if pad is not None and isinstance(own_pad, int) and pad != own_pad:
        raise DeftxError(
            f"the tokenizer in {folder} pads with {pad}, and config.json says pad_token_id={own_pad}: the encoder "
            "would count positions from another token and never train this one; give the model's own tokenizer, or "
            "set pad_token_id where you know it to be wrong"
        )
    types = config.get("type_vocab_size")
    if isinstance(types, int) and segments > max(types, 1):
        raise DeftxError(
            f"the tokenizer in {folder} tells {segments} segments apart, the encoder {types} (type_vocab_size); "
            "give the model's own tokenizer"
        )
    if longest_input(config) < 8:
        raise DeftxError(
            f"{folder} accepts {longest_input(config)} tokens at most (max_position_embeddings="
            f"{config.get('max_position_embeddings')}); download the model again"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
