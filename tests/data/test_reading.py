"""What is malformed is an error with its file and row, in every reader; what a person cannot see is not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from upstream_folders import tsv, write

from deftx.data.corpora import clean_line
from deftx.data.labelled import task_spec
from deftx.data.reading import read_jsonl, read_table
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.data.tasks import load_test
from deftx.errors import DeftxError


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('id,text,label\n1,"Good,yes\n2,fine" ok,no\n3,last,no\n', "row 1, from line 2"),
        ('id,text,label\n1,fine,no\n2,"open,yes\n3,last,no\n', "row 2, from line 3"),
        ('id,text,label\n1,"a "quoted" word",no\n', "row 1, from line 2"),
        ('id,text,label\n\n1,"two\nlines",no\n2,"bad" ,no\n', "row 2, from line 5"),
    ],
)
def test_a_stray_quote_is_an_error_with_its_row(tmp_path: Path, text: str, where: str) -> None:
    file = write(tmp_path / "t.csv", text)
    with pytest.raises(DeftxError, match=rf"t\.csv: {where}, is not CSV .*double quotes"):
        read_table(file)


def test_quotes_that_are_right_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", 'id,text,label\n1,"say ""no"", twice",a\n2,"two\nlines",b\n3,12" long,c\n')
    assert read_table(file)["text"].tolist() == ['say "no", twice', "two\nlines", '12" long']


@pytest.mark.parametrize("value", [None, ["x"], {"x": 1}, 1.5, True])
def test_a_field_that_is_no_text_is_an_error_with_its_line(tmp_path: Path, value: object) -> None:
    lines = [json.dumps({"a": "x"}), json.dumps({"a": value})]
    file = write(tmp_path / "t.jsonl", "\n".join(lines) + "\n")
    with pytest.raises(DeftxError, match=r"t\.jsonl: line 2 is not a JSON object with texts or numbers as a"):
        read_jsonl(file, ["a"])


@pytest.mark.parametrize(
    "blank", ["\u200b", "\u200b \u200d", "\u3164", "\u2800", "\u0301", "\ufe0f", "\u00ad", "\ufeff", "\t"]
)
def test_what_nobody_sees_is_blank(blank: str) -> None:
    assert clean_line(blank) == ""


@pytest.mark.parametrize("text", ["a", "।", "👍", "နမူနာ", "ক্\u200dষ", "\u0e01\u0e33", "!", "١"])
def test_what_a_person_sees_stays(text: str) -> None:
    assert clean_line(text) == text


def test_rows_that_look_empty_are_not_evaluated(tmp_path: Path) -> None:
    rows = [["\u200b", "negative"], ["seen", "positive"], ["\u2060 \u3164", "neutral"]]
    write(tmp_path / "sentiment/xyz/test.tsv", tsv("text label", rows))
    frame = load_test("sentiment", LanguageSettings(code="xyz", name="x"), DataSettings(root=str(tmp_path)))
    assert frame["text"].tolist() == ["seen"]
    assert frame.attrs["dropped"] == {"empty": 2, "unlabelled": 0}


def test_labels_are_known_in_any_unicode_form(tmp_path: Path) -> None:
    declared = ["n\u00e3o", "sim"]
    rows = [["one", "na\u0303o"], ["two", "N\u00c3O"], ["three", "sim\u200b"]]
    file = write(tmp_path / "test.tsv", tsv("text label", rows))
    data = DataSettings(labels=declared, test=str(file))
    assert load_test("tsv", LanguageSettings(code="xyz", name="x"), data)["label"].tolist() == [0, 0, 1]
    with pytest.raises(DeftxError, match="must differ, in more than case or Unicode form"):
        task_spec("tsv", DataSettings(labels=["n\u00e3o", "na\u0303o"]))
