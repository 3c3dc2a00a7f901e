"""The main job, from the command line: one run, the same run again, a sweep, single SFTs, evaluation, pretraining."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score
from small_study import SMALL, Command

FEW = ("language=qba", "compare=[]", "controls=[]")


def scores(result: dict) -> dict[tuple[str, str, str], float]:
    return {(row["language"], row["condition"], row["metric"]): row["value"] for row in result["metrics"]}


def test_a_run_evaluates_every_target_under_every_condition(deftx: Command) -> None:
    outcome = deftx("run")
    assert outcome.status == 0, outcome.err
    result = outcome.result()
    assert result["status"] == "done"
    conditions = {"no_language_sft", "source_sft", "other_language_sft", "ltsft", "deftx"}
    found = scores(result)
    assert set(found) == {(la, co, me) for la in ("qba", "qbb") for co in conditions for me in ("macro_f1", "accuracy")}
    assert {row["n"] for row in result["metrics"]} == {30}
    assert "LT-SFT" in outcome.out
    assert "DeFT-X" in outcome.out
    assert "result.json" in outcome.out
    # Scores are recomputed from the published predictions by another library.
    run = next(outcome.folder.rglob("predictions.parquet"))
    frame = pd.read_parquet(run)
    for (language, condition, metric), value in found.items():
        rows = frame[(frame["language"] == language) & (frame["condition"] == condition)]
        again = []
        for _, part in rows.groupby("variant"):
            if metric == "accuracy":
                again.append(accuracy_score(part["label"], part["prediction"]))
            else:
                again.append(f1_score(part["label"], part["prediction"], average="macro"))
        assert value == pytest.approx(sum(again) / len(again), abs=1e-6)
    diagnostics = pd.read_parquet(run.with_name("diagnostics.parquet"))
    assert set(diagnostics["what"]) == {"sft", "pair"}
    counts = diagnostics[diagnostics["what"] == "sft"].groupby("sft")["selected"].sum()
    assert (counts > 0).all()


def test_the_same_run_again_computes_nothing_and_gives_the_same(deftx: Command) -> None:
    first = deftx("run")
    again = deftx("run")
    assert again.status == 0, again.err
    assert {stage["outcome"] for stage in again.result()["stages"]} == {"cached"}
    assert scores(again.result()) == scores(first.result())


def test_a_rank_sweep_trains_each_full_phase_once(deftx: Command, tmp_path: Path) -> None:
    outcome = deftx(
        "run",
        "experiment=rank_ablation",
        "hydra.sweeper.params.rank='2,energy:0.9,gavish_donoho,none'",
        cache=tmp_path / "c",
    )
    assert outcome.status == 0, outcome.err
    runs = outcome.runs()
    assert sorted(str(run["settings"]["rank"]) for run in runs) == ["2", "None", "energy:0.9", "gavish_donoho"]
    computed = Counter(
        (stage["kind"], stage["label"]) for run in runs for stage in run["stages"] if stage["outcome"] == "computed"
    )
    full = {label: count for (kind, label), count in computed.items() if kind == "full"}
    assert full == {"language qaa": 1, "language qba": 1, "language qbb": 1, "task on θ⁰+qaa": 1}
    decompositions = [count for (kind, _), count in computed.items() if kind == "decompose"]
    assert decompositions == [1, 1, 1, 1]


def test_a_failed_job_does_not_stop_the_sweep(deftx: Command, tmp_path: Path) -> None:
    # The learning rate is legal, the loss is not finite: only a run can find that out.
    outcome = deftx(
        "run",
        "-m",
        "compare=[]",
        "controls=[]",
        "language=qba",
        "lang.training.learning_rate=1e38,1e-3",
        cache=tmp_path / "c",
    )
    assert outcome.status == 1
    assert Counter(run["status"] for run in outcome.runs()) == {"done": 1, "failed": 1}
    assert "step" in outcome.err
    assert "1 of 2 jobs" in outcome.err


def read_bits(cache: Path) -> dict[str, bytes]:
    """The bytes of every SFT and of every prediction, by stage kind and key."""
    files = [*cache.glob("sparse/*/sft/sft.safetensors"), *cache.glob("evaluate/*/predictions.parquet")]
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(files)}


@pytest.mark.slow
def test_two_processes_with_one_seed_give_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, bytes]:
        places = [f"paths.cache={tmp_path / name}", f"paths.output={tmp_path / 'out'}"]
        few = ["language=qba", "compare=[]", "controls=[]"]
        command = [sys.executable, "-m", "deftx", "run", *SMALL, *places, *few, f"seed={seed}"]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        return read_bits(tmp_path / name)

    one, two, other = run("one", 7), run("two", 7), run("other", 8)
    assert len(one) == 4
    assert one == two
    assert not set(one) & set(other)
    assert not set(one.values()) & set(other.values())


def test_single_sfts_evaluate_as_in_the_run(deftx: Command, tmp_path: Path) -> None:
    composed = scores(deftx("run").result())
    assert deftx("sft", "kind=language", "language=qba", f"out={tmp_path / 'language'}").status == 0
    assert deftx("sft", "kind=task", f"out={tmp_path / 'task'}").status == 0
    assert (tmp_path / "task" / "README.md").is_file()
    evaluated = deftx(
        "eval", "language=qba", f"task_sft={tmp_path / 'task'}", f"language_sft.qba={tmp_path / 'language'}"
    )
    assert evaluated.status == 0, evaluated.err
    found = scores(evaluated.result())
    assert found["qba", "composed", "macro_f1"] == composed["qba", "deftx", "macro_f1"]
    again = deftx("sft", "kind=task", f"out={tmp_path / 'task'}")
    assert again.status == 1
    assert "not empty" in again.err


def test_pretraining_on_own_text_gives_a_usable_model(deftx: Command, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"the {n} small cats saw {n * 7} large dogs near house number {n % 13}\n" for n in range(400))
    )
    model = tmp_path / "model"
    outcome = deftx("pretrain", f"text=[{text}]", f"out={model}")
    assert outcome.status == 0, outcome.err
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    local = [item for item in SMALL if not item.startswith("model.")]
    used = deftx("run", *local, f"model.path={model}", "model=local", *FEW, small=False)
    assert used.status == 0, used.err


def test_a_target_without_text_is_skipped_on_request_only(deftx: Command) -> None:
    missing = "language.qbb.text=[nowhere.txt]"
    refused = deftx("run", missing)
    assert refused.status == 1
    assert "nowhere.txt" in refused.err


def test_the_result_names_the_split(deftx: Command) -> None:
    result = deftx("run").result()
    assert {row["split"] for row in result["metrics"]} == {"test"}
    assert json.dumps(result)
