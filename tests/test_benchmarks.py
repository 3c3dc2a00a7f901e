"""Both sides of a benchmark compute the same thing; nothing here looks at a clock."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    compose,
    denoise,
    device,
    evaluate,
    growth,
    harness,
    mlm_step,
    optimizer,
    options,
    select,
    sft_file,
    shapes,
    sweep,
)
from benchmarks.__main__ import MODULES, ON_DEVICE, ROWS, main
from deftx.training.modules import MaskedLM

TINY = shapes.SHAPES["tiny"]


@pytest.mark.parametrize("phase", mlm_step.PHASES)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_both_mlm_steps_take_the_same_step(family: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: dict[int, torch.Tensor] = {}  # of ours, before the step frees them
    clip = MaskedLM.configure_gradient_clipping

    def watch(module: MaskedLM, *rest: Any) -> None:
        clip(module, *rest)
        gathered = module.gradients.values if module.gradients is not None else {}
        for parameter in module.trained().values():
            found = gathered.get(parameter, parameter.grad)
            if found is not None:
                gradients[id(parameter)] = found.flatten().clone()

    monkeypatch.setattr(MaskedLM, "configure_gradient_clipping", watch)
    shape = harness.replace(TINY, family=family)
    model, batch = shapes.masked_lm(shape), mlm_step.labelled(shapes.masked_batch(shape))
    selection = shapes.mask(shape, shape.k) if phase == "sparse" else None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    models = {side: copy.deepcopy(model) for side in mlm_step.SIDES}
    losses = {side: float(make(models[side], selection)(batch)) for side, make in mlm_step.SIDES.items()}
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5)
    ours, plain = (dict(models[side].named_parameters()) for side in ("ours", "plain"))
    chosen = {id(models["ours"].base_model.get_parameter(name)): index for name, index in (selection or {}).items()}
    moved = 0
    for name, parameter in ours.items():
        if plain[name].grad is None:
            assert torch.equal(parameter, before[name])
            continue
        index = chosen.get(id(parameter), torch.arange(parameter.numel()))
        gradient = plain[name].grad.flatten()[index]
        found = gradients.get(id(parameter), torch.empty(0))  # ours freezes what has no selected coordinate
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-7)
        clear = index[gradient.abs() > 1e-6]  # where rounding cannot turn Adam's first step round
        torch.testing.assert_close(parameter.flatten()[clear], plain[name].flatten()[clear], rtol=0, atol=1e-6)
        outside = torch.ones(parameter.numel(), dtype=torch.bool)
        outside[index] = False
        for side in (parameter, plain[name]):
            assert torch.equal(side.flatten()[outside], before[name].flatten()[outside])
        moved += int((parameter != before[name]).sum())
    assert moved > (100 if phase == "sparse" else 1000)


@pytest.mark.parametrize("fused", [False, True])
def test_both_optimizers_take_the_same_steps(fused: bool) -> None:
    selection = shapes.mask(TINY, TINY.k)
    start = shapes.noise(shapes.parameter_shapes(TINY), 0)
    sides = []
    for make in (optimizer.ours, lambda p, s, limits: optimizer.plain(p, s, limits, fused=fused)):
        parameters = optimizer.parameters_of({name: tensor.clone() for name, tensor in start.items()})
        step, used = make(parameters, selection, iter([1e9, 1e-2]))  # plain clips the shared gradients in place
        for _ in range(2):
            step()
        sides.append((parameters, optimizer.state_bytes(used, selection)))
    for name in start:
        torch.testing.assert_close(sides[0][0][name], sides[1][0][name], rtol=1e-5, atol=1e-8)
    assert any(not torch.equal(sides[0][0][name], start[name]) for name in start)
    assert sides[0][1] <= 24 * TINY.k + 8 * len(start) < sides[1][1]


def test_both_selections_choose_as_much() -> None:
    found = select.sums(shapes.change(TINY), TINY.k)
    assert found["ours"][0] == found["plain"][0] == TINY.k
    assert found["ours"][1] == pytest.approx(found["plain"][1], rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_both_decompositions_rebuild_the_same(share: float) -> None:
    delta = {name: t for name, t in shapes.change(TINY, embedding_rows=share).items() if t.dim() == 2}
    rows = int(delta[denoise.EMBEDDING].abs().sum(1).count_nonzero())
    assert (rows == TINY.vocabulary) == (share == 1)
    ranks = [2, 5]
    for ours, plain in zip(denoise.ours(delta, ranks), denoise.plain(delta, ranks), strict=True):
        for name, matrix in delta.items():
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-8)
            assert torch.equal(ours[name], matrix) == (min(matrix.shape) <= ranks[0])
    assert all(entry["ours"] == 1.0 for entry in denoise.compare(delta, ranks).values())


def test_a_different_mask_shows_in_the_jaccard_index() -> None:
    delta = shapes.change(TINY)
    assert denoise.jaccard(delta, delta, 100) == 1.0
    assert denoise.jaccard(delta, shapes.change(TINY, seed=1), 100) < 0.5


def test_both_files_hold_the_same_sft(tmp_path: Path) -> None:
    delta = shapes.sparse_delta(TINY, TINY.k, 0)
    disk = sft_file.Disk(tmp_path, delta)
    for _ in range(2):
        disk.forget()
        disk.save_ours()
        disk.save_plain()
    ours, plain = disk.load_ours(), disk.load_plain()
    assert ours.k == TINY.k
    for name, tensor in shapes.dense(ours).items():
        assert torch.equal(tensor, plain[name].to_dense())
        assert torch.equal(ours.values[name], delta.values[name])


def test_both_compositions_hold_the_same_model() -> None:
    models = compose.Models(TINY)
    start = {name: tensor.clone() for name, tensor in models.ours.items()}
    models.apply_ours()
    models.apply_plain()
    assert models.distance() < 1e-7
    for _ in range(3):
        models.switch_ours()
        models.switch_plain()
        assert models.distance() < 1e-7
        assert any(not torch.equal(models.ours[name], start[name]) for name in start)
    models.reset()
    assert all(torch.equal(models.ours[name], start[name]) for name in start)


def test_both_evaluations_predict_the_same(tmp_path: Path) -> None:
    study = evaluate.Study(tmp_path, TINY, languages=2)
    shared = study.rows[0]
    study.rows[1] = shared  # so that only φ_L tells the two apart
    ours, plain = study.ours(), study.plain()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(plain[0], plain[1])
    assert len(study.ours(1)) == 1


def test_options_are_taken_and_buckets_save_padding(tmp_path: Path) -> None:
    losses = {side: options.prepare(TINY, side, "checkpointing")() for side in ("ours", "plain")}
    assert torch.equal(losses["ours"], losses["plain"])
    half, full = (options.prepare(TINY, side, "bf16-mixed")() for side in ("ours", "plain"))
    assert not torch.equal(half, full)
    epochs = options.Epochs(tmp_path, harness.replace(TINY, length=64))
    assert 0 < options.padding(epochs.batches(16)) < 0.5 * options.padding(epochs.batches(0))
    epochs.run(epochs.batches(16)[:1])


def test_a_sweep_trains_its_full_phase_once(tmp_path: Path) -> None:
    counted = sweep.phases(tmp_path, ranks=(1, 2), densities=(0.05, 0.1))
    assert counted["full"] == 1
    assert counted["decompose"] == 1
    assert counted["sparse"] == 4


def test_sides_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = harness.alternate(
        {"ours": lambda: calls.append("a"), "plain": lambda: calls.append("b")}, 2, between=lambda: calls.append("-")
    )
    assert "".join(calls) == "-a-b" * 3
    assert {side: len(seconds) for side, seconds in times.items()} == {"ours": 2, "plain": 2}


def test_a_fresh_process_sees_what_a_call_needs() -> None:
    shape = harness.replace(TINY, vocabulary=40_000, hidden=64, k=30_000)
    found = harness.peak_memory("select", "plain", shape, threads=1)
    assert 20e6 < found["extra"] < 200e6  # the concatenation alone: 2.6 M numbers of 4 bytes, its magnitudes twice
    assert found["peak"] > found["extra"]


def test_a_failing_process_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)neither of sft_fil .*failed.*No module named"):
        harness.peak_memory("sft_fil", "neither", TINY, threads=1)


def test_goals_say_and_judge() -> None:
    row = harness.Row("x", 2.0, 5.0, "s", goals=(harness.Goal("speedup", 2), harness.Goal("share", 0.3)))
    shown = harness.cells(row, judged=True)
    assert shown[3:6] == ("2.50", "≥ 2 × as fast; ≤ 0.3 × plain", "yes, no")
    assert harness.cells(row, judged=False)[5] == ""
    assert harness.Goal("value", 2.0).reached(2.0, 1.0)
    assert not harness.Goal("value", 1.9).reached(2.0, 1.0)
    assert row.to_dict()["goals"][1] == {"goal": "≤ 0.3 × plain", "reached": False}
    run = harness.Run(TINY, 1)
    assert "| x | 2 s | 5 s | 2.50 |" in harness.markdown(run, [row])


def test_a_curve_finds_its_line() -> None:
    curve = growth.Curve("c", "n", ["1", "2", "3"], [1e9, 2e9, 3e9], [3.0, 5.0, 7.0])
    a, b, residual = curve.fit()
    assert (a, b, residual) == (pytest.approx(1.0), pytest.approx(2e-9), pytest.approx(0.0, abs=1e-9))
    assert "2e-09" in curve.markdown()


def test_the_command_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown")}
    command = ["benchmarks", "--shape", "tiny", "--only", "compose", "sft_file", "--repeats", "1"]
    arguments = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    main()
    assert "switch the language SFT" in capsys.readouterr().out
    content = json.loads(files["json"].read_text())
    assert len(content["rows"]) == 6
    assert content["machine"]["torch"] == torch.__version__
    assert files["markdown"].read_text().count("\n| ") == 7
    assert set(ROWS) | {"growth", "options"} == set(MODULES)
    assert all((harness.ROOT / "benchmarks" / f"{name}.py").is_file() for name in MODULES)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Give the process back its device."""
    yield
    device.use()


