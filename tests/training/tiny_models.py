"""Toy text, rows, and encoders of both families in the hub's shape: weights, tokenizer, config."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import torch

from deftx.training.pretrain import train_tokenizer

LABELS = ("negative", "neutral", "positive")


def make_lines(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdgklmnprst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(count)]


def make_rows(count: int, seed: int, pairs: bool = False) -> pd.DataFrame:
    texts = make_lines(count, seed)
    draw = random.Random(seed)
    frame = pd.DataFrame({"id": [str(i) for i in range(count)], "text": texts})
    frame["text_pair"] = make_lines(count, seed + 1) if pairs else None
    frame["label"] = [draw.randrange(3) for _ in range(count)]
    return frame


def _scramble(model: torch.nn.Module) -> None:
    """Give every tensor values of its own: fresh layer norms and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def write_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertForPreTraining

    tokenizer = train_tokenizer(make_lines(200, 0), 160, folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model = BertForPreTraining(config)
    _scramble(model)
    model.save_pretrained(folder)
    return folder


def write_xlmr(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.trainers import UnigramTrainer
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(make_lines(200, 0), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = XLMRobertaForMaskedLM(config)
    _scramble(model)
    model.save_pretrained(folder)
    return folder
