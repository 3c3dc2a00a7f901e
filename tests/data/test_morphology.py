"""Measures of a text against counts by hand, and what they must not depend on."""

from __future__ import annotations

import pytest

from deftx.data.morphology import SAMPLE_WORDS, text_measures, words_of


def letters(words: list[str]) -> int:
    return sum(map(len, words))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ana vive en \u201cLima\u201d (Per\u00fa).", ["Ana", "vive", "en", "Lima", "Per\u00fa"]),
        ("don't re-use 3,5 \u2013 ok?", ["don't", "re-use", "3,5", "ok"]),
        ("\u2026 !! --", []),
        ("", []),
    ],
)
def test_words_stand_between_spaces_without_punctuation(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_measures_are_those_counted_by_hand() -> None:
    found = text_measures(["The cat saw the dog. It ran!", "the end"], letters)
    # words: the cat saw the dog | it ran | the end
    assert found["words"] == 9
    assert found["sentences"] == 3
    assert found["words_per_sentence"] == pytest.approx(9 / 3)
    assert found["type_token_ratio"] == pytest.approx(7 / 9)  # "the" three times, whatever its case
    assert found["fertility"] == pytest.approx(26 / 9)
    assert found["spaced"]


def test_the_ratio_is_over_a_sample_of_fixed_length() -> None:
    line = " ".join(f"w{number}" for number in range(100))
    short = text_measures([line] * (SAMPLE_WORDS // 100), letters)
    long = text_measures([line] * (SAMPLE_WORDS // 50), letters)
    assert short["words"] == long["words"] == SAMPLE_WORDS
    assert short["type_token_ratio"] == long["type_token_ratio"] == pytest.approx(100 / SAMPLE_WORDS)
    assert long["sentences"] == 2 * short["sentences"]


@pytest.mark.parametrize(
    "line",
    [
        "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e21\u0e32\u0e01",  # Thai
        "\u6211\u559c\u6b22\u8fd9\u672c\u4e66\u3002\u5b83\u5f88\u597d\u3002",  # Chinese
    ],
)
def test_a_script_without_spaces_is_marked(line: str) -> None:
    assert not text_measures([line] * 5, letters)["spaced"]


@pytest.mark.parametrize(
    "line",
    [
        "\u092f\u0939 \u0918\u0930 \u0939\u0948\u0964 \u0935\u0939 \u0917\u092f\u093e\u0964",  # Hindi, with dandas
        "\u6211\u6765\u3002\u4f60\u53bb\u3002",  # Chinese
    ],
)
def test_sentences_end_in_other_scripts_too(line: str) -> None:
    assert text_measures([line], letters)["sentences"] == 2


def test_a_text_without_words_has_no_measures() -> None:
    found = text_measures(["...", ""], letters)
    assert found["fertility"] is found["type_token_ratio"] is found["words_per_sentence"] is None
    assert not found["spaced"]
