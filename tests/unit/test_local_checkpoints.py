"""Local checkpoints: who holds what, what is chosen, and files that are private and verified."""

from __future__ import annotations

import itertools
import os
import stat
import time

import numpy as np
import pytest

from launch.errors import ConfigError
from launch.spec import CheckpointSpec
from trainer import local_directory
from trainer.checksums import DamagedError
from trainer.local_catalogue import (
    Catalogue,
    Leaf,
    Piece,
    Placement,
    box_of,
    make_plan,
    overlapping,
)
from trainer.local_directory import Entry, LocalDirectory
from trainer.local_restore import Candidate, _place, newest, unfit

RUN = "0" * 32
ENTRY = Entry(25, 3, "a" * 16)


def catalogue(data: int, fsdp: int, tensor: int, per_host: int) -> Catalogue:
    """A state on a mesh of one device per process, `per_host` processes to a host."""
    mesh = np.arange(data * fsdp * tensor).reshape(data, fsdp, tensor)
    flat = mesh.reshape(-1)

    def placement(grid: tuple[int, ...], boxes: np.ndarray) -> Placement:
        return Placement(grid, tuple(tuple(sorted(map(int, box))) for box in boxes))

    over_both = np.moveaxis(mesh, 0, 2).reshape(fsdp * tensor, data)
    over_fsdp = np.moveaxis(mesh, 1, 0).reshape(fsdp, data * tensor)
    return Catalogue(
        {
            "kernel": Leaf((24, 24), "float32", 0),
            "stack": Leaf((3, 24, 2), "bfloat16", 1),
            "key": Leaf((2,), "uint32", 2),
            "bias": Leaf((24,), "float32", 2),
            "count": Leaf((), "int32", 3),
        },
        [
            placement((fsdp, tensor), over_both),
            placement((1, fsdp, 1), over_fsdp),
            placement((1,), flat[None]),
            placement((), flat[None]),
        ],
        [process // per_host for process in range(mesh.size)],
    )


MESHES = [(2, 2, 1, 1), (4, 1, 1, 2), (1, 4, 1, 1), (1, 2, 2, 2), (2, 2, 2, 4), (1, 1, 1, 1)]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_box_is_written_once_per_host_that_has_it(mesh):
    known = Catalogue.from_json(catalogue(*mesh).as_json())
    assert known == catalogue(*mesh)
    written: dict[Piece, list[int]] = {}
    for process, directory in enumerate(known.directories):
        for piece in known.written_by(process):
            assert piece in known.held_by(process)
            written.setdefault(piece, []).append(directory)
    for name, leaf in known.leaves.items():
        for box, holders in enumerate(known.placements[leaf.placement].holders):
            hosts = {known.directories[holder] for holder in holders}
            assert sorted(written[Piece(name, box)]) == sorted(hosts)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(MESHES, MESHES)))
def test_a_state_moves_between_meshes_whole_and_bit_for_bit(before, after):
    saved, wanted = catalogue(*before), catalogue(*after)
    chance = np.random.default_rng(0)
    whole = {
        name: chance.integers(0, 256, (*leaf.shape, 4), np.uint8).view(np.uint32)[..., 0]
        for name, leaf in saved.leaves.items()
    }
    saved = Catalogue(
        {name: Leaf(leaf.shape, "uint32", leaf.placement) for name, leaf in saved.leaves.items()},
        saved.placements,
        saved.directories,
    )
    wanted = Catalogue(
        {name: Leaf(leaf.shape, "uint32", leaf.placement) for name, leaf in wanted.leaves.items()},
        wanted.placements,
        wanted.directories,
    )

    def data(piece: Piece) -> np.ndarray:
        box = tuple(slice(*ends) for ends in saved.box(piece))
        return np.ascontiguousarray(whole[piece.leaf][box]).reshape(-1).view(np.uint8)

    # Hosts keep their numbers as far as there are as many today.
    hosts = max(wanted.directories) + 1
    available = {p: d % hosts for p, d in enumerate(saved.directories)}
    for process, directory in enumerate(wanted.directories):
        plan = make_plan(saved, wanted, available, process)
        assert not plan.lacking
        buffers = {
            piece: np.full([b - a for a, b in wanted.box(piece)], 7, np.uint32)
            for piece in wanted.held_by(process)
        }
        for piece, writer in plan.own.items():
            assert available[writer] == directory
            assert piece in saved.written_by(writer)
            assert _place(saved, wanted, piece, data(piece), buffers)
        for transfer in plan.transfers:
            assert wanted.directories[transfer.source] == available[transfer.writer]
            if transfer.piece not in plan.own:
                _place(saved, wanted, transfer.piece, data(transfer.piece), buffers)
        for piece, found in buffers.items():
            box = tuple(slice(*ends) for ends in wanted.box(piece))
            np.testing.assert_array_equal(found, whole[piece.leaf][box])


