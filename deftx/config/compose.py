"""Composing the jobs of a command; those that choose the same groups share one composition.

Hydra reads and merges every file again for each job, which takes 0.12 s. Values it sets last, one after the other, on
what the groups gave. So each choice of groups is composed once, and Hydra sets the values on copies of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from deftx.config.session import group_exists, group_options


class Composer:
    """Composes the jobs of one command, inside of :func:`deftx.config.session.hydra_session`.

    Args:
        name: Primary configuration.

    Attributes:
        parse: Reads one override; equal texts once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        self.parse: Callable[[str], Override] = cache(lambda text: parser.parse_overrides([text])[0])
        self._shared: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Return what ``hydra.compose`` gives; its errors are Hydra's, too."""
        items = [self.parse(text) for text in overrides]
        choices = tuple(item.input_line or "" for item in items if not _sets_a_value(item))
        if choices not in self._shared:
            self._shared[choices] = compose(self.name, overrides=list(choices))
        config = deepcopy(self._shared[choices])
        ConfigLoaderImpl._apply_overrides_to_config([item for item in items if _sets_a_value(item)], config)
        return config


def is_group(item: Override) -> bool:
    """Return whether an override names a group of the configuration."""
    return bool(group_options(item.key_or_group)) and not is_hydra(item)


def is_hydra(item: Override) -> bool:
    """Return whether an override is one of Hydra's own settings."""
    return item.key_or_group.split(".")[0].split("/")[0] == "hydra"


def _sets_a_value(item: Override) -> bool:
    """Return whether Hydra applies an override to what groups gave (``hydra._internal.defaults_list.Overrides``)."""
    value = not item.is_sweep_override() and (isinstance(item.value(), dict) or not group_exists(item.key_or_group))
    return value and not is_hydra(item)
