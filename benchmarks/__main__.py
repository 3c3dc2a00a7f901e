"""``python -m benchmarks``: every step of the pipeline beside a plain implementation, as a table of ratios.

One module a row (``--list``), each with the plain side written out in it: same threads, dtype and attention, so that
what differs is the algorithm. Sides run in turn in this process, medians after a warm-up; peak memory comes from a
fresh process for each side. ``growth`` and ``options`` are not part of the whole and are asked for by name.

``--device cuda`` puts models and tensors on the GPU, waits for it around each call, and takes peak memory from its
allocator. ``sft_file`` (a file), ``sweep`` (counts phases), ``growth`` and ``options`` have no side there.

Ctrl-C ends the measuring; the table of what was measured until then is shown and written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import device
from benchmarks.harness import Row, Run, machine, markdown, show
from benchmarks.shapes import SHAPES

ROWS = ("mlm_step", "optimizer", "select", "denoise", "sft_file", "compose", "sweep", "evaluate")
MODULES = (*ROWS, "growth", "options")
ON_DEVICE = ("mlm_step", "optimizer", "select", "denoise", "compose", "evaluate")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=str(__doc__).split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--only", nargs="+", choices=MODULES, metavar="NAME", help="these alone; see --list")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side, after one warm-up")
    parser.add_argument("--threads", type=int, help="CPU threads of torch, for both sides")
    parser.add_argument("--check", type=int, default=4, help="matrices compared with float64 SVD (0: all; mini: all)")
    parser.add_argument("--device", choices=device.KINDS, default="cpu", help="where models and tensors live")
    parser.add_argument(
        "--precision",
        choices=device.PRECISIONS,
        default="32-true",
        help="of forward passes in training, as trainer.precision; the other operations compute in float32 either way",
    )
    parser.add_argument("--json", type=Path, help="write everything measured")
    parser.add_argument("--markdown", type=Path, help="write the table for a document")
    parser.add_argument("--list", action="store_true", help="name the modules and stop")
    arguments = parser.parse_args()
    if (arguments.device, arguments.precision) != ("cpu", "32-true"):
        arguments.only = arguments.only or list(ON_DEVICE)
        elsewhere = sorted(set(arguments.only) - set(ON_DEVICE))
        if elsewhere:
            known = ", ".join(ON_DEVICE)
            parser.error(f"{', '.join(elsewhere)}: measured on a CPU in 32-true alone; available here: {known}")
    return arguments


def main() -> None:
    """Measure, print tables, and write JSON and Markdown where asked."""
    arguments = _arguments()
    if arguments.list:
        for name in MODULES:
            print(f"{name:10s} {str(import_module(f'benchmarks.{name}').__doc__).splitlines()[0]}")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device.use(arguments.device, arguments.precision)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: {error}") from error
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 160
    run = Run(SHAPES[arguments.shape], arguments.repeats, torch.get_num_threads(), arguments.check)
    started = time.perf_counter()
    rows: list[Row] = []
    curves: list[Any] = []
    seconds: dict[str, float] = {}
    with errors.status("") as status, contextlib.suppress(KeyboardInterrupt):
        for name in arguments.only or ROWS:
            run.say = lambda text, name=name: status.update(f"[bold]{name}[/bold] {text}")  # type: ignore[misc]
            run.say("")
            since = time.perf_counter()
            measured = curves if name == "growth" else rows
            try:
                for row in import_module(f"benchmarks.{name}").measure(run):
                    measured.append(row)
            except KeyboardInterrupt:
                errors.print(f"{name}: interrupted; the table holds what was measured until then", highlight=False)
                raise
            seconds[name] = time.perf_counter() - since
            errors.print(f"{name}: {seconds[name]:.0f} s", highlight=False)
    if rows:
        show(run, rows, console)
    for curve in curves:
        curve.show(console)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    if arguments.json:
        content = {
            "shape": arguments.shape,
            "repeats": run.repeats,
            "machine": machine(run.threads),
            "rows": [row.to_dict() for row in rows],
            "curves": [curve.to_dict() for curve in curves],
            "seconds": seconds,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        text = markdown(run, rows) if rows else ""
        text += "".join(f"\n{curve.markdown()}" for curve in curves)
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
