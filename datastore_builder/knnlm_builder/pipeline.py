"""The build: plan → encode shards → index → recall gate → calibrate → verify → publish."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import JsonValue

from knnlm_builder.corpus import read_documents
from knnlm_builder.journal import discard_other_builds, discard_partial_files, exclusive
from knnlm_builder.progress import Reporter
from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.calibrate import MAX_K, MIN_SCORED_TOKENS, Calibrated, calibrate
from knnlm_builder.stages.curve import draw
from knnlm_builder.stages.held_out import encode_held_out
from knnlm_builder.stages.plan import Plan, ShardPlan, make_plan
from knnlm_builder.stages.practice import gather_practice
from knnlm_builder.stages.recall import GateResult, choose_nprobe
from knnlm_builder.stages.shards import build_indexes, build_shard
from knnlm_builder.stages.verify import SelfCheck, verify, verify_as_reader
from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import Calibration, write_calibration
from knnlm_core.datastore.canaries import RECORDED_RECALL, write_canaries
from knnlm_core.datastore.checksums import hash_file, record_files
from knnlm_core.datastore.documents import Document, DocumentsWriter
from knnlm_core.datastore.index import choose_index
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.manifest import (
    ContextSection,
    DocumentsSection,
    FileRecord,
    IndexSpec,
    KeySection,
    LMSection,
    Manifest,
    ShardSection,
    version_of,
)
from knnlm_core.datastore.publish import publish, set_current
from knnlm_core.datastore.reader import Datastore, find_version
from knnlm_core.errors import DatastoreDoesNotHelp, DatastoreNotFound, EmptyCorpus
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import TextLM


class BuildResult(NamedTuple):
    """A published datastore."""

    name: str
    version: str
    entries: int
    calibration: Calibration | None
    was_published: bool  # this very version existed before


def run_build(settings: BuildSettings, reporter: Reporter) -> BuildResult:
    """Build and publish a datastore; an interrupted build of the same inputs goes on where it stopped.

    Raises: KnnlmError: of many kinds; then nothing new is published and the name means what it meant before.
    """
    layout.check_name(settings.name)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    read_documents(settings.inputs)  # a path that does not exist is known before the model is loaded
    reporter.say(f"Loading {settings.model}")
    lm = load_lm(
        settings.model,
        LoadOptions(
            settings.dtype,
            settings.device,
            settings.key_tap,
            progress=sys.stderr.isatty(),
            weights=settings.weights,
        ),
    )
    return build_with(lm, settings, reporter)


def build_with(lm: TextLM, settings: BuildSettings, reporter: Reporter) -> BuildResult:
    """`run_build` with a model that is loaded already."""
    windowing = settings.windowing(lm.max_length)
    home = layout.name_folder(settings.output, settings.name)
    with exclusive(home) as plan_folder:
        dead = read_ledger(settings.output, settings.name).killed
        plan = make_plan(settings, windowing, lm.tokenizer, plan_folder, reporter, dead=dead)
        _say_plan(plan, reporter)
        inputs = _inputs(plan, lm, settings)
        version = version_of(inputs)
        if version in layout.published_versions(settings.output, settings.name):
            return _already_published(settings, version, reporter)
        folder = layout.building_folder(settings.output, settings.name, version)
        for other in discard_other_builds(home, folder):
            reporter.say(f"Discarding the unfinished build {other.name} of other inputs")
        folder.mkdir(exist_ok=True)
        discard_partial_files(folder)
        (folder / layout.CANARIES).unlink(missing_ok=True)  # written after the other files have been hashed
        return _build(lm, plan, settings, version, inputs, folder, reporter)


def _build(
    lm: TextLM, plan: Plan, settings: BuildSettings, version: str, inputs: dict[str, JsonValue], folder: Path,
    reporter: Reporter,
) -> BuildResult:  # fmt: skip
    shards = list(plan.shards(settings.shard_entries))
    with reporter.stage("Encode", plan.num_entries, "tokens") as advance:
        for shard in shards:
            path = folder / layout.shard_name(shard.number)
            build_shard(lm, plan, shard, path, settings.batch_tokens, advance)
    _write_documents(plan, folder)
    spec = choose_index(plan.num_entries, lm.identity.key_dim, MAX_K, seed=settings.seed)
    build_indexes(folder, shards, spec, lm.identity.key_dim, settings.seed, reporter)

    manifest = _manifest(plan, shards, spec, lm, settings.name, version, inputs, _checksums(folder, reporter))
    manifest.write(folder / layout.MANIFEST)
    queries = encode_held_out(lm, plan, plan.held_out, batch_tokens=settings.batch_tokens, reporter=reporter)
    datastore = Datastore.open_folder(folder)
    try:
        measured = choose_nprobe(datastore, queries, min(MAX_K, datastore.entries), seed=settings.seed)
        gate = measured.gate
        practice = gather_practice(
            lm,
            lm.tokenizer,
            datastore,
            k=min(MAX_K, datastore.entries),
            nprobe=gate.nprobe,
            seed=settings.seed,
            batch_tokens=settings.batch_tokens,
            reporter=reporter,
        )
        made = calibrate(
            datastore,
            plan,
            queries,
            practice=practice,
            seed=settings.seed,
            nprobe=gate.nprobe,
            reporter=reporter,
            numerics=lm.numerics,
        )
        calibration = made.calibration
        check = verify(datastore, plan, nprobe=gate.nprobe, seed=settings.seed)
    finally:
        datastore.close()
    reporter.say(
        f"Index: recall@32 {gate.recall_at_32:.3f}, recall@{MAX_K} {gate.recall_at_k:.3f}"
        + (f" at nprobe {gate.nprobe}" if gate.nprobe else " (exact)")
    )
    say_calibration(calibration, reporter)
    if not calibration.helps and not settings.force:
        raise DatastoreDoesNotHelp(
            f"on held-out text the mixture reaches perplexity {_perplexity(calibration, 'mixed'):.3f}, the base LM "
            f"alone {_perplexity(calibration, 'base'):.3f}; nothing is published (--force publishes all the same)"
        )
    # What the other files hold has not changed since they were hashed: the manifest learns of canaries and figures.
    spec = spec.model_copy(update={"nprobe": gate.nprobe})
    quality = _quality(measured, check, calibration, settings)
    files = manifest.files | {layout.CANARIES: _write_canaries(folder, plan, measured)}
    manifest.model_copy(update={"index": spec, "quality": quality, "files": files}).write(folder / layout.MANIFEST)
    verify_as_reader(folder)
    _publish(settings, version, made, reporter)
    reporter.say(f"Published {settings.name} version {version}: {plan.num_entries:,} entries, under {settings.output}")
    return BuildResult(settings.name, version, plan.num_entries, calibration, was_published=False)


def _inputs(plan: Plan, lm: TextLM, settings: BuildSettings) -> dict[str, JsonValue]:
    """What the version is a hash of: text, settings and LM; no float that was computed."""
    identity = lm.identity
    return {
        "format_version": 1,
        "model_fingerprint": identity.model_fingerprint,
        "tokenizer_fingerprint": identity.tokenizer_fingerprint,
        "key_tap": identity.key_tap,
        "window": plan.windowing.window,
        "stride": plan.windowing.stride,
        "shard_entries": settings.shard_entries,
        "seed": settings.seed,
        "held_out_fraction": settings.held_out_fraction,
        "held_out_max_tokens": settings.held_out_max_tokens,
        "documents": version_of(
            {
                "store": [
                    [d.id, d.uri, d.title, d.licence, list(d.tags), d.digest, d.num_tokens] for d in plan.documents
                ],
                "held_out": [[d.id, d.digest, d.num_tokens] for d in plan.held_out],
            }
        ),
    }


def _write_documents(plan: Plan, folder: Path) -> None:
    for name, documents in ((layout.DOCUMENTS, plan.documents), (layout.HELD_OUT, plan.held_out)):
        with DocumentsWriter(folder / name) as writer:
            for d in documents:
                entries = d.num_entries if documents is plan.documents else 0
                writer.add(Document(d.id, plan.text(d), d.uri, d.title, d.licence, d.tags), entries)


def _checksums(folder: Path, reporter: Reporter) -> dict[str, FileRecord]:
    """Hash every file of the build, with progress: large ones take a while."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != layout.MANIFEST)
    with reporter.stage("Checksums", total, "bytes") as advance:
        return record_files(folder, advance)


