"""The learned gate: what is fitted, stored and chosen, and that it is worth having."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from small_build import Recorder, build, given, prose, tiny_lm, write_jsonl

from knnlm_builder.recalibrate import calibrate_with
from knnlm_builder.settings import BuildSettings, CalibrateSettings, read_settings
from knnlm_builder.stages import compare_gates
from knnlm_builder.stages.compare_gates import Candidate, Cost, _best_within, default_threshold, settle_gates
from knnlm_builder.stages.fit import Evidence
from knnlm_builder.stages.fit_gate import as_trees
from knnlm_builder.stages.practice import MAX_SHARE, gather_practice
from knnlm_builder.stages.walked import RUN_TOKENS, Held, Walked, walk
from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import (
    PRACTICE_IDS,
    Calibration,
    calibration_id,
    read_calibration,
    read_gate_trees,
    write_calibration,
)
from knnlm_core.datastore.gate_file import GATE
from knnlm_core.datastore.ledger import ledger_lock
from knnlm_core.datastore.maintenance.carried import copy_calibration
from knnlm_core.datastore.maintenance.verify import verify
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import BuildError, DatastoreCorrupt, DatastoreMismatch, InvalidParameter
from knnlm_core.knn.gates import ALWAYS, GATE_FEATURES, Automaton, Confidence, EveryN, LearnedGate
from knnlm_core.knn.lambdas import LambdaMode
from knnlm_core.retrieval import Retrieval, Source, check_rules, ready_rule, with_gate, with_lambda_mode
from knnlm_core.signals import LMSignals
from knnlm_core.types import Neighbors


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A store of enough text for a gate."""
    folder = tmp_path_factory.mktemp("gated")
    pages = write_jsonl(folder / "pages.jsonl", [prose(i, 16) for i in range(90)])
    settings = given(folder / "stores", pages)
    build(settings)
    return settings


def opened(built: BuildSettings) -> tuple[Datastore, Calibration]:
    store = Datastore.open(built.output, "law", checksums=True)
    assert store.calibration is not None
    return store, store.calibration


def test_a_build_fits_a_gate_and_puts_it_beside_the_calibration(built: BuildSettings) -> None:
    store, calibration = opened(built)
    with store:
        folder = layout.calibration_folder(built.output, "law", calibration.id)
        assert {path.name for path in folder.iterdir()} == {"calibration.json", GATE, "curve.png", "gates.png"}
        assert (folder / "gates.png").read_bytes().startswith(b"\x89PNG\r\n")
        described = calibration.gate_trees
        assert described is not None
        assert store.gate_trees is not None
        assert described.features == GATE_FEATURES
        assert described.model_fingerprint == store.manifest.lm.model_fingerprint
        assert described.num_trees == len(store.gate_trees.feature)
        assert calibration.follow_rule is not None
        report = calibration.report["gates"]
        assert {of_gate["gate"] for of_gate in report} == {"always", "every_n", "confidence", "automaton", "learned"}
        assert report[0]["searched"] == 1
        assert report[0]["perplexity"] == pytest.approx(
            calibration.report["lambda_modes"][calibration.lambda_mode]["perplexity"]
        )
        for of_gate in report:
            assert 0 <= of_gate["searched"] + of_gate["followed"] <= 1 + 1e-9
        searched = [of_gate["searched"] for of_gate in report if of_gate["gate"] == "learned"]
        assert searched == sorted(searched, reverse=True)
        assert calibration.learned_threshold in compare_gates.GAINS


def test_the_gate_is_better_than_searching_at_every_other_token(built: BuildSettings) -> None:
    store, calibration = opened(built)
    store.close()
    by_gate = {(g["gate"], g["threshold"]): g for g in calibration.report["gates"]}
    half = by_gate["every_n", 2.0]
    saving = [g for (gate, _), g in by_gate.items() if gate == "learned" and g["searched"] <= half["searched"]]
    assert saving
    assert saving[0]["perplexity"] < half["perplexity"]


