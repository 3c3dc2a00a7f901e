"""Labelled data: both forms of every set, label order, splits, leaks, own files, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from upstream_folders import NLI_WORDS, Upstream, language, tsv, write, write_clones

from deftx.data import rows as reader
from deftx.data.hub import resolve_commit
from deftx.data.labelled import NLI, SENTIMENT, TASKS, task_spec
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.data.tasks import (
    Evaluation,
    digest_rows,
    fingerprint_rows,
    load_test,
    load_train,
    protected_texts,
    split_by_text,
    train_places,
)
from deftx.errors import DeftxError

COLUMNS = ["id", "text", "text_pair", "label"]
OWN = LanguageSettings(code="xxx", name="Own")


def labels(frame: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    return [names[label] for label in frame["label"]]


# --- forms


def test_label_orders_are_those_of_the_hub() -> None:
    assert SENTIMENT == ("negative", "neutral", "positive")
    assert NLI == ("entailment", "neutral", "contradiction")
    metrics = {
        "synthetic": ("macro_f1", False),
        "nusax": ("macro_f1", False),
        "americasnli": ("accuracy", True),
        "xnli": ("accuracy", True),
        "sentiment": ("macro_f1", False),
        "nli": ("accuracy", True),
    }
    assert {name: (TASKS[name].metric, TASKS[name].pair) for name in metrics} == metrics
    assert TASKS["tsv"].metric == "macro_f1"


def test_nusax_csv(tmp_path: Path) -> None:
    folder = tmp_path / "nusax/datasets/sentiment/minangkabau"
    rows = 'id,text,label\n7,"  elok, ""rancak""\nbana  ",positive\n3,#ERROR!,neutral\n9,  ,negative\n'
    write(folder / "test.csv", "\ufeff" + rows)
    frame = load_test("nusax", language("min"), DataSettings(root=str(tmp_path)))
    assert list(frame.columns) == COLUMNS
    assert frame[["id", "text", "label"]].to_numpy().tolist() == [["7", 'elok, "rancak" bana', 2], ["3", "#ERROR!", 1]]
    assert frame["text_pair"].isna().all()
    assert frame.attrs["dropped"] == {"empty": 1, "unlabelled": 0}
    assert frame["label"].dtype == "int64"


def test_americasnli_tsv_has_no_quoting(tmp_path: Path) -> None:
    rows = [["25051", "quy", ' "a', "b", "neutral"], ["25052", "quy", 'c"', "nan", "contradiction"]]
    write(tmp_path / "data/anli_final/test/quy.tsv", tsv("id language premise hypothesis label", rows))
    frame = load_test("americasnli", language("quy"), DataSettings(americasnli=str(tmp_path)))
    assert frame.to_numpy().tolist() == [["25051", '"a', "b", 1], ["25052", 'c"', "nan", 2]]


def test_xnli_upstream_file_holds_all_languages(tmp_path: Path) -> None:
    header = "language gold_label sentence1 sentence2 promptID pairID"
    rows = [
        ["de", "neutral", "a", "b", "1", "1"],
        ["fr", "entailment", "c", "d", "1", "1"],
        ["de", "-", "e", "f", "1", "2"],
    ]
    write(tmp_path / "XNLI-1.0/xnli.dev.tsv", tsv(header, rows))
    data = DataSettings(xnli=str(tmp_path))
    frame = load_test("xnli", language("deu"), data, "dev")
    assert frame.to_numpy().tolist() == [["1", "a", "b", 1]]
    assert frame.attrs["dropped"]["unlabelled"] == 1
    with pytest.raises(DeftxError, match="no rows in 'tr'"):
        load_test("xnli", language("tur"), data, "dev")


@pytest.mark.parametrize("name", ["multinli_1.0_train.jsonl", "multinli_1.0/multinli_1.0_train.txt"])
def test_multinli_upstream_files(tmp_path: Path, name: str) -> None:
    rows = [
        (f"{i}{label[0]}", f"premise {i}", f"hypothesis {label} {i}", label) for i in range(10) for label in NLI_WORDS
    ]
    rows.append(("11e", "premise", "hypothesis", "-"))
    if name.endswith("jsonl"):
        items = [{"pairID": a, "sentence1": b, "sentence2": c, "gold_label": d, "genre": "x"} for a, b, c, d in rows]
        write(tmp_path / name, "".join(json.dumps(item) + "\n" for item in items))
    else:
        cells = [[d, b, c, a] for a, b, c, d in rows]
        write(tmp_path / name, tsv("gold_label sentence1 sentence2 pairID", cells))
    loaded = load_train("multinli", language("eng"), DataSettings(multinli=str(tmp_path), root=str(tmp_path)), seed=0)
    assert loaded.report["train"]["unlabelled"] == 1
    assert len(loaded.train) + len(loaded.valid) == 30
    both = pd.concat([loaded.train, loaded.valid])
    assert labels(both, NLI) == [hypothesis.split()[1] for hypothesis in both["text_pair"]]
    assert set(both["id"]) == {row[0] for row in rows[:-1]}


def test_translated_multinli_says_contradictory(tmp_path: Path) -> None:
    rows = [
        [sentence_, f"h {i}", "contradictory"]
        for i, sentence_ in enumerate(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"])
    ]
    write(tmp_path / "XNLI-MT-1.0/multinli/multinli.train.es.tsv", tsv("premise hypo label", rows))
    data = DataSettings(multinli=str(tmp_path), xnli=str(tmp_path), valid_fraction=0.2)
    loaded = load_train("multinli", language("spa"), data, seed=0)
    assert (len(loaded.train), len(loaded.valid)) == (8, 2)
    assert set(loaded.train["label"]) == {2}


def test_all_training_files_of_a_language_are_read(tmp_path: Path) -> None:
    for name, start in (("train-en", 0), ("train_extra-en", 50), ("train-es", 90)):
        rows = [[f"premise {i}", f"hypothesis {i}", "neutral"] for i in range(start, start + 20)]
        write(tmp_path / f"{name}.tsv", tsv("premise hypothesis label", rows))
    data = DataSettings(multinli=str(tmp_path), xnli=str(tmp_path))
    loaded = load_train("multinli", language("eng"), data, seed=0)
    both = pd.concat([loaded.train, loaded.valid])
    assert len(both) == 40
    assert both["id"].is_unique
    assert {"train-en:1", "train_extra-en:20"} <= set(both["id"])


@pytest.mark.parametrize("form", ["named", "integers", "words"])
@pytest.mark.parametrize(
    ("task", "code", "config", "order"),
    [
        ("nusax", "jav", "jav", ("negative", "neutral", "positive")),
        ("americasnli", "gn", "gn", ("entailment", "neutral", "contradiction")),
        ("xnli", "zho", "zh", ("entailment", "neutral", "contradiction")),
    ],
)
def test_hub_forms(
    hub_copy: Callable[..., Path], tmp_path: Path, task: str, code: str, config: str, order: tuple[str, ...], form: str
) -> None:
    """The integers of the hub are the integers of the task, whether or not the data set names them."""
    pair = TASKS[task].pair
    columns: dict[str, list[object]] = {"premise" if pair else "text": [" a", "b", "c"]}
    columns |= {"hypothesis": ["x", "y", "z"]} if pair else {"id": ["7", "8", "9"]}
    columns["label"] = list(order) if form == "words" else [0, 1, 2]
    features = None
    if form == "named":
        features = datasets.Features({name: datasets.Value("string") for name in columns if name != "label"})
        features["label"] = datasets.ClassLabel(names=list(order))
    other = {name: cells[::-1] for name, cells in columns.items()}
    splits = {"validation": other, "test": columns}
    folder = hub_copy("copy", {config: splits, "other": {"test": other}}, features)
    data = dataclasses.replace(DataSettings(cache_dir=str(tmp_path / "cache")), **{task: str(folder)})
    test = load_test(task, language(code), data)
    assert test["label"].tolist() == [0, 1, 2]
    assert labels(test, TASKS[task].labels) == list(order)
    assert test["text"].tolist() == ["a", "b", "c"]
    assert test["text_pair"].tolist() == (["x", "y", "z"] if pair else [None] * 3)
    assert test["id"].tolist() == (["1", "2", "3"] if pair else ["7", "8", "9"])
    assert load_test(task, language(code), data, "dev")["text"].tolist() == ["c", "b", "a"]


def test_smsa_hub_integers_are_not_nusax_integers(
    hub_copy: Callable[..., Path], upstream: Upstream, tmp_path: Path
) -> None:
    columns = {"text": ["bagus sekali", "biasa", "jelek sekali"], "label": [0, 1, 2]}
    valid = {"text": ["mantap", "lumayan", "buruk"], "label": [0, 1, 2]}
    folder = hub_copy("indonlu", {"smsa": {"train": columns, "validation": valid}})
    data = DataSettings(root=str(upstream.root), smsa=str(folder), cache_dir=str(tmp_path / "cache"))
    loaded = load_train("smsa", language("ind"), data, seed=0)
    assert labels(loaded.train, SENTIMENT) == ["positive", "neutral", "negative"]
    assert labels(loaded.valid, SENTIMENT) == ["positive", "neutral", "negative"]


def test_multinli_hub_form_drops_unlabelled_rows(hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    columns = {
        "pairID": [f"{i}" for i in range(20)],
        "premise": [f"premise {i}" for i in range(20)],
        "hypothesis": ["h"] * 20,
        "label": [-1, *[i % 3 for i in range(1, 20)]],
    }
    folder = hub_copy("multi_nli", {"default": {"train": columns}})
    data = DataSettings(multinli=str(folder), root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    loaded = load_train("multinli", language("eng"), data, seed=0)
    assert loaded.report["train"]["unlabelled"] == 1
    both = pd.concat([loaded.train, loaded.valid])
    assert {row_id: int(row_id) % 3 for row_id in both["id"]} == dict(zip(both["id"], both["label"], strict=True))


def test_hub_problems_are_one_message(hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = hub_copy("nusax", {"ace": {"test": {"text": ["a"], "label": [5]}}, "ban": {"test": {"words": ["a"]}}})
    data = DataSettings(nusax=str(folder), cache_dir=str(tmp_path / "cache"))
    for code, message in (
        ("ace", r"row 1: unknown label 5; known are 0 to 2"),
        ("ban", r"no column 'text'.* words"),
        ("bbc", "bbc"),
    ):
        with pytest.raises(DeftxError, match=message):
            load_test("nusax", language(code), data)
    with pytest.raises(DeftxError, match=r"split 'validation', could not be loaded with datasets: .*data.root"):
        load_test("nusax", language("ace"), data, "dev")


def test_hub_ids_commits_and_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of the hub and of ``datasets`` for each set, without asking."""
    asked, calls = [], []

    class Api:
        def repo_info(self, repo_id: str, *, revision: str | None, repo_type: str, timeout: float) -> object:
            asked.append((repo_id, revision, repo_type))
            return SimpleNamespace(sha=f"{len(asked):040x}")

    class Builder:
        def __init__(self, commit: str) -> None:
            self.hash = commit

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self, split: str) -> None:
            calls[-1] += (split,)
            raise ValueError("nothing here")

    def load_dataset_builder(path: str, name: str | None, *, revision: str, cache_dir: str | None) -> Builder:
        calls.append((path, name, int(revision, 16), cache_dir))
        return Builder(revision)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    resolve_commit.cache_clear()
    data = DataSettings(revisions={"nusax": "abc", "xnli": "x1", "multinli": "m1"}, cache_dir="/c")
    requests: list[Callable[[], object]] = [
        lambda: load_test("nusax", language("sun"), data),
        lambda: load_test("americasnli", language("quy"), data, "dev"),
        lambda: load_test("xnli", language("swa"), data),
        lambda: load_train("multinli", language("eng"), data, 0),
        lambda: load_train("multinli", language("spa"), data, 0),
    ]
    for request in requests:
        with pytest.raises(DeftxError, match="nothing here"):
            request()
    resolve_commit.cache_clear()
    assert asked == [
        ("mteb/NusaX-senti", "abc", "dataset"),
        ("nala-cub/americas_nli", None, "dataset"),
        ("facebook/xnli", "x1", "dataset"),
        ("nyu-mll/multi_nli", "m1", "dataset"),
    ]
    assert calls == [
        ("mteb/NusaX-senti", "sun", 1, "/c", "test"),
        ("nala-cub/americas_nli", "quy", 2, "/c", "validation"),
        ("facebook/xnli", "sw", 3, "/c", "test"),
        ("nyu-mll/multi_nli", None, 4, "/c", "train"),
        ("facebook/xnli", "es", 3, "/c", "train"),
    ]


