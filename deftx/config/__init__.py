"""From Hydra's configuration to plain settings, with every problem of a command reported at once.

``schema`` registers :mod:`deftx.settings` with Hydra, ``session`` opens and launches, ``compose`` composes many jobs,
``check`` looks at all jobs of a command before any starts, ``resolve`` turns composed settings into those of a study.
"""

from deftx.config.check import CheckedCommand, CheckedJob, check_command, check_search, first_configuration
from deftx.config.resolve import resolve_command, study_settings, written_folders
from deftx.config.session import (
    conf_dir,
    defaults_of,
    group_options,
    hydra_session,
    language_settings,
    run_directory,
    run_job,
    typed,
)

__all__ = [
    "CheckedCommand",
    "CheckedJob",
    "check_command",
    "check_search",
    "conf_dir",
    "defaults_of",
    "first_configuration",
    "group_options",
    "hydra_session",
    "language_settings",
    "resolve_command",
    "run_directory",
    "run_job",
    "study_settings",
    "typed",
    "written_folders",
]