def test_the_best_gate_within_the_budget_is_chosen() -> None:
    trees = as_trees(*_fitted())
    tried = [
        Candidate(ALWAYS, _walked(1.0, -1.0)),
        Candidate(Confidence(0.5), _walked(0.5, -1.3)),
        Candidate(Automaton(), _walked(0.4, -1.1)),
        Candidate(LearnedGate(trees, 0.1), _walked(0.3, -1.2)),
        Candidate(LearnedGate(trees, 0.2), _walked(0.1, -1.4)),
    ]
    cost = Cost(search=10.0, decision=1.0)
    for budget, need in ((10.0, 0), (9.9, 2), (5.0, 2), (4.9, 3), (4.0, 3), (3.9, 4), (2.0, 4)):
        assert _best_within(tried, budget, cost) is tried[need]
    with pytest.raises(InvalidParameter, match=r"`latency_budget_ms` must be at least 2.00, .*, got 1.9"):
        _best_within(tried, 1.9, cost)


def test_a_budget_is_measured_anew_and_named_when_it_cannot_be_kept(built: BuildSettings, tmp_path: Path) -> None:
    shutil.copytree(built.output, tmp_path / "stores")
    place = tmp_path / "stores" / "law"
    wide = read_settings(CalibrateSettings, datastore=place, model="tiny", latency_budget_ms=1e6)
    made = calibrate_with(tiny_lm(), wide, Recorder())
    best = min(made.report["gates"], key=lambda of_gate: of_gate["perplexity"])
    assert made.report["mixed"]["perplexity"] < 1.02 * best["perplexity"]  # nothing was forbidden
    assert made.protocol["latency_budget_ms"] == 1e6
    assert made.protocol["cost_ms"]["search"] > 0
    hopeless = read_settings(CalibrateSettings, datastore=place, model="tiny", latency_budget_ms=1e-9)
    with pytest.raises(InvalidParameter, match=r"`latency_budget_ms` must be at least .*, got 1e-09"):
        calibrate_with(tiny_lm(), hopeless, Recorder())


def test_a_copy_keeps_the_gate_unless_a_document_goes_that_it_was_fitted_on(
    built: BuildSettings, tmp_path: Path
) -> None:
    root = tmp_path / "stores"
    shutil.copytree(built.output, root)
    store, calibration = opened(built)
    store.close()
    assert calibration.protocol[PRACTICE_IDS]
    kept = read_calibration(root, "law", copy_calibration(root, "law", calibration.id, "0" * 16, without=["another"]))
    changed = {"id": kept.id, "datastore_version": "0" * 16, "protocol": kept.protocol}
    assert kept == calibration.model_copy(update=changed)
    copied = read_gate_trees(root, "law", kept)
    assert copied is not None
    assert store.gate_trees is not None
    assert all(np.array_equal(a, b) for a, b in zip(copied, store.gate_trees, strict=True))
    for field in (PRACTICE_IDS, "held_out_documents"):
        gone = calibration.protocol[field][0]
        bare = read_calibration(root, "law", copy_calibration(root, "law", calibration.id, "1" * 16, without=[gone]))
        assert (bare.gate, bare.gate_trees, bare.follow_rule, bare.lambda_mode) == ("always", None, None, "fixed")
        assert bare.protocol[field] == calibration.protocol[field][1:]
        assert not (layout.calibration_folder(root, "law", bare.id) / GATE).exists()


def test_what_is_practised_on_changes_what_the_calibration_is_called(built: BuildSettings, tmp_path: Path) -> None:
    shutil.copytree(built.output, tmp_path / "stores")
    store, calibration = opened(built)
    store.close()
    gone = calibration.protocol[PRACTICE_IDS][0]
    with ledger_lock(tmp_path / "stores", "law") as ledger:
        ledger.delete([gone])
    settings = read_settings(CalibrateSettings, datastore=tmp_path / "stores" / "law", model="tiny")
    made = calibrate_with(tiny_lm(), settings, Recorder())
    assert made.id != calibration.id
    assert gone not in made.protocol[PRACTICE_IDS]


