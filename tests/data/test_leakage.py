"""The leak filter: what it must find, what it must leave, and that its index loses nothing of it."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import pytest
from upstream_folders import sentence

from deftx.data.leakage import FULL_LENGTH, LeakFilter, normalise, summarise
from deftx.errors import DeftxError

REVIEW = "Tempatnya nyaman sekali, makanannya enak dan harganya cukup terjangkau untuk keluarga kami."


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Tempat nya juga tidak nyaman .", "tempatnyajugatidaknyaman"),
        ("tempatnya JUGA tidak-nyaman!", "tempatnyajugatidaknyaman"),
        ("Èqkèqkë!", "eqkeqke"),
        ("ne'ẽ ne\u02bcẽ ne\u2019ẽ", "neeneenee"),
        ("Straße ﬁ Ⅳ ½", "strassefiiv12"),
        ("हिन्दी", "हिनदी"),
        ("عَرَبِيّ", "عربي"),
        ("ไม่ดี", "ไมดี"),
        ("中文，测试。", "中文测试"),
        ("... !?", ""),
    ],
)
def test_normalise(text: str, letters: str) -> None:
    assert normalise(text) == letters


@pytest.mark.parametrize(
    ("protected", "text", "kind"),
    [
        (
            REVIEW,
            "tempat nya nyaman sekali , makanan nya enak dan harga nya cukup terjangkau untuk keluarga kami .",
            "exact",
        ),
        (
            REVIEW,
            "Tempatnya nyaman sekali, makanannya lezat dan harganya cukup terjangkau untuk keluarga saya.",
            "near",
        ),
        (
            REVIEW,
            f"Hari Minggu kami ke sana lagi, seperti biasa bersama anak-anak. {REVIEW} Pasti kembali lagi nanti.",
            "contained",
        ),
        (f"{REVIEW} Pasti kembali lagi.", "makanannya enak dan harganya cukup terjangkau untuk", "fragment"),
        (REVIEW, "harganya terjangkau", None),
        (REVIEW, "Restoran ini sangat romantis dengan pemandangannya yang sangat indah di malam hari", None),
        # One pattern, two sentences: short texts get few edits ...
        ("Saya tidak kecewa dengan produk apple", "saya tidak kecewa dengan prabowo", None),
        ("¿Cuántos hijos tiene?", "¿Cuántos hijos tienes?", "near"),
        # ... and are looked for inside others only from twenty letters.
        ("No lo sé.", "Me preguntó por ellos y le dije que no lo sé, que nunca estuve allí.", None),
        ("No lo sé.", "no lo se", "exact"),
        (
            "Nunca he estado en Washington.",
            "Dijo que nunca he estado en Washington, y es verdad, por desgracia.",
            "contained",
        ),
        # Scripts without spaces, with vowel signs, with optional vowels.
        ("他告诉母亲他已经到家了，正在等待晚饭。", "他告诉母亲他已到家了，正在等待晚饭。", "near"),
        (
            "他告诉母亲他已经到家了，正在等待晚饭。",
            "昨天，他告诉母亲他已经到家了，正在等待晚饭。然后他睡了，直到第二天早上才醒来。",
            "contained",
        ),
        ("他告诉母亲他已经到家了，正在等待晚饭。", "我从来没有去过华盛顿，所以迷路了。", None),
        ("और उसने कहा, माँ, मैं घर आया हूं।", "और उसने कहा माँ मैं घर आया हूं", "exact"),
        ("وَقَالَ: أُمِّي، أَنَا فِي البَيتِ", "وقال أمي أنا في البيت", "exact"),
        ("และเขาพูดว่า ม๊า ผมอยู่บ้าน ครับ", "และเขาพูดว่าม๊าผมอยู่บ้านนะครับ", "near"),
    ],
)
def test_what_counts_as_a_leak(protected: str, text: str, kind: str | None) -> None:
    (match,) = LeakFilter([protected[::-1], protected]).matches([text])
    assert (match.kind if match else None) == kind
    if match:
        assert match.index == 1
        assert 0.7 <= match.similarity <= 1


def test_index_is_the_first_of_equal_protected_sentences() -> None:
    matches = LeakFilter(["", "!", "abc def", "Abc, def", REVIEW]).matches(["ABC DEF.", REVIEW, "", "?"])
    assert [match.index if match else None for match in matches] == [2, 4, None, None]


def test_length_counts_distinct_sentences() -> None:
    assert len(LeakFilter(["a b", "A-B", "c", ""])) == 2


@pytest.mark.parametrize("threshold", [0, -0.5])
def test_threshold_must_be_positive(threshold: float) -> None:
    with pytest.raises(DeftxError, match=f"leak_threshold={threshold}.*\\(0, 1\\]"):
        LeakFilter(["a"], threshold)


@pytest.mark.parametrize(("threshold", "found"), [(0.7, 3), (1.0, 2), (1.1, 0)])
def test_threshold_one_is_verbatim_and_above_one_is_off(threshold: float, found: int) -> None:
    texts = [REVIEW.upper(), f"Kemarin: {REVIEW}", REVIEW.replace("nyaman", "bersih")]
    assert sum(match is not None for match in LeakFilter([REVIEW], threshold).matches(texts)) == found


@pytest.mark.parametrize("protected", [[], ["", "..."]])
def test_nothing_protected_matches_nothing(protected: list[str]) -> None:
    assert LeakFilter(protected).matches(["", "text", REVIEW]) == [None, None, None]


def similarity(a: str, b: str) -> float:
    """2·LCS / (|a| + |b|) by the textbook table."""
    row = [0] * (len(b) + 1)
    for char in a:
        previous = 0
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if char == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


@pytest.mark.parametrize(("edit", "bound"), [("substitute", 0.8), ("delete", 0.9), ("insert", 0.9)])
def test_index_loses_nothing_of_an_exhaustive_comparison(edit: str, bound: float) -> None:
    """Edits scattered letter by letter are the hardest case for n-grams; real edits cluster and leave more of them."""
    found = 0
    for seed in range(150):
        rng = random.Random(seed)
        protected = [sentence(rng, rng.randint(6, 16)) for _ in range(30)]
        share = rng.uniform(0, 0.3)
        chars = list(protected[17])
        for position, char in enumerate(chars):
            if char != " " and rng.random() < share:
                letter = rng.choice("abcdefghij")
                chars[position] = {"substitute": letter, "delete": "", "insert": char + letter}[edit]
        text = "".join(chars)
        target = normalise(protected[17])
        actual = similarity(target, normalise(text))
        (match,) = LeakFilter(protected).matches([text])
        if actual >= max(bound, 1 - 0.3 * min(1, len(target) / FULL_LENGTH)):
            assert match is not None, (seed, actual)
            assert match.index == 17
            found += 1
        if match is not None and match.kind == "near":
            assert match.similarity == pytest.approx(actual, abs=1e-9)
    assert found > 50


def test_sentences_of_another_script_beside_it_hide_none() -> None:
    chinese = "今天天气很好我们一起去公园散步看花吧朋友们"
    edited = chinese.replace("公园", "学校").replace("花", "书")
    latin = [sentence(random.Random(seed), 12) for seed in range(40)]
    alone, mixed = (LeakFilter(protected).matches([edited])[0] for protected in ([chinese], [*latin, chinese]))
    assert alone is not None
    assert mixed is not None
    assert (mixed.similarity, mixed.kind, mixed.index) == (alone.similarity, alone.kind, 40)
    assert LeakFilter([*latin, chinese]).matches(latin) == LeakFilter(latin).matches(latin)


def test_a_sentence_of_common_words_only_is_still_found() -> None:
    """Frequent n-grams are left out of the index, but not where a sentence has no others."""
    rng = random.Random(1)
    words = [sentence(rng, 1) for _ in range(12)]
    protected = list({" ".join(rng.sample(words, 8)) for _ in range(3000)})
    matches = LeakFilter(protected).matches([f"{protected[5]} xyz", protected[7]])
    assert [match.index if match else None for match in matches] == [5, 7]


def test_many_texts_equal_one_by_one() -> None:
    rng = random.Random(2)
    protected = [sentence(rng) for _ in range(50)]
    texts = [sentence(rng) for _ in range(300)]
    texts[::7] = [f"{protected[i % 50]} {i}" for i in range(len(texts[::7]))]
    leak_filter = LeakFilter(protected)
    together = leak_filter.matches(texts)
    assert together == [leak_filter.matches([text])[0] for text in texts]
    assert sum(match is not None for match in together) == len(texts[::7])


def test_summary_counts_kinds_and_shows_the_most_doubtful_first() -> None:
    protected = [REVIEW]
    texts = [REVIEW, "unrelated words", REVIEW.replace("enak", "lezat"), REVIEW.replace("nyaman sekali", "bersih")]
    report = summarise(LeakFilter(protected).matches(texts), texts, protected, limit=2)
    assert report["dropped"] == 3
    assert report["by_kind"] == {"exact": 1, "near": 2, "contained": 0, "fragment": 0}
    assert [example["text"] for example in report["examples"]] == [texts[3], texts[2]]
    assert report["examples"][0]["protected"] == REVIEW


def test_smsa_rows_behind_nusax(shared_data: Path) -> None:
    """Recall on the shared overlap list by match type, and how many other rows go (read: 4 of 122 are unrelated)."""
    folder = shared_data / "indonlu"
    originals = [
        text
        for split in ("valid", "test")
        for text in pd.read_csv(
            shared_data / f"nusax/datasets/sentiment/indonesian/{split}.csv", keep_default_na=False
        ).text
    ]
    overlap = pd.read_csv(folder / "unlabelled/smsa_nusax_overlap.tsv", sep="\t", quoting=3)
    overlap = overlap[overlap.nusax_split.isin(["valid", "test"])]
    leak_filter = LeakFilter(originals)
    recall: dict[str, list[bool]] = {"exact": [], "near": []}
    unlisted = {}
    for split in ("train", "valid"):
        file = folder / f"dataset/smsa_doc-sentiment-prosa/{split}_preprocess.tsv"
        texts = pd.read_csv(file, sep="\t", quoting=3, keep_default_na=False, header=None, names=["text", "label"]).text
        found = [match is not None for match in leak_filter.matches(texts)]
        listed = overlap[overlap.smsa_split == split]
        for line, kind in zip(listed.smsa_line, listed.match, strict=True):
            recall[kind].append(found[line - 1])
        unlisted[split] = sum(found) - sum(found[line - 1] for line in set(listed.smsa_line))
    assert {kind: (sum(hits), len(hits)) for kind, hits in recall.items()} == {"exact": (271, 271), "near": (84, 84)}
    assert unlisted == {"train": 118, "valid": 4}
