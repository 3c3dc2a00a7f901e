"""Sections, columns and baselines; means, spreads and intervals of whole result folders."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from fabricate import LABELS, N, write_run, write_sweep

from deftx import tracking
from deftx.report.collect import collect
from deftx.report.knobs import ordered_values, read_by, score_settings, varying
from deftx.report.remarks import run_notes
from deftx.report.sections import MEAN, Section, make_sections
from deftx.report.summary import Options, Summary, summarise

FEW = Options(samples=200)
BOTH = {"ltsft": 0.5, "deftx": 0.7}


def sections(folder: Path, metric: str | None = None) -> list[Section]:
    return make_sections(collect([folder]).runs, metric)


def summary(folder: Path, baseline: str | None = "ltsft", options: Options = FEW) -> Summary:
    (section,) = sections(folder)
    return summarise(section, baseline, options)


def labels(section: Section) -> list[str]:
    return [column.label for column in section.columns]


def test_scores_are_means_and_sample_deviations_over_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / str(seed), conditions=BOTH, seed=seed)
    found = summary(tmp_path)
    values: dict[tuple[str, str], list[float]] = {}
    for seed in (0, 1, 2):
        for item in tracking.read_result(tmp_path / str(seed)).metrics:
            if item.metric == "macro_f1" and item.value is not None:
                values.setdefault((item.condition, item.language), []).append(item.value)
    for column in found.section.columns:
        by_language = [values[column.condition, language] for language in ("ace", "min")]
        for language, expected in zip(("ace", "min"), by_language, strict=True):
            score = found.scores[column, language]
            assert score.mean == pytest.approx(np.mean(expected))
            assert score.std == pytest.approx(np.std(expected, ddof=1))
            assert score.n == N
        means = np.mean(by_language, axis=0)  # by seed
        assert found.scores[column, MEAN].std == pytest.approx(np.std(means, ddof=1))


def test_differences_are_those_of_a_naive_loop_over_the_same_draws(tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    from deftx.report.bootstrap import Resampler

    for seed in (0, 1):
        write_run(tmp_path / str(seed), conditions=BOTH, seed=seed)
    options = Options(samples=60)
    found = summary(tmp_path, options=options)
    parts, ids = {}, []
    for seed in (0, 1):
        frame = pd.read_parquet(tmp_path / str(seed) / "predictions.parquet").sort_values("id")
        ids = sorted(frame["id"].unique())
        for where, rows in frame.groupby(["language", "condition"]):
            parts[(seed, *where)] = rows["label"].to_numpy(dtype=str), rows["prediction"].to_numpy(dtype=str)
    resampler = Resampler(options.samples, options.seed)
    weights = resampler.items({"ace": ids, "min": ids})
    drawn = np.zeros((2, options.samples))
    for sample, (place, seed), language in itertools.product(range(options.samples), enumerate((0, 1)), ("ace", "min")):
        items = np.repeat(np.arange(N), weights[language][sample].astype(int))
        for condition, sign in (("deftx", 1), ("ltsft", -1)):
            label, prediction = parts[seed, language, condition]
            f1 = f1_score(label[items], prediction[items], average="macro")
            drawn[place, sample] += sign * f1 / 2
    (column,) = found.section.named(["deftx"])
    difference = found.differences[column, MEAN]
    own, other = (found.scores[c, MEAN].values for c in (column, found.baselines[column]))
    by_seed = [own[seed] - other[seed] for seed in (0, 1)]
    # Written out: the items' part without what differs between the two seeds item by item, and t with one degree.
    center, items = np.mean(by_seed), np.var(drawn.mean(axis=0))
    apart = np.mean([np.var(drawn[0]), np.var(drawn[1])]) - items
    share = (max(items - max(apart, 0), 0) / items) ** 0.5
    low, high = (share * (end - center) for end in np.quantile(drawn.mean(axis=0), [0.025, 0.975]))
    over_seeds = scipy.stats.t(1).ppf(0.975) * abs(by_seed[0] - by_seed[1]) / 2
    expected = center - (low**2 + over_seeds**2) ** 0.5, center + (high**2 + over_seeds**2) ** 0.5
    assert (difference.low, difference.high) == pytest.approx(expected)
    assert difference.value == pytest.approx(
        found.scores[column, MEAN].mean - found.scores[found.baselines[column], MEAN].mean
    )


def test_a_rank_sweep_has_one_ltsft_column_and_it_is_everybodys_baseline(tmp_path: Path) -> None:
    for number, rank in enumerate(("4", "16", "energy:0.9", None)):
        write_run(tmp_path / str(number), rank=rank)
    found = summary(tmp_path)
    assert labels(found.section) == ["LT-SFT", "DeFT-X rank=4", "DeFT-X rank=16", "DeFT-X rank=energy:0.9"]
    assert {base.label for base in found.baselines.values()} == {"LT-SFT"}
    assert len(found.baselines) == 3


def test_runs_that_hold_both_methods_share_the_ltsft_column_of_the_sweep(tmp_path: Path) -> None:
    for number, rank in enumerate(("4", "16")):
        write_run(tmp_path / str(number), rank=rank, conditions=BOTH)
    (section,) = sections(tmp_path)
    assert labels(section) == ["LT-SFT", "DeFT-X rank=4", "DeFT-X rank=16"]
    assert any("stand in more than one run" in text for text in section.warnings)


def test_a_baseline_agrees_in_every_other_knob(tmp_path: Path) -> None:
    number = 0
    for rank in ("4", None):
        for density in (0.05, 0.1):
            write_run(tmp_path / str(number), rank=rank, density=density)
            number += 1
    write_run(tmp_path / "alone", rank="4", density=0.4)
    found = summary(tmp_path)
    assert {column.label: base.label for column, base in found.baselines.items()} == {
        "DeFT-X density=0.05": "LT-SFT density=0.05",
        "DeFT-X density=0.1": "LT-SFT density=0.1",
    }
    assert any("so no difference: DeFT-X density=0.4" in note for note in found.notes)


def test_a_column_may_be_the_baseline(tmp_path: Path) -> None:
    for number, rank in enumerate(("4", "16", None)):
        write_run(tmp_path / str(number), rank=rank)
    found = summary(tmp_path, "DeFT-X rank=4")
    assert {column.label: base.label for column, base in found.baselines.items()} == {
        "LT-SFT": "DeFT-X rank=4",
        "DeFT-X rank=16": "DeFT-X rank=4",
    }


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / f"a{seed}", rank="4", seed=seed)
    for seed in (1, 2, 3):
        write_run(tmp_path / f"b{seed}", rank=None, seed=seed)
    found = summary(tmp_path)
    (column,) = found.section.named(["deftx"])
    difference = found.differences[column, "ace"]
    assert difference.seeds == (1, 2)
    mine, base = found.scores[column, "ace"].values, found.scores[found.baselines[column], "ace"].values
    assert difference.value == pytest.approx(np.mean([mine[1] - base[1], mine[2] - base[2]]))
    assert any("fewer seeds than others" in note for note in found.notes)


def test_a_mean_that_lacks_a_language_says_so_and_is_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "0", rank="4", language=["ace"])
    write_run(tmp_path / "1", rank=None)
    found = summary(tmp_path)
    (column,) = found.section.named(["deftx"])
    assert found.scores[column, MEAN].missing == ("min",)
    assert (column, MEAN) not in found.differences
    assert (column, "ace") in found.differences


def test_one_language_a_run_is_one_section(tmp_path: Path) -> None:
    for number, language in enumerate(("ace", "min")):
        write_run(tmp_path / str(number), conditions=BOTH, language=[language])
    (section,) = sections(tmp_path)
    assert (section.languages, labels(section)) == (["ace", "min"], ["LT-SFT", "DeFT-X"])


@pytest.mark.parametrize(
    "other",
    [
        {"task": "xnli"},
        {"study": "another"},
        {"split": "dev"},
        {"model": "mbert"},
        {"metric": "accuracy"},
        {"record": {"fingerprints": {"base": "c" * 64}}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_does_not_compare_is_a_section_of_its_own(tmp_path: Path, other: dict[str, object]) -> None:
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", seed=1, **other)  # type: ignore[arg-type]
    found = sections(tmp_path)
    assert len(found) == len({section.slug for section in found}) == len({section.title for section in found}) == 2


def test_another_metric_on_request(tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH)
    (section,) = sections(tmp_path, "accuracy")
    frame = pd.read_parquet(tmp_path / "0" / "predictions.parquet").query("language == 'ace' and condition == 'deftx'")
    cell = section.cells[section.named(["deftx"])[0], "ace", 0]
    assert cell.value == pytest.approx((frame["label"] == frame["prediction"]).mean())
    assert cell.items is not None


def test_variants_of_a_condition_are_averaged_in_each_resample(tmp_path: Path) -> None:
    write_run(tmp_path, conditions={"ltsft": 0.5, "other_language_sft": 0.6}, variants=("ban", "bjn"))
    found = summary(tmp_path)
    (column,) = found.section.named(["other_language_sft"])
    cell = found.section.cells[column, "ace", 0]
    assert cell.items is not None
    assert cell.items.predicted.shape == (2, N)
    assert found.differences[column, "ace"].low is not None
    assert found.section.warnings == []


def test_other_examples_cannot_be_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "0", rank="4")
    write_run(tmp_path / "1", rank=None, ids=[f"x{number}" for number in range(N)])
    found = summary(tmp_path)
    (column,) = found.section.named(["deftx"])
    difference = found.differences[column, "ace"]
    assert (difference.low, difference.high) == (None, None)
    assert any("cannot be paired" in note for note in found.notes)


def test_predictions_that_do_not_give_the_score_are_not_used(tmp_path: Path) -> None:
    write_run(tmp_path, conditions=BOTH)
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    frame.loc[(frame["condition"] == "deftx") & (frame["language"] == "ace"), "prediction"] = LABELS[0]
    tracking.write_predictions(tmp_path, frame)
    found = summary(tmp_path)
    assert any("do not give the macro-F1" in text and "ace deftx" in text for text in found.section.warnings)
    (column,) = found.section.named(["deftx"])
    assert found.differences[column, "ace"].low is None
    assert found.differences[column, "min"].low is not None


@pytest.mark.parametrize("labels_known", [True, False])
def test_numbers_for_labels_are_read_too(tmp_path: Path, labels_known: bool) -> None:
    write_run(tmp_path, conditions=BOTH, **({} if labels_known else {"data.labels": []}))
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    for name in ("label", "prediction"):
        frame[name] = frame[name].map(LABELS.index)
    tracking.write_predictions(tmp_path, frame.drop(columns="variant"))
    found = summary(tmp_path)
    assert found.section.warnings == []
    assert found.differences[found.section.named(["deftx"])[0], MEAN].low is not None


def test_conflicting_results_are_told_of_and_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "old", rank="4")
    write_run(tmp_path / "new", rank="4", draw=99, record={"finished": "2026-02-01T00:00:00+00:00"})
    (section,) = sections(tmp_path)
    assert any("other numbers" in text and "not averaged" in text for text in section.warnings)
    newest = tracking.read_result(tmp_path / "new").metrics[0]
    cell = section.cells[section.columns[0], newest.language, 0]
    assert (cell.value, len(section.cells)) == (newest.value, 2)


def test_a_run_found_twice_counts_once(tmp_path: Path) -> None:
    for launch in ("first", "second"):
        write_run(tmp_path / launch / "0", conditions=BOTH)
    found = collect([tmp_path])
    assert (len(found.runs), len(found.repeated)) == (1, 1)
    # The same numbers from other predictions are not the same result.
    write_run(tmp_path / "third", conditions=BOTH)
    frame = pd.read_parquet(tmp_path / "third" / "predictions.parquet")
    frame["prediction"] = frame["prediction"].to_numpy()[::-1]
    tracking.write_predictions(tmp_path / "third", frame)
    assert len(collect([tmp_path]).runs) == 2


@pytest.mark.parametrize(
    ("condition", "lost", "kept"),
    [
        ("ltsft", ["lang.rank", "task.residual"], ["lang.density", "source.rank"]),
        ("no_language_sft", ["lang.rank", "source.rank", "corpus.leak_threshold"], ["task.rank"]),
        ("source_sft", ["lang.rank"], ["task.rank", "source.rank"]),
        ("deftx", [], ["lang.rank", "task.rank", "source.rank"]),
    ],
)
def test_a_condition_reads_what_its_composition_is_made_of(condition: str, lost: list[str], kept: list[str]) -> None:
    from fabricate import settings

    read = read_by(condition, score_settings(settings(rank="4")))
    assert all(read.get(key) is None for key in lost)
    assert all(read[key] is not None for key in kept)
    assert not {"seed", "rank", "study", "language"} & set(read)


FAILED = {"status": "failed", "metrics": [], "error": {"type": "DeftxError", "message": "no text", "traceback": None}}


@pytest.mark.parametrize(
    ("prints", "other", "made_up"),
    [
        ({}, {}, True),
        ({"base files": "c"}, {}, True),
        ({"base files": "d"}, {}, False),
        ({"base": "d"}, {}, False),
        ({}, {"seed": 1}, False),
        ({}, {"rank": "8"}, False),
        ({}, {"language": ["ace"]}, False),
    ],
)
def test_a_run_that_failed_early_is_made_up_for_by_its_rerun(
    tmp_path: Path, prints: dict[str, str], other: dict[str, object], made_up: bool
) -> None:
    write_run(tmp_path / "failed", record=FAILED | {"fingerprints": prints}, with_predictions=False, **other)
    write_run(tmp_path / "done", record={"fingerprints": {"base": "b", "base files": "c"}})
    (trouble,) = collect([tmp_path]).troubles
    assert (trouble.kind, trouble.finished_in) == ("failed", f"{tmp_path.name}/done" if made_up else "")


@pytest.mark.parametrize(
    ("failed", "done", "made_up"),
    [
        (["a", "b"], ["b", "a"], True),
        (["task deftx"], ["language ace deftx"], False),
        (None, None, False),  # an older result does not say which part it is
    ],
)
def test_parts_of_a_job_are_told_apart(
    tmp_path: Path, failed: list[str] | None, done: list[str] | None, made_up: bool
) -> None:
    for name, only, status in (("0", failed, FAILED), ("1", done, {"metrics": []})):
        record = {**status, "job_type": "stage"}
        write_run(tmp_path / name, record=record, with_predictions=False, **({} if only is None else {"only": only}))
    (trouble,) = collect([tmp_path]).troubles
    assert bool(trouble.finished_in) is made_up


def test_a_sweep_started_again_makes_up_for_what_results_do_not_say(tmp_path: Path) -> None:
    """Older results of parts: what was asked for tells them apart."""
    for launch, status in (("0", "failed"), ("1", "done")):
        record = {**(FAILED if status == "failed" else {"metrics": []}), "job_type": "stage"}
        for number in ("0", "1"):
            write_run(tmp_path / launch / number, record=record, with_predictions=False)
        write_sweep(tmp_path / launch, [(["only=[a]"], status), (["only=[b]"], status)])
    found = {item.name.split(" ")[0]: item.finished_in.split(" ")[0] for item in collect([tmp_path]).troubles}
    name = tmp_path.name
    assert found == {f"{name}/0/{number}": f"{name}/1/{number}" for number in (0, 1)}


def test_another_language_is_another_target(tmp_path: Path) -> None:
    """``other_language_sft`` composes the other targets' SFTs: other targets, another score."""
    conditions = {"deftx": 0.7, "other_language_sft": 0.4}
    write_run(tmp_path / "0", conditions=conditions, language=["ace", "min"])
    write_run(tmp_path / "1", conditions=conditions, language=["ace", "ban"], draw=5)
    write_run(tmp_path / "2", conditions=conditions, language=["min", "ace"], seed=1)
    (section,) = sections(tmp_path)
    others = section.named(["other_language_sft"])
    assert [column.knobs for column in others] == [{"targets": ["ace", "ban"]}, {"targets": ["ace", "min"]}]
    assert [section.seeds(column, "ace") for column in others] == [[0], [0, 1]]
    (deftx,) = section.named(["deftx"])
    assert deftx.knobs == {}


