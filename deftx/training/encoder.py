"""Pretrained encoders: load, untie, freeze, and name their parameters.

What may change (M) is keyed by the *base model's own names*, never by the training model's: in transformers 5
``XLMRobertaForMaskedLM`` reports its tied embedding as ``lm_head.decoder.weight``, and an SFT with that key would
change nothing in a classifier. The output embedding becomes a frozen clone of the input embedding after loading
(``tie_word_embeddings=False`` at load would leave it random); LayerNorm is frozen by the name ``LayerNorm``
(so XLM-R's ``lm_head.layer_norm`` trains). A head the checkpoint lacks is drawn from the seed alone.

Source: the reference code of LT-SFT (Ansell et al., ACL 2022), ``cambridgeltl/composable-sft``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deftx.core.delta import fingerprint
from deftx.errors import DeftxError
from deftx.training.model_folder import FAMILIES, bert_facts, check_model_folder
from deftx.training.settings import PretrainSettings

logger = logging.getLogger(__name__)
_SAID: set[str] = set()


@dataclass
class LoadReport:
    """What loading found: the family, and which head tensors were drawn instead of read.

    Attributes:
        model_type: the family, a key of ``FAMILIES``.
        drawn: full names of the head tensors drawn from the seed.
        pooler_in_head: a BERT checkpoint without pooler: the pooler is drawn and counts as head, not as M.
        parameters: P, all parameters of the training model, the frozen decoder copy included.
        warnings: sentences a user should see, also logged.
    """

    model_type: str
    drawn: list[str] = field(default_factory=list)
    pooler_in_head: bool = False
    parameters: int = 0
    warnings: list[str] = field(default_factory=list)


def load_masked_lm(folder: Path, *, seed: int) -> tuple[Any, LoadReport]:
    """Load an encoder with its MLM head; the decoder becomes a frozen clone of the input embedding.

    Head tensors the checkpoint lacks (a bare encoder such as MiniLM) are drawn from ``seed``: N(0,
    initializer_range) weights, zero biases, unit layer norms. That is logged as a warning and recorded.

    Args:
        folder: model folder, see :func:`check_model_folder`.
        seed: decides the drawn tensors, independently of torch's global generator.

    Returns:
        The model in float32 on the CPU, and the report.

    Raises:
        DeftxError: the folder is incomplete, or the checkpoint lacks tensors of the base model.
    """
    from transformers import AutoModelForMaskedLM

    model, report, missing = _load(AutoModelForMaskedLM, folder, {})
    decoder = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if decoder.weight is embedding or _name(model, "decoder.weight") in missing:
        decoder.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    decoder.weight.requires_grad_(False)
    model.config.tie_word_embeddings = False
    head = getattr(model, FAMILIES[report.model_type])
    biased = getattr(head, "predictions", head)
    decoder.bias = biased.bias  # one parameter, whatever the checkpoint said

    drawn = [name for name in missing if not name.endswith(("decoder.weight", "decoder.bias"))]
    _draw(model, drawn, seed)
    if drawn:
        report.drawn = drawn
        _warn(
            report,
            f"{folder} has no trained masked-language-model head ({len(drawn)} tensors missing): it is drawn from seed "
            f"{seed} and must be learnt, so language SFTs on this base are weaker than on one with its MLM head",
        )
    _freeze_layer_norms(model)
    report.parameters = _count(model)
    return model, report


def load_classifier(folder: Path, *, labels: Sequence[str], seed: int) -> tuple[Any, LoadReport]:
    """Load an encoder with a fresh classifier drawn from ``seed``.

    A BERT checkpoint without pooler gets one drawn from the seed; it is then part of the head (trained in full, kept
    with the SFT), not of M.

    Args:
        folder: model folder, see :func:`check_model_folder`.
        labels: label names; the index is the integer label.
        seed: decides the classifier, independently of torch's global generator.

    Returns:
        The model in float32 on the CPU, and the report.

    Raises:
        DeftxError: the folder is incomplete, the checkpoint lacks tensors of the base model, or fewer than two labels.
    """
    from transformers import AutoModelForSequenceClassification

    if len(labels) < 2:
        raise DeftxError(f"a classifier needs at least 2 labels, got {list(labels)}")
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    model, report, missing = _load(AutoModelForSequenceClassification, folder, names)
    pooler = [name for name in missing if ".pooler." in name]
    classifier = [name for name, _ in model.named_parameters() if name.startswith("classifier.")]
    report.drawn = sorted(pooler + classifier)
    _draw(model, report.drawn, seed)
    if pooler:
        report.pooler_in_head = True
        model.deftx_pooler_in_head = True
        report.warnings.append(f"{folder} has no pooler: it is drawn from seed {seed} and trained as part of the head")
    _freeze_layer_norms(model)
    report.parameters = _count(model)
    return model, report


def _load(auto: Any, folder: Path, options: Mapping[str, Any]) -> tuple[Any, LoadReport, list[str]]:
    config = check_model_folder(folder)
    with quiet_transformers():
        try:
            model, info = auto.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise DeftxError(f"the weights in {folder} cannot be read ({type(error).__name__}: {error})") from error
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in name)
    odd = sorted(str(entry[0]) for entry in info["mismatched_keys"] if not str(entry[0]).startswith("classifier."))
    if lost or odd:
        shown = ", ".join((lost + odd)[:5]) + (", ..." if len(lost + odd) > 5 else "")
        raise DeftxError(
            f"the checkpoint in {folder} does not fit its config.json: {len(lost)} base tensors missing, "
            f"{len(odd)} with another shape ({shown}); download the model again"
        )
    return model, LoadReport(config["model_type"]), sorted(info["missing_keys"])


def _name(model: Any, suffix: str) -> str:
    """Full name of the MLM head's tensor that ends with ``suffix``."""
    return next((n for n, _ in model.named_parameters(remove_duplicate=False) if n.endswith(suffix)), "")


