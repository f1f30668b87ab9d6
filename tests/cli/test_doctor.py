"""`knnlm doctor`: each check finds what it is for, on real files and servers; a sound installation passes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from knnlm_cli import doctor_compute, doctor_selftest
from knnlm_cli.doctor_checks import Check, Probe, Status, findings, ok, worst
from knnlm_cli.doctor_compute import check_gpu, check_threads
from knnlm_cli.doctor_datastores import check_datastores, largest_bytes
from knnlm_cli.doctor_environment import check_disk, check_variables
from knnlm_cli.doctor_machine import Cores, cores, memory
from knnlm_cli.doctor_packages import EXTRAS, Extra, _extra, check_faiss, check_packages
from knnlm_cli.doctor_reference import Reference
from knnlm_cli.doctor_served import served
from knnlm_cli.doctor_server import check_server
from knnlm_cli.main import make_app
from knnlm_core import __version__
from knnlm_core.datastore.maintenance.stages import silent
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import NotReady
from knnlm_core.lm.random_lm import save_random_lm
from knnlm_server.settings import ServerSettings

BASIC = (
    "python", "system", "cores", "memory", "variables", "disk", "packages", "torch", "faiss",
    *(f"extra {extra.name}" for extra in EXTRAS), "threads", "gpu",
)  # fmt: skip
SELF_TEST = ("self-test build", "self-test search", "self-test answer")


class Store:
    """A model and a datastore, made by the self-test's own way; tests that damage it take a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_random_lm(folder / "model", doctor_selftest._prose(0, 40))
        doctor_selftest._build(folder, self.model)
        self.root = folder / "datastores"

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.root, to / "datastores"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KNNLM_")]:
        monkeypatch.delenv(name)


