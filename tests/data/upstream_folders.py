"""Writers of small folders with the layout of upstream repositories, in every language of each set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from deftx.data.settings import LanguageSettings

CONF = Path(__file__).resolve().parents[2] / "conf" / "language"
SENTIMENT_WORDS = ("positive", "negative", "neutral")
NLI_WORDS = ("contradiction", "entailment", "neutral")
XNLI = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]
AMERICASNLI_HEADER = "id language premise hypothesis label"
AMERICAS = ["aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar"]
NUSAX = [
    "acehnese",
    "balinese",
    "banjarese",
    "buginese",
    "english",
    "indonesian",
    "javanese",
    "madurese",
    "minangkabau",
    "ngaju",
    "sundanese",
    "toba_batak",
]


def language(code: str) -> LanguageSettings:
    """Settings of a language as the project ships them."""
    return LanguageSettings(**yaml.safe_load((CONF / f"{code}.yaml").read_text(encoding="utf-8")))


def write(path: Path, text: str) -> Path:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def sentence(rng: random.Random, words: int = 9) -> str:
    """A sentence of invented words that resembles no other."""
    return " ".join("".join(rng.choices("abcdefghijklmnoprstu", k=rng.randint(4, 8))) for _ in range(words))


def tsv(header: str, rows: Sequence[Sequence[str]]) -> str:
    """A TSV file: header (names separated by blanks), then rows."""
    return "\n".join("\t".join(row) for row in [header.split(), *rows]) + "\n"


@dataclass(frozen=True)
class Upstream:
    """A ``data.root`` and the Indonesian NusaX sentences in it."""

    root: Path
    indonesian: dict[str, list[str]]


def write_clones(root: Path) -> Upstream:
    """Clones of nusax, indonlu, americasnli, multinli and xnli below ``root``: a few rows each, no text twice."""
    rng = random.Random(0)
    indonesian: dict[str, list[str]] = {}
    for name in NUSAX:
        number = 0
        for split, count in (("train", 9), ("valid", 6), ("test", 6)):
            texts = [sentence(rng) for _ in range(count)]
            if name == "indonesian":
                indonesian[split] = texts
            rows = [f'{number + i},"{text}, ya",{SENTIMENT_WORDS[i % 3]}\n' for i, text in enumerate(texts)]
            number += count
            write(root / "nusax/datasets/sentiment" / name / f"{split}.csv", "id,text,label\n" + "".join(rows))
    for split, count in (("train", 30), ("valid", 9)):
        rows = [f"{sentence(rng)} .\t{SENTIMENT_WORDS[i % 3]}\n" for i in range(count)]
        write(root / f"indonlu/dataset/smsa_doc-sentiment-prosa/{split}_preprocess.tsv", "".join(rows))
    for code in AMERICAS:
        for split, first in (("dev", 12451), ("test", 25051)):
            rows = [[str(first + i), code, sentence(rng), sentence(rng), NLI_WORDS[i % 3]] for i in range(6)]
            write(root / "americasnli/data/anli_final" / split / f"{code}.tsv", tsv(AMERICASNLI_HEADER, rows))
    for code in XNLI:
        for split in ("dev", "test"):
            rows = [[sentence(rng), sentence(rng), NLI_WORDS[i % 3]] for i in range(6)]
            write(root / f"xnli/{split}-{code}.tsv", tsv("premise hypothesis label", rows))
        premises = [sentence(rng) for _ in range(20)]
        rows = [[premise, sentence(rng), word] for premise in premises for word in NLI_WORDS]
        write(root / f"multinli/train-{code}.tsv", tsv("premise hypothesis label", rows))
    return Upstream(root, indonesian)
