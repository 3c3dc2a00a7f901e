"""``deftx dashboard``: a W&B workspace over the runs of one study, as a specification and published.

The specification is plain JSON and needs neither an account nor a network. With ``--publish`` it becomes a saved view
of the project, through the extra ``wandb-workspaces``.
"""

from deftx.dashboard.command import main
from deftx.dashboard.specification import config_names, specification, summary_names

__all__ = ["config_names", "main", "specification", "summary_names"]
