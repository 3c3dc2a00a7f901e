"""A small BERT from raw text, for work without a hub: tokenizer, masked language modelling, model folder.

The same :class:`MaskedLM` and :func:`fit_phase` as everywhere; here everything trains, LayerNorm and the tied output
embedding included. The folder loads with ``load_masked_lm`` and ``load_classifier`` like any pretrained encoder (a
classifier's pooler is drawn, since masked language modelling has none).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from deftx import atomic
from deftx.errors import DeftxError
from deftx.knobs import refuse
from deftx.training.encoder import bert_config, quiet_transformers
from deftx.training.fit import PhaseResult, fit_phase
from deftx.training.modules import MaskedLM
from deftx.training.settings import PretrainSettings, TrainerSettings, TrainingSettings

LONGEST_WORD = 100  # letters; WordPiece's own limit
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(
    lines: Iterable[str], vocab_size: int, folder: Path | None = None, *, lowercase: bool = False, max_length: int = 512
) -> Any:
    """Train a BERT-style WordPiece tokenizer on lines of text.

    Every character of the text gets into the vocabulary while it has room; characters never seen become ``[UNK]``.
    Accents and case stay unless ``lowercase``.

    Args:
        lines: text in every language the encoder should know.
        vocab_size: number of tokens, special tokens included.
        folder: where to save it; None does not.
        lowercase: fold case (and strip accents, as BERT's uncased models do).
        max_length: longest sequence the tokenizer announces.

    Returns:
        A transformers fast tokenizer; ``AutoTokenizer.from_pretrained(folder)`` gives the same, offline.

    Raises:
        DeftxError: there is no text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizer

    text = list(lines)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    letters: Counter[str] = Counter()
    for line in text:
        letters.update(normalizer.normalize_str(line))
    letters = Counter({letter: count for letter, count in letters.items() if not letter.isspace()})
    if not letters:
        raise DeftxError("there is no text to train a tokenizer on: 0 characters")
    # Rare letters give way where the vocabulary cannot hold the alphabet twice (as a word's start and inside it).
    room = max(1, (vocab_size - len(SPECIAL_TOKENS)) // 2)
    alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:room])
    inner = [f"##{letter}" for letter in alphabet]
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers inner letters in the order of a hash map, and breaks ties by number: naming them first, as if
    # they were special, makes the vocabulary a function of the text alone.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # Longer words become the unknown token anyway, and the trainer's time grows with the square of a word's length.
    short = (" ".join(word for word in line.split() if len(word) <= LONGEST_WORD) for line in text)
    tokenizer.train_from_iterator(short, trainer)
    tokens: dict[str, Any] = dict(SPECIAL_TOKENS)
    fast = BertTokenizer(
        vocab=tokenizer.get_vocab(),
        do_lower_case=lowercase,
        strip_accents=lowercase,
        model_max_length=max_length,
        **tokens,
    )
    if folder is not None:
        fast.save_pretrained(str(folder))
    return fast


def pretrain(
    data_module: Any,
    tokenizer: Any,
    settings: PretrainSettings,
    trainer: TrainerSettings,
    folder: Path,
    *,
    seed: int,
    scratch: Path | None = None,
    loggers: Sequence[Any] = (),
    label: str = "pretrain",
) -> PhaseResult:
    """Train a small BERT from scratch and write it as a model folder.

    Args:
        data_module: text in blocks of ``settings.max_length``, tokenised with ``tokenizer``
            (``TextDataModule.for_language``).
        tokenizer: from :func:`train_tokenizer`; saved with the model.
        settings: size and training of the encoder.
        trainer: what to run on.
        folder: where the model goes; it appears when it is complete, never half-written.
        seed: decides initial weights, order of the data, masking and dropout.
        scratch: folder of the fit's checkpoints, from which an interrupted one resumes; None keeps none.
        loggers: Lightning loggers.
        label: how progress bar and errors name the fit.

    Returns:
        The fit's result; the folder, as its checkpoint, holds the best weights.

    Raises:
        DeftxError: settings out of range, or the folder exists with something in it.
    """
    refuse(settings)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeftxError(f"{folder} exists and is not empty; nothing is overwritten, give another folder")
    model = build_encoder(settings, len(tokenizer), pad_token_id=tokenizer.pad_token_id, seed=seed)
    module = MaskedLM(model, training_settings(settings), everything=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        result = fit_phase(
            module,
            data_module,
            None,
            module.settings,
            trainer,
            scratch or Path(temporary) / "fit",
            seed=seed,
            loggers=loggers,
            label=label,
        )
    with atomic.folder(folder) as temporary:
        with quiet_transformers():
            model.save_pretrained(str(temporary))
            tokenizer.save_pretrained(str(temporary))
        facts = {"settings": asdict(settings), "seed": seed, "steps": result.steps, "val_loss": result.best_score}
        (temporary / "pretraining.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # weights are written for the owner alone
    return replace(result, checkpoint=folder)


def build_encoder(settings: PretrainSettings, vocab_size: int, *, pad_token_id: int = 0, seed: int) -> Any:
    """Return an untrained ``BertForMaskedLM``, a function of its size and the seed."""
    from transformers import BertForMaskedLM

    config = bert_config(settings, vocab_size, pad_token_id=pad_token_id)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        auto: Any = BertForMaskedLM
        return auto._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def training_settings(settings: PretrainSettings) -> TrainingSettings:
    """Return the fit's settings that ``settings`` stands for."""
    return TrainingSettings(
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        epochs=1,
        min_steps=settings.steps,
        max_steps=settings.steps,
        eval_every=settings.eval_every,
        mlm_probability=settings.mlm_probability,
        warmup_steps=int(settings.warmup * settings.steps),
    )
