"""The main job, from the command line: one run, the same run again, a sweep, single SFTs, evaluation, pretraining."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
from small_study import FEW, SMALL, Command, own_rows

from deftx.core.delta import SparseDelta
from deftx.training.fit import fit_phase


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


def test_a_run_that_finds_everything_in_the_cache_loads_no_heavy_library(
    deftx: Command, shared_cache: Path, tmp_path: Path
) -> None:
    first = deftx("run")
    assert first.status == 0, first.err
    arguments = ["run", *SMALL, f"paths.cache={shared_cache}", f"paths.output={tmp_path / 'again'}"]
    heavy = {"torch", "transformers", "tokenizers", "pytorch_lightning", "torchmetrics", "datasets", "scipy", "wandb"}
    code = (
        "import sys\nfrom deftx.cli import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit as stop: print(stop.code, sorted({heavy!r} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert ended.stdout.splitlines()[-1] == "0 []", ended.stderr
    assert re.search(r"note: 0 stages computed, \d+ from the cache, \d+ s; imports took \d+ s", ended.stdout)
    (place,) = (tmp_path / "again").rglob("result.json")
    again = json.loads(place.read_text())
    assert again["provenance"]["threads"] == 1
    assert again["times"]["imports"] > 0
    assert scores(again) == scores(first.result())
    before = next(first.folder.rglob("diagnostics.parquet"))
    pd.testing.assert_frame_equal(pd.read_parquet(before), pd.read_parquet(place.with_name(before.name)))


@pytest.mark.parametrize(
    ("condition", "variant", "task", "language"),
    [
        ("deftx", "", "task on θ⁰+qaa deftx", "language qba deftx"),
        ("ltsft", "", "task on θ⁰+qaa ltsft", "language qba ltsft"),
        ("no_language_sft", "", "task on θ⁰ deftx", None),
        ("source_sft", "", "task on θ⁰+qaa deftx", "language qaa deftx"),
        ("other_language_sft", "qbb", "task on θ⁰+qaa deftx", "language qbb deftx"),
    ],
)
def test_predictions_are_those_of_the_sum_written_out(
    deftx: Command, shared_cache: Path, condition: str, variant: str, task: str, language: str | None
) -> None:
    outcome = deftx("run")
    stages = outcome.result()["stages"]

    def entry(kind: str, name: str = "") -> Path:
        (key,) = {s["key"] for s in stages if s["kind"] == kind and f"{s['label']} ".startswith(f"{name} ".lstrip())}
        return shared_cache / kind / key[:16]

    def folder(name: str) -> Path:
        return entry("sparse", name) / "sft"

    base = entry("pretrain") / "model"

    # θ⁰ + φ_T + φ_L, one coordinate after the other in float64, and the classifier as transformers builds it.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    sum_of = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name in filter(None, (task, language)):
        delta = SparseDelta.load(folder(name))
        for parameter, index in delta.indices.items():
            flat = sum_of[f"bert.{parameter}"].view(-1)
            for position, value in zip(index.tolist(), delta.values[parameter].tolist(), strict=True):
                flat[position] += value
    sum_of |= SparseDelta.load(folder(task)).head
    model.load_state_dict({name: tensor.float() for name, tensor in sum_of.items()})
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    frame = pd.read_parquet(next(outcome.folder.rglob("predictions.parquet")))
    chosen = (frame["language"] == "qba") & (frame["condition"] == condition) & (frame["variant"] == variant)
    published = frame[chosen].set_index("id")
    texts = pd.read_csv(entry("family") / "family/sentiment/qba/test.tsv", sep="\t")
    assert len(published) == len(texts) == 30
    with torch.inference_mode():
        for number, text in enumerate(texts["text"], 1):
            row = published.loc[str(texts["id"][number - 1] if "id" in texts else number)]
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).logits[0]
            expected = [row[f"score_{label}"] for label in ("negative", "neutral", "positive")]
            assert logits.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_result_says_of_each_cell_what_was_composed(deftx: Command, shared_cache: Path) -> None:
    outcome = deftx("run", "density=0.2")
    result = outcome.result()
    sfts = {sft["key"]: sft for sft in result["sfts"]}
    assert len(result["cells"]) == 10
    for cell in result["cells"]:
        manifest = json.loads((shared_cache / "evaluate" / cell["key"][:16] / "manifest.json").read_text())
        keys = {term["kind"]: term["key"] for term in cell["terms"]}
        assert keys == {kind: manifest["inputs"][kind] for kind in ("task", "language") if kind in manifest["inputs"]}
        for term in cell["terms"]:
            assert term == {name: sfts[term["key"]][name] for name in term}
        own = cell["condition"] if cell["condition"] in ("deftx", "ltsft") else "deftx"
        assert {cell["method"], *(term["method"] for term in cell["terms"])} == {own}
    deftx_, ltsft = (
        next(cell for cell in result["cells"] if (cell["language"], cell["condition"]) == ("qbb", condition))["terms"]
        for condition in ("deftx", "ltsft")
    )
    assert [(term["kind"], term["languages"], term["task"]) for term in deftx_] == [
        ("task", ["qaa"], "synthetic"),
        ("language", ["qbb"], None),
    ]
    assert {(term["rank"], term["residual"], term["density"]) for term in deftx_} == {("energy:0.9", "prune:0.05", 0.2)}
    assert {(term["rank"], term["residual"], term["density"]) for term in ltsft} == {(None, None, 0.2)}
    assert {term["base"] for term in deftx_} == {result["fingerprints"]["base"]}
    # φ_T was trained on θ⁰ + φ_S, the control's on θ⁰.
    (under,) = deftx_[0]["on"]
    assert (sfts[under]["languages"], sfts[under]["density"]) == (["qaa"], 0.2)  # as the language SFTs are
    (alone,) = {cell["terms"][0]["key"] for cell in result["cells"] if cell["condition"] == "no_language_sft"}
    assert sfts[alone]["on"] == []
    frame = pd.read_parquet(next(outcome.folder.rglob("diagnostics.parquet")))
    assert set(frame["key"]) == set(sfts)
    pairs = set(frame[frame["what"] == "pair"][["key", "other_key"]].itertuples(index=False, name=None))
    composed = [tuple(term["key"] for term in cell["terms"]) for cell in result["cells"]]
    assert pairs == {keys for keys in composed if len(keys) == 2}


def test_the_same_run_again_computes_nothing_and_gives_the_same(deftx: Command) -> None:
    first = deftx("run")
    again = deftx("run")
    assert again.status == 0, again.err
    assert {stage["outcome"] for stage in again.result()["stages"]} == {"cached"}
    assert scores(again.result()) == scores(first.result())


def test_a_rank_sweep_trains_each_full_phase_once(
    deftx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: dict[str, list[int]] = {}

    def spy(*arguments: Any, **options: Any) -> Any:
        fits.setdefault(options["label"].replace(" ltsft", " deftx"), []).append(options["seed"])
        return fit_phase(*arguments, **options)

    monkeypatch.setattr("deftx.training.fit.fit_phase", spy)
    outcome = deftx(
        "run",
        "experiment=rank_ablation",
        "seed=0",
        "hydra.sweeper.params.rank='2,energy:0.9,gavish_donoho,none'",
        cache=tmp_path / "c",
    )
    assert outcome.status == 0, outcome.err
    runs = outcome.runs()
    ranks = sorted(str(run["settings"]["rank"]) for run in runs if run["job_type"] == "run")
    assert ranks == ["2", "None", "energy:0.9", "gavish_donoho"]
    computed = Counter(
        (stage["kind"], stage["label"]) for run in runs for stage in run["stages"] if stage["outcome"] == "computed"
    )
    full = {label: count for (kind, label), count in computed.items() if kind == "full"}
    assert full == {"language qaa": 1, "language qba": 1, "language qbb": 1, "task on θ⁰+qaa": 1}
    decompositions = [count for (kind, _), count in computed.items() if kind == "decompose"]
    assert decompositions == [1, 1, 1, 1]
    # Batch i is a function of (seed, i): one seed whatever the rank is one data order.
    sparse = {label: seeds for label, seeds in fits.items() if "sparse" in label and "qaa" not in label}
    assert {label: (len(seeds), len(set(seeds))) for label, seeds in sparse.items()} == {
        label: (4, 1) for label in sparse
    }
    assert len(sparse) == 2
    assert len({seeds[0] for seeds in sparse.values()}) == 2


def read_bits(cache: Path) -> dict[str, bytes]:
    """The bytes of every SFT and of every prediction, by stage kind and key."""
    files = [*cache.glob("sparse/*/sft/sft.safetensors"), *cache.glob("evaluate/*/predictions.parquet")]
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(files)}


@pytest.mark.soak
def test_two_processes_with_one_seed_give_the_same_bits(tmp_path: Path) -> None:
    def start(name: str, seed: int) -> subprocess.Popen[bytes]:
        places = [f"paths.cache={tmp_path / name}", f"paths.output={tmp_path / 'out'}"]
        command = [sys.executable, "-m", "deftx", "run", *SMALL, *places, *FEW, f"seed={seed}"]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    for process in [start("one", 7), start("two", 7), start("other", 8)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    one, two, other = (read_bits(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 4
    assert one == two
    assert not set(one) & set(other)
    assert not set(one.values()) & set(other.values())


def test_single_sfts_evaluate_as_in_the_run(deftx: Command, sfts: Path) -> None:
    composed = scores(deftx("run").result())
    assert (sfts / "task" / "README.md").is_file()
    evaluated = deftx("eval", "language=qba", f"task_sft={sfts / 'task'}", f"language_sft.qba={sfts / 'language'}")
    assert evaluated.status == 0, evaluated.err
    result = evaluated.result()
    assert scores(result)["qba", "composed", "macro_f1"] == composed["qba", "deftx", "macro_f1"]
    # φ_T was trained on θ⁰ + φ_S, so alone it is no model "without language SFTs".
    assert {condition for _, condition, _ in scores(result)} == {"composed", "source_language_only"}
    # What trained the SFTs is what they say.
    said = result["settings"]
    assert (said["task_sft.rank"], said["task_sft.seed"], said["method"]) == ("energy:0.9", 0, "deftx")


def test_an_sft_folder_is_never_overwritten_nor_trained_for_nothing(deftx: Command, sfts: Path, tmp_path: Path) -> None:
    refused = deftx("sft", "kind=task", f"out={sfts / 'task'}", cache=tmp_path / "untouched")
    assert refused.status == 1
    assert "not empty" in refused.err
    assert not (tmp_path / "untouched").exists()


def test_pretraining_on_own_text_gives_a_usable_model(deftx: Command, model: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    local = [item for item in SMALL if not item.startswith("model.")]
    used = deftx("run", *local, f"model.path={model}", "model=local", *FEW, small=False)
    assert used.status == 0, used.err


def test_a_target_without_text_is_skipped_on_request_only(deftx: Command, shared_cache: Path, tmp_path: Path) -> None:
    deftx("run", *FEW)
    # A copy of the family in which one target has no text at all.
    data = Path(shutil.copytree(next(shared_cache.glob("family/*/family")), tmp_path / "data"))
    (data / "unlabelled" / "qbb.txt").unlink()
    own = ["task=sentiment", "task.source=qaa", f"data.root={data}", "language.qbb.text=[]", "model.vocabulary=[]"]
    refused = deftx("run", *own)
    assert refused.status == 1
    assert "no unlabelled text for 'qbb'" in refused.err
    skipped = deftx("run", *own, "missing_text=skip", "controls=[]")
    assert skipped.status == 0, skipped.err
    result = skipped.result()
    assert [note["about"] for note in result["notes"] if note["kind"] == "no_text"] == [["qbb"]]
    assert re.search(r"note: no unlabelled text.*: qbb\n", skipped.out)
    # Its row is φ_T alone, a condition of its own and no part of a method's mean; the other's is composed as ever.
    evaluated = {stage["label"]: stage["key"] for stage in result["stages"] if stage["kind"] == "evaluate"}
    without = {f"qbb {method}_without_language_sft" for method in ("deftx", "ltsft")}
    assert set(evaluated) == {"qba deftx", "qba ltsft", *without}
    scores = {(score["language"], score["condition"]) for score in result["metrics"]}
    assert {language for language, condition in scores if condition in ("deftx", "ltsft")} == {"qba"}
    assert {cell["method"] for cell in result["cells"] if cell["condition"] == "ltsft_without_language_sft"} == {
        "ltsft"
    }
    # A file that is named and not there is no missing text: skip does not cover it.
    assert "nowhere.txt" in deftx("run", "missing_text=skip", "language.qbb.text=[nowhere.txt]").err


def test_every_table_names_the_split(deftx: Command, shared_cache: Path, tmp_path: Path) -> None:
    assert {row["split"] for row in deftx("run").result()["metrics"]} == {"test"}
    own = ["task=sentiment", "task.source=qaa", f"data.root={own_rows(tmp_path, shared_cache)}"]
    outcome = deftx("run", *own, *FEW, "split=dev")
    assert outcome.status == 0, outcome.err
    result = outcome.result()
    assert {row["split"] for row in result["metrics"]} == {"dev"}
    assert any(note["kind"] == "split" and "dev split, not on test" in note["text"] for note in result["notes"])
    assert "dev" in outcome.out

    # Both splits in one run: one training, two tables.
    both = deftx("run", *own, *FEW, "split=[dev,test]")
    assert both.status == 0, both.err
    found = both.result()
    assert Counter(stage["outcome"] for stage in found["stages"] if stage["kind"] in ("full", "sparse")) == {
        "cached": 3
    }
    assert [row["split"] for row in found["metrics"] if row["metric"] == "macro_f1"] == ["test", "dev"]
    alone = {row["metric"]: row["value"] for row in result["metrics"]}
    assert {row["metric"]: row["value"] for row in found["metrics"] if row["split"] == "dev"} == alone
    assert {name for name in found["fingerprints"] if " q" in name} == {"test qba", "dev qba"}
    assert found["settings"]["split"] == ["test", "dev"]
    assert [cell["split"] for cell in found["cells"]] == ["test", "dev"]
    predictions = pd.read_parquet(next(both.folder.rglob("predictions.parquet")))
    assert "(test+dev)" in both.out
    for row in found["metrics"]:
        if row["metric"] == "macro_f1":
            rows = predictions[predictions["split"] == row["split"]]
            assert f1_score(rows["label"], rows["prediction"], average="macro") == pytest.approx(row["value"])
    again = deftx("run", *own, *FEW, "split=[test,dev]")
    assert {stage["outcome"] for stage in again.result()["stages"]} == {"cached"}, "the order makes no difference"


def test_a_task_sft_learns_from_several_sources(deftx: Command, shared_cache: Path, tmp_path: Path) -> None:
    deftx("run", *FEW)
    own = ["task=sentiment", "task.source=qab", f"data.root={own_rows(tmp_path, shared_cache)}", *FEW]
    own += ["data.valid_fraction=0.2", "data.leak_threshold=2"]
    one = deftx("run", *own)
    assert one.status == 0, one.err
    several = deftx("run", *own, "task.more_sources=[qac]", "controls=[source_sft]")
    assert several.status == 0, several.err
    assert "from qab+qac" in several.out
    labels = [stage["label"] for stage in several.result()["stages"] if stage["kind"] == "sparse"]
    assert any(label.startswith("task on θ⁰+qab+qac deftx") for label in labels)
    keys = [
        {s["key"] for s in outcome.result()["stages"] if s["kind"] == "sparse" and "task" in s["label"]}
        for outcome in (one, several)
    ]
    assert not keys[0] & keys[1]
    (key,) = keys[1]
    metadata = json.loads((shared_cache / "sparse" / key[:16] / "sft" / "sft.json").read_text())["metadata"]
    assert metadata["languages"] == ["qab", "qac"]
    assert set(metadata["trained_on"]) == {"qab", "qac"}
    refused = deftx("run", "task.more_sources=[qab]")
    assert "labelled rows in qaa only" in refused.err


def test_data_files_are_keyed_by_their_role(deftx: Command, shared_cache: Path, tmp_path: Path) -> None:
    deftx("run", *FEW)
    data = own_rows(tmp_path, shared_cache)
    files = [data / "sentiment" / code / "train.tsv" for code in ("qab", "qac")]
    own = ["task=sentiment", "task.source=qaa", f"data.root={data}", "source=none", "data.leak_threshold=2", *FEW]
    keys = []
    for train, valid in (files, files[::-1]):
        outcome = deftx("run", *own, f"data.train={train}", f"data.valid={valid}")
        assert outcome.status == 0, outcome.err
        keys.append({stage["key"] for stage in outcome.result()["stages"] if stage["kind"] == "task"})
    assert not keys[0] & keys[1]


def test_own_test_sentences_are_kept_out_of_training_rows_and_text(
    deftx: Command, shared_cache: Path, tmp_path: Path
) -> None:
    deftx("run", *FEW)
    data = own_rows(tmp_path, shared_cache)
    sentences = data / "sentiment" / "qba" / "test.tsv"
    header, *rows = sentences.read_text().splitlines(keepends=True)
    long = [row.replace("\t", " and so on and so forth until the very end\t", 1) for row in rows]
    sentences.write_text(header + "".join(long))
    train = data / "sentiment" / "qaa" / "train.tsv"
    train.write_text(train.read_text() + "".join(long[:5]))
    column = header.rstrip("\n").split("\t").index("text")
    text = data / "unlabelled" / "qba.txt"
    text.write_text(text.read_text() + "".join(row.split("\t")[column].rstrip("\n") + "\n" for row in long[5:12]))
    own = ["task=sentiment", "task.source=qaa", f"data.root={data}", "data.test=sentiment/{language}/test.tsv", *FEW]
    outcome = deftx("run", *[f"{item.split('=')[0]}='{item.split('=')[1]}'" if "{" in item else item for item in own])
    assert outcome.status == 0, outcome.err
    found = outcome.result()["data"]
    assert found["rows sentiment qaa"]["train"]["leak"]["dropped"] >= 5
    assert found["text qba"]["leak"]["dropped"] >= 7


def test_curves_are_written(deftx: Command, tmp_path: Path) -> None:
    outcome = deftx("run", *FEW, "source=none", cache=tmp_path / "own")
    curves = {path.parent.name: pd.read_csv(path) for path in outcome.folder.rglob("curves/*/*/metrics.csv")}
    assert set(curves) == {"language-qba", "task", "language-qba-deftx", "task-deftx"}
    for frame in curves.values():
        assert frame["train/loss"].notna().any()
        assert frame["val/loss"].notna().any()


@pytest.mark.soak
def test_an_interrupted_run_says_so_and_goes_on_later(tmp_path: Path) -> None:
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "deftx", "run", *SMALL, *places, *FEW]
    process = subprocess.Popen(
        [*command, "lang.training.max_steps=100000", "lang.training.epochs=100000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a script inherit that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:  # in the middle of a fit: after the last line that comes before one
            if line.startswith("pretrain"):
                break
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "run the command again" in errors
    result = json.loads(next((tmp_path / "out").rglob("result.json")).read_text())
    assert (result["status"], result["error"]["type"]) == ("interrupted", "KeyboardInterrupt")
    assert list((tmp_path / "cache" / "pretrain").iterdir())


def test_a_cell_that_composes_what_another_does_is_a_cell_of_its_own(deftx: Command) -> None:
    # Of the source as a target φ_S is its own φ_L: both conditions have one key.
    outcome = deftx("run", "language=[qaa,qba]", "compare=[]", "controls=[source_sft]")
    assert outcome.status == 0, outcome.err
    cells = [(cell["language"], cell["condition"]) for cell in outcome.result()["cells"]]
    assert cells == [("qaa", "source_sft"), ("qaa", "deftx"), ("qba", "source_sft"), ("qba", "deftx")]
    found = scores(outcome.result())
    assert found["qaa", "source_sft", "macro_f1"] == found["qaa", "deftx", "macro_f1"]