def test_a_precision_is_that_of_both_sides_and_of_forward_passes(elsewhere: None) -> None:
    model, batch = shapes.masked_lm(TINY), mlm_step.labelled(shapes.masked_batch(TINY))
    sides = {}
    for precision in device.PRECISIONS:
        device.use("cpu", precision)
        sides[precision] = {side: float(make(copy.deepcopy(model))(batch)) for side, make in mlm_step.SIDES.items()}
    for losses in sides.values():
        assert losses["ours"] == pytest.approx(losses["plain"], rel=2e-3)
    assert all(sides["32-true"][side] != sides["bf16-mixed"][side] for side in mlm_step.SIDES)
    assert "bf16-mixed" in harness.markdown(harness.Run(TINY, 1), [harness.Row("x", 2.0, 5.0)])
    assert "target" not in harness.markdown(harness.Run(TINY, 1), [harness.Row("x", 2.0, 5.0)])


def test_a_device_that_is_not_here_and_what_has_no_side_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda"])
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        main()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", "--only", "compose", "sweep"])
    with pytest.raises(SystemExit):
        main()
    assert "sweep: measured on a CPU in 32-true alone" in capsys.readouterr().err
    assert device.current().is_default


def test_an_interrupted_run_shows_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measure(run: harness.Run) -> Iterator[harness.Row]:
        yield harness.Row("the first of two", 1.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(denoise, "measure", measure)
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "denoise", "compose", "--json", str(file)])
    main()
    assert "the first of two" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["the first of two"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", device.PRECISIONS)
def test_the_command_measures_on_a_gpu(
    precision: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    command = ["benchmarks", "--shape", "tiny", "--repeats", "1", "--device", "cuda", "--precision", precision]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file)])
    main()
    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["machine"]["gpu"]
    assert set(content["seconds"]) == set(ON_DEVICE)
    assert rows["top 300 of 14,976"]["facts"]["exact"]
    assert rows["top 300 of 14,976"]["facts"]["equal"]
    assert rows["denoise 12 encoder matrices, r = 4"]["facts"]["exact"]
    assert rows["switch the language SFT"]["facts"]["largest_difference"] < 1e-7
    assert rows["evaluate 12 languages × 10 rows"]["facts"]["largest_difference"] < 1e-5
    assert all(row["ours"] > 0 and row["plain"] > 0 for name, row in rows.items() if "memory" in name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase", mlm_step.PHASES)
def test_both_sides_lose_as_much_on_a_gpu_as_on_a_cpu(phase: str, elsewhere: None) -> None:
    def losses() -> dict[str, float]:
        selection = shapes.mask(TINY, TINY.k) if phase == "sparse" else None
        batch = mlm_step.labelled(shapes.masked_batch(TINY))
        steps = {side: make(shapes.masked_lm(TINY), selection) for side, make in mlm_step.SIDES.items()}
        return {f"{side}, step {n}": float(step(batch)) for side, step in steps.items() for n in range(3)}

    expected = losses()
    device.use("cuda")
    assert losses() == pytest.approx(expected, rel=1e-3)