def test_the_calibrated_gate_is_what_a_source_gets_at_the_calibrated_settings_alone(built: BuildSettings) -> None:
    store, calibration = opened(built)
    with store:
        source = Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda)
        ruled = with_lambda_mode(source, calibration, None, "law")
        assert ruled.follow_rule is not None
        gated = with_gate(ruled, calibration, store.gate_trees, ("learned", None), "law")
        assert isinstance(gated.gate, LearnedGate)
        assert gated.gate.threshold == calibration.learned_threshold
        assert with_gate(ruled, calibration, store.gate_trees, None, "law").gate is ALWAYS
        every_third = calibration.model_copy(update={"gate": "every_n", "gate_threshold": 3.0})
        assert with_gate(ruled, every_third, store.gate_trees, None, "law").gate == EveryN(3)
        other = replace(source, k=calibration.k + 1)
        assert with_gate(other, calibration, store.gate_trees, None, "law").gate is ALWAYS
        with pytest.raises(InvalidParameter, match="holds for the calibrated k and τ alone"):
            with_gate(other, calibration, store.gate_trees, ("learned", 0.1), "law")
        with pytest.raises(InvalidParameter, match="needs a gate in the calibration of datastore 'law'"):
            with_gate(source, None, None, ("learned", 0.1), "law")


def rewritten(built: BuildSettings, tmp_path: Path, **changes: object) -> tuple[Path, Calibration]:
    """A copy of the store whose calibration says something else."""
    root = tmp_path / "stores"
    shutil.copytree(built.output, root)
    old = read_calibration(root, "law", str(layout.read_current(root, "law").calibration))
    with Datastore.open(root, "law") as store:
        trees = store.gate_trees
    protocol = {**old.protocol, "rewritten": True}
    new = old.model_copy(
        update={"id": calibration_id(old.datastore_version, protocol), "protocol": protocol, **changes}
    )
    write_calibration(root, "law", new, trees)
    set_current(root, "law", new.datastore_version, new.id)
    return root, new


def test_a_gate_of_another_model_is_refused(built: BuildSettings, tmp_path: Path) -> None:
    _, calibration = opened(built)
    assert calibration.gate_trees is not None
    other = calibration.gate_trees.model_copy(update={"model_fingerprint": "e" * 32})
    root, _ = rewritten(built, tmp_path, gate_trees=other)
    with pytest.raises(DatastoreMismatch, match=r"gate_trees.model_fingerprint"):
        Datastore.open(root, "law")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "every_n", "gate_threshold": None}, "gate_threshold"),
        ({"gate": "confidence", "gate_threshold": 1.5}, "gate_threshold"),
        ({"gate": "always", "gate_threshold": 0.5}, "gate_threshold"),
    ],
)
def test_a_default_gate_that_no_request_could_use_is_refused(
    built: BuildSettings, changes: dict[str, object], message: str
) -> None:
    _, calibration = opened(built)
    check_rules(calibration, "law")
    with pytest.raises(DatastoreMismatch, match=message):
        check_rules(calibration.model_copy(update=changes), "law")


def test_features_that_this_build_does_not_know_are_refused(built: BuildSettings) -> None:
    _, calibration = opened(built)
    assert calibration.gate_trees is not None
    other = calibration.gate_trees.model_copy(update={"features": ("the weather", *GATE_FEATURES[1:])})
    with pytest.raises(DatastoreMismatch, match=r"gate_trees.features"):
        check_rules(calibration.model_copy(update={"gate_trees": other}), "law")


def test_a_calibrated_single_lambda_leaves_the_rule_for_pointers_in_force(built: BuildSettings) -> None:
    store, calibration = opened(built)
    with store:
        single = calibration.model_copy(update={"lambda_mode": "fixed"})
        source = Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda)
        by_default = with_lambda_mode(source, single, None, "law")
        assert by_default.lambda_rule is None
        assert by_default.follow_rule is not None
        asked = with_lambda_mode(source, single, LambdaMode.FIXED, "law")
        assert (asked.lambda_rule, asked.follow_rule) == (None, None)
        assert not Retrieval((by_default,)).needs_context
        assert Retrieval((by_default,)).gated(Automaton()).needs_context


