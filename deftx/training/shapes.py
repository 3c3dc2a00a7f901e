"""Names and shapes of M from ``config.json``, without torch or transformers where it describes a plain BERT.

Families of BERT's architecture follow from six numbers. A configuration that says anything else (another architecture,
a decoder, a number that is missing) is built by transformers on the meta device instead; both ways give the same names
in the same order, and a test holds them together. Stage keys and checks read this, so a study that is all in the cache
loads neither library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deftx.training.model_folder import FAMILIES, read_config, tensor_facts


def shapes_of(model: Path | Mapping[str, Any], *, kind: str) -> dict[str, tuple[int, ...]]:
    """Return M's names and shapes from ``config.json`` alone, in the order of the model's own parameters.

    Args:
        model: model folder; weights are not loaded (the file is asked whether it has a pooler). Or
            :func:`~deftx.training.model_folder.bert_facts` of an encoder that is still to be pretrained.
        kind: ``"language"`` (MaskedLM) or ``"task"`` (classifier; includes a pooler that the checkpoint has).

    Raises:
        DeftxError: no readable ``config.json``, or an unsupported family.
    """
    if kind not in ("language", "task"):
        raise ValueError(f"kind is {kind!r}; available: language, task")
    if isinstance(model, Mapping):
        # Masked language modelling pretrains no pooler: a classifier's belongs to its head.
        plain = _plain_shapes(model, "language")
        if plain is None:
            raise ValueError(f"this configuration does not describe a plain BERT: {model}")
        return plain
    config = read_config(model)
    shapes = _shapes(model, config, kind)
    if kind == "task":
        pooler = tuple(shapes.keys() - _shapes(model, config, "language"))
        stored = tensor_facts(model) if pooler else None
        if stored is not None and not any(name.endswith(pooler) for name in stored):
            return {name: shape for name, shape in shapes.items() if name not in pooler}
    return shapes


def _shapes(folder: Path, config: Mapping[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as :func:`shapes_of`, with a pooler even if the checkpoint has none."""
    plain = _plain_shapes(config, kind)
    if plain is not None:
        return plain
    from deftx.training.encoder import built_shapes

    return built_shapes(folder, kind=kind)


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


def _plain_shapes(config: Mapping[str, Any], kind: str) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a plain BERT encoder; None where the configuration does not describe one."""
    family = FAMILIES[config["model_type"]]
    if not family.embeddings:
        return None
    sizes = [config.get(name) for name in _SIZES]
    if any(config.get(name) not in usual for name, usual in _PLAIN.items()):
        return None
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    hidden, layers, heads, intermediate, vocabulary, positions, types = map(int, sizes)  # type: ignore[arg-type]
    if hidden % heads:
        return None
    rows = {"word": vocabulary, "position": positions, "token_type": types}
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (rows[name], hidden) for name in family.embeddings
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
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    if family.pooler and kind == "task":
        shapes["pooler.dense.weight"], shapes["pooler.dense.bias"] = (hidden, hidden), (hidden,)
    return shapes