def test_smsa_without_a_clone_is_upstreams_file(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = "https://raw.githubusercontent.com/IndoNLP/indonlu/ce728f6926a36174b9923dfe49d6a6839b6e9bb7/"

    def download(url: str, cache_dir: str | None) -> Path:
        assert url.startswith(f"{repository}dataset/smsa_doc")
        assert cache_dir == str(tmp_path)
        return upstream.root / "indonlu" / url.removeprefix(repository)

    monkeypatch.setattr(reader, "download", download)
    data = DataSettings(nusax=str(upstream.root / "nusax"), cache_dir=str(tmp_path))
    loaded = load_train("smsa", language("ind"), data, seed=0)
    assert (len(loaded.train), len(loaded.valid)) == (30, 9)


# --- training data


def test_smsa_loses_the_originals_of_nusax(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    leaked = [clones.indonesian["test"][0].upper(), clones.indonesian["valid"][1].replace(" ", "  ")]
    folder = tmp_path / "indonlu/dataset/smsa_doc-sentiment-prosa"
    train, valid = (folder / f"{split}_preprocess.tsv" for split in ("train", "valid"))
    own = clones.indonesian["train"][0]
    train.write_text(
        train.read_text() + "".join(f"{text} ya\tpositive\n" for text in [*leaked, leaked[0], own, "sama saja"])
    )
    valid.write_text(valid.read_text() + f"{leaked[0]} .\tnegative\nsama saja ya\tpositive\n")
    loaded = load_train("smsa", language("ind"), DataSettings(root=str(tmp_path)), seed=0)
    texts = set(loaded.train["text"])
    assert not {f"{' '.join(text.split())} ya" for text in leaked} & texts
    assert f"{own} ya" in texts  # NusaX train rows may be learnt from
    report = loaded.report
    assert report["train"]["rows"] == 35
    assert report["train"]["leak"]["by_kind"] == {"exact": 3, "near": 0, "contained": 0, "fragment": 0}
    assert report["train"]["in_valid"] == 1
    assert report["train"]["kept"] == len(loaded.train) == 31
    assert report["valid"]["leak"]["dropped"] == 1
    assert report["valid"]["kept"] == len(loaded.valid) == 10
    assert report["leak"]["threshold"] == 0.7
    assert report["leak"]["protected"] == 12
    assert len(report["leak"]["sets"]) == 2
    assert json.loads(json.dumps(report)) == report


def test_smsa_needs_the_originals(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    (clones.root / "nusax/datasets/sentiment/indonesian/test.csv").unlink()
    with pytest.raises(DeftxError, match="nusax has no test file for 'indonesian'"):
        load_train("smsa", language("ind"), DataSettings(root=str(tmp_path)), seed=0)


def test_smsa_validates_on_its_own_rows_alone(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    (clones.root / "indonlu/dataset/smsa_doc-sentiment-prosa/valid_preprocess.tsv").unlink()
    with pytest.raises(DeftxError, match=r"smsa has no dev file for 'indonesian': .*valid_preprocess\.tsv; upstream"):
        load_train("smsa", language("ind"), DataSettings(root=str(tmp_path)), seed=0)


def test_nusax_train_keeps_its_own_validation(upstream: Upstream) -> None:
    loaded = load_train("nusax", language("bbc"), DataSettings(root=str(upstream.root)), seed=0)
    assert (len(loaded.train), len(loaded.valid)) == (9, 6)


def test_multinli_validates_on_whole_premises(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    extra = [
        [row.split("\t")[0].upper() + " !", "new hypothesis", "neutral"]
        for row in lines(clones, "multinli/train-en.tsv")
    ]
    write(tmp_path / "multinli/train_extra-en.tsv", tsv("premise hypothesis label", extra[::3]))
    data = DataSettings(root=str(tmp_path), valid_fraction=0.25)
    loaded = load_train("multinli", language("eng"), data, seed=3)
    train, valid = ({text.strip(" !").lower() for text in frame["text"]} for frame in (loaded.train, loaded.valid))
    assert len(train) == 15
    assert len(valid) == 5
    assert not train & valid
    assert len(loaded.valid) == 20  # 25 % of 80: premises of four pairs each
    again = load_train("multinli", language("eng"), data, seed=3)
    assert fingerprint_rows(again.valid) == fingerprint_rows(loaded.valid)
    other = load_train("multinli", language("eng"), data, seed=4)
    assert fingerprint_rows(other.valid) != fingerprint_rows(loaded.valid)


def lines(clones: Upstream, name: str) -> list[str]:
    return (clones.root / name).read_text().splitlines()[1:]


def test_xnli_rows_neither_train_nor_select(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    evaluation = [row for split in ("dev", "test") for row in lines(clones, f"xnli/{split}-en.tsv")]
    file = tmp_path / "multinli/train-en.tsv"
    premise_only = evaluation[0].split("\t")[0] + "\ta hypothesis that nobody has evaluated so far\tneutral"
    file.write_text(file.read_text() + "".join(f"{row}\n" for row in [*evaluation, premise_only]))
    loaded = load_train("multinli", language("eng"), DataSettings(root=str(tmp_path)), seed=0)
    assert loaded.report["train"]["leak"]["by_kind"]["exact"] == 12
    assert len(loaded.train) + len(loaded.valid) == 61


@pytest.mark.parametrize(("fraction", "rows", "texts"), [(0.05, 9, 9), (0.5, 4, 1), (0.0, 9, 9), (1.0, 9, 9)])
def test_too_few_rows_to_split(fraction: float, rows: int, texts: int) -> None:
    frame = pd.DataFrame({"text": [f"t{i % texts}" for i in range(rows)]})
    with pytest.raises(DeftxError, match=f"data.valid_fraction={fraction}"):
        split_by_text(frame, fraction, 0, "set")


def test_a_split_always_leaves_something_to_learn_from() -> None:
    train, valid = split_by_text(pd.DataFrame({"text": ["a", "b", "b", "b"]}), 0.9, 0, "set")
    assert set(train["text"]) | set(valid["text"]) == {"a", "b"}
    assert not set(train["text"]) & set(valid["text"])


# --- files of one's own


def own_files(root: Path, kind: str) -> None:
    header = "premise hypothesis label" if kind == "nli" else "text label"
    words = NLI_WORDS if kind == "nli" else ("positive", "negative", "neutral")
    for split, count in (("train", 24), ("test", 3)):
        rows = [[f"{split} {kind} number {i}", *(["h"] if kind == "nli" else []), words[i % 3]] for i in range(count)]
        write(root / kind / "xxx" / f"{split}.tsv", tsv(header, rows))


@pytest.mark.parametrize(("task", "kind"), [("sentiment", "sentiment"), ("nli", "nli"), ("synthetic", "sentiment")])
def test_own_files_below_the_root(tmp_path: Path, task: str, kind: str) -> None:
    own_files(tmp_path, kind)
    data = DataSettings(root=str(tmp_path), leak_threshold=2)
    loaded = load_train(task, OWN, data, seed=0)
    assert (len(loaded.train), len(loaded.valid)) == (23, 1)
    test = load_test(task, OWN, data)
    assert labels(test, TASKS[task].labels) == list(NLI_WORDS if kind == "nli" else ("positive", "negative", "neutral"))
    with pytest.raises(DeftxError, match=f"{task} has no dev file for 'xxx'"):
        load_test(task, OWN, data, "dev")
    write(tmp_path / kind / "xxx" / "valid.tsv", (tmp_path / kind / "xxx/test.tsv").read_text())
    assert len(load_test(task, OWN, data, "dev")) == 3
    assert len(load_train(task, OWN, data, seed=0).valid) == 3
    assert len(load_train(task, OWN, data, seed=0).train) == 24


def test_own_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_files(tmp_path, "sentiment")
    monkeypatch.chdir(tmp_path)
    data = DataSettings(
        train="sentiment/xxx/train.tsv", test="sentiment/{language}/test.tsv", valid="missing-{language}.tsv"
    )
    assert len(load_test("sentiment", OWN, data)) == 3
    with pytest.raises(DeftxError, match=r"sentiment has no dev file for 'xxx': .*missing-xxx\.tsv"):
        load_train("sentiment", OWN, data, seed=0)
    data.valid = None
    assert len(load_train("sentiment", OWN, data, seed=0).valid) == 1


def test_own_test_sentences_are_not_learnt(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    own = write(
        tmp_path / "sentiment/ind/test.tsv", tsv("text label", [["satu dua tiga empat lima enam tujuh", "neutral"]])
    )
    rows = [
        [f"{sentence_} lagi", "neutral"] for sentence_ in [*clones.indonesian["train"], *clones.indonesian["train"]]
    ]
    rows += [
        ["Satu, dua, tiga, empat, lima, enam, tujuh!", "neutral"],
        [clones.indonesian["test"][0] + " ya", "neutral"],
    ]
    write(tmp_path / "sentiment/ind/train.tsv", tsv("text label", rows))
    data = DataSettings(root=str(tmp_path), valid_fraction=0.2)
    loaded = load_train("sentiment", language("ind"), data, seed=0)
    assert loaded.report["train"]["leak"]["dropped"] == 2
    assert any(own in place.files for place in train_places("sentiment", language("ind"), data).protected)


OTHERS = [[f"satu kalimat nomor {word} yang tidak sama {word}", "neutral"] for word in "abcdefghijklmnopqrst"]


@pytest.mark.parametrize("train", ["sentiment", "tsv"])
def test_files_of_ones_own_hold_no_row_of_a_public_set_in_any_language(tmp_path: Path, train: str) -> None:
    write_clones(tmp_path)
    evaluated = load_test("nusax", language("ace"), DataSettings(root=str(tmp_path)))["text"].tolist()
    file = write(tmp_path / "mixed.tsv", tsv("text label", [*OTHERS, *([text, "neutral"] for text in evaluated)]))
    data = DataSettings(root=str(tmp_path), train=str(file), labels=list(SENTIMENT))
    evaluation = Evaluation("nusax", ("test",), (language("ind"), language("ace")))
    loaded = load_train(train, language("ind"), data, seed=0, evaluation=evaluation)
    assert not {*loaded.train["text"], *loaded.valid["text"]} & set(evaluated)
    assert len(loaded.train) + len(loaded.valid) == len(OTHERS)


def test_evaluated_rows_do_not_choose_a_checkpoint_under_any_name(tmp_path: Path) -> None:
    rows = tsv("text label", [[f"kalimat uji {word} sekali lagi {word}", "neutral"] for word in "abcdefgh"])
    train = write(tmp_path / "train.tsv", tsv("text label", OTHERS))
    test, copy = (write(tmp_path / name, rows) for name in ("test.tsv", "copy.tsv"))
    evaluation = Evaluation("sentiment", ("test",), (OWN,))
    for valid in (test, copy):
        data = DataSettings(train=str(train), valid=str(valid), test=str(test))
        with pytest.raises(DeftxError, match="none of 8 validation rows is left: 8 are sentences of evaluation sets"):
            load_train("sentiment", OWN, data, seed=0, evaluation=evaluation)
    # Dev rows choose checkpoints by their nature; a copy of them is the same rows.
    write(tmp_path / "other.tsv", tsv("text label", [["tidak ada yang sama di sini sama sekali", "neutral"]]))
    evaluation = Evaluation("sentiment", ("dev",), (OWN,))
    for valid in (test, copy):
        data = DataSettings(train=str(train), valid=str(valid), test=str(tmp_path / "other.tsv"))
        assert len(load_train("sentiment", OWN, data, seed=0, evaluation=evaluation).valid) == 8


def test_a_training_label_means_what_the_task_means_by_it(tmp_path: Path) -> None:
    pairs = [(text, SENTIMENT[number % 3]) for number, (text, _) in enumerate(OTHERS)]
    file = write(tmp_path / "train.tsv", tsv("text label", [list(pair) for pair in pairs]))
    told = dict(pairs)
    for order in (SENTIMENT, SENTIMENT[::-1]):
        data = DataSettings(train=str(file), labels=list(order))
        loaded = load_train("tsv", OWN, data, seed=0, evaluation=Evaluation("sentiment"))
        for frame in (loaded.train, loaded.valid):
            assert labels(frame, SENTIMENT) == [told[text] for text in frame["text"]]
    data = DataSettings(train=str(file), labels=["no", "yes"])
    with pytest.raises(
        DeftxError, match=r"task.train=tsv has the labels no, yes, and task=sentiment asks for negative"
    ):
        load_train("tsv", OWN, data, seed=0, evaluation=Evaluation("sentiment"))


def test_named_training_rows_without_validation_rows_hold_out_a_part(tmp_path: Path) -> None:
    own_files(tmp_path, "sentiment")
    file = write(tmp_path / "mine.tsv", tsv("text label", OTHERS))
    data = DataSettings(root=str(tmp_path), train=str(file), valid_fraction=0.25)
    loaded = load_train("sentiment", OWN, data, seed=0)
    assert len(loaded.valid) == 5
    assert set(loaded.valid["text"]) <= {text for text, _ in OTHERS}


def test_sets_of_sentences_are_known_by_their_letters(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["Satu, dua", "tiga"], "text_pair": [None, "empat"]})
    again = pd.DataFrame({"text": ["TIGA", "satu dua!", "tiga"], "text_pair": ["empat", None, "empat"]})
    assert digest_rows(frame) == digest_rows(again)
    assert digest_rows(frame) != digest_rows(frame[:1])
    write_clones(tmp_path)
    data = DataSettings(root=str(tmp_path))
    assert digest_rows(load_test("nusax", language("ace"), data)) in protected_texts(language("ace"), data).sets
    assert digest_rows(load_test("nusax", language("ban"), data)) not in protected_texts(language("ace"), data).sets


def test_labels_of_ones_own(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "label,text,note\nyes,a,x\nno,b,y\n")
    data = DataSettings(test=str(file), labels=["no", "yes"])
    assert task_spec("tsv", data).labels == ("no", "yes")
    assert load_test("tsv", OWN, data)["label"].tolist() == [1, 0]
    pairs = write(tmp_path / "p.tsv", tsv("premise hypothesis label", [["a", "b", "no"]]))
    assert load_test("tsv", OWN, DataSettings(test=str(pairs), labels=["no", "yes"]))["text_pair"].tolist() == ["b"]
    with pytest.raises(DeftxError, match=r"data.labels=\[no,yes\]"):
        load_test("tsv", OWN, DataSettings(test=str(file)))
    # Labels of a known set may be spelt as there.
    known = write(tmp_path / "k.tsv", tsv("premise hypothesis label", [["a", "b", "contradictory"], ["c", "d", "-"]]))
    rows = load_test("tsv", OWN, DataSettings(test=str(known), labels=list(NLI)))
    assert rows["label"].tolist() == [2]
    assert rows.attrs["dropped"]["unlabelled"] == 1


# --- what is wrong, in one message

BAD_FILES = {
    "unknown label": (
        "text\tlabel\na\tpositive\nb\tgreat\n",
        r"t\.tsv: row 2: unknown label 'great'; known are negative, neutral, positive",
    ),
    "no column": ("sentence\tlabel\na\tpositive\n", r"t\.tsv: no column 'text'; .* names sentence, label"),
    "no label column": (
        "text\ttag\na\tpositive\n",
        r"t\.tsv: no column 'label'; its first line must name the columns, and names text, tag",
    ),
    "cells": ("text\tlabel\na\tpositive\nb\tc\tpositive\n", r"t\.tsv: row 2 has 3 cells, not 2 \(text, label\)"),
    "a column twice": ("text\tlabel\ttext\na\tpositive\tb\n", r"t\.tsv: its first line names text more than once"),
    "empty": ("", r"t\.tsv is empty"),
    "blank": ("\n \n", r"t\.tsv is empty"),
    "header only": ("text\tlabel\n", r"t\.tsv has a header but no rows"),
    "nothing usable": ("text\tlabel\n \tpositive\n", r"no usable rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    text, message = BAD_FILES[name]
    file = write(tmp_path / "t.tsv", text)
    with pytest.raises(DeftxError, match=message):
        load_test("sentiment", OWN, DataSettings(test=str(file)))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_bytes(b"\xef\xbb\xbftext\tlabel\ncaf\xc3\xa9\tneutral\ncaf\xe9\tneutral\n")
    with pytest.raises(DeftxError, match=r"t\.tsv: not UTF-8: byte 0xe9 at offset 31, line 3"):
        load_test("sentiment", OWN, DataSettings(test=str(file)))
    assert file.read_bytes()[31] == 0xE9


def test_csv_rows_count_records_not_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", 'text,label\n"two\nlines",positive\nb,good\n')
    with pytest.raises(DeftxError, match="row 2: unknown label 'good'"):
        load_test("sentiment", OWN, DataSettings(test=str(file)))


@pytest.mark.parametrize(
    ("task", "code", "split", "message"),
    [
        ("nusaks", "ace", "test", "unknown task 'nusaks'; did you mean 'nusax'"),
        ("nusax", "quy", "test", "language 'quy' is not in nusax; its languages are ace, ban, bbc"),
        ("americasnli", "spa", "test", "language 'spa' is not in americasnli; its languages are aym, bzd"),
        ("nusax", "ace", "validation", "split='validation': must be test or dev"),
    ],
)
def test_bad_requests(upstream: Upstream, task: str, code: str, split: str, message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        load_test(task, language(code), DataSettings(root=str(upstream.root)), split)


@pytest.mark.parametrize(
    ("train", "code", "message"),
    [
        ("smsaa", "ind", "unknown training set 'smsaa'; did you mean 'smsa'"),
        ("smsa", "jav", "language 'jav' is not in smsa; its languages are ind; .*task.train=nusax"),
        ("multinli", "quy", "language 'quy' is not in multinli; its languages are ar, bg"),
        ("nusax", "deu", "language 'deu' is not in nusax"),
    ],
)
def test_bad_training_requests(upstream: Upstream, train: str, code: str, message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        load_train(train, language(code), DataSettings(root=str(upstream.root)), seed=0)


def test_a_missing_test_file_is_refused_and_dev_is_never_silent(tmp_path: Path) -> None:
    data = DataSettings(root=str(write_clones(tmp_path).root))
    test = tmp_path / "americasnli/data/anli_final/test/oto.tsv"
    test.unlink()
    with pytest.raises(
        DeftxError, match=r"americasnli has no test file for 'oto': .*oto\.tsv.*split=dev evaluates on it"
    ):
        load_test("americasnli", language("oto"), data)
    assert len(load_test("americasnli", language("oto"), data, "dev")) == 6
    (tmp_path / "americasnli/data/anli_final/dev/oto.tsv").unlink()
    with pytest.raises(DeftxError, match="no dev file either"):
        load_test("americasnli", language("oto"), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "{tmp}/none"}, r"data\.root=.*none: no such folder"),
        ({"root": "{tmp}"}, r"no folder .*nusax; clone https://github.com/IndoNLP/nusax.*data.nusax=mteb/NusaX-senti"),
        ({"nusax": "{tmp}/none"}, r"data\.nusax=.*none: no such folder, and not a hub id"),
    ],
)
def test_folders_that_are_not_there(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    data = DataSettings(**{key: value.format(tmp=tmp_path) for key, value in settings.items()})
    with pytest.raises(DeftxError, match=message):
        load_test("nusax", language("ace"), data)


# --- protection and fingerprints


def test_protected_texts_are_dev_and_test_of_what_is_at_hand(tmp_path: Path) -> None:
    clones = write_clones(tmp_path)
    data = DataSettings(root=str(tmp_path))
    texts = protected_texts(language("eng"), data).texts
    assert len(texts) == len(set(texts)) == 12 + 24  # NusaX valid + test; premises and hypotheses of XNLI dev + test
    assert len(protected_texts(language("quy"), data).texts) == 24
    (tmp_path / "americasnli/data/anli_final/test/quy.tsv").unlink()
    assert len(protected_texts(language("quy"), data).texts) == 12
    data.protect = ["nusax"]
    assert sorted(protected_texts(language("ind"), data).texts) == sorted(
        f"{text}, ya" for split in ("valid", "test") for text in clones.indonesian[split]
    )
    assert protected_texts(language("quy"), data).texts == []
    assert protected_texts(language("ace"), DataSettings(root=str(tmp_path / "xnli"))).texts == []
    data.protect = ["nusaks"]
    with pytest.raises(DeftxError, match=r"data\.protect: 'nusaks'"):
        protected_texts(language("ind"), data)


def test_fingerprint_sees_every_cell(upstream: Upstream) -> None:
    rows = load_test("xnli", language("eng"), DataSettings(root=str(upstream.root)))
    prints = {fingerprint_rows(rows)}
    for column, value in (("id", "z"), ("text", "z"), ("text_pair", "z"), ("label", 1 - rows["label"][0])):
        changed = rows.copy()
        changed.loc[0, column] = value
        prints.add(fingerprint_rows(changed))
    prints.add(fingerprint_rows(rows.iloc[::-1]))
    assert len(prints) == 6


def test_rows_survive_parquet(upstream: Upstream, tmp_path: Path) -> None:
    for task, code in (("nusax", "ace"), ("xnli", "eng")):
        rows = load_test(task, language(code), DataSettings(root=str(upstream.root)))
        rows.to_parquet(tmp_path / "rows.parquet")
        assert fingerprint_rows(pd.read_parquet(tmp_path / "rows.parquet")) == fingerprint_rows(rows)


# --- the shared data


@pytest.mark.parametrize(
    ("task", "code", "split", "counts"),
    [
        ("nusax", "min", "test", [153, 96, 151]),
        ("nusax", "eng", "dev", [38, 24, 38]),
        ("americasnli", "quy", "test", [250, 250, 250]),
        ("americasnli", "oto", "dev", [78, 69, 75]),
        ("xnli", "tur", "test", [1670, 1670, 1670]),
        ("xnli", "urd", "dev", [830, 830, 830]),
    ],
)
def test_shared_evaluation_sets(shared_data: Path, task: str, code: str, split: str, counts: list[int]) -> None:
    rows = load_test(task, language(code), DataSettings(root=str(shared_data)), split)
    assert rows["label"].value_counts().sort_index().tolist() == counts


def test_shared_smsa(shared_data: Path) -> None:
    loaded = load_train("smsa", language("ind"), DataSettings(root=str(shared_data)), seed=0)
    report = loaded.report
    assert (report["train"]["rows"], report["valid"]["rows"]) == (11000, 1260)
    assert report["train"]["leak"]["by_kind"] == {"exact": 269, "near": 193, "contained": 7, "fragment": 0}
    assert report["valid"]["leak"]["by_kind"] == {"exact": 2, "near": 6, "contained": 0, "fragment": 0}
    assert report["train"]["kept"] == len(loaded.train) == 11000 - 469 - report["train"]["in_valid"]


def test_shared_americasnli_comes_from_xnli(shared_data: Path) -> None:
    """AmericasNLI's ids point at XNLI rows with the same label: the leak this room guards against."""
    data = DataSettings(root=str(shared_data))
    spanish = load_test("xnli", language("spa"), data, "dev").set_index("id")["label"]
    aymara = load_test("americasnli", language("aym"), data, "dev")
    assert [spanish[str(int(row_id) - 12450)] for row_id in aymara["id"]] == aymara["label"].tolist()