def test_a_damaged_gate_is_noticed(built: BuildSettings, tmp_path: Path) -> None:
    store, calibration = opened(built)
    store.close()
    path = layout.calibration_folder(built.output, "law", calibration.id) / GATE
    content = path.read_bytes()
    try:
        for damaged in (content[:-1], content + b"\0", content[:200] + bytes([content[200] ^ 1]) + content[201:], b""):
            path.write_bytes(damaged)
            with pytest.raises(DatastoreCorrupt, match=r"gate.safetensors is not the file that the calibration names"):
                Datastore.open(built.output, "law")
            with pytest.raises(DatastoreCorrupt):
                verify(built.output, "law")
        path.unlink()
        with pytest.raises(DatastoreCorrupt, match="No such file"):
            Datastore.open(built.output, "law")
    finally:
        path.write_bytes(content)


def test_practice_never_finds_the_document_that_it_practises_on(built: BuildSettings) -> None:
    store, _ = opened(built)
    with store:
        lm = tiny_lm()
        k = min(300, store.entries)  # so deep that documents fill much of it
        practice = gather_practice(
            lm, lm.tokenizer, store, k=k, nprobe=0, seed=0, batch_tokens=4096, reporter=Recorder()
        )
        assert practice is not None
        found, queries = practice.evidence.neighbors, practice.queries
        assert 0 < len(queries.keys) <= MAX_SHARE * store.entries
        starts = {store.document_entries(id_).first: store.document_entries(id_) for id_ in store.document_ids()}
        firsts = np.array(sorted(starts))
        for number in torch.unique(queries.documents).tolist():
            rows = (queries.documents == number).nonzero()[:, 0]
            # The nearest entry of all is the token itself: that tells which document it is.
            (itself,) = {
                int(firsts[np.searchsorted(firsts, entry, side="right") - 1])
                for entry in store.search(queries.keys[rows[5:6]], 1).entry_ids[:, 0].tolist()
            }
            own = starts[itself]
            alone = store.search(queries.keys[rows], k, exclude=[own])
            assert torch.equal(found.entry_ids[rows], alone.entry_ids)
            assert torch.equal(found.values[rows], alone.values)
            torch.testing.assert_close(found.distances[rows], alone.distances)


def test_trees_that_are_kept_otherwise_than_this_knows_are_refused() -> None:
    draw = np.random.default_rng(0)
    inputs, wanted = draw.standard_normal((400, 3)), draw.standard_normal(400)
    model = HistGradientBoostingRegressor(max_iter=5, max_leaf_nodes=4).fit(inputs, wanted)
    trees = as_trees(model, inputs)
    np.testing.assert_allclose(trees.predict(inputs), model.predict(inputs), atol=1e-9)
    model._baseline_prediction = model._baseline_prediction + 1
    kept, model.predict = model.predict, lambda rows: kept(rows) - 1
    with pytest.raises(BuildError, match="this release of scikit-learn is not supported"):
        as_trees(model, inputs)


class _NoPointers:
    """A store of which only searches are asked."""

    def lookup(self, queries, entry_ids, *, exclude=()):  # type: ignore[no-untyped-def]
        missing = torch.full(entry_ids.shape, -1)
        return Neighbors(missing, torch.full(entry_ids.shape, math.inf), missing)

    def next_entry(self, entry_ids):  # type: ignore[no-untyped-def]
        return torch.full(entry_ids.shape, -1)

    def search(self, queries, k, *, exclude=()):  # type: ignore[no-untyped-def]
        raise AssertionError


