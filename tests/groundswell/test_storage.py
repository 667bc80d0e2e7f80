"""Shared storage and the mirror of a sweep in it: on a file system, and on a real S3 server on this machine."""

import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from groundswell.mirror import Mirror
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.storage import Storage, StorageError

S3_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server on loopback with a bucket named `bucket`: its URL."""
    server_module = pytest.importorskip("moto.server", reason="the S3 tests need moto: pip install -e '.[dev]'")
    from pyarrow import fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"access_key": "testing", "secret_key": "testing", "region": "us-east-1"}
    client = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True, **keys)
    client.create_dir("bucket")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    for name, value in (S3_VARIABLES | {"AWS_ENDPOINT_URL": s3_server}).items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["file", "s3"])
def storage(request, tmp_path):
    if request.param == "file":
        return Storage((tmp_path / "store").as_uri())
    request.getfixturevalue("s3")
    return Storage(f"s3://bucket/{tmp_path.name}-{time.time_ns()}")


@pytest.fixture
def folder(tmp_path):
    """A folder as a checkpoint is one."""
    path = tmp_path / "here"
    path.mkdir()
    write(path, {"weights.bin": b"w" * 3_000_000, "config.json": b"{}", "deep/vocab.txt": b"a b", "state.json": b"1"})
    os.utime(path / "weights.bin", (time.time() - 60,) * 2)  # stores may tell times in whole seconds
    return path


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- folders ----


def test_a_folder_goes_there_and_back(storage, folder, tmp_path):
    assert storage.push(folder, "a/b", "state.json") == 4
    assert storage.list("a/b") == ["config.json", "deep", "state.json", "weights.bin"]
    assert storage.list("nothing") == []
    assert storage.exists("a/b/deep/vocab.txt") and not storage.exists("a/c")
    assert storage.pull("a/b", tmp_path / "back", "state.json") == 4
    assert content(tmp_path / "back") == content(folder)
    assert storage.pull("a/b", tmp_path / "back", "state.json") == 0


def test_only_what_has_changed_is_sent(storage, folder):
    storage.push(folder, "a")
    assert storage.push(folder, "a") == 0
    fresh = Storage(storage.uri)  # another process, which has sent nothing itself
    assert fresh.push(folder, "a") == 0
    write(folder, {"config.json": b"[]", "more.txt": b"x"})  # of the same size
    assert fresh.push(folder, "a") == 2
    assert fresh.read("a/config.json") == b"[]"
    assert storage.push(folder, "a") == 1  # as it does not know that the other one has
    later = time.time() + 5
    write(folder, {"weights.bin": b"v" * 3_000_000})
    os.utime(folder / "weights.bin", (later, later))
    assert Storage(storage.uri).push(folder, "a") == 1


def test_only_what_is_missing_or_newer_is_fetched(storage, folder, tmp_path):
    storage.push(folder, "a")
    assert storage.pull("a", tmp_path / "back") == 4
    assert storage.pull("a", tmp_path / "back") == 0
    (tmp_path / "back/config.json").unlink()
    write(folder, {"deep/vocab.txt": b"a b c"})
    storage.push(folder, "a")
    assert storage.pull("a", tmp_path / "back") == 2
    assert content(tmp_path / "back") == content(folder)


def test_temporaries_and_locks_stay_at_home(storage, folder):
    write(folder, {".config.json.tmp-host-1-0123abcd": b"half", "training.lock": b"", ".hidden/x": b""})
    storage.push(folder, "a")
    assert storage.list("a") == ["config.json", "deep", "state.json", "weights.bin"]


def test_without_its_marker_a_folder_is_not_there(storage, folder, tmp_path):
    storage.push(folder, "a", "state.json")
    storage.delete("a/state.json")
    assert storage.pull("a", tmp_path / "back", "state.json") == 0
    assert not (tmp_path / "back").exists()
    (folder / "state.json").unlink()
    assert storage.push(folder, "b", "state.json") == 0
    assert storage.list("b") == []


class Watched(Storage):
    """Looks at the store, as a reader would, before each change of it."""

    def __init__(self, uri, look):
        super().__init__(uri)
        self.look = look

    def _upload(self, relative, source):
        self.look(self, relative)
        super()._upload(relative, source)


def test_readers_never_see_half_a_folder(storage, folder, tmp_path):
    """Another content comes under the same name, as when a damaged checkpoint is written again."""
    old = content(folder)
    storage.push(folder, "a", "state.json")
    seen = []

    def look(store, relative):
        back = tmp_path / f"look-{len(seen)}"
        Storage(store.uri).pull("a", back, "state.json")
        seen.append(content(back) if back.exists() else None)

    write(folder, {"weights.bin": b"v" * 3_000_001, "config.json": b"[1]", "state.json": b"2"})
    (folder / "deep/vocab.txt").unlink()
    Watched(storage.uri, look).push(folder, "a", "state.json")
    assert len(seen) == 3 and all(found in (None, old) for found in seen)
    assert storage.pull("a", tmp_path / "back", "state.json") == 3
    assert content(tmp_path / "back") == content(folder)


def test_a_writer_that_dies_leaves_nothing_to_see(storage, folder, tmp_path):
    def look(store, relative):
        if relative.endswith("weights.bin"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watched(storage.uri, look).push(folder, "a", "state.json")
    assert "config.json" in storage.list("a")
    assert storage.pull("a", tmp_path / "back", "state.json") == 0
    assert storage.push(folder, "a", "state.json") == 2  # only what is missing
    assert storage.pull("a", tmp_path / "back", "state.json") == 4


def test_an_upload_that_breaks_off_leaves_no_part(storage):
    class Broken:
        def __init__(self):
            self.chunks = [b"x" * 2**20, b"y" * 2**20]

        def read(self, size):
            if not self.chunks:
                raise OSError("the disk is gone")
            return self.chunks.pop()

    with pytest.raises(StorageError, match="the disk is gone"):
        storage._upload("a/file", Broken())
    assert storage.list("a") == [] and not storage.exists("a/file")


def test_a_damaged_copy_is_replaced(storage, folder, tmp_path):
    storage.push(folder, "a", "state.json")
    write(tmp_path / "back", {"state.json": b"torn", "rubbish": b""})
    assert storage.pull("a", tmp_path / "back", "state.json") == 4
    assert content(tmp_path / "back") == content(folder)


def test_deleting(storage, folder):
    storage.push(folder, "a/b", "state.json")
    storage.push(folder, "a/bc", "state.json")
    storage.delete("a/b", "state.json")
    storage.delete("a/b", "state.json")
    assert storage.list("a/b") == [] and len(storage.list("a/bc")) == 4
    assert storage.push(folder, "a/b", "state.json") == 4  # it is not taken for sent


def test_paths_stay_inside(storage):
    for bad in ("../x", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="must stay below"):
            storage.exists(bad)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("results", "'results' is no URI; write file:///folder"),
        ("C:/results", "is no URI"),
        ("file://results", "is no URI"),
        ("nope://x/y", r"storage nope://x/y: .*built in are file://, s3://, .* need their fsspec package"),
    ],
)
def test_uris_that_cannot_be_right(uri, message):
    with pytest.raises(StorageError, match=message) as caught:
        Storage(uri)
    assert "\n" not in str(caught.value) and not caught.value.passing


def test_a_place_where_nobody_may_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="storage file://"):
        Storage((tmp_path / "file" / "store").as_uri())


def test_no_such_bucket(s3):
    with pytest.raises(StorageError, match="storage s3://missing/x: make the bucket first, or correct the URI"):
        Storage("s3://missing/x")


def test_a_store_that_is_away(s3, monkeypatch, folder):
    storage = Storage("s3://bucket/away")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        StorageError, match="cannot be reached: check the network, and for s3 AWS_ENDPOINT_URL"
    ) as caught:
        Storage("s3://bucket/away")
    assert caught.value.passing
    storage.push(folder, "a")  # the one that was opened before still is


# ---- a sweep's mirror ----


@pytest.fixture
def sweep(tmp_path):
    return SweepFolder(tmp_path / "first" / "sweep")


@pytest.fixture
def other(tmp_path):
    """The same sweep on another machine."""
    return SweepFolder(tmp_path / "second" / "sweep")


@pytest.fixture
def mirror(storage):
    """sweep folder, interval -> Mirror in the one storage; they are closed at the end."""
    made = []

    def make(sweep: SweepFolder, interval_s: float = 0.0) -> Mirror:
        made.append(Mirror(Storage(storage.uri), sweep, interval_s))
        return made[-1]

    yield make
    for one in made:
        one.close(10)


def train(run: RunFolder, steps: range, keep: int = 2) -> None:
    """What a trainer leaves: readings, checkpoints of which the older ones are thinned out, a status."""
    import shutil

    if not run.exists():
        write(run.path, {"experiment.json": b"{}", "run.json": b"{}"})
    for step in steps:
        run.append_metrics(step, {"loss": 1.0 / (step + 1)}, time_ms=step)
        run.sync_journal()
        name = f"step-{step:08d}"
        write(run.checkpoints / name, {"model.bin": bytes([step]) * 1000, "state.json": f"{step}".encode()})
        for old in run.checkpoint_steps()[:-keep]:
            shutil.rmtree(run.checkpoint_folder(old))
    run.update_status(state="running", step=steps[-1])


def test_a_run_goes_on_where_its_first_machine_was_lost(mirror, sweep, other):
    run = sweep.run("abc")
    train(run, range(4))
    first = mirror(sweep)
    first.publish(run)
    assert first.flush(30) is None
    second, there = mirror(other), other.run("abc")
    assert second.fetch(there)
    assert content(there.path) == content(run.path)
    assert not second.fetch(there)
    train(there, range(4, 6))
    second.publish(there)
    assert second.flush(30) is None
    assert first.fetch(run)  # the first one is back, with an older copy
    assert run.journal() == there.journal() and run.status() == there.status()
    assert run.checkpoint_steps()[-2:] == [4, 5]


def test_what_was_thinned_out_here_goes_there_too(mirror, sweep, storage):
    run, one = sweep.run("abc"), mirror(sweep)
    for steps in (range(2), range(2, 4)):
        train(run, steps)
        one.publish(run)
        assert one.flush(30) is None
        assert storage.list("sweep/runs/abc/checkpoints") == [f"step-{s:08d}" for s in run.checkpoint_steps()]


def test_an_empty_machine_takes_nothing_away(mirror, sweep, other, storage):
    run, there = sweep.run("abc"), other.run("abc")
    train(run, range(3))
    one = mirror(sweep)
    one.publish(run)
    assert one.flush(30) is None
    train(there, range(1))
    two = mirror(other)
    two.publish(there)
    assert two.flush(30) is None
    assert {"step-00000001", "step-00000002"} <= set(storage.list("sweep/runs/abc/checkpoints"))


def test_the_one_that_is_ahead_wins(mirror, sweep, other):
    run, there = sweep.run("abc"), other.run("abc")
    train(run, range(3))
    one = mirror(sweep)
    one.publish(run)
    assert one.flush(30) is None
    train(run, range(3, 5))  # not published any more
    assert not one.fetch(run)
    assert run.journal()[-1]["step"] == 4
    run.update_status(state="failed")
    one.publish(run)
    assert one.flush(30) is None
    run.update_status(state="waiting")  # a new start of the sweep tries it again
    one.fetch(run)
    assert run.status().state == "waiting"
    assert mirror(other).fetch(there) and there.status().state == "failed"


def test_the_journal_reaches_as_far_as_the_checkpoints(mirror, sweep, other, storage, tmp_path):
    """At any moment of publishing: else a run that goes on from there would miss readings."""
    run = sweep.run("abc")
    train(run, range(2))
    gaps = []

    def look(store, relative):
        place = SweepFolder(tmp_path / f"look-{len(gaps)}" / "sweep")
        reader = Mirror(Storage(store.uri), place)
        seen = place.run("abc")
        reader.fetch(seen, None)
        reader.close()
        last = seen.journal()[-1]["step"] if seen.journal() else -1
        gaps.append(max([*seen.checkpoint_steps(), -1]) - last)

    one = mirror(sweep)
    one.storage = Watched(storage.uri, look)
    one._publish_run(run)
    train(run, range(2, 4))
    one._publish_run(run)
    assert len(gaps) > 10 and max(gaps) <= 0


def test_the_rest_of_a_sweep(mirror, sweep, other):
    write(sweep.path, {"sweep.json": b'{"name": 1}', "tables/runs.csv": b"a,b", "figures/f.png": b"png"})
    with sqlite3.connect(sweep.path / "study.db") as study:
        study.execute("create table trials (number integer)")
        study.execute("insert into trials values (7)")
    for name in ("abc", "def"):
        train(sweep.run(name), range(3))
    one = mirror(sweep)
    one.publish_sweep()
    for run in sweep.runs():
        one.publish(run)
    assert one.flush(60) is None
    two = mirror(other)
    assert [run.run_id for run in two.fetch_sweep()] == ["abc", "def"]
    assert [run.checkpoint_steps() for run in other.runs()] == [[], []]  # the worker fetches what it needs
    assert [run.journal()[-1]["step"] for run in other.runs()] == [2, 2]
    assert two.fetch(other.run("abc")) and other.run("abc").checkpoint_steps() == [1, 2]
    with sqlite3.connect(other.path / "study.db") as study:
        assert study.execute("select number from trials").fetchall() == [(7,)]
    assert two.storage.read("sweep/tables/runs.csv") == b"a,b"


def test_a_run_is_announced_before_it_trains(mirror, sweep, other):
    run = sweep.run("abc")
    write(run.path, {"experiment.json": b"{}", "run.json": b"{}"})
    run.update_status(state="waiting")
    mirror(sweep).announce(run)
    assert mirror(other).fetch(other.run("abc"))
    assert other.run("abc").exists() and other.run("abc").status().state == "waiting"


def test_publishing_waits_for_its_interval(mirror, sweep, storage):
    run, one = sweep.run("abc"), mirror(sweep, interval_s=3600.0)
    path = "sweep/runs/abc/checkpoints"
    train(run, range(1))
    one.publish(run)  # the first time at once
    wait_for(lambda: storage.exists("sweep/runs/abc/run.json"))
    train(run, range(1, 2))
    one.publish(run)
    time.sleep(0.3)
    assert storage.list(path) == ["step-00000000"]
    one.publish(run, force=True)
    wait_for(lambda: storage.exists(f"{path}/step-00000001/state.json"))


def test_a_store_that_is_away_stops_nothing(mirror, sweep, monkeypatch, caplog):
    monkeypatch.setattr("groundswell.mirror.TRY_DELAYS_SECONDS", (0.01, 0.01))
    one, run, tries = mirror(sweep), sweep.run("abc"), []
    train(run, range(1))
    push = one.storage.push

    def broken(*arguments):
        tries.append(threading.current_thread().name)
        raise StorageError("storage x: it cannot be reached", passing=True)

    monkeypatch.setattr(one.storage, "push", broken)
    start = time.monotonic()
    one.publish(run)
    assert time.monotonic() - start < 0.5
    assert one.flush(10) == f"not in {one.storage.uri}: abc (storage x: it cannot be reached)"
    assert len(tries) >= 3 and set(tries) == {"mirror"}
    assert "not published: abc: storage x: it cannot be reached" in caplog.text
    monkeypatch.setattr(one.storage, "push", push)  # it is back: what was left is sent without being asked for again
    assert one.flush(30) is None
    assert one.storage.exists("sweep/runs/abc/run.json")


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