def test_results_from_before_a_knob_hold_its_default(tmp_path: Path) -> None:
    later: dict[str, object] = {"task.source": "ind", "task.more_sources": [], "task.training.length_buckets": 0}
    for prefix in ("", "lang.", "task.", "source."):
        later |= {f"{prefix}value_dtype": "float32", f"{prefix}mask": "magnitude", f"{prefix}second_phase": True}
    later |= {"lang.training.length_buckets": 0, "task.training.mlm_probability": None}
    write_run(tmp_path / "old", conditions={"ltsft": 0.5}, rank=None, **{"task.source": "ind"})
    write_run(tmp_path / "old, too", conditions={"deftx": 0.7}, seed=1, **{"task.source": "ind"})
    for seed in (0, 1):
        write_run(tmp_path / f"new {seed}", conditions=BOTH, seed=seed, **later)
    write_run(tmp_path / "ablation", conditions={"deftx": 0.6}, **(later | {"lang.mask": "random", "mask": None}))
    (section,) = sections(tmp_path)
    ltsft = section.named(["ltsft"])
    deftx = section.named(["deftx"])
    assert [section.seeds(column, "ace") for column in ltsft] == [[0, 1]]
    assert [column.knobs for column in deftx] == [{"lang.mask": "magnitude"}, {"lang.mask": "random"}]
    assert [section.seeds(column, "ace") for column in deftx] == [[0, 1], [0]]
    assert section.baseline_of(deftx[0], "ltsft") is ltsft[0]