def _manifest(
    plan: Plan, shards: Sequence[ShardPlan], spec: IndexSpec, lm: TextLM, name: str, version: str,
    inputs: dict[str, JsonValue], files: dict[str, FileRecord],
) -> Manifest:  # fmt: skip
    identity = lm.identity
    return Manifest(
        name=name,
        version=version,
        lm=LMSection.of(identity),
        key=KeySection(tap=identity.key_tap, dim=identity.key_dim),
        context=ContextSection(
            window=plan.windowing.window, stride=plan.windowing.stride, bos_token_ids=lm.tokenizer.bos_token_ids
        ),
        entries=plan.num_entries,
        shards=tuple(
            ShardSection(
                name=layout.shard_name(shard.number),
                first_entry=shard.entries.first,
                entries=shard.entries.stop - shard.entries.first,
            )
            for shard in shards
        ),
        index=spec,
        documents=DocumentsSection(count=len(plan.documents)),
        revision=0,  # nothing learned or deleted is folded in
        build=inputs,
        quality={},
        files=files,
    )


def _write_canaries(folder: Path, plan: Plan, measured: GateResult) -> FileRecord:
    """Keep the queries of the gate: asked again, they must show the recall that it recorded."""
    path = folder / layout.CANARIES
    documents = [plan.held_out[number].id for number in measured.sample.documents.tolist()]
    write_canaries(path, measured.sample.keys, measured.exact, documents)
    return FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))


