"""Settings of the training room: how a phase trains, on what it runs, and how a small encoder is pretrained.

Light dataclasses (standard library only), so that ``deftx --help`` can read them without torch. The defaults are
neutral; the papers' values live in ``conf/budget``.
"""

from __future__ import annotations

from dataclasses import dataclass

from deftx.errors import DeftxError

ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("32-true", "bf16-mixed")


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

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 256
    epochs: int = 1
    min_steps: int = 0
    max_steps: int | None = None
    eval_every: int | None = None
    clip_norm: float = 1.0
    l1_full: float = 0.0
    l1_sparse: float = 0.0
    mlm_probability: float = 0.15
    warmup_steps: int = 0
    length_buckets: int = 0
    log_every: int = 50

    def problems(self) -> list[str]:
        """Return one sentence for each value out of its range; empty when all is well."""
        found = []
        for name in ("batch_size", "accumulate", "epochs", "log_every"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_length < 8:
            found.append(f"max_length is {self.max_length}; it must be at least 8 tokens")
        steps = ("min_steps", "warmup_steps", "length_buckets")
        for name in ("weight_decay", "clip_norm", "l1_full", "l1_sparse", *steps):
            if not getattr(self, name) >= 0:
                found.append(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.learning_rate > 0:
            found.append(f"learning_rate is {self.learning_rate}; it must be positive")
        if not 0 < self.mlm_probability < 1:
            found.append(f"mlm_probability is {self.mlm_probability}; it must lie between 0 and 1")
        if self.max_steps is not None and self.max_steps < max(1, self.min_steps):
            found.append(
                f"max_steps is {self.max_steps}; it must be at least 1 and at least min_steps ({self.min_steps})"
            )
        if self.eval_every is not None and self.eval_every < 1:
            found.append(f"eval_every is {self.eval_every}; it must be at least 1, or null for each epoch")
        return found


@dataclass
class TrainerSettings:
    """What a phase runs on.

    Only the precision is part of a stage's key: device, threads and kernels change results by float rounding.

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

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    threads: int | None = None
    num_workers: int = 0
    progress: bool = True
    deterministic: bool = True
    masked_logits: bool = True
    fused: bool = True
    sparse_gradients: bool = True
    compile: bool = False
    checkpointing: bool = False
    profile: bool = False
    checkpoint_minutes: float = 10.0

    def problems(self) -> list[str]:
        """Return one sentence for each value that cannot work; empty when all is well."""
        found = []
        if self.accelerator not in ACCELERATORS:
            found.append(f"accelerator is {self.accelerator!r}; available: {', '.join(ACCELERATORS)}")
        if self.precision == "16-mixed":
            found.append(
                "precision 16-mixed is not supported: its loss scaling changes the gradient norm that is clipped "
                "and skips steps; use bf16-mixed or 32-true"
            )
        elif self.precision not in PRECISIONS:
            found.append(f"precision is {self.precision!r}; available: {', '.join(PRECISIONS)}")
        for name, lowest in (("devices", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                found.append(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.threads is not None and self.threads < 1:
            found.append(f"threads is {self.threads}; it must be at least 1, or null")
        if not self.checkpoint_minutes >= 0:
            found.append(f"checkpoint_minutes is {self.checkpoint_minutes}; it must not be negative")
        return found


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
        valid_fraction: share of the lines held out for validation.
        mlm_probability: share of tokens to predict.
        lowercase: fold case in the tokenizer.
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 2
    intermediate: int = 512
    vocab_size: int = 8000
    positions: int = 512
    dropout: float = 0.1
    steps: int = 1000
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    eval_every: int | None = None
    valid_fraction: float = 0.02
    mlm_probability: float = 0.15
    lowercase: bool = False

    def problems(self) -> list[str]:
        """Return one sentence for each value out of its range; empty when all is well."""
        found = []
        for name in ("layers", "hidden", "heads", "intermediate", "steps", "batch_size"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads >= 1 and self.hidden % self.heads:
            found.append(f"hidden is {self.hidden}; it must be a multiple of heads ({self.heads})")
        if self.vocab_size < 32:
            found.append(f"vocab_size is {self.vocab_size}; it must be at least 32")
        if not 8 <= self.max_length <= self.positions:
            found.append(f"max_length is {self.max_length}; it must lie between 8 and positions ({self.positions})")
        for name in ("valid_fraction", "mlm_probability"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        return found


def refuse(settings: TrainingSettings | TrainerSettings | PretrainSettings) -> None:
    """Raise one :class:`DeftxError` that lists every problem of ``settings``; silent when there is none.

    Raises:
        DeftxError: a value is out of its range.
    """
    problems = settings.problems()
    if problems:
        raise DeftxError("\n".join(problems))
