"""The dataclasses of the configuration, registered with Hydra.

An unknown key or a value of the wrong type is refused by this schema before anything else looks at it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deftx.folders import cache_root
from deftx.knobs import declared
from deftx.methods.settings import ShortKnobs, SizeKnobs
from deftx.settings import RunConfig
from deftx.training.settings import TrainingSettings


@cache
def register() -> None:
    """Register the schema with Hydra; a second call changes nothing."""
    schema = OmegaConf.structured(RunConfig)
    # Each field of a training budget follows the budget group, and can still be overridden by itself.
    for node, budget in (("lang", "language"), ("source", "language"), ("task", "${task.family}")):
        for name in declared(TrainingSettings):
            schema[node].training[name] = f"${{budget.{budget}.{name}}}"
    # So do the knobs of language and task SFTs those at the top. Of sizes one of two is set: resolving chooses.
    for node in ("lang", "task"):
        for name in declared(ShortKnobs).keys() - declared(SizeKnobs).keys():
            schema[node][name] = f"${{{name}}}"
        schema[node].exclude = "${denoise.exclude}"
    schema.corpus.max_lines = "${budget.max_lines}"
    # Hydra makes these folders itself, and the shell leaves the ~ of key=~/x alone.
    OmegaConf.register_new_resolver("home", lambda path: str(Path(path).expanduser()), replace=True)
    OmegaConf.register_new_resolver("cache_root", cache_root, replace=True)
    ConfigStore.instance().store(name="run_schema", node=schema)