def data(path: str = "here", **digests: str) -> dict[str, Any]:
    """The setting ``data.read``: ``train_ind="1"`` is the digest of the source's training rows."""
    items = [
        tracking.DataRead(what=what, language=language, digest=digest * 64, path=f"{path}/{what}")
        for (what, language), digest in ((name.split("_"), digest) for name, digest in digests.items())
    ]
    return {"data.read": tracking.data_setting(items)}


SOURCE = {"train_ind": "1", "valid_ind": "2", "text_ind": "3"}
TARGETS = {"test_ace": "4", "text_ace": "5", "test_min": "6", "text_min": "7"}
EVERY = {"no_language_sft": 0.3, "source_sft": 0.4, "ltsft": 0.5, "deftx": 0.7}


@pytest.mark.parametrize(
    ("other", "split"),
    [
        ({}, set()),
        ({"train_ind": "9"}, set(EVERY)),
        ({"valid_ind": "9"}, set(EVERY)),
        ({"test_ace": "9"}, set(EVERY)),
        ({"text_ace": "9"}, {"ltsft", "deftx"}),
        ({"text_ind": "9"}, {"source_sft", "ltsft", "deftx"}),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_a_column_holds_runs_on_the_same_data(tmp_path: Path, other: dict[str, str], split: set[str]) -> None:
    write_run(tmp_path / "0", conditions=EVERY, **data(**SOURCE, **TARGETS))
    write_run(tmp_path / "1", conditions=EVERY, seed=1, **data("elsewhere", **{**SOURCE, **TARGETS, **other}))
    (section,) = sections(tmp_path)
    found = {condition: section.named([condition]) for condition in EVERY}
    assert {condition for condition, columns in found.items() if len(columns) == 2} == split
    for condition in split:
        (name,) = (name.replace("_", " ") for name in other)
        before = {**SOURCE, **TARGETS}[next(iter(other))]
        title = tracking.CONDITIONS[condition]
        assert [c.label for c in found[condition]] == [f"{title} {name}={before * 8}", f"{title} {name}={'9' * 8}"]
    for column in found["deftx"]:
        base = section.baseline_of(column, "ltsft")
        assert base is not None
        assert {run.name for run in section.runs_of(base)} == {run.name for run in section.runs_of(column)}


def test_other_targets_are_no_other_data(tmp_path: Path) -> None:
    for number, code in enumerate(("ace", "min")):
        own = {name: digest for name, digest in TARGETS.items() if code in name}
        write_run(tmp_path / str(number), conditions=BOTH, language=[code], **data(**SOURCE, **own))
    write_run(tmp_path / "2", conditions=BOTH, language=["ban"], seed=1)  # an older result says nothing of its data
    (section,) = sections(tmp_path)
    assert labels(section) == ["LT-SFT", "DeFT-X"]
    # Another text of one of them: that run alone is apart.
    changed = {"test_min": "6", "text_min": "9"}
    write_run(tmp_path / "3", conditions=BOTH, language=["min"], draw=7, **data(**SOURCE, **changed))
    (section,) = sections(tmp_path)
    assert labels(section)[2:] == [f"DeFT-X text min={'7' * 8}", f"DeFT-X text min={'9' * 8}"]
    languages = [{run.record.settings["language"][0] for run in section.runs_of(c)} for c in section.named(["deftx"])]
    assert languages == [{"ace", "min", "ban"}, {"min"}]


def test_equal_scores_on_other_data_are_no_repetition(tmp_path: Path) -> None:
    for number, digest in enumerate(("8", "8", "9")):
        write_run(tmp_path / str(number), conditions=BOTH, **data(f"place {number}", train_ind=digest))
    found = collect([tmp_path])
    assert [again.name for again, _ in found.repeated] == [f"{tmp_path.name}/1"]
    assert len(found.runs) == 2
    # A failed run is made up for by one on its own data only.
    write_run(tmp_path / "failed", record=FAILED, with_predictions=False, **data(train_ind="7"))
    assert collect([tmp_path]).troubles[0].finished_in == ""
    write_run(tmp_path / "failed", record=FAILED, with_predictions=False, **data(train_ind="9"))
    assert collect([tmp_path]).troubles[0].finished_in == f"{tmp_path.name}/2"


def test_one_line_warns_where_stages_were_computed_under_other_versions(tmp_path: Path) -> None:
    old, new = (tracking.Provenance({"torch": version}, 2, "cpu", {"full": 1}) for version in ("2.8", "2.9"))
    for seed, stood_on in enumerate(([old], [new], [old, new], [])):
        remark = tracking.provenance_remark(stood_on)
        record = {"provenances": stood_on, "notes": [remark] if remark is not None else []}
        write_run(tmp_path / str(seed), conditions=BOTH, seed=seed, record=record)
    write_run(tmp_path / "other", conditions=BOTH, task="xnli", record={"provenances": [old]})
    first, second = sections(tmp_path)
    (line,) = first.warnings
    assert line.endswith("under different versions, thread counts or devices: torch 2.8 / 2.9")
    assert second.warnings == []
    assert run_notes(collect([tmp_path])) == {}


def test_varying_knobs_have_short_names_where_both_sfts_agree() -> None:
    same = [{"lang.rank": r, "task.rank": r, "lang.k": 5, "x": 1} for r in ("4", "8")]
    assert varying(same) == [{"rank": "4"}, {"rank": "8"}]
    apart = [{"lang.rank": "4", "task.rank": r} for r in ("4", "8")]
    assert varying(apart) == [{"task.rank": "4"}, {"task.rank": "8"}]
    implied = [{"rank": "4", "residual": "drop"}, {"rank": None, "residual": None}]
    assert varying(implied) == [{"rank": "4"}, {"rank": None}]


def test_values_are_ordered_as_a_person_orders_them() -> None:
    mixed = ["gavish_donoho", None, "16", "energy:0.9", "4", "energy:0.8", "128", "4"]
    assert ordered_values(mixed) == ["4", "16", "128", "energy:0.8", "energy:0.9", "gavish_donoho", None]


def test_a_control_of_another_method_is_another_column(tmp_path: Path) -> None:
    for method, skill in (("ltsft", 0.8), ("another", 0.4)):
        write_run(tmp_path / method, conditions={"no_language_sft": skill, method: 0.9}, rank=None, method=method)
    (section,) = sections(tmp_path)
    assert [column.label for column in section.named(["no_language_sft"])] == [
        "no language SFTs method=another",
        "no language SFTs method=ltsft",
    ]
    assert not section.warnings


def test_a_mask_that_is_drawn_has_the_baseline_of_another_run(tmp_path: Path) -> None:
    write_run(tmp_path / "ltsft", conditions={"ltsft": 0.5}, rank=None)
    drawn: dict[str, object] = {f"{prefix}mask": "random" for prefix in ("", "lang.", "task.")}
    write_run(tmp_path / "random", conditions={"random_mask": 0.4}, rank=None, method="random_mask", **drawn)
    (section,) = sections(tmp_path)
    (ltsft,), (random) = section.named(["ltsft"]), section.named(["random_mask"])
    assert [section.baseline_of(column, "ltsft") for column in random] == [ltsft]


def test_runs_without_a_source_sft_differ_in_one_setting(tmp_path: Path) -> None:
    source = {"source.rank": None, "source.residual": None}
    write_run(tmp_path / "with", conditions={"deftx": 0.8}, **{"source.training.epochs": 3})
    write_run(tmp_path / "without", conditions={"deftx": 0.4}, **{"source.enabled": False, **source})
    (section,) = sections(tmp_path)
    assert [column.setting for column in section.columns] == ["source.enabled=false", "source.enabled=true"]


def test_what_filters_left_is_data_too(tmp_path: Path) -> None:
    for seed, kept in enumerate(("a" * 64, "b" * 64, None)):
        read = [tracking.DataRead(what="train", language="ind", digest="d" * 64, kept=kept)]
        write_run(tmp_path / str(seed), seed=seed, **{tracking.DATA_READ: tracking.data_setting(read)})
    (section,) = sections(tmp_path)
    assert [column.label for column in section.columns] == [
        "DeFT-X train ind kept=aaaaaaaa",
        "DeFT-X train ind kept=bbbbbbbb",
    ]


def test_only_the_mean_is_marked_and_only_from_three_seeds_on(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / str(seed), conditions={"ltsft": 0.3, "deftx": 0.9}, seed=seed)
    three = summary(tmp_path)
    shutil.rmtree(tmp_path / "2")
    two = summary(tmp_path)
    (column,) = three.section.named(["deftx"])
    assert all(three.differences[column, row].clear for row in three.rows)
    for found, marked in ((two, set()), (three, {MEAN})):
        (column,) = found.section.named(["deftx"])
        assert {row for row in found.rows if found.marked(column, row)} == marked
    assert any("2 seeds: no difference is marked" in note for note in two.notes)


def test_copies_of_one_run_are_no_seeds(tmp_path: Path) -> None:
    write_run(tmp_path / "0", conditions=BOTH, seed=0)
    write_run(tmp_path / "1", conditions=BOTH, seed=1)
    assert not any("identical predictions" in note for note in summary(tmp_path).notes)
    shutil.copy(tmp_path / "0/predictions.parquet", tmp_path / "1/predictions.parquet")
    result = json.loads((tmp_path / "0/result.json").read_text())
    (tmp_path / "1/result.json").write_text(
        json.dumps(result | {"seed": 1, "settings": result["settings"] | {"seed": 1}})
    )
    notes = [note for note in summary(tmp_path).notes if "identical predictions" in note]
    assert len(notes) == 2
    assert "seeds 0, 1 have identical predictions; copies of one run are no sample of seeds" in notes[0]
