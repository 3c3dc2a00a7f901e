"""Reads results and sweeps of older schemas into the fields of the newest.

Schemas 1 and 2 of ``result.json`` say little more about an SFT than its name (``language ace deftx rank=16
residual=drop``, ``task on θ⁰+ind ltsft``), and nothing about a cell but its score. This is the only module that parses
names and sentences, and only those of older results. There, an SFT's name is its key, because ``diagnostics.parquet``
has nothing else to tell it by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["upgrade", "upgrade_sweep", "with_keys"]

_JOB_TYPES = ("run", "stage", "sft-language", "sft-task", "eval")
_METHODS = ("deftx", "ltsft", "random_mask")
_CONSTANT = "one class is predicted throughout, nothing was learnt or transferred"


class _Policy(NamedTuple):
    """What tells two SFTs of one language apart."""

    rank: str | None
    residual: str | None
    mask: str
    second_phase: bool


def upgrade(version: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a ``result.json`` of schema 1 or 2 in the form of schema 3.

    Args:
        version: Its schema.
        content: Its content, without the version.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: It is not a result.
    """
    new = dict(content)
    if version == 1:
        # Its name began with it: sft-language-2026-11-21_...
        new["job_type"] = next((name for name in _JOB_TYPES if content["job"].startswith(name)), "run")
    old = _Result(new)
    new["sfts"] = old.sfts
    new["cells"] = old.cells()
    new["notes"] = [_remark(str(note)) for note in content.get("notes", [])]
    new["provenances"] = []
    return new


def with_keys(diagnostics: pd.DataFrame) -> pd.DataFrame:
    """Return diagnostics with the columns ``key`` and ``other_key``, which older ones lack."""
    names = {"key": "sft", "other_key": "other"}
    absent = {key: diagnostics[name] for key, name in names.items() if key not in diagnostics and name in diagnostics}
    return diagnostics.assign(**absent)