def _draw(model: Any, names: Sequence[str], seed: int) -> None:
    scale = float(getattr(model.config, "initializer_range", 0.02))
    tensors = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in names:
            tensor = tensors[name]
            if name.endswith("bias"):
                tensor.zero_()
            elif "norm" in name.lower():
                tensor.fill_(1.0)
            else:
                digest = hashlib.sha256(f"head/{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def _freeze_layer_norms(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(False)


def _warn(report: LoadReport, message: str) -> None:
    report.warnings.append(message)
    if message not in _SAID:  # the stages of one SFT load the same folder several times
        _SAID.add(message)
        logger.warning(message)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _pooler_is_head(model: Any) -> bool:
    return bool(getattr(model, "deftx_pooler_in_head", False))


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return every parameter of the base encoder under the base model's own names, LayerNorm included.

    A pooler that was drawn (see :func:`load_classifier`) belongs to the head and is left out.
    """
    base = model.base_model
    found = dict(base.named_parameters())
    embedding = base.get_input_embeddings().weight
    if not any(parameter is embedding for parameter in found.values()):
        raise RuntimeError("the input embedding is not among the base model's parameters")
    if _pooler_is_head(model):
        found = {name: parameter for name, parameter in found.items() if not name.startswith("pooler.")}
    return found


def maskable_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return M: the base parameters an SFT may change (those that require gradients), by base names."""
    return {name: p for name, p in base_parameters(model).items() if p.requires_grad}


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the trained tensors of the head under the full model's names; never the frozen decoder copy."""
    base = {id(parameter) for parameter in base_parameters(model).values()}
    return {name: p for name, p in model.named_parameters() if id(p) not in base and p.requires_grad}


def base_fingerprint_of(model: Any) -> str:
    """Return the fingerprint of the base weights that MLM and classifier share (no pooler).

    Call it on a freshly loaded model, before any SFT is applied.
    """
    return fingerprint({name: p.detach() for name, p in base_parameters(model).items()})


def built_shapes(folder: Path, *, kind: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of M, LayerNorm left out, of the model transformers builds from ``config.json``.

    The model is built on the meta device: no weights. A pooler is among them where the architecture has one. What
    :func:`~deftx.training.model_folder.shapes_of` gives without transformers has to agree with it.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForMaskedLM if kind == "language" else AutoModelForSequenceClassification
    with quiet_transformers(), torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(str(folder), local_files_only=True))
    base = model.base_model.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in base if "LayerNorm" not in name}


def bert_config(settings: PretrainSettings, vocab_size: int, *, pad_token_id: int = 0) -> Any:
    """Return the ``BertConfig`` of an encoder that is pretrained here."""
    from transformers import BertConfig

    facts = bert_facts(settings, vocab_size, pad_token_id=pad_token_id)
    del facts["model_type"]
    return BertConfig(**facts)


def load_tokenizer(folder: Path) -> Any:
    """Load the folder's tokenizer, offline.

    Raises:
        DeftxError: it cannot be read, or has no mask or padding token.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise DeftxError(f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error})") from error
    lacking = [name for name in ("mask_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise DeftxError(f"the tokenizer in {folder} has no {' and no '.join(lacking)}; deftx needs both")
    return tokenizer


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pick what the encoder reads from a batch; a padding mask is given in the form that costs no look at its values.

    A batch without padding carries no mask: transformers would otherwise ask the device whether the mask is all
    ones, which waits for the GPU at every step.
    """
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        rows, length = mask.shape
        inputs["attention_mask"] = mask[:, None, None, :].expand(rows, 1, length, length)
    return inputs


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and bars inside the block; what matters is in :class:`LoadReport`."""
    from transformers.utils import logging

    library: Any = logging

    level = library.get_verbosity()
    bars = library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
