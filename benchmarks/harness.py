"""What the benchmarks share: sides timed in turn, peak memory of each side, rows, goals and the table.

Two sides of a pair run alternately in one process (ours, plain, ours, plain, ...), so that a machine that slows down
slows both; a warm-up of each does not count and the median of the rest does. Peak memory needs a fresh process for each
side, because an allocator gives back little of what another side needed: :func:`peak_memory` starts one, its
:func:`one_side` answers with a line of JSON. It reads ``VmHWM``, not ``ru_maxrss``: the latter of a child starts at the
memory of the process that started it. A GPU needs no fresh process: torch counts what is allocated there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import device
from benchmarks.shapes import SHAPES, Shape
from deftx import memory

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Goal:
    """What a row should reach at the base shape.

    Attributes:
        kind: ``speedup`` (plain / ours is at least the limit), ``share`` (ours / plain is at most it) or ``value``
            (ours, in the row's unit, is at most it).
        limit: the number.
    """

    kind: Literal["speedup", "share", "value"]
    limit: float

    def text(self, unit: str) -> str:
        """As the table prints it."""
        if self.kind == "speedup":
            return f"≥ {self.limit:g} × as fast" if self.limit != 1 else "not slower"
        return f"≤ {self.limit:g} × plain" if self.kind == "share" else f"≤ {amount(self.limit, unit)}"

    def reached(self, ours: float, plain: float) -> bool:
        """Whether a pair reaches it."""
        if self.kind == "speedup":
            return plain >= self.limit * ours
        return ours <= self.limit * (plain if self.kind == "share" else 1.0)


@dataclass
class Row:
    """One measured pair.

    Attributes:
        name: what was measured.
        ours: deftx, in ``unit``.
        plain: what it is compared with.
        unit: ``s``, ``bytes`` or a word that is counted.
        goals: targets at the base shape.
        quoted: what was measured elsewhere at the base shape, in words.
        note: what the plain side is, or what else belongs beside the numbers.
        facts: everything else for the JSON: raw times, counts, equalities.
    """

    name: str
    ours: float
    plain: float
    unit: str = "s"
    goals: tuple[Goal, ...] = ()
    quoted: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Plain over ours: above 1, ours is the cheaper one."""
        return self.plain / self.ours if self.ours else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        judged = self.goals if device.current().is_default else ()
        goals = [{"goal": goal.text(self.unit), "reached": goal.reached(self.ours, self.plain)} for goal in judged]
        return {**asdict(self), "ratio": self.ratio, "goals": goals}


@dataclass
class Run:
    """What all modules are given.

    Attributes:
        shape: sizes of model and data.
        repeats: timed calls of each side, after one warm-up.
        threads: CPU threads of torch, in this and in fresh processes.
        check: encoder matrices whose masks are compared with float64 SVD; 0 for all of them.
        say: shows what is being done.
        memo: what one row measured and another needs.
    """

    shape: Shape
    repeats: int = 5
    threads: int = field(default_factory=torch.get_num_threads)
    check: int = 4
    say: Callable[[str], None] = lambda _: None
    memo: dict[str, Any] = field(default_factory=dict)

    def alternate(
        self, what: str, sides: Mapping[str, Callable[[], object]], between: Callable[[], object] | None = None
    ) -> dict[str, list[float]]:
        """As :func:`alternate`, shown."""
        return alternate(sides, self.repeats, between=between, say=lambda text: self.say(f"{what}: {text}"))

    def peak_memory(self, module: str, side: str, option: str = "", repeats: int = 1) -> dict[str, Any]:
        """As :func:`peak_memory`, shown."""
        if device.current().kind == "cuda":
            self.say(f"{module} {option}: peak memory of {side}")
            prepare = import_module(f"benchmarks.{module}").prepare
            return device_memory(lambda: prepare(self.shape, side, option), repeats)
        self.say(f"{module} {option}: peak memory of {side}, in a fresh process")
        return peak_memory(module, side, self.shape, threads=self.threads, option=option, repeats=repeats)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    between: Callable[[], object] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each side, called in turn; the first call of each is a warm-up and does not count.

    Args:
        sides: functions by name.
        repeats: calls that count.
        between: called before each call, outside the time.
        say: told which call comes.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, function in sides.items():
            say(f"{name}, {f'{turn} of {repeats}' if turn else 'warm-up'}")
            if between is not None:
                between()
            device.wait()
            started = time.perf_counter()
            result = function()
            device.wait()
            seconds = time.perf_counter() - started
            del result  # not while the other side runs
            if turn:
                times[name].append(seconds)
    return times


def timed_row(name: str, times: Mapping[str, Sequence[float]], **options: Any) -> Row:
    """A row of seconds: medians of the sides ``ours`` and ``plain``, the raw times among its facts."""
    facts = {"times": {side: list(values) for side, values in times.items()}, **options.pop("facts", {})}
    return Row(name, statistics.median(times["ours"]), statistics.median(times["plain"]), facts=facts, **options)


# Peak memory: of the device, or of one process a side.


def device_memory(prepare: Callable[[], Callable[[], object]], repeats: int = 1) -> dict[str, Any]:
    """Measure one side on the GPU, in this process.

    Args:
        prepare: Builds the inputs there and returns what is measured.
        repeats: Timed calls after one warm-up.

    Returns:
        As :func:`peak_memory`, in bytes allocated on the GPU beyond what this process held there.
    """
    held = device.settle()
    function = prepare()
    before = device.settle()
    times = alternate({"": function}, repeats)[""]
    peak = device.high_water()
    return {"peak": peak - held, "extra": peak - before, "seconds": statistics.median(times)}


def peak_memory(
    module: str, side: str, shape: Shape, *, threads: int, option: str = "", repeats: int = 1
) -> dict[str, Any]:
    """Run one side of a module in a fresh process.

    Args:
        module: name within ``benchmarks``; it ends with a call of :func:`one_side`.
        side: ``ours`` or ``plain``.
        shape: its fields are passed on, also where they are not those of a named shape.
        threads: CPU threads of torch.
        option: which of the module's pairs.
        repeats: timed calls after one warm-up.

    Returns:
        ``peak``: bytes of the process at its peak. ``extra``: how far the calls went above what was there before
        them, that is inputs, model and imports. ``seconds``: median of the calls.

    Raises:
        RuntimeError: the process failed; its last lines are in the message.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--side", side, "--shape", json.dumps(asdict(shape))]
    command += ["--threads", str(threads), "--repeats", str(repeats), *(["--option", option] if option else [])]
    command += ["--precision", device.current().precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (
            "it was killed, probably for its memory"
            if done.returncode < 0
            else "\n".join(done.stderr.splitlines()[-5:])
        )
        raise RuntimeError(f"{side} of {module} {option} at shape {shape.name} failed ({done.returncode}): {why}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_side(prepare: Callable[[Shape, str, str], Callable[[], object]]) -> None:
    """Command line of a fresh process: prepare a side, call it, print peak memory and seconds as a line of JSON.

    Args:
        prepare: given shape, side and option, builds the inputs and returns what is measured.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "plain"), required=True)
    parser.add_argument("--shape", type=shape_of, default=SHAPES["mini"], help="a name, or all fields as JSON")
    parser.add_argument("--option", default="", help="which of the module's pairs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--precision", choices=device.PRECISIONS, default=device.PRECISIONS[0])
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device.use("cpu", arguments.precision)
    function = prepare(arguments.shape, arguments.side, arguments.option)
    before = settle()
    times = []
    for _ in range(arguments.repeats + 1):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
        del result
    peak = high_water()
    print(json.dumps({"peak": peak, "extra": peak - before, "seconds": statistics.median(times[1:])}))


