"""Nothing that trains has seen what is evaluated: text, rows, and the base's own text and tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_study import FEW, SMALL, Command

LETTER = "ж"  # in evaluation sentences alone
WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "ne", "so") for c in ("", "n", "k", "ta")]


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., list[str]]:
    """Files of one's own in which sentences of one evaluation set stand in every text and among the training rows."""

    def write(split: str) -> list[str]:
        rng = random.Random(7)
        labels = ("negative", "neutral", "positive")

        def sentence(letter: str = "") -> str:
            return " ".join(rng.choice(WORDS) for _ in range(12)) + (f" {letter}{rng.choice(WORDS)}" if letter else "")

        def table(path: str, texts: list[str]) -> None:
            file = tmp_path / "data" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [f"{text}\t{labels[number % 3]}\n" for number, text in enumerate(texts)]
            file.write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")

        evaluated = [sentence(LETTER) for _ in range(12)]
        other = "valid" if split == "test" else "test"
        table(f"sentiment/qba/{split}.tsv", evaluated)
        table(f"sentiment/qba/{other}.tsv", [sentence() for _ in range(12)])
        table("sentiment/qaa/train.tsv", [sentence() for _ in range(40)] + evaluated[:4])
        table("sentiment/qaa/valid.tsv", [sentence() for _ in range(12)] + evaluated[4:6])
        for code in ("qaa", "qab", "qac", "qba"):
            lines = [sentence() for _ in range(80)]
            lines[20:20] = evaluated[6:]
            (tmp_path / "data" / "unlabelled").mkdir(exist_ok=True)
            (tmp_path / "data" / f"unlabelled/{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ["task=sentiment", "task.source=qaa", f"data.root={tmp_path / 'data'}", "model.vocabulary=[qba]", *FEW]

    return write


@pytest.mark.parametrize("split", ["test", "dev"])
def test_evaluation_sentences_of_ones_own_reach_nothing_that_trains(
    deftx: Command, own: Callable[..., list[str]], tmp_path: Path, split: str
) -> None:
    cache = tmp_path / "cache"
    outcome = deftx("run", *own("test" if split == "test" else "valid"), f"split={split}", cache=cache)
    assert outcome.status == 0, outcome.err
    trained = [
        *cache.glob("pretrain/*/model/tokenizer.json"),
        *cache.glob("corpus/*/*.txt"),
        *cache.glob("task/*/*.parquet"),
    ]
    assert len(trained) == 1 + 2 * 2 + 2
    assert [path for path in trained if LETTER in path.read_bytes().decode("utf-8", "ignore")] == []
    data = outcome.result()["data"]
    assert data["rows sentiment qaa"]["train"]["leak"]["dropped"] == 4
    assert data["rows sentiment qaa"]["valid"]["leak"]["dropped"] == 2
    texts = {name: report for name, report in data.items() if "text" in name}
    assert set(texts) == {"text qaa", "text qba", *(f"base text {code}" for code in ("qaa", "qab", "qac", "qba"))}
    assert {report["leak"]["dropped"] for report in texts.values()} == {6}


def test_given_sfts_that_were_not_kept_clear_are_named(
    deftx: Command, own: Callable[..., list[str]], tmp_path: Path
) -> None:
    cache, common = tmp_path / "cache", own("test")
    assert deftx("run", *common, "only=[base]", cache=cache).status == 0
    [base] = cache.glob("pretrain/*/model")
    here = ["task=sentiment", "task.source=qaa", f"data.root={tmp_path / 'data'}", "language=qba", "logger=csv"]
    here += ["model=local", f"model.path={base}", "trainer=cpu", "trainer.threads=1", "trainer.progress=false"]
    later = tmp_path / "later.tsv"
    rows = (tmp_path / "data/sentiment/qba/test.tsv").read_text(encoding="utf-8")
    later.write_text(f"{rows}one sentence more\tneutral\n", encoding="utf-8")
    for kind in ("language", "task"):
        size = ["budget=smoke", "k=200", "rank=4"]
        made = deftx("sft", f"kind={kind}", f"out={tmp_path / kind}", *here, *size, cache=cache, small=False)
        assert made.status == 0, made.err
    given = [f"task_sft={tmp_path / 'task'}", f"language_sft.qba={tmp_path / 'language'}"]
    for files, named in (([], None), ([f"data.test={later}"], ["φ_L of qba", "φ_T, with qba's rows"])):
        outcome = deftx("eval", *here, *given, *files, cache=cache, small=False)
        assert outcome.status == 0, outcome.err
        notes = {note["kind"]: note["about"] for note in outcome.result()["notes"]}
        assert notes.get("unfiltered") == named
    assert "scores may be too high: φ_L of qba" in " ".join(outcome.out.split())


def test_with_the_filter_off_they_do(deftx: Command, own: Callable[..., list[str]], tmp_path: Path) -> None:
    off = ["data.leak_threshold=2", "corpus.leak_threshold=2", "only=[base]"]
    outcome = deftx("run", *own("test"), *off, cache=tmp_path / "cache")
    assert outcome.status == 0, outcome.err
    [tokenizer] = (tmp_path / "cache").glob("pretrain/*/model/tokenizer.json")
    assert LETTER in tokenizer.read_text(encoding="utf-8")


def test_a_base_has_not_learnt_from_the_lines_that_choose_checkpoints(
    deftx: Command, own: Callable[..., list[str]], tmp_path: Path
) -> None:
    import json

    cache = tmp_path / "cache"
    assert deftx("run", *own("test"), cache=cache).status == 0
    [report] = [json.loads(path.read_text()) for path in cache.glob("pretrain/*/text.json")]
    held = {path.parent: path.read_text().splitlines() for path in cache.glob("corpus/*/valid.txt")}
    for folder, lines in held.items():
        [code] = [code for code in ("qaa", "qba") if lines[0] in (tmp_path / f"data/unlabelled/{code}.txt").read_text()]
        text = json.loads((folder / "report.json").read_text())
        assert (text["valid"], text["train"]) == (report[code]["valid"], report[code]["train"]) == (len(lines), 64)
        assert lines == (tmp_path / f"data/unlabelled/{code}.txt").read_text().splitlines()[: len(lines)]


@pytest.mark.parametrize("form", ["txt", "tsv", "csv", "nusax"])
def test_pretraining_keeps_out_what_it_is_told_to(
    deftx: Command, own: Callable[..., list[str]], tmp_path: Path, form: str
) -> None:
    own("test")
    rows = [line.split("\t") for line in (tmp_path / "data/sentiment/qba/test.tsv").read_text().splitlines()[1:]]
    content = {
        "txt": "".join(f"{text}\n" for text, _ in rows),
        "tsv": "premise\thypothesis\tlabel\n" + "".join(f"{text}\tshort\tx\n" for text, _ in rows),
        "csv": "id,text,label\n" + "".join(f'{number},"{text}",x\n' for number, (text, _) in enumerate(rows)),
        "nusax": "id,text,label\n"
        + "".join(f'{number},"{text}",{label}\n' for number, (text, label) in enumerate(rows)),
    }[form]
    file = tmp_path / ("nusax/datasets/sentiment/minangkabau/test.csv" if form == "nusax" else f"later.{form}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    protect = f"protect=[nusax] data.nusax={tmp_path / 'nusax'}" if form == "nusax" else f"protect=[{file}]"
    text = tmp_path / "data/unlabelled/qba.txt"
    cache, out = tmp_path / "cache", tmp_path / "made"
    outcome = deftx("pretrain", f"text=[{text}]", *protect.split(), f"out={out}", cache=cache)
    assert outcome.status == 0, outcome.err
    assert LETTER not in (out / "tokenizer.json").read_text(encoding="utf-8")
    assert "6 dropped like any of" in outcome.out
    assert "(6 exact)" in outcome.out
    assert f"such as '{rows[6][0]}'" in outcome.out


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ("none.tsv", "protect=none.tsv: no such file, and none of nusax, americasnli, xnli"),
        ("nusax", "protect=nusax: there are no rows of it"),
        ("bad.csv", "no column 'text'; its first line must name the columns, and names a, b"),
    ],
)
def test_what_cannot_be_protected_is_refused(deftx: Command, tmp_path: Path, protect: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "t.txt").write_text("".join(f"line {number}\n" for number in range(60)))
    (tmp_path / "root").mkdir()
    outcome = deftx("pretrain", "text=[t.txt]", f"protect=[{protect}]", f"data.root={tmp_path / 'root'}", "out=made")
    assert outcome.status == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "made").exists()


def test_text_without_protection_is_said(deftx: Command, tmp_path: Path) -> None:
    assert SMALL
    (tmp_path / "t.txt").write_text("".join(f"line {number} of some text\n" for number in range(60)))
    outcome = deftx("pretrain", "text=[t.txt]", "out=made")
    assert outcome.status == 0, outcome.err
    assert "nothing was kept out of this text: protect=[FILE, nusax, ...]" in outcome.out
