"""Checks that the files of a model folder belong together, before anything runs and without loading the model.

Each of these passes in silence otherwise: layers that ``config.json`` does not count, numbers that are no floats, token
ids beyond the embedding, segment ids that the encoder does not have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deftx.errors import DeftxError, listed
from deftx.training.model_folder import longest_input, tensor_facts

_OF_THE_ENCODER = re.compile(r"(?:^|\.)((?:encoder|embeddings)\..*)$")
_LAYER = re.compile(r"encoder\.layers?\.(\d+)\.")
BUFFERS = ("position_ids", "token_type_ids")
"""Ends of the names of integer tensors that older versions of transformers wrote, and that no model needs."""


def check_contents(folder: Path, config: Mapping[str, Any]) -> None:
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