def held_without_pointers(count: int, seed: int) -> Held:
    """Where the LM's margin is small a search tells the token, elsewhere it misleads."""
    draw = torch.Generator().manual_seed(seed)
    margin = torch.rand(count, generator=draw)
    unsure = margin < 0.4
    targets = torch.randint(0, 50, (count,), generator=draw)
    values = torch.where(unsure, targets, targets + 50)[:, None].expand(count, 8)
    near = Neighbors(torch.arange(8).expand(count, 8), torch.ones(count, 8), values)
    base = torch.full((count,), math.log(0.2))
    signals = LMSignals(base, margin, torch.ones(count), torch.zeros(count, dtype=torch.int64))
    evidence = Evidence(base, near, targets, torch.arange(count) // 64, signals)
    return Held.of(evidence, torch.zeros(count, 2), torch.arange(count) // 700)


def test_without_anything_to_follow_the_gate_learns_where_a_search_pays() -> None:
    to_fit, report = (held_without_pointers(n, seed) for n, seed in ((6000, 1), (2100, 2)))
    assert [len(run) for run in report.runs] == 3 * [RUN_TOKENS, RUN_TOKENS, 700 - 2 * RUN_TOKENS]
    source = Source(_NoPointers(), 8, 1.0, 0.5)  # type: ignore[arg-type]
    gates = settle_gates(to_fit, report, source, num_practice=0, timed=None, seed=0, reporter=Recorder())
    assert (gates.mode, gates.threshold, gates.follow_rule) == ("always", None, None)
    learned = next(g for g in gates.reports if (g.gate, g.threshold) == ("learned", gates.learned_threshold))
    assert learned.searched == pytest.approx(0.4, abs=0.05)  # where it pays, and nowhere else
    assert learned.perplexity < 0.9 * gates.reports[0].perplexity
    few = held_without_pointers(600, 3)
    gates = settle_gates(few, report, source, num_practice=0, timed=None, seed=0, reporter=Recorder())
    assert (gates.trees, gates.learned_threshold) == (None, None)
    assert {of_gate.gate for of_gate in gates.reports} == {"always", "every_n", "confidence"}


@pytest.mark.parametrize(
    ("searched", "need"), [((0.9, 0.5, 0.2), 0.04), ((0.9, 0.8, 0.7), 0.06), ((0.4, 0.3, 0.2), 0.02)]
)
def test_the_default_threshold_is_the_lowest_that_saves_half(searched: tuple[float, ...], need: float) -> None:
    trees = as_trees(*_fitted())
    tried = [
        Candidate(ALWAYS, _walked(1.0)),
        Candidate(Automaton(), _walked(0.1)),
        Candidate(Confidence(0.5), _walked(0.3)),
    ]
    tried += [Candidate(LearnedGate(trees, t), _walked(s)) for t, s in zip((0.02, 0.04, 0.06), searched, strict=True)]
    assert default_threshold(tried) == need


def _fitted() -> tuple[HistGradientBoostingRegressor, np.ndarray]:
    inputs = np.random.default_rng(0).standard_normal((100, len(GATE_FEATURES)))
    return HistGradientBoostingRegressor(max_iter=2).fit(inputs, inputs[:, 0]), inputs


def _walked(searched: float, log_prob: float = 0.0) -> Walked:
    outcomes = (torch.arange(1000) < 1000 * searched).to(torch.int8)
    return Walked(torch.full((1000,), log_prob, dtype=torch.float64), outcomes)


def test_searching_everywhere_and_following_agree_where_both_search(built: BuildSettings) -> None:
    store, calibration = opened(built)
    with store:
        assert calibration.follow_rule is not None
        source = with_lambda_mode(
            Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda), calibration, None, "law"
        )
        source = replace(source, follow_rule=ready_rule(calibration.follow_rule, "law"))
        lm = tiny_lm()
        practice = gather_practice(
            lm, lm.tokenizer, store, k=calibration.k, nprobe=0, seed=1, batch_tokens=4096, reporter=Recorder()
        )
        assert practice is not None
        held = Held.of(practice.evidence, practice.queries.keys, practice.queries.documents)
        full = walk(held, source)
        followed = walk(held, replace(source, gate=Automaton()))
        assert full.searched == 1
        assert 0 < followed.searched < 0.5
        assert followed.followed == pytest.approx(1 - followed.searched)
        # Where both searched they say the same.
        both = followed.outcomes == 1
        torch.testing.assert_close(full.log_probs[both], followed.log_probs[both])