def _quality(
    measured: GateResult, check: SelfCheck, calibration: Calibration, settings: BuildSettings
) -> dict[str, int | float | str | bool]:
    gate = measured.gate
    return {
        "recall_queries": len(measured.sample.keys),
        RECORDED_RECALL: gate.recall_at_32,
        "recall_at_k": gate.recall_at_k,
        "recall_k": MAX_K,
        "perplexity_ratio_to_exact": gate.perplexity_ratio,
        "self_recall": check.self_recall,
        "self_queries": check.queries,
        "helps": calibration.helps,
        "forced": settings.force and not calibration.helps,
    }


def _publish(settings: BuildSettings, version: str, made: Calibrated, reporter: Reporter) -> None:
    """Calibration first, then the version, then CURRENT: each step leaves what readers see whole."""
    calibration = made.calibration
    # A calibration of a version that was never published is what an interrupted build left.
    shutil.rmtree(layout.calibration_folder(settings.output, settings.name, calibration.id), ignore_errors=True)
    beside = write_calibration(settings.output, settings.name, calibration, made.trees)
    draw(beside, made.curves, calibration, reporter)
    publish(settings.output, settings.name, version, calibration.id)


def _already_published(settings: BuildSettings, version: str, reporter: Reporter) -> BuildResult:
    """The same inputs were published before: make that version current again if it is not."""
    _, manifest, calibration, _ = find_version(settings.output, settings.name, version)
    if not _is_current(settings, version):
        set_current(settings.output, settings.name, version, calibration.id if calibration else None)
    reporter.say(f"{settings.name} version {version} is published already: the same text, settings and model")
    return BuildResult(settings.name, version, manifest.entries, calibration, was_published=True)


def _is_current(settings: BuildSettings, version: str) -> bool:
    try:
        return layout.read_current(settings.output, settings.name).version == version
    except DatastoreNotFound:  # interrupted between publishing and making current
        return False


def _say_plan(plan: Plan, reporter: Reporter) -> None:
    if not plan.num_entries:
        raise EmptyCorpus("the inputs hold fewer than 2 tokens for the store, so no token has a context")
    if sum(document.num_entries for document in plan.held_out) < MIN_SCORED_TOKENS:
        why = "what could be held out repeats the rest" if plan.near_duplicates else "too few to hold any out"
        raise EmptyCorpus(
            f"the inputs hold {plan.num_entries + 1} tokens for the store, and none for calibration: {why}; "
            "give more text"
        )
    held_out = sum(document.num_tokens for document in plan.held_out)
    reporter.say(plan.stats.summary())
    if plan.left_out:
        reporter.say(f"Left out: {plan.left_out:,} documents that were deleted or learned while serving")
    reporter.say(
        f"Store: {len(plan.documents):,} documents, {plan.num_entries:,} entries. Held out: {len(plan.held_out):,} "
        f"{plan.held_out_unit}, {held_out:,} tokens; {plan.near_duplicates} near-duplicates of the store kept out"
    )


def say_calibration(calibration: Calibration, reporter: Reporter) -> None:
    """Tell what was chosen, and what it is worth."""
    report = calibration.report
    interval = "too little held-out text for an interval"
    if report["gain_interval_95"] is not None:
        low, high = report["gain_interval_95"]  # type: ignore[misc, str-unpack]
        interval = f"95 % interval {-100 * float(high):+.1f} … {-100 * float(low):+.1f} %"  # type: ignore[arg-type]
    mode = "" if calibration.lambda_mode == "fixed" else f", set per token by the rule {calibration.lambda_mode!r}"
    reporter.say(
        f"Calibrated: k = {calibration.k}, τ = {calibration.knn_temperature:.3g}, λ = {calibration.lmbda:.2f}{mode}"
    )
    reporter.say(
        f"Perplexity on {report['tokens']:,} held-out tokens that were not fitted on: base "
        f"{_perplexity(calibration, 'base'):.3f} → mixed {_perplexity(calibration, 'mixed'):.3f} "
        f"({-100 * float(report['gain']):+.1f} %, {interval})"  # type: ignore[arg-type]
    )
    _say_gates(calibration, reporter)


def _say_gates(calibration: Calibration, reporter: Reporter) -> None:
    """Tell which gate is the default where it is not `always`, and what the learned one saves."""
    report: Any = calibration.report
    if calibration.gate != "always":
        threshold = "" if calibration.gate_threshold is None else f" at {calibration.gate_threshold:g}"
        reporter.say(
            f"Gate: {calibration.gate}{threshold}, for {calibration.protocol['latency_budget_ms']} ms per token"
        )
    for of_gate in report["gates"]:
        if (of_gate["gate"], of_gate["threshold"]) == ("learned", calibration.learned_threshold):
            saved, change = 1 - of_gate["searched"], of_gate["change"]
            reporter.say(f"The gate 'learned' saves {saved:.0%} of the searches there for {change:+.1%} of perplexity")


def _perplexity(calibration: Calibration, which: str) -> float:
    return float(calibration.report[which]["perplexity"])  # type: ignore[index, call-overload, arg-type]
