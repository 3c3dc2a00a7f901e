"""Sizes of the benchmarks, and what is made of a size: a model with random weights, a batch, a weight change, a mask.

``base`` and ``large`` are XLM-R's (Conneau et al. 2020), ``mini`` a BERT that takes seconds, ``tiny`` one for tests.
Everything is made from the configuration and a seed, on the CPU, then put on the benchmarks' device; nothing is
downloaded.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import device
from deftx.core.delta import SparseDelta
from deftx.core.selection import select_topk
from deftx.training.encoder import quiet_transformers
from deftx.training.shapes import shapes_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of model and data.

    Attributes:
        name: what it is called.
        family: ``bert`` or ``xlm-roberta``.
        vocabulary: tokens.
        layers: transformer layers.
        hidden: width.
        intermediate: width of the feed-forward layers.
        heads: attention heads.
        batch: blocks of a training step.
        length: tokens of a block.
        rows: evaluation rows of a language.
        k: selected coordinates of a language SFT.
        k_task: of a task SFT.
        dropout: of hidden states and attention.
        judged: whether targets are meant for this shape.
    """

    name: str
    family: str
    vocabulary: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    batch: int
    length: int
    rows: int
    k: int
    k_task: int
    dropout: float = 0.1
    judged: bool = False


SHAPES = {
    "tiny": Shape("tiny", "bert", 150, 2, 16, 32, 2, 4, 16, 10, 300, 500, dropout=0.0),
    "mini": Shape("mini", "bert", 16000, 4, 256, 1024, 4, 8, 128, 32, 204_067, 376_756),
    "base": Shape("base", "xlm-roberta", 250002, 12, 768, 3072, 12, 8, 256, 64, 7_667_712, 14_155_776, judged=True),
    "large": Shape("large", "xlm-roberta", 250002, 24, 1024, 4096, 16, 8, 256, 64, 15_472_000, 28_560_000),
}


def config_of(shape: Shape) -> Any:
    """The transformers configuration of a shape; padding is token 0, as in the tokenizers trained here."""
    from transformers import BertConfig, XLMRobertaConfig

    kind = {"bert": BertConfig, "xlm-roberta": XLMRobertaConfig}[shape.family]
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=514,
        type_vocab_size=2 if shape.family == "bert" else 1,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        pad_token_id=0,
    )


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of M, what a language SFT may change."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(shape).save_pretrained(folder)
        return shapes_of(Path(folder), kind="language")


def masked_lm(shape: Shape, seed: int = 0) -> Any:
    """A masked language model with random weights: sdpa, LayerNorm frozen, the decoder a frozen copy."""
    from transformers import AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = auto.from_config(config_of(shape), attn_implementation="sdpa", dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    model.get_output_embeddings().weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(False)
    return device.put(model)


def masked_batch(shape: Shape, seed: int = 0) -> Batch:
    """A batch as :class:`~deftx.training.modules.MaskedLM` takes it: whole blocks, 15 % of the tokens predicted."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, shape.vocabulary, (shape.batch, shape.length), generator=generator)
    chosen = torch.rand(tokens.shape, generator=generator) < 0.15
    chosen[0, 0] = True
    positions = chosen.flatten().nonzero().flatten()
    inputs = torch.where(chosen, torch.full_like(tokens, 4), tokens)
    batch: Batch = {
        "input_ids": inputs,
        "positions": positions,
        "targets": tokens.flatten()[positions],
        "normalizer": torch.tensor(float(positions.numel())),
        "tokens": tokens.numel(),
    }
    return dict(device.put(batch))


def change(shape: Shape, seed: int = 0, *, embedding_rows: float = 1.0) -> dict[str, Tensor]:
    """A weight change by the names of M, float32: a decaying spectrum and noise.

    Args:
        shape: sizes.
        seed: of the numbers.
        embedding_rows: share of the word embedding's rows that changed; the others are zero, as after a short MLM run.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: changed(size, generator, embedding_rows if "word_embeddings" in name else 1.0)
        for name, size in parameter_shapes(shape).items()
    }


def changed(size: tuple[int, ...], generator: torch.Generator, share: float = 1.0) -> Tensor:
    """One tensor of :func:`change`: 1e-4 · (Σ u_i v_iᵀ / i + noise) for a matrix, noise for a vector."""
    if len(size) != 2:
        return device.put(torch.randn(size, generator=generator) * 1e-4)  # type: ignore[no-any-return]
    m, n = size
    inner = min(64, m, n)
    falling = 1 / torch.arange(1, inner + 1)
    made = (torch.randn(m, inner, generator=generator) * falling) @ torch.randn(inner, n, generator=generator)
    made.add_(torch.randn(m, n, generator=generator)).mul_(1e-4)
    if share < 1:
        made[torch.rand(m, generator=generator) >= share] = 0
    return device.put(made)  # type: ignore[no-any-return]


def noise(sizes: dict[str, tuple[int, ...]], seed: int, scale: float = 0.02) -> dict[str, Tensor]:
    """Normal numbers by name, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: device.put(torch.randn(size, generator=generator).mul_(scale)) for name, size in sizes.items()}


def mask(shape: Shape, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Exactly ``k`` coordinates of M, spread like the largest entries of noise."""
    return select_topk(noise(parameter_shapes(shape), seed), k)


def sparse_delta(shape: Shape, k: int, seed: int, base_fingerprint: str = "0" * 64) -> SparseDelta:
    """A sparse fine-tuning of ``k`` coordinates with values of about 1e-4."""
    sizes = parameter_shapes(shape)
    indices = {name: index for name, index in mask(shape, k, seed).items() if index.numel()}
    generator = torch.Generator().manual_seed(seed + 1)
    values = {name: torch.randn(index.numel(), generator=generator) * 1e-4 for name, index in indices.items()}
    facts = {"base_fingerprint": base_fingerprint, "kind": "language", "languages": ["qaa"]}
    return SparseDelta(indices, device.put(values), {name: sizes[name] for name in indices}, metadata=facts)


def entries(tensors: dict[str, Tensor]) -> int:
    """How many numbers tensors hold together."""
    return sum(tensor.numel() for tensor in tensors.values())


def dense(delta: SparseDelta) -> dict[str, Tensor]:
    """A sparse fine-tuning as dense differences, as one subtracts two state dicts."""
    found = {}
    for name, size in delta.shapes.items():
        flat = torch.zeros(math.prod(size), device=delta.values[name].device)
        flat[delta.indices[name]] = delta.values[name]
        found[name] = flat.view(size)
    return found
