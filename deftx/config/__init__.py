"""From Hydra's configuration to plain settings, with every problem of a command reported at once.

``schema`` registers the rooms' settings with Hydra, ``commands`` says what each command reads, ``session`` composes and
launches, ``check`` looks at all jobs of a command before any starts, ``resolve`` turns a composed configuration into
the settings the stages read.
"""

from deftx.config.check import Command, check_command
from deftx.config.commands import OWN, READS
from deftx.config.resolve import (
    eval_settings,
    launcher_settings,
    pretrain_settings,
    resolve_command,
    search_settings,
    sft_settings,
    study_settings,
    written_folders,
)
from deftx.config.search import OBJECTIVES, SearchSettings, override
from deftx.config.session import (
    conf_dir,
    defaults_of,
    group_options,
    hydra_session,
    language_settings,
    launch,
    run_directory,
)

__all__ = [
    "OBJECTIVES",
    "OWN",
    "READS",
    "Command",
    "SearchSettings",
    "check_command",
    "conf_dir",
    "defaults_of",
    "eval_settings",
    "group_options",
    "hydra_session",
    "language_settings",
    "launch",
    "launcher_settings",
    "override",
    "pretrain_settings",
    "resolve_command",
    "run_directory",
    "search_settings",
    "sft_settings",
    "study_settings",
    "written_folders",
]
