"""Unlabelled text: where it is found, how it is cleaned, split and kept free of evaluation sentences."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from upstream_folders import language, sentence, write

from deftx.data.corpora import TextSource, build_corpus, clean_line, resolve_text
from deftx.data.settings import CorpusSettings, DataSettings, LanguageSettings
from deftx.data.tasks import protected_texts
from deftx.errors import DeftxError


def spoken(code: str = "xxx", **fields: object) -> LanguageSettings:
    return LanguageSettings(code=code, name="Own", **fields)  # type: ignore[arg-type]


def source(tmp_path: Path, text: str) -> TextSource:
    return resolve_text(spoken(text=[str(write(tmp_path / "t.txt", text))]), DataSettings())


NUMBERED = "".join(f"line number {i} of many\n" for i in range(100))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tb  c ", "a b c"),
        ("\ufeffa\ufeff", "a"),
        ("cafe\u0301", "café"),
        ("a\u2028b\x0bc\x85d\re", "a b c d e"),
        ("\u00a0 \u3000", ""),
    ],
)
def test_clean_line(raw: str, clean: str) -> None:
    assert clean_line(raw) == clean
    assert len(clean_line(raw).splitlines()) <= 1


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/c.md", "x.aym", "y.aym", "[z].txt"):
        write(tmp_path / "da[t]a" / name, f"{name}\n")
    root = DataSettings(root=str(tmp_path / "da[t]a"))

    def found(*patterns: str) -> list[str]:
        files = resolve_text(spoken(text=list(patterns)), root).files
        return [path.relative_to(tmp_path / "da[t]a").as_posix() for path in files]

    assert found("sub/c.md") == ["sub/c.md"]
    assert found("sub") == ["sub/b.txt"]
    assert found(".") == ["[z].txt", "a.txt", "sub/b.txt"]
    assert found("*.aym", "a.txt", "x.aym") == ["x.aym", "y.aym", "a.txt"]
    assert found("**/*.md") == ["sub/c.md"]
    assert found("[z].txt") == ["[z].txt"]
    assert found(str(write(tmp_path / "da[t]a/abs.txt", "x\n"))) == ["abs.txt"]
    assert [lines for lines, _ in resolve_text(spoken(text=["x.aym", "sub"]), root).pieces(0.1)] == [
        ["x.aym"],
        ["sub/b.txt"],
    ]


def test_every_pattern_of_ones_own_must_match(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x\n")
    with pytest.raises(DeftxError, match=r"no text file matches b\.txt, \*\.md \(data\.text\.xxx, below"):
        resolve_text(spoken(text=["a.txt", "b.txt", "*.md"]), DataSettings(root=str(tmp_path)))


def test_relative_text_without_a_root_starts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "x\n")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in resolve_text(spoken(text=["a.txt"]), DataSettings()).files] == ["a.txt"]


def test_order_of_sources(tmp_path: Path) -> None:
    known, own = write(tmp_path / "set/k.xx", "k\n"), write(tmp_path / "own.txt", "o\n")
    settings = spoken(text=["own.txt"], local_text=["set/*.xx", "absent/*.xx"], wikipedia="xx")
    root = DataSettings(root=str(tmp_path))
    assert resolve_text(settings, root).files == (own,)
    settings.text = []
    assert resolve_text(settings, root).files == (known,)
    known.unlink()
    # A root means nothing is downloaded unless asked for.
    with pytest.raises(
        DeftxError,
        match=r"no unlabelled text for 'xxx' \(below .*: set/\*\.xx, absent/\*\.xx, unlabelled/xxx\.txt\); "
        r"set data\.text\.xxx=\[FILE, \.\.\.\]; or data\.wikipedia=wikimedia/wikipedia for 20231101\.xx",
    ):
        resolve_text(settings, root)
    for data in (DataSettings(), DataSettings(root=str(tmp_path), wikipedia="wikimedia/wikipedia")):
        assert str(resolve_text(settings, data).hub) == "wikimedia/wikipedia (20231101.xx)"
    with pytest.raises(DeftxError, match=r"it has no Wikipedia"):
        resolve_text(spoken(), DataSettings())
    with pytest.raises(DeftxError, match=r"data\.root=.*: no such folder"):
        resolve_text(settings, DataSettings(root=str(tmp_path / "none")))


def test_wikipedia(hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    pages: list[object] = [f"Title {i}\n\nFirst line {i}.\nSecond line {i}." for i in range(40)]
    folder = hub_copy("wikipedia", {"20231101.qu": {"train": {"id": [str(i) for i in range(40)], "text": pages}}})
    data = DataSettings(wikipedia=str(folder), cache_dir=str(tmp_path / "cache"))
    wiki = resolve_text(language("quy"), data)
    [(everything, held)] = wiki.pieces(0.05)
    assert everything[:4] == ["Title 0", "", "First line 0.", "Second line 0."]
    assert (len(everything), held) == (160, 8)  # two articles of forty
    corpus = build_corpus(wiki, [], CorpusSettings(leak_threshold=2), seed=0)
    assert corpus.report["blank"] == 40
    assert corpus.valid == [line for line in everything[:8] if line]
    assert corpus.train == [line for line in everything[8:] if line]
    # A sample of a large Wikipedia reads only as much as it needs, from everywhere.
    [(some, held)] = wiki.pieces(0.05, limit=30, seed=1)
    assert some[:held] == everything[:4], "the held-out piece is that of the whole Wikipedia"
    assert len([line for line in some[held:] if line]) == 30
    assert {line.split()[-1] for line in some if line.startswith("Title")} != {str(i) for i in range(11)}
    assert [(some, held)] == list(wiki.pieces(0.05, limit=30, seed=1)) != list(wiki.pieces(0.05, limit=30, seed=2))
    small = build_corpus(wiki, [], CorpusSettings(max_lines=20, valid_fraction=0.1, leak_threshold=2), seed=0)
    assert (len(small.train), len(small.valid)) == (18, 2)


def test_missing_wikipedia_is_one_message(hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = hub_copy("wikipedia", {"20231101.qu": {"train": {"title": ["x"]}}})
    data = DataSettings(wikipedia=str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DeftxError, match=r"20231101\.ay.*could not be loaded"):
        list(resolve_text(language("aym"), data).pieces(0.1))
    with pytest.raises(DeftxError, match=r"no column 'text'; its columns are title"):
        list(resolve_text(language("quy"), data).pieces(0.1))


def test_cleaning_is_counted(tmp_path: Path) -> None:
    text = "\ufeffone two\r\n\r\n  one two \nthree\n \none  two\n" + NUMBERED
    corpus = build_corpus(source(tmp_path, text), [], CorpusSettings(min_words=2), seed=0)
    report = corpus.report
    counts = {key: report[key] for key in ("lines", "blank", "short", "duplicate", "kept", "train", "valid")}
    assert counts == {"lines": 106, "blank": 2, "short": 1, "duplicate": 2, "kept": 101, "train": 96, "valid": 5}
    assert report["words"] == 502
    assert "one two" in corpus.train + corpus.valid
    kept = build_corpus(source(tmp_path, text), [], CorpusSettings(deduplicate=False), seed=0)
    assert kept.report["duplicate"] == 0
    assert (kept.train + kept.valid).count("one two") == 3


def test_the_first_lines_of_each_file_are_held_out(tmp_path: Path) -> None:
    rng = random.Random(3)
    files = {name: [sentence(rng) for _ in range(count)] for name, count in (("a", 40), ("b", 3), ("c", 57))}
    names = [str(write(tmp_path / f"{name}.txt", "\n".join(lines))) for name, lines in files.items()]
    text = resolve_text(spoken(text=names), DataSettings())
    corpora = [build_corpus(text, [], CorpusSettings(valid_fraction=0.1), seed) for seed in (1, 2)]
    assert corpora[0].valid == corpora[1].valid == files["a"][:4] + files["c"][:6]
    assert corpora[0].train == corpora[1].train == files["a"][4:] + files["b"] + files["c"][6:]
    small = [build_corpus(text, [], CorpusSettings(valid_fraction=0.1, max_lines=50), seed) for seed in (1, 1, 2)]
    assert small[0] == small[1] != small[2]
    assert [len(part) for part in (small[0].train, small[0].valid)] == [45, 5]
    for corpus in small:
        assert corpus.valid == corpora[0].valid[:5]
        assert corpus.train == [line for line in corpora[0].train if line in corpus.train]


def test_lines_like_those_held_out_are_dropped(tmp_path: Path) -> None:
    rng = random.Random(5)
    lines = [sentence(rng) for _ in range(100)]
    copies = [lines[0] + " indeed", lines[3].upper(), f"before that {lines[4]} and after"]
    lines[40:40] = copies
    lines[70:70] = [lines[60] + " indeed"]  # of a line to learn from
    corpus = build_corpus(source(tmp_path, "\n".join(lines)), [], CorpusSettings(), seed=0)
    assert corpus.valid == lines[:5]
    assert corpus.train == [line for line in lines[5:] if line not in copies]
    assert corpus.report["near_valid"] == 3
    off = build_corpus(source(tmp_path, "\n".join(lines)), [], CorpusSettings(leak_threshold=2), seed=0)
    assert off.train == lines[5:]


def test_text_of_a_few_patterns_is_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"this is sentence number {number} of the very same pattern" for number in range(100)]
    corpus = build_corpus(source(tmp_path, "\n".join(lines)), [], CorpusSettings(), seed=0)
    assert (corpus.train, corpus.valid) == (lines[5:], lines[:5])
    assert "95 of the 95 lines to learn from resemble held-out ones" in caplog.text


def test_validation_lines_of_a_budget_are_those_of_the_whole_text(tmp_path: Path) -> None:
    text = source(tmp_path, NUMBERED)
    whole, few = (build_corpus(text, [], CorpusSettings(max_lines=lines), seed=0) for lines in (None, 40))
    assert set(few.valid) <= set(whole.valid)
    assert not set(few.train) & set(whole.valid)


def test_evaluation_sentences_are_dropped_and_shown(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [sentence(rng) for _ in range(60)]
    protected = [lines[3].upper(), lines[4] + " end", sentence(rng)]
    lines[5] = f"{lines[5]} {protected[2]} {lines[6]}"
    corpus = build_corpus(source(tmp_path, "\n".join(lines)), protected, CorpusSettings(), seed=0)
    leak = corpus.report["leak"]
    assert leak["by_kind"] == {"exact": 1, "near": 1, "contained": 1, "fragment": 0}
    assert (leak["threshold"], leak["protected"], leak["dropped"]) == (0.7, 3, 3)
    assert {example["text"] for example in leak["examples"]} == {lines[3], lines[4], lines[5]}
    assert not {lines[3], lines[4], lines[5]} & set(corpus.train + corpus.valid)
    assert corpus.report["kept"] == 57
    off = build_corpus(source(tmp_path, "\n".join(lines)), protected, CorpusSettings(leak_threshold=1.5), seed=0)
    assert off.report["kept"] == 60


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a\nb\nc\n", {}, r"'xxx' has 3 usable lines \(t\.txt\); corpus\.valid_fraction=0\.05 needs at least 20"),
        ("a\n" * 50, {}, r"has 1 usable lines"),
        ("a\n", {"valid_fraction": 0.9}, r"needs at least 2"),
        ("", {}, r"t\.txt is empty"),
        (" \n\n", {}, r"t\.txt is empty"),
        (NUMBERED, {"valid_fraction": 0.0}, r"corpus\.valid_fraction=0\.0: must lie between 0 and 1"),
        (
            NUMBERED,
            {"max_lines": 1, "min_words": 0},
            r"corpus\.max_lines=1: must be at least 2.*\n.*corpus\.min_words=0",
        ),
        (NUMBERED, {"leak_threshold": 0.0}, r"leak_threshold=0\.0"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        build_corpus(source(tmp_path, text), [], CorpusSettings(**settings), seed=0)  # type: ignore[arg-type]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"caf\xc3\xa9\ncaf\xe9\n")
    with pytest.raises(DeftxError, match=r"t\.txt: not UTF-8: byte 0xe9 at offset 9, line 2"):
        list(resolve_text(spoken(text=[str(file)]), DataSettings()).pieces(0.1))


@pytest.mark.parametrize(
    ("code", "duplicates", "leaks"), [("bzd", 647, {"exact": 2, "near": 1}), ("shp", 1093, {"exact": 5, "near": 3})]
)
def test_shared_text(shared_data: Path, code: str, duplicates: int, leaks: dict[str, int]) -> None:
    """Evaluation sentences that upstream left in its training text (shared README: bzd 1, shp 5 equal ones)."""
    data = DataSettings(root=str(shared_data))
    corpus = build_corpus(
        resolve_text(language(code), data), protected_texts(language(code), data).texts, CorpusSettings(), 0
    )
    assert corpus.report["duplicate"] == duplicates
    assert {kind: corpus.report["leak"]["by_kind"][kind] for kind in leaks} == leaks
