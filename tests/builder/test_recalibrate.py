"""`knnlm calibrate`: new settings for a version that is published, from the text that its build held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_build import Recorder, build, given, prose, tiny_lm, write_jsonl

from knnlm_builder.recalibrate import calibrate_with, run_calibrate
from knnlm_builder.settings import BuildSettings, CalibrateSettings, read_settings
from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.ledger import ledger_lock
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument
from knnlm_core.errors import DatastoreBusy, DatastoreMismatch, DatastoreNotFound, EmptyCorpus, InvalidParameter
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A store of enough text for rules."""
    folder = tmp_path_factory.mktemp("template")
    settings = given(folder / "stores", write_jsonl(folder / "pages.jsonl", [prose(i, 40) for i in range(24)]))
    build(settings)
    return settings


@pytest.fixture
def built(template: BuildSettings, tmp_path: Path) -> BuildSettings:
    """A copy that a test may change."""
    shutil.copytree(template.output, tmp_path / "stores")
    return template.model_copy(update={"output": tmp_path / "stores"})


def settings_of(built: BuildSettings, **changes: object) -> CalibrateSettings:
    return read_settings(CalibrateSettings, datastore=built.output / "law", model="tiny", **changes)


def test_calibrating_at_once_gives_what_the_build_has_given(built: BuildSettings) -> None:
    before = layout.read_current(built.output, "law")
    assert before.calibration is not None
    first = read_calibration(built.output, "law", before.calibration)
    told = Recorder()
    assert calibrate_with(tiny_lm(), settings_of(built), told) == first
    assert told.said[-1].endswith("this calibration is the current one already")
    assert layout.read_current(built.output, "law") == before
    assert first.lambda_rules.bucketed is not None


def test_another_seed_is_another_calibration_and_the_old_one_stays(built: BuildSettings) -> None:
    before = layout.read_current(built.output, "law")
    assert before.calibration is not None
    told = Recorder()
    made = calibrate_with(tiny_lm(), settings_of(built, seed=5), told)
    after = layout.read_current(built.output, "law")
    assert (after.version, after.calibration) == (before.version, made.id)
    assert made.id != before.calibration
    assert told.said[-1].endswith(f"is served with calibration {made.id} from now on")
    with Datastore.open(built.output, "law", checksums=True) as store:
        assert store.calibration == made
    # An earlier one is made current again, as it is.
    assert calibrate_with(tiny_lm(), settings_of(built), Recorder()).id == before.calibration
    assert layout.read_current(built.output, "law") == before


def test_held_out_text_that_was_deleted_is_not_looked_at(built: BuildSettings) -> None:
    with Datastore.open(built.output, "law") as store:
        held_out = [document.id for document in store.held_out_documents()]
    with ledger_lock(built.output, "law") as ledger:
        ledger.delete(held_out[:1])
    made = calibrate_with(tiny_lm(), settings_of(built, force=True), Recorder())
    assert made.protocol["held_out_documents"] == held_out[1:]


def test_held_out_text_that_the_version_has_taken_in_is_not_looked_at(built: BuildSettings) -> None:
    with Datastore.open(built.output, "law") as store:
        held_out = list(store.held_out_documents())
        living = LivingName(built.output, "law")
        tokens = np.array(tiny_lm().tokenizer.encode(held_out[0].text))
        keys = tiny_lm().encode([tokens.tolist()], [0]).keys[:-1].numpy().astype(np.float16)
        same = NewDocument(Document("the same", held_out[0].text), keys, tokens[1:], np.zeros((len(keys), 2), np.int64))
        living.add([same], living.snapshot(store))
    compact(built.output, "law")
    made = calibrate_with(tiny_lm(), settings_of(built, force=True), Recorder())
    looked_at = made.protocol["held_out_documents"]
    assert isinstance(looked_at, list)
    assert looked_at
    assert held_out[0].id not in looked_at


def test_what_cannot_be_calibrated_is_refused_and_keeps_its_calibration(built: BuildSettings) -> None:
    before = layout.read_current(built.output, "law")
    with pytest.raises(DatastoreMismatch, match="model_fingerprint"):
        calibrate_with(tiny_lm(seed=1), settings_of(built), Recorder())
    with lock_versions(built.output, "law"), pytest.raises(DatastoreBusy):
        calibrate_with(tiny_lm(), settings_of(built), Recorder())
    with pytest.raises(DatastoreNotFound):
        run_calibrate(settings_of(built).model_copy(update={"datastore": built.output / "absent"}), Recorder())
    with pytest.raises(InvalidParameter, match="`seed`"):
        settings_of(built, seed=-1)
    assert layout.read_current(built.output, "law") == before


def test_a_version_without_held_out_text_says_so(built: BuildSettings) -> None:
    with Datastore.open(built.output, "law") as store:
        folder, manifest = store.folder, store.manifest
    (folder / layout.HELD_OUT).unlink()
    files = {name: record for name, record in manifest.files.items() if name != layout.HELD_OUT}
    manifest.model_copy(update={"files": files}).write(folder / layout.MANIFEST)
    shutil.rmtree(built.output / "law" / "calibrations")
    layout.write_current(built.output, "law", layout.Current(manifest.version, None))
    with pytest.raises(EmptyCorpus, match="keeps no held-out text to calibrate on; build it anew"):
        calibrate_with(tiny_lm(), settings_of(built), Recorder())


def test_calibrating_with_int8_weights_is_another_calibration_that_says_so(built: BuildSettings) -> None:
    before = layout.read_current(built.output, "law")
    assert before.calibration is not None
    assert read_calibration(built.output, "law", before.calibration).numerics == "float32"
    rounded = HuggingFaceLM(tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="tiny", weights="int8")
    made = calibrate_with(rounded, settings_of(built, force=True), Recorder())
    assert (made.numerics, made.id != before.calibration) == ("int8", True)
    with pytest.raises(DatastoreMismatch, match="--weights full"):
        made.require_numerics("law", tiny_lm().numerics)
