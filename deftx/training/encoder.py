"""Pretrained encoders: load, untie, freeze, and name their parameters.

An encoder's parts are found by the structure of the model, never by a family's names: the base by
``base_model_prefix``, the embedding and the decoder by transformers' accessors, norms by their class, the pooler as
what only a classifier's base has, and the head as what lies outside the base.

What may change (M) is keyed by the *base model's own names*, never by the training model's: in transformers 5
``XLMRobertaForMaskedLM`` reports its tied embedding as ``lm_head.decoder.weight``, and an SFT with that key would
change nothing in a classifier. The output embedding becomes a frozen clone of the input embedding after loading
(``tie_word_embeddings=False`` at load would leave it random). Every norm of the base is frozen; in a head those called
``LayerNorm`` are, as in the reference (so XLM-R's ``lm_head.layer_norm`` trains). A head the checkpoint lacks is drawn
from the seed alone.

Source: the reference code of LT-SFT (Ansell et al., ACL 2022), ``cambridgeltl/composable-sft``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deftx.core.delta import fingerprint
from deftx.errors import DeftxError
from deftx.seeds import seed_of
from deftx.training.model_folder import (
    BUFFERS,
    bert_facts,
    check_model_folder,
    read_config,
    refuse_misfit,
    weight_files,
)
from deftx.training.settings import PretrainSettings

logger = logging.getLogger(__name__)
_SAID: set[str] = set()


@dataclass
class LoadReport:
    """What loading found: which head tensors were drawn instead of read.

    Attributes:
        drawn: full names of the head tensors drawn from the seed.
        pooler_in_head: a BERT checkpoint without pooler: the pooler is drawn and counts as head, not as M.
        parameters: P, all parameters of the training model, the frozen decoder copy included.
        warnings: sentences a user should see, also logged.
    """

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

    model, report, missing = _load(AutoModelForMaskedLM, folder)
    drawn = untie(model, missing)
    _draw(model, drawn, seed)
    if drawn:
        report.drawn = drawn
        _warn(
            report,
            f"{folder} has no trained masked-language-model head ({len(drawn)} tensors missing): it is drawn from seed "
            f"{seed} and must be learnt, so language SFTs on this base are weaker than on one with its MLM head",
        )
    _freeze_norms(model)
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
    model, report, missing = _load(AutoModelForSequenceClassification, folder, fresh_head=names)
    report.drawn = sorted({*missing, *_outside_base(model)})
    _draw(model, report.drawn, seed)
    if report.pooler_in_head:
        report.warnings.append(f"{folder} has no pooler: it is drawn from seed {seed} and trained as part of the head")
    _freeze_norms(model)
    report.parameters = _count(model)
    return model, report


HEADS = {"sequence": load_classifier}
"""How an encoder is loaded with the head of a task: ``sequence`` gives a row one label."""


def _load(auto: Any, folder: Path, *, fresh_head: Mapping[str, Any] | None = None) -> tuple[Any, LoadReport, list[str]]:
    """Load a model; also return full names of the tensors its checkpoint lacks, a pooler's or some outside the base.

    ``fresh_head`` holds options of the configuration for a head that the caller draws, whatever the checkpoint has.
    """
    check_model_folder(folder)
    with quiet_transformers():
        try:
            model, info = auto.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=not any(path.suffix == ".bin" for path in weight_files(folder)),
                weights_only=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **(fresh_head or {}),
            )
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise DeftxError(f"the weights in {folder} cannot be read ({type(error).__name__}: {error})") from error
    prefix = f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    report = LoadReport()
    absent = [name for name in missing if name.startswith(prefix)]
    if absent:
        pooler = _pooler(model)
        absent = [name for name in absent if name.removeprefix(prefix) not in pooler]
        report.pooler_in_head = True
        model.deftx_drawn_pooler = pooler
    # Of what no model uses, heads and buffers are others' business; the rest is a part of this encoder.
    unused = sorted(
        name for name in info["unexpected_keys"] if name.removeprefix(prefix).startswith(("encoder.", "embeddings."))
    )
    unused = [name for name in unused if not name.endswith(BUFFERS)]
    if unused:
        raise DeftxError(
            f"the checkpoint in {folder} has {len(unused)} tensors of the encoder that config.json has no place for "
            f"({', '.join(unused[:3])}); download the model again"
        )
    infinite = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    infinite = [name for name in infinite if name not in missing]
    if infinite:
        raise DeftxError(
            f"the checkpoint in {folder} has {len(infinite)} tensors with NaN or infinite numbers "
            f"({', '.join(infinite[:3])}); download the model again"
        )
    odd = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if fresh_head is not None:
        odd = [name for name in odd if name.startswith(prefix)]
    if absent or odd:
        shown = ", ".join((absent + odd)[:5]) + (", ..." if len(absent + odd) > 5 else "")
        raise DeftxError(
            f"the checkpoint in {folder} does not fit its config.json: {len(absent)} base tensors missing, "
            f"{len(odd)} with another shape ({shown}); download the model again"
        )
    return model, report, missing


def _pooler(model: Any) -> frozenset[str]:
    """Return base names of the parameters that the same encoder lacks under a masked language model."""
    from transformers import AutoModelForMaskedLM

    shared = {name for name, _ in _without_weights(AutoModelForMaskedLM, model.config).base_model.named_parameters()}
    return frozenset(name for name, _ in model.base_model.named_parameters() if name not in shared)


def _without_weights(auto: Any, config: Any) -> Any:
    """Return the model that transformers builds from a configuration, on the meta device."""
    with quiet_transformers(), torch.device("meta"):
        return auto.from_config(copy.deepcopy(config))


def untie(model: Any, missing: Sequence[str] = ()) -> list[str]:
    """Freeze the decoder; one that shares the embedding's storage or is missing becomes a clone of the embedding.

    Args:
        model: A transformers model with output embeddings.
        missing: Full names of tensors that its checkpoint lacks.

    Returns:
        The missing tensors that still have to be drawn.
    """
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    path = next(name for name, module in model.named_modules() if module is decoder)
    filled = set()
    if decoder.weight.data_ptr() == embedding.data_ptr() or f"{path}.weight" in missing:
        decoder.weight = nn.Parameter(embedding.detach().clone())
        filled.add(f"{path}.weight")
    decoder.weight.requires_grad_(False)
    model.config.tie_word_embeddings = False
    # A bias beside the decoder and the decoder's own are one parameter, whatever the checkpoint said.
    bias = getattr(model.get_submodule(path.rpartition(".")[0]), "bias", None)
    if decoder.bias is not None and bias is not None:
        decoder.bias = bias
        filled.add(f"{path}.bias")
    return [name for name in missing if name not in filled]


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
                generator = torch.Generator().manual_seed(seed_of("head", seed, name))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def _freeze_norms(model: Any) -> None:
    heads = _outside_base(model)
    frozen = [*norm_parameters(model.base_model), *(p for name, p in heads.items() if "LayerNorm" in name)]
    for parameter in frozen:
        parameter.requires_grad_(False)


def norm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of every normalisation layer inside a module.

    Each family names these layers differently, but their classes are named alike. A norm is a module without children
    whose class, or one it inherits from, has ``Norm`` in its name: ``LayerNorm``, ``RMSNorm``, ``EuroBertRMSNorm``.
    """
    norms = (
        part
        for part in module.modules()
        if next(part.children(), None) is None and any("Norm" in kind.__name__ for kind in type(part).__mro__)
    )
    return [parameter for norm in norms for parameter in norm.parameters()]


