"""Settings of the training room: how a phase trains, on what it runs, and what encoder it starts from.

Light dataclasses (standard library only), so that ``deftx --help`` can read them without torch. The defaults are
neutral; the papers' values live in ``conf/budget``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deftx.knobs import above, at_least, between, knob, one_of


@dataclass
class TrainingSettings:
    """How one SFT trains; the full and the sparse phase share it, only the L1 weight is each phase's own.

    Attributes:
        learning_rate: peak learning rate of AdamW; it decays linearly to zero over the phase.
        weight_decay: decoupled weight decay. 0 in the papers: anything else pulls to 0, not to θ⁰.
        batch_size: examples (MLM: blocks) per optimizer step, over all devices and accumulated batches.
        accumulate: batches one optimizer step is computed in; saves memory, same gradient within float tolerance.
        max_length: tokens per MLM block; for classification the length texts are truncated to.
        epochs: passes over the training data, before the clamp to min_steps and max_steps.
        min_steps: lower limit of optimizer steps (the data is repeated).
        max_steps: upper limit of optimizer steps, or None.
        eval_every: optimizer steps between validations, None validates after each epoch; always after the last step.
        clip_norm: largest gradient norm, over what is trained; 0 does not clip.
        l1_full: λ of the full phase, on the distance to the starting point.
        l1_sparse: λ of the sparse phase.
        mlm_probability: share of tokens the masked language model predicts.
        warmup_steps: steps of linear warm-up; 0 in the papers.
        length_buckets: classification: within every so many batches of shuffled rows, rows of like length go together,
            which saves padding and changes what a batch holds; 0 (the papers) leaves the order alone.
        log_every: optimizer steps between two records of the training loss.
    """

    learning_rate: float = knob(5e-5, above(0))
    weight_decay: float = knob(0.0, at_least(0))
    batch_size: int = knob(8, at_least(1))
    accumulate: int = knob(1, at_least(1))
    max_length: int = knob(256, at_least(8, " tokens"))
    epochs: int = knob(1, at_least(1))
    min_steps: int = knob(0, at_least(0))
    max_steps: int | None = knob(None, at_least(1, ", or null"))
    eval_every: int | None = knob(None, at_least(1, ", or null for each epoch"))
    clip_norm: float = knob(1.0, at_least(0))
    l1_full: float = knob(0.0, at_least(0), ignored_by={"sparse"})
    l1_sparse: float = knob(0.0, at_least(0), ignored_by={"full"})
    mlm_probability: float = knob(0.15, between(0, 1), ignored_by={"task"})
    warmup_steps: int = knob(0, at_least(0))
    length_buckets: int = knob(0, at_least(0), since=2, ignored_by={"language"})
    log_every: int = knob(50, at_least(1), ignored_by={"full", "sparse"})

    def conditions(self) -> list[str]:
        """What values must have in common."""
        if self.max_steps is None or self.max_steps >= self.min_steps:
            return []
        return [f"max_steps={self.max_steps}: must be at least min_steps ({self.min_steps})"]


_PRECISION = replace(
    one_of("32-true", "bf16-mixed"),
    sentence="must be 32-true or bf16-mixed; 16-mixed is not supported: its loss scaling changes the gradient norm "
    "that is clipped and skips steps",
)


@dataclass
class TrainerSettings:
    """What a phase runs on.

    Of these the precision is part of a stage's key, and where any dropout is drawn, the kind and number of devices that
    draw it. Threads and kernels change results by float rounding.

    Attributes:
        accelerator: ``auto`` (a GPU where there is one), ``cpu`` or ``gpu``.
        devices: number of devices of one training.
        precision: ``32-true`` or ``bf16-mixed``; parameters stay float32 in both.
        threads: CPU threads for torch; None leaves torch's choice.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        progress: show progress bars (on a terminal only).
        deterministic: ask torch for deterministic kernels.
        masked_logits: language modelling computes logits at the masked positions alone, and of a large vocabulary
            keeps none; off: at all positions.
        fused: the full phase's AdamW as one kernel; off: torch's loop over operations.
        sparse_gradients: the sparse phase gathers the selected gradients as backward makes them, an embedding's by the
            rows that occurred (CPU); off: dense gradients of every partly trained parameter.
        compile: compile the encoder with ``torch.compile``; needs a C++ compiler on the CPU.
        checkpointing: recompute a layer's activations in backward: less memory, about a third more arithmetic.
        profile: record where the time of a step goes (data, forward, head, backward, optimizer).
        checkpoint_minutes: minutes of training between two states that a killed phase resumes from, more where writing
            one would take over a twentieth of the time; 0 keeps one after every step, whatever it costs.
    """

    accelerator: str = knob("auto", one_of("auto", "cpu", "gpu"))
    devices: int = knob(1, at_least(1))
    precision: str = knob("32-true", _PRECISION)
    threads: int | None = knob(None, at_least(1, ", or null"))
    num_workers: int = knob(0, at_least(0))
    progress: bool = knob(True)
    deterministic: bool = knob(True)
    masked_logits: bool = knob(True)
    fused: bool = knob(True)
    sparse_gradients: bool = knob(True)
    compile: bool = knob(False)
    checkpointing: bool = knob(False)
    profile: bool = knob(False)
    checkpoint_minutes: float = knob(10.0, at_least(0))


@dataclass
class PretrainSettings:
    """A small BERT trained from scratch by masked language modelling on raw text of several languages.

    Attributes:
        layers: transformer layers.
        hidden: width; a multiple of ``heads``.
        heads: attention heads.
        intermediate: width of the feed-forward layers.
        vocab_size: size of the WordPiece vocabulary trained on the same text.
        positions: longest sequence the encoder accepts, in tokens.
        dropout: dropout of hidden states and attention.
        steps: optimizer steps.
        batch_size: blocks per optimizer step.
        max_length: tokens per block.
        learning_rate: peak learning rate.
        warmup: share of the steps with linear warm-up.
        weight_decay: decoupled weight decay.
        eval_every: optimizer steps between validations, None validates after each epoch.
        valid_fraction: share of the lines held out for validation. What ``corpus.valid_fraction`` holds out for
            language SFTs is held out here, too, if that is more.
        mlm_probability: share of tokens to predict.
        lowercase: fold case in the tokenizer.
    """

    layers: int = knob(2, at_least(1))
    hidden: int = knob(128, at_least(1))
    heads: int = knob(2, at_least(1))
    intermediate: int = knob(512, at_least(1))
    vocab_size: int = knob(8000, at_least(32))
    positions: int = knob(512)
    dropout: float = knob(0.1, between(0, 1, "[)"))
    steps: int = knob(1000, at_least(1))
    batch_size: int = knob(32, at_least(1))
    max_length: int = knob(128, at_least(8, " tokens"))
    learning_rate: float = knob(1e-3)
    warmup: float = knob(0.1, between(0, 1, "[)"))
    weight_decay: float = knob(0.01)
    eval_every: int | None = knob(None)
    valid_fraction: float = knob(0.02, between(0, 1))
    mlm_probability: float = knob(0.15, between(0, 1))
    lowercase: bool = knob(False)

    def conditions(self) -> list[str]:
        """What values must have in common."""
        messages = []
        if self.heads >= 1 and self.hidden % self.heads:
            messages.append(f"hidden={self.hidden}: must be a multiple of heads ({self.heads})")
        if self.max_length > self.positions:
            messages.append(f"max_length={self.max_length}: must be at most positions ({self.positions})")
        return messages


@dataclass
class ModelSettings:
    """Where the base encoder comes from: a local folder, a hub id, or a pretraining of our own.

    Attributes:
        name: short name, for tables and W&B.
        path: local folder with ``config.json``, ``model.safetensors`` and tokenizer files; wins over ``hub``.
        hub: model id on the hub.
        revision: commit or branch on the hub.
        pretrain: shape and budget of a small encoder trained here on ``languages``; null for a pretrained one.
        languages: languages the encoder is pretrained on.
        vocabulary: further languages whose text the tokenizer sees; the encoder does not. Multilingual vocabularies
            cover languages that their encoder has hardly met, too.
        seed: seed of that pretraining. A base is given, like a download: it does not move with the run's seed.
    """

    name: str = knob("local")
    path: str | None = knob(None)
    hub: str | None = knob(None)
    revision: str | None = knob(None)
    pretrain: PretrainSettings | None = knob(None)
    languages: list[str] = knob([])
    vocabulary: list[str] = knob([])
    seed: int = knob(0)

    @property
    def pretrained_here(self) -> PretrainSettings | None:
        """Shape and budget of an encoder that this study pretrains; None where the model is given."""
        return self.pretrain if self.path is None else None
