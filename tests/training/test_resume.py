"""A phase that dies anywhere and is run again ends with the bits of one that ran through."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from restart import Clock, Killed, RestartEqualsOneShot
from tiny_models import LABELS, make_lines, make_rows

import deftx.training.checkpoint as checkpoint
from deftx.data.module import TextDataModule
from deftx.errors import DeftxError
from deftx.training.callback import SparseFineTuning
from deftx.training.encoder import load_classifier, load_masked_lm, load_tokenizer
from deftx.training.fit import fit_phase
from deftx.training.modules import MaskedLM, SequenceClassifier

OBJECTIVES = ("language", "task")
PHASES = ("full", "sparse")


@pytest.fixture
def clock(monkeypatch):
    """Moments: each training batch, each validation batch, before and after each file that is written."""
    clock, write = Clock(), checkpoint.write

    def watched(path, payload):
        clock(f"before {path.name}")
        write(path, payload)
        clock(f"after {path.name}")

    monkeypatch.setattr(checkpoint, "write", watched)
    for kind in (MaskedLM, SequenceClassifier):
        for name in ("training_step", "validation_step"):
            original = getattr(kind, name)

            def moment(self, batch, batch_idx, name=name, original=original):
                clock(name)
                return original(self, batch, batch_idx)

            monkeypatch.setattr(kind, name, moment)
    return clock


@pytest.fixture
def run(folders, settings, trainer, tmp_path):
    """Load afresh, fit, and return all that has to be the same: as a stage does it in a new process."""
    folder = folders["bert"]
    tokenizer = load_tokenizer(folder)
    language = TextDataModule.for_language(
        make_lines(60, 1), make_lines(20, 2), tokenizer, block_length=settings.max_length, seed=0
    )
    task = TextDataModule.for_task(make_rows(60, 1), make_rows(20, 2), tokenizer, max_length=32)

    def fit(scratch, objective="language", phase="full", loggers=(), seed=1, options=None, **changes):
        chosen = replace(settings, **{"max_steps": 5, "eval_every": 3, "log_every": 2, "epochs": 5, **changes})
        module = (
            MaskedLM(load_masked_lm(folder, seed=0)[0], chosen)
            if objective == "language"
            else SequenceClassifier(load_classifier(folder, labels=LABELS, seed=0)[0], chosen)
        )
        last = {}
        validated = module.on_validation_epoch_end

        def remember():
            last.update({name: p.detach().clone() for name, p in module.model.named_parameters()})
            validated()

        module.on_validation_epoch_end = remember
        selection = {name: torch.arange(0, p.numel(), 3) for name, p in list(module.maskable.items())[:-3]}
        callback = SparseFineTuning(
            l1_full=chosen.l1_full, l1_sparse=chosen.l1_sparse, selection=selection if phase == "sparse" else None
        )
        data = {"language": language, "task": task}[objective]
        result = fit_phase(
            module,
            data,
            callback,
            chosen,
            replace(trainer, **{"checkpoint_minutes": 0, **(options or {})}),
            tmp_path / scratch,
            seed=seed,
            loggers=loggers,
            label=f"{objective}, {phase}",
        )
        if phase == "sparse":
            callback.verify()
            product = {name: values for name, values in callback.delta().values.items()}
        else:
            product = callback.change()
        best = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        numbers = (result.best_score, result.best_step, result.steps, result.history, result.padding)
        return {"best": best, "last": last, "product": product}, numbers, result

    return fit


def same(found, expected):
    """Bits of all tensors, and every number; a fit that had only its end to do validated nothing."""
    for part, tensors in expected[0].items():
        if part == "last" and not found[0][part]:
            continue
        assert found[0][part].keys() == tensors.keys()
        assert all(torch.equal(found[0][part][name], tensor) for name, tensor in tensors.items()), part
    assert found[1] == expected[1]


def until_killed(clock, moment, run, *arguments, **options):
    clock.reset(moment)
    with pytest.raises(Killed):
        run(*arguments, **options)
    clock.reset()


class TestAFit(RestartEqualsOneShot):
    """Killed wherever it has come to, and resumed from a resumed attempt: each one makes at most a step."""

    cases: ClassVar = {
        f"{objective}, {phase}, {accumulate} batches a step": {
            "objective": objective,
            "phase": phase,
            "accumulate": accumulate,
            "length_buckets": 2,
        }
        for objective in OBJECTIVES
        for phase in PHASES
        for accumulate in (1, 2)
    }

    @pytest.fixture(autouse=True)
    def fits(self, run, clock, tmp_path, caplog):
        self.run, self.clock, self.folder, self.caplog = run, clock, tmp_path, caplog

    def start(self, folder, case, kill=None):
        self.clock.reset(kill)
        try:
            return self.run(folder, **case)
        except Killed:
            return None

    def histories(self, case, whole):
        validated = [entry["step"] for entry in whole[1][3] if any(name.startswith("val/") for name in entry)]
        assert validated == [3, 5]
        step = case["accumulate"]
        assert self.clock.seen.count("training_step") == 5 * step
        yield [
            ("training_step", 0),  # nothing is there yet
            ("training_step", step),  # 1 step is kept
            ("training_step", 2 * step - 1),  # 2 steps are kept; with two batches a step it is the second of one
            ("validation_step", 0),  # of step 3, before what it made is kept
            ("before resume.ckpt", 0),  # the best weights are newer than the state
            ("after resume.ckpt", 0),  # 3 steps are kept
            ("training_step", 1),
            ("validation_step", 1),  # of the last step
            ("before resume.ckpt", 0),
        ]

    def check(self, folder, case, resumed, whole):
        same(resumed, whole)
        assert self.clock.seen.count("training_step") < 5 * case["accumulate"]


@pytest.mark.soak
class TestAFitAtEachOfItsMoments(TestAFit):
    """Killed once, at any moment; its validation gets worse, so that the best weights are not the newest."""

    cases: ClassVar = {"language, full": {"learning_rate": 2.0, "eval_every": 2, "max_steps": 6}}

    def histories(self, case, whole):
        self.moments = list(self.clock.seen)
        scores = [entry["val/loss"] for entry in whole[1][3] if "val/loss" in entry]
        assert 0 < scores.index(min(scores)) < len(scores) - 1, scores
        assert self.moments.count("training_step") == self.moments.count("after resume.ckpt") == 6
        yield from ([moment] for moment in range(len(self.moments)))
        assert self.caplog.text.count("resumes at step") > len(self.moments) // 2
        assert "starts from the beginning" not in self.caplog.text

    def check(self, folder, case, resumed, whole):
        same(resumed, whole)
        best = whole[2].checkpoint.name
        assert sorted(path.name for path in (self.folder / folder).iterdir()) == [best, "resume.ckpt"]


def test_states_by_time(run, clock, tmp_path):
    """Ten minutes never pass here: nothing but the best weights and the end is written, and a kill costs the phase."""
    options = {"options": {"checkpoint_minutes": 10.0}}
    expected = run("whole", **options)
    assert [what for what in clock.seen if what.startswith("after")] == [
        "after best-3.ckpt",
        "after best-5.ckpt",
        "after resume.ckpt",
    ]
    until_killed(clock, clock.seen.index("after best-5.ckpt") if clock.seen else 9, run, "a", **options)
    same(run("a", **options), expected)
    assert clock.seen.count("training_step") == 5
    clock.reset()
    same(run("whole", **options), expected)  # a stage that was killed while it was published
    assert "training_step" not in clock.seen
    assert (tmp_path / "whole" / "resume.ckpt").stat().st_size < 20_000


@pytest.mark.soak
def test_workers_and_a_new_number_of_them(run, clock):
    expected = run("whole", objective="task")
    until_killed(clock, clock.seen.index("validation_step"), run, "a", objective="task", options={"num_workers": 2})
    same(run("a", objective="task", options={"num_workers": 1}), expected)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor: the file's form is as it was
    path.write_bytes(content)


def _pickled(path):
    torch.save({"format": 1, "facts": Killed()}, path)


DAMAGE = {
    "a flipped bit": _flip,
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint\n"),
    "an object": _pickled,
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "another format": lambda path: torch.save({"format": 99}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_left_aside(run, clock, tmp_path, caplog, what):
    expected = run("whole")
    until_killed(clock, [i for i, x in enumerate(clock.seen) if x == "training_step"][4], run, "a")
    DAMAGE[what](tmp_path / "a" / "resume.ckpt")
    if what == "a folder":
        with pytest.raises(DeftxError, match="cannot write the checkpoint"):
            run("a")
        return
    with caplog.at_level(logging.WARNING, logger="deftx"):
        same(run("a"), expected)
    assert clock.seen.count("training_step") == 5
    assert "language, full: the state in" in caplog.text
    assert "cannot be read" in caplog.text
    assert "starts from the beginning" in caplog.text


@pytest.mark.parametrize("damage", [_flip, lambda path: path.unlink()])
def test_a_state_whose_best_weights_are_damaged(run, clock, tmp_path, damage):
    expected = run("whole")
    until_killed(clock, [i for i, x in enumerate(clock.seen) if x == "training_step"][4], run, "a")
    damage(tmp_path / "a" / "best-3.ckpt")
    same(run("a"), expected)
    assert clock.seen.count("training_step") == 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": 6}, "data, settings, steps"),
        ({"seed": 2}, "data, seed"),
        ({"learning_rate": 1e-3}, "settings"),
        ({"phase": "sparse"}, "phase, selection, trained"),
        ({"objective": "task"}, "data, monitor, start, steps of an epoch, trained"),
        ({"options": {"precision": "bf16-mixed"}}, "precision"),
    ],
)
def test_a_state_of_another_fit_is_left_aside(run, clock, caplog, changes, named):
    until_killed(clock, [i for i, x in enumerate(clock.seen or ["training_step"] * 9)][8], run, "a")
    expected = run("whole", **changes)
    with caplog.at_level(logging.WARNING, logger="deftx"):
        same(run("a", **changes), expected)
    assert f"belongs to another fit (other: {named})" in caplog.text


def test_how_often_the_loss_is_logged_binds_nothing(run, clock, caplog):
    until_killed(clock, 8, run, "a")
    with caplog.at_level(logging.WARNING, logger="deftx"):
        run("a", log_every=50)
    assert "resumes at step" in caplog.text


def test_other_weights_are_another_fit(run, clock, caplog, monkeypatch):
    """A state holds for the θ⁰ it came from; names and shapes alone would let it pass."""
    until_killed(clock, 8, run, "a")
    monkeypatch.setattr(
        "deftx.training.callback.SparseFineTuning.setup",
        lambda self, trainer, module, stage, setup=SparseFineTuning.setup: (
            next(iter(module.maskable.values())).data.view(-1)[:1].add_(1e-3),
            setup(self, trainer, module, stage),
        )[-1],
    )
    with caplog.at_level(logging.WARNING, logger="deftx"):
        run("a")
    assert "(other: start)" in caplog.text


def test_no_room_for_a_state_costs_no_phase(run, monkeypatch, caplog, tmp_path):
    expected = run("whole")
    original = torch.save

    def save(payload, stream):
        if "optimizer" in payload:
            stream.write(b"half")
            raise OSError(28, "No space left on device")
        original(payload, stream)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    with caplog.at_level(logging.WARNING, logger="deftx"):
        same(run("a"), expected)
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "a").glob(".*"))


def test_loggers_hear_the_whole_curve(run, clock):
    class Logger:
        def __init__(self):
            self.rows = []

        def log_metrics(self, metrics, step):
            self.rows.append({"step": step, **metrics})

        def save(self):
            pass

    first, second = Logger(), Logger()
    expected = run("whole")
    clock.reset(8)
    with pytest.raises(Killed):
        run("a", loggers=[first])
    clock.reset()
    run("a", loggers=[second])
    assert 0 < len(first.rows) < len(second.rows)
    assert second.rows == expected[1][3]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_asked_to_end(run, clock, monkeypatch, caplog, accumulate):
    """SIGTERM within a step: the state of the last whole step is kept, however long ago the last one was.

    After the third step a validation is due, for which there is no time any more.
    """
    options = {"accumulate": accumulate, "options": {"checkpoint_minutes": 10.0}}
    expected = run("whole", **options)
    clock.reset()
    original = MaskedLM.training_step

    def step(self, batch, batch_idx):
        if len([what for what in clock.seen if what == "training_step"]) == accumulate + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MaskedLM, "training_step", step)
        with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, logger="deftx"):
            run("a", **options)
    assert signal.getsignal(signal.SIGTERM) == before
    kept = 3 if accumulate == 1 else 1
    assert f"asked to end (SIGTERM); stops at step {kept} of 5" in caplog.text
    clock.reset()
    with caplog.at_level(logging.WARNING, logger="deftx"):
        same(run("a", **options), expected)
    assert f"resumes at step {kept} of 5" in caplog.text
    assert clock.seen.count("training_step") == (5 - kept) * accumulate
