"""Runs a study's graph: a whole study, parts of one, single SFTs, given SFTs, a base of one's own.

Each run writes ``result.json`` and ``metrics.csv`` (also when it fails), ``predictions.parquet`` and
``diagnostics.parquet`` into its folder, and prints one table: targets × conditions.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deftx import atomic, tracking
from deftx.cache import StageCache
from deftx.data.labelled import SETS
from deftx.data.settings import LanguageSettings
from deftx.errors import DeftxError
from deftx.heartbeat import heartbeats
from deftx.stages.base import PRETRAINING_TEXT
from deftx.stages.execute import Results, StudyProgress
from deftx.stages.graph import GivenSFTs, graph
from deftx.stages.inputs import NEEDS, TestRows, read_json
from deftx.stages.knobs import flat_knobs, given_knobs
from deftx.stages.outputs import fill, keep, short, show, write_tables
from deftx.stages.preflight import refuse_used
from deftx.stages.settings import StudySettings
from deftx.stages.sources import open_given

log = logging.getLogger(__name__)


def run_study(study: StudySettings, run_dir: Path) -> tracking.RunRecord:
    """Run a study and write its results into ``run_dir``.

    Args:
        study: Resolved settings.
        run_dir: Folder of this run; made if needed.

    Returns:
        What ``result.json`` holds.

    Raises:
        DeftxError: An error the user can fix; ``result.json`` then says ``failed`` and why.
    """

    def body(progress: StudyProgress) -> None:
        for sft in progress.open(NEEDS["run"]).sfts:
            progress.train(sft)
        progress.evaluate()

    return _run(study, run_dir, "run", flat_knobs(study), body, cached=True)


def run_parts(study: StudySettings, run_dir: Path) -> tracking.RunRecord:
    """Compute parts of a study for the cache that other runs read (``only=[...]``); evaluates nothing.

    Args:
        study: Resolved settings; ``only`` names the parts (:class:`deftx.stages.graph.Part`).
        run_dir: Folder of this run.
    """

    def body(progress: StudyProgress) -> None:
        nodes = progress.open(NEEDS["run"])
        for name in study.only:
            if not (part := nodes.named(name)):
                # An encoder that is given, a target without text, the full phase of a method that reads none.
                log.warning("only=%s: this study makes nothing of that name", name)
            for node in part[-1:]:
                progress.results.of(node)
        computed = progress.results.entries
        progress.sfts += [sft for sft in nodes.sfts if sft.key in computed]

    return _run(study, run_dir, "stage", flat_knobs(study) | {"only": list(study.only)}, body)


def run_sft(study: StudySettings, kind: str, out: Path | None, run_dir: Path) -> tracking.RunRecord:
    """Train one kind of SFT and copy it to ``out``.

    Args:
        study: Resolved settings; its first method decides.
        kind: ``language`` (one SFT a target) or ``task``.
        out: Folder for the SFT; several languages become sub-folders. ``None``: a folder in ``run_dir``.
        run_dir: Folder of this run.
    """
    destination = out or run_dir / "sfts"

    def body(progress: StudyProgress) -> None:
        nodes = progress.open(NEEDS[f"sft {kind}"])
        for sft in nodes.sfts:
            progress.train(sft)
        sfts = [sft for sft in nodes.sfts if sft.kind == kind]
        single = out is not None and (kind == "task" or len(study.targets) == 1)
        names = [study.task] if kind == "task" else [code for code in study.targets if code in nodes.inputs.texts]
        for name, sft in zip(names, sfts, strict=True):
            folder = destination if single else destination / name
            _copy(progress.results.folder(sft), folder)
            print(f"{sft.name}: {short(folder)}")

    return _run(study, run_dir, f"sft-{kind}", flat_knobs(study), body)


def run_eval(
    study: StudySettings, task_sft: str, language_sfts: dict[str, str], run_dir: Path, max_length: int | None = None
) -> tracking.RunRecord:
    """Compose given SFTs and evaluate them.

    Args:
        study: Resolved settings: model, task, targets, split.
        task_sft: Folder or hub id of φ_T.
        language_sfts: Folder or hub id of φ_L by target; a target without one is evaluated on θ⁰ + φ_T.
        run_dir: Folder of this run.
        max_length: The length that the command asks for, if it does; texts are cut as when φ_T was trained.
    """
    task, task_facts = open_given(task_sft, "task", study)
    opened = {code: open_given(source, "language") for code, source in language_sfts.items()}
    languages = {code: sft for code, (sft, _) in opened.items()}
    language_facts = {code: facts for code, (_, facts) in opened.items()}
    remarks = list(_given_remarks(task_facts, language_facts, max_length))
    for remark in remarks:
        log.warning("%s", remark.line)
    knobs = given_knobs(study, task_facts, language_facts)

    def body(progress: StudyProgress) -> None:
        nodes = progress.open(NEEDS["eval"], GivenSFTs(task, languages, int(task_facts["training"]["max_length"])))
        progress.sfts += nodes.sfts
        unfiltered = list(_unfiltered(task_facts, language_facts, nodes.inputs.tests))
        for remark in unfiltered:
            log.warning("%s", remark.line)
        progress.remarks += [*remarks, *unfiltered]
        progress.evaluate()

    return _run(study, run_dir, "eval", knobs, body)


def _given_remarks(
    task: Mapping[str, Any], languages: Mapping[str, Mapping[str, Any]], max_length: int | None
) -> Iterator[tracking.Remark]:
    """Yield what of given SFTs makes a score another one than its column says.

    Args:
        task: Metadata of φ_T.
        languages: Metadata of φ_L by target.
        max_length: The length that the command asks for, if it does.
    """
    own_length = task["training"]["max_length"]
    if max_length not in (None, own_length):
        text = (
            f"texts are cut at {own_length} tokens, as when the task SFT was trained, and not at "
            f"task.training.max_length={max_length}"
        )
        yield tracking.Remark("other_length", text)
    others = {code: "+".join(map(str, facts.get("languages") or ["?"])) for code, facts in languages.items()}
    if mixed := tuple(f"{code} with {other}'s" for code, other in others.items() if other != code):
        yield tracking.Remark("other_language", "the language SFT is another language's", mixed)
    silent = [name for name, facts in {"task": task, **languages}.items() if facts.get("tokenizer") is None]
    if silent:
        text = "these SFTs do not say which tokenizer they were trained with, so that cannot be checked"
        yield tracking.Remark("unknown_tokenizer", text, tuple(silent))


def _unfiltered(
    task: Mapping[str, Any], languages: Mapping[str, Mapping[str, Any]], tests: Mapping[tuple[str, str], TestRows]
) -> Iterator[tracking.Remark]:
    """Yield which given SFTs may have learnt from the rows that are evaluated, as far as their files say.

    Args:
        task: Metadata of φ_T. Rows of a public set have their own guards; those of files may hold anything.
        languages: Metadata of φ_L by target.
        tests: The rows that will be evaluated. The generated family's stand in no text.
    """
    from deftx.data.tasks import digest_rows

    own = [report for report in (task.get("rows") or {}).values() if SETS[report["source"]].own]
    learnt: dict[str, list[Mapping[str, Any]]] = {code: [facts.get("text") or {}] for code, facts in languages.items()}
    found: dict[str, None] = {}
    for (code, _), rows in tests.items():
        if rows.needs:
            continue
        digest = digest_rows(rows.frame)
        for name, reports in ((f"φ_L of {code}", learnt.get(code, [])), (f"φ_T, with {code}'s rows", own)):
            filters = [report.get("leak") or {} for report in reports]
            if any(item.get("threshold", 2) > 1 or digest not in item.get("sets", ()) for item in filters):
                found[name] = None
    if found:
        text = (
            "what these SFTs learnt from was not kept clear of the sentences that are evaluated: scores may be too high"
        )
        yield tracking.Remark("unfiltered", text, tuple(found))


def run_pretrain(study: StudySettings, text: Sequence[str], out: Path) -> None:
    """Pretrain a small encoder and copy its model folder to ``out``.

    Args:
        study: Resolved settings; ``model.pretrain`` and ``model.languages`` decide.
        text: Files, folders or globs used in place of the languages' own text. ``study.protect`` is kept out of it.
        out: Folder of the model; must not exist or be empty.
    """
    refuse_used(out)
    if text:
        # Relative to the working directory, not to the study's data.root.
        patterns = [str(Path(pattern).expanduser().absolute()) for pattern in text]
        language = LanguageSettings(code="text", name="text", text=patterns)
        model = replace(study.model, languages=["text"], vocabulary=[])
        study = replace(study, model=model, pretrain_languages={"text": language})
    results = Results(_open_cache(study), lambda _: [])
    base = graph(study, results.cache, needs=NEEDS["pretrain"]).base
    _copy(results.folder(base), out)
    for code, report in read_json(results.entries[base.key].file(PRETRAINING_TEXT)).items():
        _print_text_report(code, report)
    if text and not study.protect:
        print("nothing was kept out of this text: protect=[FILE, nusax, ...] keeps evaluation sentences out")
    print(f"model: {short(out.absolute())}\nuse it with: model=local model.path={short(out.absolute())}")


def _print_text_report(code: str, report: Mapping[str, Any]) -> None:
    """Print what became of the lines of a text, with an example of what was taken for an evaluation sentence."""
    leak = report["leak"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in leak["by_kind"].items() if count)
    print(
        f"{code}: {report['lines']} lines, {report['blank']} blank, {report['duplicate']} repeated; "
        f"{leak['dropped']} dropped like any of {leak['protected']} protected ones{f' ({kinds})' if kinds else ''}; "
        f"{report['valid']} held out, {report['near_valid']} like those dropped, {report['train']} learnt from"
    )
    for example in leak["examples"][:1]:
        print(f"  such as {example['text']!r}, where an evaluation set has {example['protected']!r}")


def _open_cache(study: StudySettings) -> StageCache:
    return StageCache(study.cache_root, provenance=partial(_ready, study))


def _ready(study: StudySettings) -> dict[str, Any]:
    """Prepare torch for the first stage that computes; returns the provenance of its results."""
    import torch

    if study.trainer.threads is not None:
        torch.set_num_threads(study.trainer.threads)
    gpu = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of this job, not of the sweep's earlier ones
        gpu = torch.cuda.get_device_name() if study.trainer.accelerator != "cpu" else None
    return tracking.provenance(gpu=gpu)


def _copy(folder: Path, target: Path) -> None:
    """Copy a result out of the cache, whole or not at all; never overwrites a folder that holds something."""
    refuse_used(target)
    try:
        with atomic.folder(target) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
    except OSError as error:
        # copytree's own error lists one (source, target, reason) for each file.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        raise DeftxError(f"cannot write {target}: {reason}; free space or choose another out=FOLDER") from error


def _run(
    study: StudySettings,
    run_dir: Path,
    job: str,
    knobs: dict[str, Any],
    body: Callable[[StudyProgress], None],
    *,
    cached: bool = False,
) -> tracking.RunRecord:
    """Run ``body`` and write the run's record and tables, whether it succeeds or fails.

    With ``cached``, a finished run is cached: the same job of another sweep then copies its files.
    """
    cache = _open_cache(study)
    record = tracking.RunRecord(
        study=study.name,
        job=f"{job}-{run_dir.name}",
        job_type=job,
        settings=knobs,
        seed=study.seed,
    )
    tracker = tracking.Tracker(
        study.logger,
        run_dir,
        study=study.name,
        job_type=job,
        name=record.job,
        config=record.settings,
        tags=[*study.methods, study.task, *study.targets],
    )
    with tracker, tracking.recording(run_dir, record), heartbeats(run_dir):
        progress = StudyProgress(study, Results(cache, tracker.lightning_loggers))

        def finish() -> None:
            fill(record, progress)
            tables = write_tables(run_dir, progress)
            tracker.finish_run(record, tables, {sft.key: progress.results.folder(sft) for sft in progress.sfts})

        try:
            body(progress)
        except BaseException:
            try:
                progress.so_far()
                finish()
            except Exception as error:  # noqa: BLE001 - the run's own error is the one to tell
                log.warning("what the run came to before it failed is not told in full: %s", error)
            raise
        finish()
    if cached:
        keep(progress, run_dir)
    if study.trainer.profile:
        tracking.print_steps(record.sfts)
    if progress.outcomes:
        show(study, record, run_dir, cache)
    return record
