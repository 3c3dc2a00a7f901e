"""What a run leaves behind: result.json, predictions, CSV, a table on the terminal, a W&B run.

``result.json`` is the record that reports read; everything else repeats or details it. It is written for
failed runs too, atomically, with everything needed to say where its numbers come from (provenance,
fingerprints, stage keys). W&B mirrors it: one run for each job, group = study, offline unless asked
otherwise, closed whatever happens; trouble with W&B is logged and never costs a result.

Scores are stored as fractions (0 to 1) and shown multiplied by 100. wandb, pandas, pyarrow, rich and Lightning
are imported where they are used, so that importing this module is quick.
"""

from deftx.tracking import names
from deftx.tracking.environment import provenance
from deftx.tracking.imports import clock_imports
from deftx.tracking.results import (
    CONDITIONS,
    DIAGNOSTICS,
    METRICS,
    PREDICTIONS,
    RESULT,
    SCHEMA_VERSION,
    Metric,
    RunRecord,
    mean_scores,
    read_result,
    recording,
    write_diagnostics,
    write_predictions,
    write_result,
)
from deftx.tracking.summary import summarise
from deftx.tracking.sweeps import SWEEP, SweepJob, SweepRecord, read_sweep, write_sweep
from deftx.tracking.tables import print_results, print_steps, print_sweep, results_table
from deftx.tracking.tracker import LoggerSettings, Tracker

__all__ = [
    "CONDITIONS",
    "DIAGNOSTICS",
    "METRICS",
    "PREDICTIONS",
    "RESULT",
    "SCHEMA_VERSION",
    "SWEEP",
    "LoggerSettings",
    "Metric",
    "RunRecord",
    "SweepJob",
    "SweepRecord",
    "Tracker",
    "clock_imports",
    "mean_scores",
    "names",
    "print_results",
    "print_steps",
    "print_sweep",
    "provenance",
    "read_result",
    "read_sweep",
    "recording",
    "results_table",
    "summarise",
    "write_diagnostics",
    "write_predictions",
    "write_result",
    "write_sweep",
]
