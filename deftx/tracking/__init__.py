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
from deftx.tracking.facts import (
    DATA_READ,
    CellFacts,
    DataRead,
    Provenance,
    Remark,
    SFTFacts,
    Term,
    data_read,
    data_setting,
    gather_provenances,
    provenance_differences,
    provenance_remark,
)
from deftx.tracking.legacy import with_keys
from deftx.tracking.results import (
    CONDITIONS,
    DIAGNOSTICS,
    METRICS,
    PREDICTIONS,
    RESULT,
    RUN_FILES,
    SCHEMA_VERSION,
    Metric,
    RunRecord,
    clock_imports,
    mean_scores,
    read_result,
    recording,
    title_of,
    write_diagnostics,
    write_predictions,
    write_result,
)
from deftx.tracking.settings import LoggerSettings
from deftx.tracking.summary import summarise
from deftx.tracking.sweeps import SWEEP, SweepJob, SweepRecord, read_sweep, write_sweep
from deftx.tracking.tables import print_coverage, print_results, print_steps, print_sweep, results_table
from deftx.tracking.tracker import Tracker

__all__ = [
    "CONDITIONS",
    "DATA_READ",
    "DIAGNOSTICS",
    "METRICS",
    "PREDICTIONS",
    "RESULT",
    "RUN_FILES",
    "SCHEMA_VERSION",
    "SWEEP",
    "CellFacts",
    "DataRead",
    "LoggerSettings",
    "Metric",
    "Provenance",
    "Remark",
    "RunRecord",
    "SFTFacts",
    "SweepJob",
    "SweepRecord",
    "Term",
    "Tracker",
    "clock_imports",
    "data_read",
    "data_setting",
    "gather_provenances",
    "mean_scores",
    "names",
    "print_coverage",
    "print_results",
    "print_steps",
    "print_sweep",
    "provenance",
    "provenance_differences",
    "provenance_remark",
    "read_result",
    "read_sweep",
    "recording",
    "results_table",
    "summarise",
    "title_of",
    "with_keys",
    "write_diagnostics",
    "write_predictions",
    "write_result",
    "write_sweep",
]