def shape_of(text: str) -> Shape:
    """A shape by its name or as JSON."""
    if text in SHAPES:
        return SHAPES[text]
    values = json.loads(text)
    return replace(SHAPES["mini"], **{entry.name: values[entry.name] for entry in fields(Shape)})


def high_water() -> int:
    """Peak resident bytes of this process, since it began or since :func:`settle`."""
    found = _status("VmHWM")
    return found if found is not None else memory.peak_memory() or 0


def settle() -> int:
    """Give freed memory back and start the high-water mark afresh where Linux allows it; resident bytes now."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except (AttributeError, OSError):  # another libc, or a sandbox: the mark stays where it is
            return high_water()
    return _status("VmRSS") or high_water()


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


# What is shown.


def machine(threads: int) -> dict[str, Any]:
    """Facts of the machine that a figure depends on."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **device.facts(),
    }


def amount(value: float, unit: str) -> str:
    """A number with its unit: ``0.0123 s``, ``1.5 GiB``, ``21 phases``."""
    if unit == "bytes":
        power = min(len(UNITS) - 1, int(math.log(abs(value), 1024))) if abs(value) >= 1 else 0
        number = value / 1024**power
        return f"{number:.3g} {UNITS[power]}" if number < 999.5 else f"{number:.0f} {UNITS[power]}"
    if unit == "s":
        return f"{value:.3g} s" if value >= 0.001 else f"{value * 1e3:.2g} ms"
    return f"{value:.4g} {unit}"


COLUMNS = ("operation", "deftx", "plain", "plain ÷ deftx", "target at base", "met", "measured elsewhere at base")


def cells(row: Row, judged: bool) -> tuple[str, ...]:
    """A row's texts; targets are judged at the base shape alone."""
    met = ", ".join("yes" if goal.reached(row.ours, row.plain) else "no" for goal in row.goals) if judged else ""
    return (
        row.name,
        amount(row.ours, row.unit),
        amount(row.plain, row.unit),
        f"{row.ratio:.2f}",
        "; ".join(goal.text(row.unit) for goal in row.goals),
        met,
        row.quoted,
    )


def _title(run: Run) -> str:
    where = f"{device.facts().get('gpu', '')} {device.current().precision}".strip()
    computing = "" if device.current().is_default else f", {where}"
    return f"shape {run.shape.name}{computing}, {run.threads} threads, medians of {run.repeats} after a warm-up"


def _columns() -> tuple[str, ...]:
    """Return what the table shows; targets and figures from elsewhere are those of a CPU in float32."""
    return COLUMNS if device.current().is_default else COLUMNS[:4]


def show(run: Run, rows: Sequence[Row], console: Console) -> None:
    """Print the table, and the notes below it."""
    table = Table(title=_title(run))
    columns = _columns()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in (1, 2, 3) else "left")
    for row in rows:
        table.add_row(*cells(row, run.shape.judged)[: len(columns)])
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"[dim]{row.name}:[/dim] {row.note}", highlight=False)


def markdown(run: Run, rows: Sequence[Row]) -> str:
    """The table and the notes as Markdown, with the machine above them."""
    facts, columns = machine(run.threads), _columns()
    cuda = f", CUDA {facts['cuda']}" if "cuda" in facts else ""
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores ({facts['capability']}), torch {facts['torch']}{cuda}; {_title(run)}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *["---:"] * 3, *["---"] * 3][: len(columns)]) + "|",
    ]
    for row in rows:
        texts = cells(row, run.shape.judged)[: len(columns)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    lines += ["", *(f"- {row.name}: {row.note}" for row in rows if row.note)]
    return "\n".join(lines) + "\n"
