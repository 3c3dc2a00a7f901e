"""Each mistake gets one message, a non-zero exit, no traceback, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import Command

from deftx.core.delta import SparseDelta

PREPARED = ["compare=[]", "controls=[]", "language=qba"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["language=qbz"], ["unknown language 'qbz'", "did you mean 'qb"]),
        (["task=nusaxx"], ["unknown task 'nusaxx'", "did you mean 'nusax'"]),
        (["model=tinny"], ["unknown model 'tinny'", "did you mean 'tiny'"]),
        (["experiment=dmo"], ["unknown experiment 'dmo'", "did you mean 'demo'"]),
        (["method=[deftx,ltsft]"], ["a run has one method", "-m method=deftx,ltsft", "compare=[ltsft]"]),
        (["+foo=1"], ["unknown key 'foo'"]),
        (["+lang.rnak=3", "k=0"], ["unknown key 'lang.rnak'", "did you mean 'lang.rank'", "k=0"]),
        (["+trainer.foo=3"], ["unknown key 'trainer.foo'"]),
        (["rnak=3"], ["unknown key 'rnak'", "did you mean 'rank'"]),
        (["lang.training.epoch=3"], ["unknown key", "did you mean 'lang.training.epochs'"]),
        (["seed=abc"], ["seed=abc", "Integer"]),
        (["rank=0"], ["rank 0", "at least 1"]),
        (["rank=17"], ["rank=17", "exceeds 16"]),
        (["rank=energy:1.5"], ["energy:1.5", "(0, 1]"]),
        (["rank=median"], ["median", "gavish_donoho"]),
        (["density=0"], ["density=0", "(0, 1]"]),
        (["density=1.5"], ["density=1.5", "(0, 1]"]),
        (["k=-3"], ["k=-3", "at least 1"]),
        (["k=3", "density=0.5"], ["one of the two"]),
        (["k=99999999"], ["k=99999999", "maskable parameters"]),
        (["residual=prune:2"], ["residual 2.0", "[0, 1]"]),
        (["residual=keep"], ["keep", "drop"]),
        (["value_dtype=float61"], ["float61", "did you mean 'float16'", "bfloat16"]),
        (["rank=2,4"], ["rank=2,4", "-m"]),
        (["trainer.precision=16-mixed"], ["16-mixed", "bf16-mixed"]),
        (["split=train"], ["split", "test or dev"]),
        (["split=[test,train]"], ["split", "test or dev"]),
        (["split=[test,test]"], ["split=['test', 'test']", "split=[test,dev]"]),
        (["split=[]"], ["split=[]", "split=[test,dev]"]),
        (["split=dev"], ["split=dev", "test sets only"]),
        (["lang.training.max_length=600"], ["lang.training.max_length=600", "exceeds 64"]),
        (["language=ace"], ["'ace' is not in the generated family", "task=nusax"]),
        (["task=tsv"], ["data.labels=[no,yes]", "task.source=CODE"]),
        (["task=nusax", "language=ace", "data.root=/nowhere"], ["/nowhere", "pretrained here on text of 'qaa'"]),
        (["language=null"], ["string or a list"]),
        (["paths.output=/proc/nowhere"], ["/proc/nowhere", "paths.output=FOLDER"]),
        (["kind=task"], ["kind", "deftx sft"]),
        (["corpus.valid_fraction=2"], ["corpus.valid_fraction=2", "between 0 and 1"]),
        (["corpus.max_lines=0"], ["corpus.max_lines=0", "at least 2"]),
        (["data.leak_threshold=-1"], ["data.leak_threshold=-1"]),
        (["data.protect=[foo]"], ["data.protect", "foo", "xnli"]),
        (["synthetic.train=0"], ["synthetic.train=0"]),
        (["logger.wandb=offlin"], ["offlin", "did you mean 'offline'"]),
        (["denoise.exclude=[embedings*]"], ["embedings*", "matches no parameter"]),
        (["data.root=."], ["data.root", "task=nusax"]),
        (["task.more_sources=[qaa]"], ["twice"]),
        (["task=nusax", "language=ace", "task.more_sources=[jav]"], ["smsa has labelled rows in ind only", "=nusax"]),
        (["--config-name", "x"], ["--config-name", "--config-dir FOLDER"]),
        (["-m", "trainer.devices=2", "rank=2,3"], ["trainer.devices", "one device"]),
        (["nonsense"], ["nonsense", "key=value"]),
        (["source.training.batch_size=0"], ["source.training.batch_size"]),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(deftx: Command, arguments: list[str], expected: list[str]) -> None:
    outcome = deftx("run", *arguments)
    assert outcome.status == 1
    for text in expected:
        assert text in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.folder.exists()


def test_all_problems_come_in_one_message(deftx: Command) -> None:
    outcome = deftx("run", "language=qbz", "rnak=3", "rank=0", "seed=-1", "lang.training.epochs=x", "task.k=0")
    for text in ("qbz", "rnak", "rank 0", "seed=-1", "lang.training.epochs=x", "k=0"):
        assert text in outcome.err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("pretrain", ["seed=9", "out=model"]),
        ("pretrain", ["rank=4", "out=model"]),
        ("sft", ["compare=[ltsft]"]),
        ("eval", ["task_sft=x", "rank=3"]),
        ("eval", ["task_sft=x", "lang.training.epochs=3"]),
        ("run", ["out=x"]),
    ],
)
def test_what_a_command_would_ignore_is_refused(deftx: Command, command: str, arguments: list[str]) -> None:
    outcome = deftx(command, *arguments)
    assert outcome.status == 1
    assert f"not read by deftx {command}" in outcome.err


def test_ltsft_ignores_a_rank_it_does_not_use(deftx: Command) -> None:
    assert deftx("run", "method=ltsft", "rank=900", *PREPARED).status == 0


def test_one_invalid_value_in_a_sweep_runs_nothing(deftx: Command, tmp_path: Path) -> None:
    outcome = deftx("run", "-m", "rank=2,4,900", cache=tmp_path / "new")
    assert outcome.status == 1
    assert "rank=900" in outcome.err
    assert not outcome.folder.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "own.txt"),
        (b"", "empty"),
        (b"one line\n", "line"),
        (b"good line\n\xff\xfe bad\n" * 50, "UTF-8"),
    ],
)
def test_unusable_text_is_refused(deftx: Command, tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = deftx("run", *PREPARED, f"language.qba.text=[{path}]")
    assert outcome.status == 1
    assert expected in outcome.err
    assert "Traceback" not in outcome.err


def test_training_rows_of_one_label_are_refused(deftx: Command, tmp_path: Path) -> None:
    rows = "".join(f"word{number} another{number}\tno\n" for number in range(30))
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{rows}")
    (tmp_path / "test.tsv").write_text("text\tlabel\nsomething else\tyes\n")
    own = ["task=tsv", "task.source=qaa", "data.labels=[no,yes]", f"data.train={tmp_path / 'train.tsv'}"]
    outcome = deftx("run", *own, f"data.test={tmp_path / 'test.tsv'}", *PREPARED)
    assert outcome.status == 1
    assert "training rows have one label" in outcome.err
    assert "Traceback" not in outcome.err


LANGUAGE_FILES = {
    "no package line": ("code: xxa\nname: X\n", "language/xxa.yaml: its first line must be `# @package language.xxa`"),
    "unknown key": (
        "# @package language.xxa\ncode: xxa\ntxt: [a.txt]\n",
        "language/xxa.yaml: unknown key 'txt'; did you mean 'text'?",
    ),
    "no list": ("# @package language.xxa\ncode: xxa\ntext: a.txt\n", "text: a.txt is no list; write text: [a.txt]"),
    "a word as a value": ("# @package language.xxa\ncode: no\n", "code: YAML reads this as False, not as a word"),
    "a word in a list": ("# @package language.xxa\ncode: xxa\ntext: [on]\n", "text: YAML reads this as True"),
    "a list": ("# @package language.xxa\n- code\n", "language/xxa.yaml: it must hold lines `key: value`"),
    "no YAML": ("# @package language.xxa\ncode: [\n", "language/xxa.yaml"),
}


@pytest.mark.parametrize(("content", "message"), LANGUAGE_FILES.values(), ids=list(LANGUAGE_FILES))
def test_a_first_language_file_says_what_to_write(deftx: Command, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own" / "language").mkdir(parents=True)
    (tmp_path / "own" / "language" / "xxa.yaml").write_text(content)
    for asked in ("language=xxa", "task.source=xxa"):
        outcome = deftx("run", "--config-dir", str(tmp_path / "own"), asked)
        assert outcome.status == 1
        assert message in outcome.err
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "asked", ["language=nan", "language=[nan,qba]", "-m language=nan,qba", "-m language=[nan],[qba]"]
)
def test_a_code_that_is_read_as_a_value_works_as_the_message_says(deftx: Command, tmp_path: Path, asked: str) -> None:
    (tmp_path / "own" / "language").mkdir(parents=True)
    (tmp_path / "own" / "language" / "nan.yaml").write_text('# @package language.nan\ncode: "nan"\nname: Min Nan\n')
    common = ["--config-dir", str(tmp_path / "own"), "--dry-run"]
    refused = deftx("run", *common, *asked.split())
    assert refused.status == 1
    assert "is read as a value, not as a name" in refused.err
    advice = shlex.split(refused.err.partition("quote it: ")[2])
    followed = deftx("run", *common, *asked.split()[:-1], *advice)
    # The generated family has no such language: the name was read as one.
    assert "language 'nan' is not in the generated family" in followed.err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hydra.job.chdir=true", "hydra.job.chdir=true: relative paths would be looked for in each run's own folder"),
        ("language.qba.text=a.txt", "language.qba.text=a.txt: a list is needed: language.qba.text=[a.txt]"),
        ("data.text.qba=a.txt", "error: data.text.qba=a.txt: a list is needed: data.text.qba=[a.txt]"),
        ("data.text=[a.txt]", "data.text=[a.txt]: it has keys of your own: data.text.NAME=VALUE"),
        ("data.revisions=abc", "data.revisions=abc: it has keys of your own: data.revisions.NAME=VALUE"),
        ("paths.output=", "paths.output is empty: give paths.output=FOLDER"),
    ],
)
def test_a_first_override_says_what_to_write(deftx: Command, asked: str, message: str) -> None:
    for sweep in ([], ["-m"]):
        outcome = deftx("run", *PREPARED, asked, *sweep)
        assert outcome.status == 1
        assert message in outcome.err


def test_a_cluster_can_be_planned_for_where_there_is_none(
    deftx: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = ["run", *PREPARED, "-m", "rank=2,3", "launcher=slurm"]
    assert deftx(*asked).status == 1
    planned = deftx(*asked, "--dry-run")
    assert planned.status == 0, planned.err
    assert "dry run: nothing was computed" in planned.out


def test_labels_that_yaml_read_as_values_are_said_so(deftx: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"sentence {n} of mine\t{('no', 'yes')[n % 2]}\n" for n in range(30)))
    labels = ["task=tsv", "task.source=qaa", f"data.train={rows}", f"data.test={rows}", "data.labels=['False','True']"]
    outcome = deftx("run", *PREPARED, *labels)
    assert outcome.status == 1
    assert "unknown label 'no'; known are False, True; YAML reads yes, no, on, off and nan as values" in outcome.err


def test_text_of_any_language_of_the_study_can_be_named(deftx: Command, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"a line of my own with number {n} and {n * 7}\n" for n in range(60)))
    for code, kind in (("qba", "language"), ("qaa", "source")):
        outcome = deftx("run", *PREPARED, f"data.text.{code}=[{text}]", f"only=[full:{kind}:{code}]")
        assert outcome.status == 0, outcome.err
        assert outcome.result()["data"][f"text {code}"]["lines"] == 60
    outcome = deftx("run", *PREPARED, f"data.text.qaz=[{text}]")
    assert outcome.status == 1
    assert "data.text.qaz: no language of this study; did you mean" in outcome.err
    missing = deftx("run", *PREPARED, "data.text.qaa=[nowhere.txt]")
    assert "no text file matches nowhere.txt (data.text.qaa, below" in missing.err


def test_training_rows_that_are_all_evaluation_sentences_are_refused(deftx: Command, tmp_path: Path) -> None:
    rows = "".join(f"word{number} another{number}\t{'no' if number % 2 else 'yes'}\n" for number in range(30))
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text(f"text\tlabel\n{rows}")
    own = ["task=tsv", "task.source=qaa", "data.labels=[no,yes]", f"data.train={tmp_path / 'train.tsv'}"]
    outcome = deftx("run", *own, f"data.test={tmp_path / 'test.tsv'}", *PREPARED)
    assert outcome.status == 1
    assert (
        "none of 30 training rows is left: 30 are sentences of evaluation sets, or close to one; such as" in outcome.err
    )
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("removed", "expected"),
    [("model.safetensors", "model.safetensors"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_an_incomplete_model_folder_is_refused(deftx: Command, model: Path, removed: str, expected: str) -> None:
    (model / removed).unlink()
    outcome = deftx("run", *PREPARED, "model=local", f"model.path={model}")
    assert outcome.status == 1
    assert expected in outcome.err
    assert "found" in outcome.err


def test_weights_that_are_no_weights_are_refused(deftx: Command, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\0" * 100)
    outcome = deftx("run", *PREPARED, "model=local", f"model.path={model}")
    assert outcome.status == 1
    assert "Traceback" not in outcome.err


def test_a_damaged_sft_is_refused(deftx: Command, sfts: Path) -> None:
    tensors = sfts / "language" / "sft.safetensors"
    intact = tensors.read_bytes()
    ask = ["language=qba", f"task_sft={sfts / 'task'}", f"language_sft.qba={sfts / 'language'}"]
    for damaged in (intact[: len(intact) // 2], intact[:-1] + bytes([intact[-1] ^ 1])):
        tensors.write_bytes(damaged)
        outcome = deftx("eval", *ask)
        assert outcome.status == 1
        assert "sft.safetensors" in outcome.err
        assert "Traceback" not in outcome.err
    tensors.write_bytes(intact)
    assert deftx("eval", *ask).status == 0


def test_an_sft_of_another_base_is_refused(deftx: Command, sfts: Path) -> None:
    outcome = deftx(
        "eval", "language=qba", f"task_sft={sfts / 'task'}", "model.seed=5", f"language_sft.qba={sfts / 'language'}"
    )
    assert outcome.status == 1
    assert "fingerprint" in outcome.err or "base" in outcome.err
    said = json.loads((sfts / "task" / "sft.json").read_text())
    assert said["metadata"]["base_fingerprint"][:8] in outcome.err


def test_a_language_sft_is_no_task_sft(deftx: Command, sfts: Path) -> None:
    outcome = deftx("eval", "language=qba", f"task_sft={sfts / 'language'}")
    assert outcome.status == 1
    assert "task SFT is needed" in outcome.err


def test_a_pickle_is_never_opened(deftx: Command, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("sft.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        outcome = deftx("eval", "language=qba", f"task_sft={tmp_path / name}")
        assert outcome.status == 1
        assert "pickle" in outcome.err
    assert not (tmp_path / "exploded").exists()


def test_an_output_folder_that_cannot_be_is_refused(deftx: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for places in (["paths.output=" + str(tmp_path / "file")], ["paths.cache=" + str(tmp_path / "file" / "cache")]):
        outcome = deftx("run", *PREPARED, *places)
        assert outcome.status == 1
        assert str(tmp_path / "file") in outcome.err
        assert "Traceback" not in outcome.err


def test_a_loss_that_is_not_finite_stops_and_says_where(deftx: Command, tmp_path: Path) -> None:
    outcome = deftx("run", *PREPARED, "lang.training.learning_rate=1e38", cache=tmp_path / "cache")
    assert outcome.status == 1
    assert "step" in outcome.err
    result = outcome.result()
    assert result["status"] == "failed"
    assert "step" in result["error"]["message"]
    # Nothing of the failed stage is published, what came before it is.
    assert list((tmp_path / "cache" / "pretrain").iterdir())
    labels = [stage["label"] for stage in result["stages"]]
    assert "language qba" not in " ".join(labels)


def test_an_sft_of_other_tokens_is_refused_and_an_older_one_noted(deftx: Command, sfts: Path) -> None:
    ask = ["language=[qba,qbb]", f"task_sft={sfts / 'task'}"]
    stated = json.loads((sfts / "task" / "sft.json").read_text())["metadata"]["tokenizer"]
    assert len(stated) == 64

    def rewrite(folder: Path, tokenizer: str | None) -> None:
        """The same SFT, of a file that says another tokenizer, or none."""
        delta = SparseDelta.load(folder)
        facts = {name: value for name, value in delta.metadata.items() if name != "tokenizer"}
        again = replace(delta, metadata=facts | ({} if tokenizer is None else {"tokenizer": tokenizer}))
        values = {name: value.clone() for name, value in again.values.items()}
        again = replace(again, values=values, head={name: value.clone() for name, value in again.head.items()})
        shutil.rmtree(folder)
        again.save(folder)

    rewrite(sfts / "language", "0" * 64)
    refused = deftx("eval", *ask, f"language_sft.qbb={sfts / 'language'}")
    assert refused.status == 1, refused.out
    assert "was trained with another tokenizer (digest 000000000000)" in refused.err
    assert stated[:12] in refused.err
    rewrite(sfts / "language", None)
    noted = deftx("eval", *ask, f"language_sft.qbb={sfts / 'language'}", "task.training.max_length=9")
    assert noted.status == 0, noted.err
    notes = {note["kind"]: note["about"] for note in noted.result()["notes"]}
    assert notes["unknown_tokenizer"] == ["qbb"]
    assert notes["other_length"] == []
    assert "and not at task.training.max_length=9" in " ".join(noted.out.split())
    assert notes["other_language"] == ["qbb with qba's"]
    assert "the language SFT is another language's: qbb with qba's" in " ".join(noted.out.split())
