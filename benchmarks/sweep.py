"""A sweep of five ranks and four sparsities for one language: phases trained, times what a step of each costs.

The phases are counted in a real sweep of a tiny encoder through the stage cache, as ``deftx run --multirun`` does it:
the full phase knows neither rank nor K and is trained once. Plain trains both phases for every point. Steps cost what
``mlm_step`` measured at the chosen shape; all phases are taken to be equally long, denoising and selection are left out
(seconds a point beside hours).
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import mlm_step
from benchmarks.harness import Goal, Row, Run
from deftx.cache import StageCache, Workspace
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.data.settings import LanguageSettings
from deftx.stages.base import Base
from deftx.stages.execute import Results
from deftx.stages.learn import sft_nodes
from deftx.stages.node import node
from deftx.stages.objectives import LanguageObjective
from deftx.stages.settings import SFTSettings
from deftx.training.encoder import quiet_transformers
from deftx.training.pretrain import build_encoder, train_tokenizer
from deftx.training.settings import PretrainSettings, TrainerSettings, TrainingSettings
from deftx.training.shapes import shapes_of

RANKS = (1, 2, 3, 4, 6)
DENSITIES = (0.01, 0.03, 0.05, 0.1)
TINY = PretrainSettings(layers=1, hidden=16, heads=2, intermediate=32, vocab_size=200, positions=64)
SHORT = TrainingSettings(max_steps=2, batch_size=4, max_length=16)


def sentences(count: int, seed: int) -> list[str]:
    """Lines of 3 to 40 generated words, mostly short, as sentences are."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdgklmnprst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=min(40, 3 + int(draw.expovariate(1 / 12))))) for _ in range(count)]


class _Study:
    """What the nodes of an SFT read of a study."""

    seed = 0
    device = ""

    def __init__(self, threads: int) -> None:
        self.trainer = TrainerSettings(accelerator="cpu", threads=threads, progress=False)


def phases(root: Path, *, ranks: tuple[int, ...] = RANKS, densities: tuple[float, ...] = DENSITIES) -> Counter[str]:
    """Run a sweep of a tiny encoder and count the stages that were computed, by kind."""
    lines = sentences(120, 0)
    folder = root / "model"
    tokenizer = train_tokenizer(lines, TINY.vocab_size, folder)
    with quiet_transformers():
        build_encoder(TINY, len(tokenizer), seed=0).save_pretrained(str(folder))
    cache = StageCache(root / "cache")

    def write_text(work: Workspace, _: Any) -> None:
        (work.out / "train.txt").write_text("\n".join(lines[:100]) + "\n", encoding="utf-8")
        (work.out / "valid.txt").write_text("\n".join(lines[100:]) + "\n", encoding="utf-8")
        (work.out / "report.json").write_text("{}", encoding="utf-8")

    text = node("corpus", 1, {}, write_text, seed=0, label="generated")
    study: Any = _Study(torch.get_num_threads())
    shapes = shapes_of(folder, kind="language")
    base = Base(
        "tiny", "generated", folder, None, None, None, drawing=False, task_shapes=shapes, language_shapes=shapes
    )
    objective = LanguageObjective(study, base, LanguageSettings(code="qaa"), text, root / "tokens")
    results = Results(cache, lambda _: [])
    for rank in ranks:
        for density in densities:
            policies = {"rank": RankPolicy.parse(rank), "residual": ResidualPolicy()}
            results.of(sft_nodes(objective, SFTSettings(**policies, density=density, training=SHORT)).final)
    return Counter(entry.kind for entry in cache.entries())


def measure(run: Run) -> list[Row]:
    """Phases, and seconds of steps."""
    times = mlm_step.times(run)
    run.say("a sweep of a tiny encoder through the cache")
    with tempfile.TemporaryDirectory() as root:
        counted = phases(Path(root))
    points = len(RANKS) * len(DENSITIES)
    step = {
        (phase, side): statistics.median(times[phase][side]) for phase in mlm_step.PHASES for side in mlm_step.SIDES
    }
    ours = counted["full"] * step["full", "ours"] + counted["sparse"] * step["sparse", "ours"]
    plain = points * (step["full", "plain"] + step["sparse", "plain"])
    return [
        Row(
            f"sweep of {len(RANKS)} ranks × {len(DENSITIES)} sparsities: phases",
            counted["full"] + counted["sparse"],
            2 * points,
            "phases",
            quoted="40 → 21",
            note=f"computed in a real, tiny sweep: {', '.join(f'{n} {kind}' for kind, n in sorted(counted.items()))}",
            facts={"computed": dict(counted)},
        ),
        Row(
            "sweep: phases × seconds of a step",
            ours,
            plain,
            goals=(Goal("speedup", 4),),
            quoted="40 L → 21 cheaper L",
            note=f"for each step of a phase; {counted['full']} × {step['full', 'ours']:.3g} s + {counted['sparse']} × "
            f"{step['sparse', 'ours']:.3g} s beside {points} × ({step['full', 'plain']:.3g} + "
            f"{step['sparse', 'plain']:.3g} s)",
        ),
    ]
