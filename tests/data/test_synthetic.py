"""The generated family: same seed same bytes, what the settings promise, and text a language SFT can live on."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deftx.data.settings import SyntheticSettings
from deftx.data.synthetic import LABELS, generate_family, lexicons
from deftx.errors import DeftxError

SMALL = SyntheticSettings(lines_high=120, lines_low=90, train=60, valid=30, test=60)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(folder: Path, code: str) -> list[str]:
    return (folder / "unlabelled" / f"{code}.txt").read_text("utf-8").splitlines()


def rows(folder: Path, code: str, part: str) -> list[dict[str, str]]:
    with (folder / "sentiment" / code / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "family"
    generate_family(folder, SMALL)
    return folder


def test_the_same_seed_writes_the_same_bytes_in_another_process(family: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deftx.data.settings import SyntheticSettings; "
        "from deftx.data.synthetic import generate_family; "
        "settings = SyntheticSettings(lines_high=120, lines_low=90, train=60, valid=30, test=60); "
        "generate_family(Path(sys.argv[1]), settings)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env={"PYTHONHASHSEED": "7"})
    assert digests(tmp_path / "again") == digests(family)


def test_another_seed_is_another_family(family: Path, tmp_path: Path) -> None:
    generate_family(tmp_path / "other", replace(SMALL, seed=1))
    ours, other = digests(family), digests(tmp_path / "other")
    assert ours.keys() == other.keys()
    assert not [name for name in ours if ours[name] == other[name]]
    lengths = [[len(line.split()) for line in lines(folder, "qba")] for folder in (family, tmp_path / "other")]
    assert lengths[0] != lengths[1], "the same sentences in other words"


def test_more_text_does_not_change_what_came_before(family: Path, tmp_path: Path) -> None:
    generate_family(tmp_path / "longer", replace(SMALL, lines_low=150))
    assert lines(tmp_path / "longer", "qba")[:90] == lines(family, "qba")
    assert rows(tmp_path / "longer", "qba", "test") == rows(family, "qba", "test")


def test_members_sizes_and_balanced_labels(family: Path) -> None:
    description = json.loads((family / "family.json").read_text("utf-8"))
    assert list(description["members"]) == SMALL.members
    for code in SMALL.members:
        assert len(lines(family, code)) == (90 if code in SMALL.targets else 120)
        parts = {"train": 60, "valid": 30, "test": 60} if code == SMALL.source else {"test": 60}
        assert {path.stem for path in (family / "sentiment" / code).iterdir()} == set(parts)
        assert description["members"][code]["sentiment"] == parts
        for part, size in parts.items():
            found = [row["label"] for row in rows(family, code, part)]
            assert [found.count(label) for label in LABELS] == [size // 3] * 3
            assert found[: size // 3] != sorted(found)[: size // 3], "rows stand in order of their labels"


def test_labelled_sentences_are_new_and_carry_no_interjection(family: Path) -> None:
    for code, lexicon in lexicons(SMALL).items():
        parts = ("train", "valid", "test") if code == SMALL.source else ("test",)
        labelled = [row["text"] for part in parts for row in rows(family, code, part)]
        assert len(labelled) == len(set(labelled))
        running = "\n".join(lines(family, code))
        assert not [text for text in labelled if text in running]
        interjections = {form for concept, form in lexicon.words.items() if concept.startswith("interjection.")}
        assert not interjections & {word for text in labelled for word in text.split()}
        assert interjections <= set(running.split()), "the anchors of the running text are missing"


def test_no_sentence_stands_in_two_places_when_there_are_few_to_say(tmp_path: Path) -> None:
    few = {"topics": 1, "nouns_per_topic": 2, "verbs": 1, "synonyms": 2, "purity": 1.0, "interjection_rate": 0.0}
    sizes = {"train": 3000, "valid": 3000, "test": 3000, "lines_high": 3000, "lines_low": 10, "clauses": 2}
    generate_family(tmp_path / "few", SyntheticSettings(**few, **sizes))  # type: ignore[arg-type]
    labelled = [row["text"] for part in ("train", "valid", "test") for row in rows(tmp_path / "few", "qaa", part)]
    assert len(set(labelled)) == 9000
    assert not set(labelled) & set(lines(tmp_path / "few", "qaa"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_share_of_cognates_is_the_setting(share: float) -> None:
    settings = replace(SMALL, cognates=share, evaluative_cognates=share, topics=6, nouns_per_topic=8, synonyms=12)
    for lexicon in lexicons(settings).values():
        content = [concept for concept in lexicon.words if concept.startswith(("noun.", "verb.", "quality."))]
        assert len(lexicon.cognates) / len(content) == pytest.approx(share, abs=0.06)
        assert len({lexicon.words[concept] for concept in content}) == len(content), "two concepts share a form"


def test_false_friends_look_like_another_concept_of_a_high_resource_member() -> None:
    for share, lowest, highest in ((0.0, 0.0, 0.1), (1.0, 0.95, 1.0)):
        members = lexicons(replace(SMALL, false_friends=share))
        known = {
            form: concept
            for code in (SMALL.source, *SMALL.high_resource)
            for concept, form in members[code].words.items()
            if concept.startswith(("noun.", "verb.", "quality."))
        }
        for code in SMALL.targets:
            words, cognates = members[code].words, members[code].cognates
            own = [c for c in words if c.startswith(("noun.", "verb.", "quality.")) and c not in cognates]
            assert lowest <= sum(words[concept] in known for concept in own) / len(own) <= highest


def test_polarity_words_keep_company_with_interjections_of_their_polarity(family: Path) -> None:
    words = lexicons(SMALL)["qba"].words
    agree = total = 0
    for line in lines(family, "qba"):
        heard = {label: 0 for label in LABELS}
        said = {label: 0 for label in LABELS}
        for word in line.split():
            for concept, form in words.items():
                kind, _, rest = concept.partition(".")
                label = rest.partition(".")[0]
                if kind == "interjection" and word == form:
                    heard[label] += 1
                elif kind in ("quality", "verb") and word.startswith(form) and len(word) - len(form) == 2:
                    said[label] += 1
        if any(heard.values()):
            total += 1
            agree += max(heard, key=heard.__getitem__) == max(said, key=said.__getitem__)
    assert total > 60
    assert agree / total > 0.9


def test_a_tokenizer_trained_on_the_family_splits_stems_from_affixes(tmp_path: Path) -> None:
    from deftx.training.pretrain import train_tokenizer

    settings = replace(SMALL, lines_high=1500)
    generate_family(tmp_path / "family", settings)
    pretrained = [settings.source, *settings.high_resource]
    text = [line for code in pretrained for line in lines(tmp_path / "family", code)]
    tokenizer = train_tokenizer(text, 320)
    lexicon = lexicons(settings)[settings.source]
    stems = [form for concept, form in lexicon.words.items() if concept.startswith(("noun.", "verb.", "quality."))]
    pieces = {piece for line in lines(tmp_path / "family", settings.source) for piece in tokenizer.tokenize(line)}
    assert sum(f"##{affix}" in pieces for affix in lexicon.affixes.values()) >= 7
    assert sum(stem in pieces for stem in stems) / len(stems) > 0.7
    for code in settings.targets:  # no letter of a target is unknown, and its words are covered by known pieces
        words = " ".join(lines(tmp_path / "family", code)).split()
        split = [tokenizer.tokenize(word) for word in words]
        assert tokenizer.unk_token not in {piece for word in split for piece in word}
        assert 1.3 < sum(map(len, split)) / len(words) < 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "targets is empty"),
        ({"high_resource": []}, "high_resource is empty"),
        ({"targets": ["qba", "qaa"]}, "repeated: qaa"),
        ({"targets": ["QBA"]}, "three lower-case letters"),
        ({"source": "../"}, "three lower-case letters"),
        ({"test": 100}, "test=100: must be a positive multiple of 3"),
        ({"train": 0}, "train=0: must be a positive multiple of 3"),
        ({"lines_low": 0}, "lines_low=0: must be at least 1"),
        ({"clauses": 0}, "clauses=0: must be at least 1"),
        ({"synonyms": 1}, "synonyms=1: must be at least 2"),
        ({"cognates": 1.5}, r"cognates=1.5: must lie in \[0, 1\]"),
        ({"purity": -0.1}, r"purity=-0.1: must lie in \[0, 1\]"),
        ({"false_friends": float("nan")}, r"false_friends=nan: must lie in \[0, 1\]"),
        ({"synonyms": 10_000}, "run out of word forms"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        generate_family(tmp_path / "family", replace(SMALL, **change))
    assert not (tmp_path / "family").exists()


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(DeftxError, match=r"test=4: (.|\n)*cognates=2"):
        generate_family(tmp_path / "family", replace(SMALL, test=4, cognates=2.0))


def test_a_folder_that_holds_something_is_left_alone(family: Path) -> None:
    before = digests(family)
    with pytest.raises(DeftxError, match="already holds something"):
        generate_family(family, replace(SMALL, seed=3))
    assert digests(family) == before


def test_the_settings_import_without_heavy_packages() -> None:
    code = "import sys, deftx.data.synthetic; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
