"""How the tokenizer cuts each language is told before anything trains; what it cannot read is warned of or refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_study import FEW, SMALL, Command
from tokenizers import Tokenizer, models, pre_tokenizers

LATIN, GEORGIAN = "abcdeghlmnorstuw", "აბდეგიკლმნოპრსტუ"


@pytest.fixture
def own(tmp_path: Path, model: Path) -> list[str]:
    """Files of one's own in Latin letters, on a base that knows them."""
    rng = random.Random(3)

    def sentence() -> str:
        return " ".join("".join(rng.choice(LATIN) for _ in range(5)) for _ in range(9))

    for code in ("qaa", "qba"):
        lines = [sentence() for _ in range(60)]
        (tmp_path / "data/unlabelled").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/unlabelled/{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path, count in (("qaa/train", 30), ("qaa/valid", 12), ("qba/test", 12)):
        file = tmp_path / f"data/sentiment/{path}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        labels = ("negative", "neutral", "positive")
        rows = [f"{sentence()}\t{labels[number % 3]}\n" for number in range(count)]
        file.write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")
    local = [item for item in SMALL if not item.startswith("model.")]
    return [*local, "task=sentiment", "task.source=qaa", f"data.root={tmp_path / 'data'}", "model=local", *FEW]


def georgian(file: Path, share: float) -> None:
    """Write the first lines in a script that the base has not seen."""
    head, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    table = str.maketrans(LATIN, GEORGIAN)
    cut = round(share * len(lines))
    texts = [line.split("\t") for line in lines[-cut:]]
    changed = ["\t".join([text[0].translate(table), *text[1:]]) for text in texts]
    if file.suffix == ".txt":
        head = head.translate(table) if share == 1 else head
    file.write_text(head + "".join(lines[:-cut]) + "".join(changed), encoding="utf-8")


def test_the_table_comes_before_training(deftx: Command, own: list[str], model: Path, tmp_path: Path) -> None:
    command = [*own, f"model.path={model}"]
    outcome = deftx("run", *command, small=False, cache=tmp_path / "cache")
    assert outcome.status == 0, outcome.err
    assert "pieces a word, and unknown pieces in %" in outcome.out
    assert "are unknown to the tokenizer" not in outcome.err
    assert outcome.result()["languages"]["qba"]["unknown"] == 0
    again = deftx("run", *command, small=False, cache=tmp_path / "cache")
    assert "pieces a word" not in again.out, "nothing trains"


@pytest.mark.parametrize("what", ["unlabelled/qba.txt", "sentiment/qba/test.tsv", "sentiment/qaa/train.tsv"])
def test_unknown_pieces_are_warned_of_or_refused(
    deftx: Command, own: list[str], model: Path, tmp_path: Path, what: str
) -> None:
    file, kind = tmp_path / "data" / what, "rows" if "sentiment" in what else "text"
    code = "qaa" if "qaa" in what else "qba"
    before = file.read_text(encoding="utf-8")
    georgian(file, 0.5)
    warned = deftx("run", *own, f"model.path={model}", small=False, cache=tmp_path / "cache")
    assert warned.status == 0, warned.err
    assert f"of the pieces of the {kind} of {code} are unknown to the tokenizer" in warned.err
    [note] = [note for note in warned.result()["notes"] if note["kind"] == "unknown_pieces"]
    assert note["about"][0].startswith(f"{code} {kind} ")
    assert 10 < float(note["about"][0].split()[-1].rstrip("%")) < 60
    file.write_text(before, encoding="utf-8")
    georgian(file, 1)
    refused = deftx("run", *own, f"model.path={model}", small=False, cache=tmp_path / "cache")
    assert refused.status == 1
    assert f"100.0% of the pieces of the {kind} of {code} are unknown; choose a model" in refused.err
    assert "Traceback" not in refused.err


def test_words_of_byte_level_tokenizers_keep_their_space(tmp_path: Path) -> None:
    import pandas as pd

    from deftx.cache import StageCache
    from deftx.stages.base import Base
    from deftx.stages.inputs import MEASURES, TestRows, measures
    from deftx.stages.node import ExternalInput

    folder = tmp_path / "model"
    folder.mkdir()
    # " cat" is one piece; "cat" at the start of a text is three.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Ġc", "Ġca", "Ġcat", "<mask>", "<pad>", "<unk>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    config = {"model_type": "roberta", "vocab_size": len(pieces), "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    frame = pd.DataFrame({"text": ["cat cat cat."], "text_pair": [None]})
    given = ExternalInput("x", "1", lambda: "1")
    base = Base("b", "1", folder, given, None, None, drawing=False, task_shapes={}, language_shapes={})
    item = measures("xyz", TestRows({}, given, lambda: frame), base)
    entry = StageCache(tmp_path / "cache").get_or_compute(item.stage, lambda work: item.compute(work, lambda name: []))
    measured = json.loads(entry.file(MEASURES).read_text())
    assert measured["fertility"] == 1.0
    assert measured["unknown"] == 0.0