def test_what_only_a_lost_host_had_is_lacking_and_nothing_else():
    replicas, shards = catalogue(2, 2, 1, 1), catalogue(1, 4, 1, 1)
    without = {0: 0, 1: 1, 2: 2}
    assert not make_plan(replicas, replicas, without, 0).lacking
    assert make_plan(shards, shards, without, 0).lacking == [Piece("kernel", 3), Piece("stack", 3)]
    # A piece that is damaged is taken from elsewhere, or lacking as well.
    damaged = {(1, Piece("kernel", 1))}
    assert make_plan(shards, shards, without, 0, damaged).lacking[0] == Piece("kernel", 1)
    plan = make_plan(replicas, replicas, {0: 0, 1: 1, 2: 2, 3: 3}, 1, damaged)
    assert not plan.lacking
    assert set(replicas.held_by(1)) - plan.own.keys() == {Piece("kernel", 1)}
    assert [(t.piece, t.writer) for t in plan.transfers] == [(Piece("kernel", 1), 3)]
    # Whoever lacks is given; whoever has does not read from others.
    plan = make_plan(replicas, replicas, without, 3)
    assert not plan.own
    given = {transfer.piece for transfer in plan.transfers}
    assert given == set(replicas.held_by(3))


def test_nothing_is_sent_where_every_host_has_its_own():
    known = catalogue(2, 2, 1, 2)
    available = dict(enumerate(known.directories))
    for process in range(4):
        plan = make_plan(known, known, available, process)
        assert not plan.transfers
        assert set(plan.own) == set(known.held_by(process))


@pytest.mark.parametrize(
    ("shape", "box", "grid", "numbers"),
    [
        ((), (), (), [0]),
        ((8,), ((2, 4),), (4,), [1]),
        ((8,), ((1, 5),), (4,), [0, 1, 2]),
        ((8, 6), ((0, 4), (3, 6)), (2, 2), [1]),
        ((8, 6), ((2, 6), (0, 6)), (2, 2), [0, 1, 2, 3]),
    ],
)
def test_overlapping_boxes(shape, box, grid, numbers):
    assert list(overlapping(shape, box, grid)) == numbers
    assert all(len(box_of(shape, grid, number)) == len(shape) for number in numbers)


def test_the_newest_step_that_is_later_than_the_shared_one_is_chosen():
    a, b = "a" * 16, "b" * 16
    offers = [[(20, 0, a), (25, 0, a)], [], [(25, 2, a), (25, 3, b), (30, 2, b)]]
    directories = [0, 0, 1]

    def choose(newer_than, rejected=()):
        found = newest(offers, directories, newer_than, rejected)
        return None if found is None else Candidate.from_json(found)

    assert choose(None) == Candidate(30, b, {2: 1}, 2)
    assert choose(30) is None
    # Entries of two gangs are never one state; of two, the one of which there is more.
    assert choose(None, [(30, b)]) == Candidate(25, a, {0: 0, 2: 1}, 0)
    assert choose(24, [(30, b), (25, a)]) == Candidate(25, b, {3: 1}, 2)
    assert choose(25, [(30, b)]) is None


def test_a_state_of_another_config_or_shape_is_not_taken():
    was = {
        "record": {
            "config": {"seed": 1, "mesh": {"data": 2}, "restore": {"allow_change": ("seed",)}},
            "code": {"task.py": "1"},
            "versions": {"jax": "0.10.2"},
        },
        "described": {"w": {"shape": [4], "dtype": "float32"}},
    }
    wanted = {"w": np.zeros(4, np.float32)}
    now = {"config": {"seed": 1, "mesh": {"data": 4}}, "code": {"task.py": "1"}, "versions": {}}
    assert unfit(was, wanted, now) is None
    assert unfit(was, wanted, {**now, "versions": {"jax": "0.10.3"}}) is None
    assert "versions.jax" in unfit(was, wanted, {**now, "versions": {"jax": "0.11.0"}})
    told = {"seed": 1, "mesh": {"data": 4}, "restore": {"fresh": ("optimizer",)}}
    assert "config.restore" in unfit(was, wanted, {**now, "config": told})
    assert "config.seed" in unfit(was, wanted, {**now, "config": {"seed": 2}})
    assert "code" in unfit(was, wanted, {**now, "code": {"task.py": "2"}})
    assert "w differ" in unfit(was, {"w": np.zeros(4, np.float16)}, now)
    assert "v, w differ" in unfit(was, {"v": wanted["w"]}, now)


# ---- Files ----


@pytest.fixture
def directory(tmp_path):
    made = LocalDirectory(str(tmp_path / "local"), RUN)
    yield made
    made.close()


ARRAYS = [np.arange(1000, dtype=np.float32).reshape(10, 100), np.int32(7), np.ones(3, np.uint8)]


def test_what_is_written_is_private_whole_and_read_back(directory):
    old = os.umask(0)
    try:
        directory.write(ENTRY, [np.asarray(a) for a in ARRAYS], {"data_position": [1]})
    finally:
        os.umask(old)
    for folder, _, names in os.walk(directory.path):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700, folder
        for name in names:
            assert stat.S_IMODE(os.stat(f"{folder}/{name}").st_mode) == 0o600, name
    assert directory.entries() == [ENTRY]
    index = directory.index(ENTRY)
    assert index["data_position"] == [1]
    for array, piece in zip(ARRAYS, index["pieces"], strict=True):
        assert directory.read(ENTRY, piece).tobytes() == np.asarray(array).tobytes()


