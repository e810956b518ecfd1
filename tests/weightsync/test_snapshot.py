"""A version's bytes do not change while somebody reads them."""

import threading

import pytest
import torch

from grpo_worker.errors import DataError, StalledError
from grpo_worker.weightsync.manifest import SnapshotManifest, TensorSpec, VersionNotHeldError
from grpo_worker.weightsync.snapshot import SnapshotStore

SPECS = [TensorSpec("a", (3, 5), "float32"), TensorSpec("b", (7,), "bfloat16"), TensorSpec("scalar", (), "float32")]


def publish(store: SnapshotStore, version: int, value: float) -> SnapshotManifest:
    with store.begin(version, SPECS) as writer:
        for spec in SPECS:
            writer.write(spec.name, torch.full(spec.shape, value))
        return writer.commit()


@pytest.fixture
def store() -> SnapshotStore:
    return SnapshotStore(timeout_seconds=0.2)


def test_equal_weights_of_two_versions_have_one_digest(store: SnapshotStore) -> None:
    first, second, other = publish(store, 1, 0.5), publish(store, 2, 0.5), publish(store, 3, 0.25)
    assert first.digest == second.digest != other.digest


def test_tensors_are_cast_to_the_announced_dtype_in_place(store: SnapshotStore) -> None:
    with store.begin(1, SPECS) as writer:
        writer.write("a", torch.arange(15, dtype=torch.float64).view(3, 5))
        writer.write("b", torch.arange(7, dtype=torch.float32))
        writer.write("scalar", torch.tensor(2.0))
        manifest = writer.commit()
    place = manifest.tensors[1]
    with store.read(1, "test") as snapshot:
        values = torch.frombuffer(bytearray(snapshot.data), dtype=torch.uint8)[
            place.offset : place.offset + place.size_bytes
        ]
        assert values.view(torch.bfloat16).tolist() == list(range(7))


def test_a_version_that_is_read_outlives_the_next_publish_and_then_makes_room(store: SnapshotStore) -> None:
    publish(store, 1, 1.0)
    with store.read(1, "replica-0") as snapshot:
        before = bytes(snapshot.data)
        publish(store, 2, 2.0)
        assert store.held() == [1, 2]
        assert bytes(snapshot.data) == before
    publish(store, 3, 3.0)
    assert store.held() == [2, 3]


def test_a_writer_waits_for_the_reader_of_its_buffer_and_then_names_it(store: SnapshotStore) -> None:
    publish(store, 1, 1.0)
    with store.read(1, "10.0.0.7:4711"):
        publish(store, 2, 2.0)
        with pytest.raises(StalledError, match=r"10\.0\.0\.7:4711"):
            store.begin(3, SPECS)
        assert store.current is not None and store.current.version == 2


def test_a_waiting_writer_goes_on_when_the_reader_ends() -> None:
    store = SnapshotStore(timeout_seconds=30)
    publish(store, 1, 1.0)
    reading, release = threading.Event(), threading.Event()

    def read() -> None:
        with store.read(1, "replica-0"):
            reading.set()
            release.wait(30)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(30)
    publish(store, 2, 2.0)
    threading.Timer(0.05, release.set).start()
    assert publish(store, 3, 3.0).version == 3
    thread.join(30)


def test_readers_that_overlap_without_end_do_not_starve_the_writer() -> None:
    """Streams of late joiners open one after the other, each before the one before has closed."""
    store = SnapshotStore(timeout_seconds=5)
    publish(store, 1, 1.0)
    turns = [threading.Event() for _ in range(3)]
    refused, done = threading.Event(), threading.Event()

    def read(index: int) -> None:
        while not done.is_set():
            try:
                with store.read(1, f"replica-{index}"):
                    turns[(index + 1) % 3].set()  # the next one comes in before this one leaves
                    turns[index].wait(0.05)
                    turns[index].clear()
            except VersionNotHeldError:
                refused.set()
                return

    threads = [threading.Thread(target=read, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    publish(store, 2, 2.0)
    assert publish(store, 3, 3.0).version == 3
    done.set()
    for thread in threads:
        thread.join(10)
    assert refused.is_set()
    with store.read(2, "a late joiner") as snapshot:
        assert snapshot.manifest.version == 2


def test_a_version_that_is_not_held_is_refused_with_those_that_are(store: SnapshotStore) -> None:
    publish(store, 4, 1.0)
    with pytest.raises(VersionNotHeldError, match=r"version 3 is not held \(held: 4\)"), store.read(3, "test"):
        pass


def test_an_incomplete_version_is_not_published_and_is_named(store: SnapshotStore) -> None:
    publish(store, 1, 1.0)
    with store.begin(2, SPECS) as writer:
        writer.write("a", torch.zeros(3, 5))
        with pytest.raises(DataError, match="2 tensors were not written: b, scalar"):
            writer.commit()
    assert store.held() == [1]
    assert publish(store, 2, 2.0).version == 2


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("c", torch.zeros(1), "'c' was not announced"),
        ("a", torch.zeros(5, 3), r"shape \[5, 3\], announced \[3, 5\]"),
    ],
)
def test_a_wrong_write_names_the_tensor(store: SnapshotStore, name: str, tensor: torch.Tensor, message: str) -> None:
    with store.begin(1, SPECS) as writer, pytest.raises(DataError, match=message):
        writer.write(name, tensor)


def test_a_tensor_written_twice_is_refused(store: SnapshotStore) -> None:
    with store.begin(1, SPECS) as writer:
        writer.write("a", torch.zeros(3, 5))
        with pytest.raises(DataError, match="'a' was written twice"):
            writer.write("a", torch.zeros(3, 5))


def test_an_exception_while_writing_frees_the_buffer(store: SnapshotStore) -> None:
    def interrupted() -> None:
        with store.begin(1, SPECS) as writer:
            writer.write("a", torch.zeros(3, 5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert publish(store, 1, 1.0).version == 1
