"""A search over knobs with Optuna, judged by what is known without target labels.

A trial trains the SFTs a run would compose and evaluates nothing on a target: its objective is the task SFT's score on
the source language's validation rows, or the mean masked-language-modelling loss of the targets' φ_L on their own
held-out text. Choosing by a target's labels would be no zero-shot result any more (docs/method.md). The best trial is
then run and evaluated, once.

Trials are jobs like any other: they share full phases through the stage cache, the launcher runs several at a time, and
one that failed is told to Optuna as failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deftx.errors import DeftxError
from deftx.jobs import JobEnd
from deftx.launch import TaskFailure
from deftx.search import OBJECTIVES, SearchSettings, override

if TYPE_CHECKING:
    import optuna


def search(
    settings: SearchSettings,
    folder: Path,
    run: Callable[[Sequence[Sequence[str]]], Sequence[JobEnd | TaskFailure]],
    *,
    at_once: int = 1,
) -> list[str]:
    """Run the trials.

    Args:
        settings: What is searched for.
        folder: ``trials.csv`` goes here.
        run: Runs jobs with these overrides on top of the study's, and says how each ended.
        at_once: Trials proposed together.

    Returns:
        Overrides of the best trial.

    Raises:
        DeftxError: Every trial failed.
    """
    try:
        import optuna
    except ImportError as error:
        raise DeftxError("a search needs Optuna: pip install 'deftx[search]'") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind, direction = OBJECTIVES[settings.objective]
    study = optuna.create_study(
        direction=optuna.study.StudyDirection[direction.upper()],
        sampler=optuna.samplers.TPESampler(seed=settings.sampler_seed, constant_liar=at_once > 1),
    )
    reasons: list[str] = []
    while len(study.trials) < settings.trials:
        trials = [study.ask() for _ in range(min(at_once, settings.trials - len(study.trials)))]
        proposals = [_propose(trial, settings.space) for trial in trials]
        for trial, proposal, end in zip(trials, proposals, run(proposals), strict=True):
            reason = str(end) if isinstance(end, TaskFailure) else end.error
            value = None if isinstance(end, TaskFailure) or reason else _value(end, kind)
            if value is None:
                reasons.append(reason or "no SFT was judged")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, value)
            outcome = f"{value:.4f}" if value is not None else f"failed: {reasons[-1]}"
            print(f"trial {trial.number + 1} of {settings.trials}: {' '.join(proposal)}: {outcome}", flush=True)
        study.trials_dataframe().to_csv(folder / "trials.csv", index=False)
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not finished:
        raise DeftxError("every trial of the search failed\n" + "\n".join(dict.fromkeys(reasons)))
    best = study.best_trial
    chosen = [override(knob, value) for knob, value in best.params.items()]
    print(f"best of {len(finished)} trials by {settings.objective}: {' '.join(chosen)} ({best.value:.4f})", flush=True)
    return chosen


def _propose(trial: optuna.Trial, space: Mapping[str, Any]) -> list[str]:
    overrides = []
    for knob, values in space.items():
        if isinstance(values, Mapping):
            low, high, log = values["low"], values["high"], bool(values.get("log"))
            whole = isinstance(low, int) and isinstance(high, int)
            suggest: Any = trial.suggest_int if whole else trial.suggest_float
            steps = {"step": values["step"]} if values.get("step") else {}
            overrides.append(override(knob, suggest(knob, low, high, log=log, **steps)))
        else:
            overrides.append(override(knob, trial.suggest_categorical(knob, list(values))))
    return overrides


def _value(end: JobEnd, kind: str) -> float | None:
    """Return mean score of the judged SFTs; φ_S under a task SFT, of the other kind, is not."""
    values = end.sfts.get(kind)
    return math.fsum(values) / len(values) if values else None