def _outside_base(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters outside the base by full names: the head and, untied, the decoder."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in base}


def _warn(report: LoadReport, message: str) -> None:
    report.warnings.append(message)
    if message not in _SAID:  # the stages of one SFT load the same folder several times
        _SAID.add(message)
        logger.warning(message)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return every parameter of the base encoder under the base model's own names, norms included.

    A pooler that was drawn (see :func:`load_classifier`) belongs to the head and is left out.
    """
    base = model.base_model
    parameters = dict(base.named_parameters())
    embedding = base.get_input_embeddings().weight
    if not any(parameter is embedding for parameter in parameters.values()):
        raise RuntimeError("the input embedding is not among the base model's parameters")
    drawn: frozenset[str] = getattr(model, "deftx_drawn_pooler", frozenset())
    return {name: parameter for name, parameter in parameters.items() if name not in drawn}


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
    """Return names and shapes of the base without its norms, of the model transformers builds from ``config.json``.

    The model is built on the meta device: no weights. A pooler is among them where the architecture has one. What
    :func:`~deftx.training.shapes.shapes_of` gives without transformers has to agree with it.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForMaskedLM if kind == "language" else AutoModelForSequenceClassification
    with quiet_transformers():
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    base = _without_weights(auto, config).base_model
    norms = {id(parameter) for parameter in norm_parameters(base)}
    return {name: tuple(p.shape) for name, p in base.named_parameters() if id(p) not in norms}


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits that a masked language model's head computes from hidden states.

    The head is whatever lies outside the base, one module or several. Only the model's own forward knows how these are
    chained, so that forward runs, and the encoder in it is replaced by one that returns ``hidden``.

    Args:
        model: a masked language model.
        hidden: float [..., H], hidden states of any tokens.

    Returns:
        Logits, float [..., vocabulary].
    """
    base = model.base_model
    setattr(model, model.base_model_prefix, _Encoded(hidden))
    try:
        logits: Tensor = model().logits
    finally:
        setattr(model, model.base_model_prefix, base)
    return logits


class _Encoded(nn.Module):
    """Replaces an encoder whose output is already known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.hidden)


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
            why = _sentencepiece_alone(folder) or f" ({type(error).__name__}: {error})"
            raise DeftxError(f"the tokenizer in {folder} cannot be read{why}") from error
    lacking = [name for name in ("mask_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise DeftxError(f"the tokenizer in {folder} has no {' and no '.join(lacking)}; deftx needs both")
    segments = tokenizer("a", "b").get("token_type_ids") or [0]
    refuse_misfit(
        folder,
        read_config(folder),
        highest=len(tokenizer) - 1,
        pad=tokenizer.pad_token_id,
        segments=max(segments) + 1,
    )
    return tokenizer


def _sentencepiece_alone(folder: Path) -> str:
    """Return what to do about a tokenizer that is there as a SentencePiece model alone; for others an empty text."""
    models = sorted(path.name for path in folder.glob("*.model"))
    if (folder / "tokenizer.json").is_file() or not models:
        return ""
    lacking = [name for name in ("sentencepiece", "google.protobuf") if importlib.util.find_spec(name) is None]
    packages = " ".join(name.removeprefix("google.") for name in lacking)
    install = f"install {packages} (pip install {packages}), or " if lacking else ""
    return (
        f": {models[0]} is a SentencePiece model without tokenizer.json: {install}save the tokenizer where it loads: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
    )


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