def looked_at(root: Path) -> dict[str, Check]:
    return {check.name: check for check in check_datastores(root, silent)}


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_sound_installation_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("TMPDIR", "XDG_CACHE_HOME", "HOME")}
    for place in places.values():
        place.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    done = subprocess.run(
        [sys.executable, "-m", "knnlm_cli", "doctor", "--json"],
        env=environment | {name: str(place) for name, place in places.items()} | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == [*BASIC, *SELF_TEST]
    assert [check for check in report["checks"] if check["status"] == "failed"] == []
    assert done.returncode == 0
    assert (report["object"], report["version"]) == ("doctor.report", __version__)
    assert all((check["status"] == "ok") == (check["next"] is None) for check in report["checks"])
    answer = report["checks"][-1]["facts"]
    assert answer["compared"] > 0.8 * (answer["scored"] + answer["generated"])
    assert 0 < answer["largest_difference"] < doctor_selftest.MAX_LOG_PROB_ERROR
    assert [path for place in places.values() for path in place.rglob("*")] == []


def test_what_failed_makes_the_exit_status_one_and_is_a_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KNNLM_MAX_SEQUENCE", "8")
    result = CliRunner().invoke(make_app(), ["doctor", "--no-self-test"])
    assert result.exit_code == 1, result.output
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  ")]
    assert len(lines) == len(BASIC)
    assert {line[0] for line in lines} <= set(Status)
    (failure,) = [line[1] for line in lines if line[0] == "failed"]
    assert failure.startswith("variables ")
    assert "→ unset KNNLM_MAX_SEQUENCE; did you mean KNNLM_MAX_SEQUENCES?" in failure
    assert result.stdout.splitlines()[-1].endswith(", 1 failed")


def test_a_warning_alone_does_not_change_the_exit_status(tmp_path: Path) -> None:
    result = CliRunner().invoke(make_app(), ["doctor", "--no-self-test", "--json", "--datastores", str(tmp_path)])
    report = json.loads(result.stdout)
    assert {check["name"]: check["status"] for check in report["checks"]}["datastores"] == "warning"
    assert (result.exit_code, report["status"]) == (0, "warning")


def test_a_check_that_breaks_is_a_finding_and_the_others_are_made() -> None:
    def broken() -> Iterator[Check]:
        yield ok("first", "fine")
        raise ZeroDivisionError("a defect")

    first, second = findings(Probe("group", "name", broken))
    assert first.status is Status.OK
    assert (second.name, second.status, second.message) == ("name", Status.FAILED, "ZeroDivisionError: a defect")


def test_the_worst_finding_counts() -> None:
    assert worst([Status.OK, Status.FAILED, Status.WARNING]) is Status.FAILED
    assert worst([]) is Status.OK


def test_every_check_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    names = {"extra …" if name.startswith("extra ") else name for name in (*BASIC, *SELF_TEST)}
    assert {name for name in names | {"datastores", "server"} if f"`{name}`" not in page} == set()


# -- environment -------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_narrowest_quota_above_this_process_counts(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/pods/this\n")
    tree = tmp_path / "tree"
    write(tree / "cpu.max", "max 100000\n")
    write(tree / "pods" / "cpu.max", "150000 100000\n")
    write(tree / "pods" / "this" / "cpu.max", "400000 100000\n")
    found = cores(tree, own)
    assert found.quota == 1.5
    assert found.usable == min(found.affinity, 2)


def test_quotas_of_the_first_kind_of_cgroups_count_too(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n")
    tree = tmp_path / "tree"
    write(tree / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "100000\n")
    write(tree / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000\n")
    write(tree / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1\n")
    write(tree / "cpu,cpuacct" / "cpu.cfs_period_us", "100000\n")
    write(tree / "memory" / "job" / "memory.limit_in_bytes", "1073741824\n")
    write(tree / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert cores(tree, own).usable == 1
    assert memory(tree, own).limit == 1 << 30


def test_without_limits_the_affinity_counts(tmp_path: Path) -> None:
    found = cores(tmp_path / "no tree", tmp_path / "no file")
    assert found.quota is None
    assert found.usable == found.affinity == len(os.sched_getaffinity(0))


def test_a_setting_out_of_bounds_is_told_before_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_PORT", "99999")
    found = check_variables()
    assert found.status is Status.FAILED
    assert "`port`" in found.message
    assert "99999" in found.message


def test_known_settings_in_bounds_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_PORT", "8001")
    assert check_variables() == ok("variables", "set: KNNLM_PORT", given=["KNNLM_PORT"], unknown=[])


def test_too_little_room_for_another_version_is_a_warning(tmp_path: Path) -> None:
    assert check_disk(tmp_path / "not" / "yet" / "there").facts["folder"] == str(tmp_path)
    found = check_disk(tmp_path, needed_bytes=1 << 60)
    assert found.status is Status.WARNING
    assert found.next is not None
    assert "prune" in found.next


# -- packages ----------------------------------------------------------------------------------------------------------


def install(site: Path, name: str, version: str) -> None:
    """Metadata as an installer leaves it."""
    write(
        site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA",
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    )


def test_the_one_faiss_is_named() -> None:
    found = check_faiss()
    assert found.status is Status.OK
    assert list(found.facts["distributions"]) == ["faiss-cpu"]
    assert found.message.startswith("faiss-cpu 1.15.")


def test_two_faiss_distributions_are_both_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "faiss-gpu", "1.15.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check_faiss()
    assert found.status is Status.FAILED
    assert "faiss-cpu 1.15." in found.message
    assert "faiss-gpu 1.15.0" in found.message
    assert found.next is not None
    assert "pip uninstall --yes faiss-cpu faiss-gpu" in found.next


def test_a_package_of_a_version_that_is_too_old_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "transformers", "4.57.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check_packages()
    assert found.status is Status.FAILED
    assert found.message.startswith("transformers is 4.57.1, knnlm needs ")
    assert found.next is not None
    assert found.next.startswith("pip install 'transformers")


def test_an_extra_that_is_missing_says_what_it_would_give() -> None:
    found = _extra(Extra("music", ("json", "knnlm_no_such_package.part"), "music", "pip install 'knnlm[music]'"))
    assert found.status is Status.OK
    assert found.facts == {"installed": False, "missing": ["knnlm_no_such_package.part"]}
    assert "pip install 'knnlm[music]'" in found.message


# -- compute -----------------------------------------------------------------------------------------------------------


def test_more_threads_than_usable_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_compute, "cores", lambda: Cores(16, 16, 1.0))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = check_threads()
    finally:
        torch.set_num_threads(before)
    assert found.status is Status.WARNING
    assert found.message.startswith("torch 3, FAISS ")
    assert found.next is not None
    assert "OMP_NUM_THREADS=1" in found.next


def test_a_number_of_threads_that_is_none_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "two")
    assert check_threads().status is Status.WARNING


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a build for CUDA here")
def test_a_driver_that_torch_cannot_use_is_a_warning_with_its_version(tmp_path: Path) -> None:
    told = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    found = check_gpu(write(tmp_path / "version", told))
    assert found.status is Status.WARNING
    assert found.message == "driver 550.54.15 is here, but torch is a build for CPUs"


def test_no_gpu_is_no_fault(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert check_gpu(tmp_path / "nothing").status is Status.OK


# -- datastores --------------------------------------------------------------------------------------------------------


def test_a_whole_datastore_is_read_in_full_and_fine(store: Store) -> None:
    found = looked_at(store.root)
    assert [check.status for check in found.values()] == [Status.OK, Status.OK]
    assert found["datastores"].facts["names"] == ["self-test"]
    assert largest_bytes(store.root) == found["datastore self-test"].facts["bytes"]


def test_a_damaged_file_fails_with_its_name(store: Store, tmp_path: Path) -> None:
    root = store.copy(tmp_path)
    damaged = next((root / "self-test").glob("*/shard-00000/keys.arrow"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    found = looked_at(root)["datastore self-test"]
    assert (found.status, found.facts["code"]) == (Status.FAILED, "datastore_corrupt")
    assert str(damaged) in found.message


def test_leftovers_of_interrupted_builds_are_warnings(store: Store, tmp_path: Path) -> None:
    root = store.copy(tmp_path)
    (root / "self-test" / "0123456789abcdef.tmp").mkdir()
    (root / "begun" / "0123456789abcdef.tmp").mkdir(parents=True)
    found = looked_at(root)
    for name in ("self-test", "begun"):
        check = found[f"datastore {name}"]
        assert (check.status, check.facts["leftovers"]) == (Status.WARNING, ["0123456789abcdef.tmp"])


@pytest.mark.parametrize(
    ("place", "status", "hint"),
    [
        ("absent", Status.FAILED, "--output"),
        (".", Status.WARNING, "knnlm build"),
        ("datastores/self-test", Status.WARNING, "give the folder around it"),
    ],
)
def test_a_folder_that_holds_no_datastores_says_what_to_give(
    store: Store, place: str, status: Status, hint: str
) -> None:
    (found,) = check_datastores(store.folder / place, silent)
    assert found.status is status
    assert found.next is not None
    assert hint in found.next


# -- server ------------------------------------------------------------------------------------------------------------


def settings(store: Store, **changes: Any) -> ServerSettings:
    given: dict[str, Any] = {"model": str(store.model), "kv_cache_bytes": 8 << 20, "drain_timeout_s": 1}
    return ServerSettings(**{**given, **changes})


def test_a_ready_server_is_told_with_what_it_serves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = settings(store, datastores=store.root, state=tmp_path / "state.json", api_key=("k" * 20,))
    with served(given) as client:
        found = check_server(f"{client.base_url}/v1/")
    assert found.status is Status.OK
    assert (found.facts["model"], found.facts["datastores"]) == ("model", ["self-test"])


def test_a_server_that_cannot_start_raises_its_reason(store: Store) -> None:
    with pytest.raises(NotReady, match="nowhere"), served(settings(store, model="/nowhere/at/all")):
        pass


class Answers(BaseHTTPRequestHandler):
    """Answers of other servers, or of ours in other states."""

    routes: ClassVar[dict[str, tuple[int, dict[str, Any]]]] = {}

    def do_GET(self) -> None:
        status, content = self.routes.get(self.path, (404, {}))
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def answering(routes: dict[str, tuple[int, dict[str, Any]]]) -> Iterator[str]:
    handler = type("Handler", (Answers,), {"routes": routes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


READY = {"status": "ready", "model": "lm", "datastores": [], "running": 0, "waiting": 0, "scoring": 0}
LOADING = {"error": {"message": "loading law", "type": "service_unavailable_error", "param": None, "code": "not_ready"}}


@pytest.mark.parametrize(
    ("routes", "status", "told"),
    [
        ({}, Status.FAILED, "is no knnlm server: /version answers 404"),
        (
            {"/version": (200, {"version": "0.0.9"}), "/health": (200, {"status": "ok"}), "/ready": (200, READY)},
            Status.WARNING,
            "knnlm 0.0.9",
        ),
        (
            {"/version": (200, {"version": __version__}), "/health": (200, {"status": "ok"}), "/ready": (503, LOADING)},
            Status.WARNING,
            "is not ready: loading law",
        ),
        (
            {"/version": (200, {"version": __version__}), "/health": (503, LOADING), "/ready": (503, LOADING)},
            Status.FAILED,
            "has failed: loading law",
        ),
    ],
    ids=["another server", "another version", "still loading", "failed"],
)
def test_a_server_in_another_state_is_told_apart(
    routes: dict[str, tuple[int, dict[str, Any]]], status: Status, told: str
) -> None:
    with answering(routes) as url:
        found = check_server(url)
    assert found.status is status
    assert told in found.message
    assert found.next is not None


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not an address", "http://[::1"])
def test_nobody_at_the_address_is_a_failure(url: str) -> None:
    found = check_server(url)
    assert found.status is Status.FAILED
    assert "cannot be reached" in found.message


# -- the self-test can fail --------------------------------------------------------------------------------------------


def test_the_self_test_finds_a_search_that_misses_the_nearest(store: Store) -> None:
    with Datastore.open(store.root, "self-test") as datastore:
        reference = Reference(store.model, datastore)
        token_ids = doctor_selftest._token_ids(store.model)
        assert doctor_selftest._search(datastore, reference, token_ids).status is Status.OK
        reference._keys = reference._keys[1::2]  # the index now finds entries that it should not
        assert doctor_selftest._search(datastore, reference, token_ids).status is Status.FAILED


def test_the_self_test_finds_a_server_that_mixes_otherwise(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Datastore.open(store.root, "self-test") as datastore:
        reference = Reference(store.model, datastore)
        token_ids = doctor_selftest._token_ids(store.model)
        monkeypatch.setattr(
            doctor_selftest, "_knn", lambda: {"k": 16, "temperature": 20.0, "lambda": 0.49, "gate": "always"}
        )
        found = doctor_selftest._answer(store.folder, store.model, reference, token_ids)
    assert found.status is Status.FAILED
    assert found.facts["largest_difference"] > 2 * doctor_selftest.MAX_LOG_PROB_ERROR