def upgrade_sweep(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a ``sweep.json`` of schema 1 in the form of schema 2."""

    def job_of(job: Mapping[str, Any]) -> dict[str, Any]:
        texts = [text.replace("\\", "") for text in job["swept"]]  # Hydra's
        return {**job, "swept": texts, "knobs": {knob: value for knob, _, value in (t.partition("=") for t in texts)}}

    jobs = [job_of(job) for job in content["jobs"]]
    swept = {knob for job in jobs for knob in job["knobs"]}
    every = [text for text in jobs[0]["overrides"] if all(text in job["overrides"] for job in jobs)] if jobs else []
    shared = [text for text in every if text.partition("=")[0] not in swept]
    return {**content, "jobs": jobs, "stages": list(content["stages"]), "shared": shared}


def _remark(note: str) -> dict[str, Any]:
    start, _, cells = note.partition(": ")
    if start == _CONSTANT:
        return {"kind": "constant_predictions", "text": start, "about": cells.split(", ")}
    return {"kind": "other", "text": note}


class _Result:
    """The SFTs of an older result, and what its cells composed."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.settings: Mapping[str, Any] = content.get("settings", {})
        self.targets = [str(code) for code in self.settings.get("language") or []]
        more = self.settings.get("task.more_sources") or []
        self.sources = [str(code) for code in (self.settings.get("task.source"), *more) if code]
        self.given = content["job_type"] == "eval"
        self.policies: dict[str, _Policy | None] = {}
        self.sfts: list[dict[str, Any]] = [self._sft(facts) for facts in content.get("sfts", [])]
        under = [sft["key"] for code in self.sources if (sft := self._source(code)) is not None]
        for sft in self.sfts:
            if sft["kind"] == "task" and "θ⁰+" in sft["name"]:
                sft["on"] = under

    def _sft(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return an SFT's fields from its result, else from its name, else from the settings."""
        name = str(entry["name"])
        words = name.split()
        kind = str(entry.get("role") or words[0])
        languages = entry.get("languages") or (words[1:2] if kind == "language" else [])
        method = entry.get("method") or next((word for word in words if word in _METHODS), None)
        values = dict(word.split("=", 1) for word in words if "=" in word)
        if method in _METHODS and ("rank" in values or method != "deftx"):
            mask = "random" if method == "random_mask" or "random mask" in name else "magnitude"
            policy = _Policy(values.get("rank"), values.get("residual"), mask, "without second phase" not in name)
        else:
            policy = None
        self.policies[name] = policy
        scope = self._scope(kind, languages, policy)
        requested = policy or self._asked(scope)
        task = self.settings.get("train") or self.settings.get("task")
        return {
            "kind": kind,
            "key": name,
            "method": method,
            **requested._asdict(),
            "exclude": self.settings.get(f"{scope}.exclude") or [],
            "k": entry.get("k"),
            "density": self.settings.get(f"{scope}.density"),
            "value_dtype": self.settings.get(f"{scope}.value_dtype") or "float32",
            "languages": languages,
            "task": task if kind == "task" else None,
            "seed": self.settings.get(f"{scope}.seed") if self.given else self.content.get("seed"),
            "base": self.content.get("fingerprints", {}).get("base"),
            "name": name,
            "bytes": entry.get("bytes"),
            "sha256": entry.get("sha256"),
            "metrics": entry.get("metrics") or {},
        }

    def _scope(self, kind: str, languages: Sequence[str], policy: _Policy | None) -> str:
        """Return the prefix of an SFT's settings, without the dot."""
        if self.given:
            return "task_sft" if kind == "task" else f"language_sft.{'+'.join(map(str, languages))}"
        if kind == "task":
            return "task"
        of_source = not set(languages) & set(self.targets)
        if set(languages) & set(self.sources):
            of_source |= policy == self._asked("source") != self._asked("lang")
        return "source" if of_source else "lang"

    def _asked(self, scope: str) -> _Policy:
        """Return the policy that the settings ask for."""
        short = self.settings if scope != "source" else {}  # short knobs never moved φ_S
        rank = self.settings.get(f"{scope}.rank", short.get("rank"))
        residual = self.settings.get(f"{scope}.residual", short.get("residual"))
        return _Policy(
            None if rank is None else str(rank),
            None if rank is None or residual is None else str(residual),
            str(self.settings.get(f"{scope}.mask") or "magnitude"),
            self.settings.get(f"{scope}.second_phase") is not False,
        )

    def _pick(
        self, candidates: Sequence[dict[str, Any]], policy: _Policy, method: str | None = None
    ) -> dict[str, Any] | None:
        """Of several SFTs, return one of this policy, else one of this method, else one whose name says neither."""
        fits = [sft for sft in candidates if self.policies[sft["name"]] == policy]
        fits += [sft for sft in candidates if sft["method"] == method]
        fits += [sft for sft in candidates if self.policies[sft["name"]] is None]
        return fits[0] if fits else None

    def _all(self, kind: str, code: str | None = None) -> list[dict[str, Any]]:
        """SFTs of a kind, of one language or of all."""
        return [sft for sft in self.sfts if sft["kind"] == kind and (code is None or code in sft["languages"])]

    def _source(self, code: str) -> dict[str, Any] | None:
        """Return φ_S of a source language."""
        candidates = self._all("language", code)
        if code not in self.targets:
            return candidates[0] if candidates else None
        return self._pick(candidates, self._asked("source"))

    def _task(self, policy: _Policy, method: str | None, *, alone: bool = False) -> dict[str, Any] | None:
        """Return φ_T on θ⁰ + φ_S, or on θ⁰ if it is ``alone`` or there is no other."""
        tasks = self._all("task")
        apart = [sft for sft in tasks if bool(sft.get("on")) is not alone]
        return self._pick(apart, policy, method) or self._pick(tasks, policy, method)

    def cells(self) -> list[dict[str, Any]]:
        """Return one cell for each score, in the same order; for other targets' SFTs one each."""
        keys = {
            str(stage.get("label")): stage.get("key")
            for stage in self.content.get("stages", [])
            if stage.get("kind") == "evaluate"
        }
        scores = dict.fromkeys((metric["language"], metric["condition"]) for metric in self.content["metrics"])
        cells = []
        for language, condition in scores:
            for variant, method, terms in self._compositions(str(language), str(condition)):
                label = " ".join(part for part in (language, condition, variant) if part)
                cell = {"language": language, "condition": condition, "variant": variant, "method": method}
                cell |= {"key": keys.get(label) or "", "terms": [_term(sft) for sft in terms if sft is not None]}
                cells.append(cell)
        return cells

    def _compositions(
        self, language: str, condition: str
    ) -> list[tuple[str, str | None, Sequence[dict[str, Any] | None]]]:
        """Return variant, method and SFTs of a condition's cells."""
        main = self.settings.get("method")
        if self.given:
            languages = sorted(self._all("language"), key=lambda sft: list(sft["languages"]) != [language])
            terms = self._all("task")[:1] + (languages[:1] if condition == "composed" else [])
            return [("", main, terms)]
        task_policy, language_policy = self._asked("task"), self._asked("lang")
        if condition == "ltsft":
            task_policy, language_policy = (
                policy._replace(rank=None, residual=None) for policy in (task_policy, language_policy)
            )
        method = condition if condition in _METHODS else main
        task = self._task(task_policy, method, alone=condition == "no_language_sft")
        if condition == "no_language_sft":
            return [("", method, (task,))]
        if condition == "source_sft":
            return [("", method, (task, self._source(self.sources[0]) if self.sources else None))]
        if condition == "other_language_sft":
            others = [(code, self._pick(self._all("language", code), language_policy, method)) for code in self.targets]
            return [(code, method, (task, sft)) for code, sft in others if code != language and sft is not None]
        if condition not in _METHODS:
            return [("", method, ())]
        return [("", method, (task, self._pick(self._all("language", language), language_policy, method)))]


def _term(sft: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sft.items() if name not in ("name", "bytes", "sha256", "metrics")}