def test_any_changed_byte_is_noticed(directory):
    directory.write(ENTRY, [np.asarray(a) for a in ARRAYS], {})
    pieces = directory.index(ENTRY)["pieces"]
    chance = np.random.default_rng(1)

    def read_all():
        directory.index(ENTRY)
        for piece in pieces:
            directory.read(ENTRY, piece)

    for name in ("data", "index.json"):
        path = directory.path / ENTRY.name / name
        good = path.read_bytes()
        places = [0, len(good) - 1, *chance.integers(0, len(good), 30)]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(chance.integers(8))
            path.write_bytes(bad)
            with pytest.raises(DamagedError):
                read_all()
        path.write_bytes(good[:-1])
        with pytest.raises(DamagedError):
            read_all()
        path.write_bytes(good)
    read_all()


def test_a_write_that_fails_leaves_nothing_and_spares_the_one_before(directory, monkeypatch):
    directory.write(ENTRY, [np.zeros(4, np.uint8)], {})

    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            directory.write(ENTRY, [np.ones(4, np.uint8)], {})
    with pytest.raises(OSError, match=r"1,125,899,906,842,624 bytes are needed and [0-9,]+ are"):
        local_directory._require_room(1, 2**50)
    assert directory.entries() == [ENTRY]
    assert directory.read(ENTRY, directory.index(ENTRY)["pieces"][0]).tolist() == [0, 0, 0, 0]
    assert sorted(os.listdir(directory.path)) == [".identity", ENTRY.name]


def test_unfinished_writes_are_no_entries_and_go(directory):
    (directory.path / f"{ENTRY.name}.0000.tmp").mkdir()
    assert directory.entries() == []
    directory.remove_unfinished()
    assert os.listdir(directory.path) == [".identity"]


def test_processes_of_one_host_share_a_directory_and_the_last_one_deletes_it(tmp_path):
    parent = str(tmp_path / "local")
    one, two = LocalDirectory(parent, RUN), LocalDirectory(parent, RUN)
    other = LocalDirectory(str(tmp_path / "elsewhere"), RUN)
    assert one.identity == two.identity != other.identity
    one.close()
    assert two.path.is_dir()
    two.write(ENTRY, [], {})
    two.close()
    assert two.path.is_dir(), "there is a checkpoint in it"
    again = LocalDirectory(parent, RUN)
    again.remove(again.entries())
    again.close()
    assert not again.path.exists()
    other.close()


def test_only_what_dead_runs_have_left_long_ago_is_deleted(tmp_path):
    parent = str(tmp_path / "local")
    names = [digit * 32 for digit in "1234"]
    alive, dead, recent, own = (LocalDirectory(parent, name) for name in names)
    for directory in (alive, dead, recent):
        directory.write(ENTRY, [np.zeros(8)], {})
    for directory in (dead, recent):
        directory.close()
    long_ago = time.time() - 8 * 86400
    for directory in (alive, dead):
        for path in [directory.path, *directory.path.iterdir()]:
            os.utime(path, (long_ago, long_ago))
    (tmp_path / "local" / "mine").mkdir()
    os.utime(tmp_path / "local" / "mine", (long_ago, long_ago))
    assert own.remove_left_over() == [dead.path]
    assert sorted(os.listdir(parent)) == sorted([names[0], names[2], names[3], "mine"])
    own.close()
    alive.close()


def test_a_directory_that_is_not_ours_alone_is_refused(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / RUN).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        LocalDirectory(str(tmp_path), RUN)
    own, other = os.getuid(), "1" * 32
    LocalDirectory(str(tmp_path), other).close()
    (tmp_path / other).mkdir()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        LocalDirectory(str(tmp_path), other)


def test_the_directory_of_all_runs_is_as_open_as_its_place(tmp_path):
    shared = tmp_path / "shm"
    shared.mkdir()
    shared.chmod(0o1777)
    for parent, mode in ((shared / "muster", 0o1777), (tmp_path / "mine", 0o700)):
        made = LocalDirectory(str(parent), RUN)
        assert stat.S_IMODE(parent.stat().st_mode) == mode
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
        made.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_every_steps": 5}, "local_every_steps=5: needs checkpoint.local_dir"),
        ({"local_every_steps": -1}, "local_every_steps=-1: must be 0"),
        ({"local_dir": "muster"}, "local_dir='muster': must be an absolute path"),
        ({"local_dir": "gs://b/p"}, "must be an absolute path on the hosts' own storage"),
        ({"local_dir": "/tmp/{hostname}"}, 'in which only "{host}" is filled in'),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError) as refused:
        CheckpointSpec(**fields)
    assert message in str(refused.value)


def test_a_local_directory_may_differ_from_host_to_host():
    assert CheckpointSpec(local_dir="/local/{host}", local_every_steps=3).local_every_steps == 3
