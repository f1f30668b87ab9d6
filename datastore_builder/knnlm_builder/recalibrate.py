"""Calibrate a published version anew, on the text that its build held out; the version itself is not touched."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from knnlm_builder.pipeline import say_calibration
from knnlm_builder.progress import Reporter
from knnlm_builder.settings import CalibrateSettings
from knnlm_builder.stages.calibrate import MAX_K, MIN_SCORED_TOKENS, Calibrated, calibrate
from knnlm_builder.stages.curve import draw
from knnlm_builder.stages.held_out import encode_held_out
from knnlm_builder.stages.plan import plan_held_out
from knnlm_builder.stages.practice import gather_practice
from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import Calibration, read_calibration, write_calibration
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreDoesNotHelp, EmptyCorpus
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import TextLM


def run_calibrate(settings: CalibrateSettings, reporter: Reporter) -> Calibration:
    """Calibrate the current version of a name and make it current with the result.

    Raises:
        DatastoreNotFound: no such datastore.
        DatastoreBusy: a build, a calibration, a compaction or a purge of the name is under way.
        DatastoreMismatch: it was built with another model.
        EmptyCorpus: the version keeps no text to calibrate on.
        DatastoreDoesNotHelp: the mixture is no better than the base LM. Then, as always, nothing has changed.
    """
    name = layout.check_name(settings.datastore.name)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with Datastore.open(settings.datastore.parent, name) as datastore:
        reporter.say(f"Loading {settings.model}")
        options = LoadOptions(
            settings.dtype,
            settings.device,
            datastore.manifest.key.tap,
            progress=sys.stderr.isatty(),
            weights=settings.weights,
        )
        return calibrate_with(load_lm(settings.model, options), settings, reporter)


def calibrate_with(lm: TextLM, settings: CalibrateSettings, reporter: Reporter) -> Calibration:
    """`run_calibrate` with a model that is loaded already."""
    root, name = settings.datastore.parent, layout.check_name(settings.datastore.name)
    with lock_versions(root, name), Datastore.open(root, name) as datastore:
        datastore.require_fits(lm.identity)
        with tempfile.TemporaryDirectory() as folder:
            made = _calibrated(lm, datastore, settings, Path(folder), reporter)
        calibration = made.calibration
        say_calibration(calibration, reporter)
        if not calibration.helps and not settings.force:
            raise DatastoreDoesNotHelp(
                "on held-out text the mixture is no better than the base LM; the datastore keeps its calibration "
                "(--force replaces it all the same)"
            )
        if calibration.id in layout.calibration_ids(root, name):
            calibration = read_calibration(root, name, calibration.id)
            if layout.read_current(root, name).calibration == calibration.id:
                reporter.say("The same settings, text and model: this calibration is the current one already")
                return calibration
        else:
            draw(write_calibration(root, name, calibration, made.trees), made.curves, calibration, reporter)
        set_current(root, name, datastore.version, calibration.id)
        reporter.say(f"{name} version {datastore.version} is served with calibration {calibration.id} from now on")
    return calibration


def _calibrated(
    lm: TextLM, datastore: Datastore, settings: CalibrateSettings, folder: Path, reporter: Reporter
) -> Calibrated:
    dead = read_ledger(settings.datastore.parent, datastore.name).killed
    plan = plan_held_out(datastore, lm.tokenizer, folder, dead)
    if sum(document.num_entries for document in plan.held_out) < MIN_SCORED_TOKENS:
        raise EmptyCorpus(
            f"{datastore.name!r} version {datastore.version} keeps no held-out text to calibrate on; build it anew"
        )
    queries = encode_held_out(lm, plan, plan.held_out, batch_tokens=settings.batch_tokens, reporter=reporter)
    nprobe = datastore.manifest.index.nprobe if datastore.manifest.index.is_trained else 0
    practice = gather_practice(
        lm,
        lm.tokenizer,
        datastore,
        dead,
        k=min(MAX_K, datastore.entries),
        nprobe=nprobe,
        seed=settings.seed,
        batch_tokens=settings.batch_tokens,
        reporter=reporter,
    )
    return calibrate(
        datastore,
        plan,
        queries,
        seed=settings.seed,
        nprobe=nprobe,
        reporter=reporter,
        practice=practice,
        budget_ms=settings.latency_budget_ms,
        numerics=lm.numerics,
    )
