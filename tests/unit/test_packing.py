"""Documents side by side in rows, examples left out, and the indices that say which."""

import concurrent.futures
import itertools
import json
import os
import time

import numpy as np
import pytest

from launch.spec import ConfigError
from tests.unit.test_elastic_data import Documents, is_kept
from trainer.data import filtering, index
from trainer.data.documents import ByteDocuments
from trainer.data.filtering import filtered
from trainer.data.packing import WINDOW, fit, packed, plan_rows
from trainer.data.records import TokenDocuments, write_token_records
from trainer.data.sources import fixed_order, read_corpus, training_order


@pytest.fixture
def directory(tmp_path):
    index.keep_in(tmp_path / "data")
    yield tmp_path / "data"
    index.keep_in(None)


def test_rows_hold_whole_documents_numbered_and_padded():
    row = packed(Documents(0, [3, 4, 5]), 8)[0]
    assert row["tokens"].tolist() == [0, 1, 2, 200, 201, 202, 203, 204]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    row = packed(Documents(0, [3, 4, 5]), 8)[1]
    assert row["tokens"].tolist() == [100, 101, 102, 103, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1] * 4 + [0] * 4


def test_a_long_document_is_cut_so_that_every_token_but_the_first_is_predicted_once():
    for length in range(2, 40):
        rows = packed(Documents(0, [length]), 8, overlap=1)
        predicted = []
        for row in (rows[i] for i in range(len(rows))):
            tokens, segments = row["tokens"], row["segment_ids"]
            pairs = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
            assert (tokens[1:][pairs] == tokens[:-1][pairs] + 1).all()
            predicted += tokens[1:][pairs].tolist()
        assert sorted(predicted) == list(range(1, length))
    mixed = packed(Documents(0, [1, 0, 5, 1]), 8, overlap=1)
    assert (mixed.num_documents, mixed.num_dropped, len(mixed)) == (1, 3, 1)


def test_pieces_fit_and_little_is_padding():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 300, 4000), 1000)
    rows = fit(lengths, 1000)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 1000
    assert len(filled) == rows.max() + 1
    assert (filled > 0).all()
    assert lengths.sum() / (len(filled) * 1000) > 0.98
    assert packed(Documents(0, lengths.tolist()), 1000).efficiency > 0.98


def test_windows_are_planned_alone_so_that_no_process_needs_all_lengths():
    lengths = np.random.default_rng(1).integers(0, 50, WINDOW + 700)
    whole = packed(Lengths(lengths), 64)
    parts = [plan_rows(0, lengths[:WINDOW], 64, 0), plan_rows(WINDOW, lengths[WINDOW:], 64, 0)]
    assert len(whole) == sum(len(part["pieces"]) for part in parts)
    last = whole[len(whole) - 1]
    assert last["segment_ids"].max() == parts[1]["pieces"][-1]


class Lengths:
    """Documents of zeros whose lengths are known without reading them."""

    def __init__(self, sizes):
        self.sizes = np.asarray(sizes)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return {"tokens": np.zeros(self.sizes[i], np.uint8)}

    def lengths(self, indices):
        return self.sizes[list(indices)]

    def __repr__(self):
        return f"Lengths({self.sizes.tolist()})"


def test_a_filter_keeps_what_it_should_in_order_and_composes_with_packing():
    source = Documents(0, [4] * 20)
    kept = filtered(source, is_kept)
    assert [int(kept[i]["tokens"][0]) // 100 for i in range(len(kept))] == [
        i for i in range(20) if i % 3 != 1
    ]
    assert (len(kept), kept.num_dropped) == (13, 7)
    assert packed(kept, 8).num_documents == 13
    assert len(filtered(fixed_order(source).map(lambda e: e), is_kept)) == 13


def test_an_index_is_made_once_and_read_from_then_on(directory):
    calls = []

    def keep(example):
        calls.append(int(example["tokens"][0]) // 100)
        return calls[-1] % 2 == 0

    source = Documents(0, [2] * 5000)
    first = filtered(source, keep)
    assert len(calls) == 5000 + 32
    calls.clear()
    again = filtered(source, keep)
    assert len(calls) == 32  # Some are looked at, whether the filter is still the same.
    assert (again.digest, len(again)) == (first.digest, 2500)
    assert len(os.listdir(directory)) == 1


def test_a_damaged_index_is_made_again(directory):
    wanted = packed(Documents(0, [5, 9, 3]), 16)
    (file,) = directory.iterdir()
    for damage in (
        lambda b: b[:-70],
        lambda b: b[:-64] + b"x" + b[-63:],
        lambda b: b"",
        bytes.upper,
    ):
        file.write_bytes(damage(file.read_bytes()))
        again = packed(Documents(0, [5, 9, 3]), 16)
        assert again.digest == wanted.digest
        assert [a.tolist() for a in again[0].values()] == [a.tolist() for a in wanted[0].values()]


def test_an_index_of_another_filter_is_not_taken_for_it(directory):
    source = Documents(0, [2] * 200)
    limits = [150, 50]
    sizes = [len(filtered(source, lambda e, n=n: e["tokens"][0] < n * 100)) for n in limits]
    assert sizes == limits
    threshold = [150]  # Behind a name that no digest of the code sees: the examples tell.
    keep = Hidden(threshold)
    assert len(filtered(source, keep)) == 150
    threshold[0] = 50
    with pytest.raises(ConfigError, match=r"drops example \d+, and did the contrary"):
        filtered(source, keep)


class Hidden:
    __slots__ = ("threshold",)

    def __init__(self, threshold):
        self.threshold = threshold

    def __call__(self, example):
        return example["tokens"][0] < self.threshold[0] * 100

    def __repr__(self):
        return "Hidden"


def test_those_who_need_an_index_share_the_pass_over_the_data(directory, monkeypatch):
    monkeypatch.setattr(filtering, "_CHUNK", 64)

    def build(_):
        count = itertools.count()

        def keep(example):
            next(count)
            time.sleep(0.0001)  # So that others get their turn.
            return example["tokens"][0] % 700 < 400

        index = filtered(Documents(0, [1] * 2000), keep)
        return index.digest, next(count)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(build, range(3)))
    assert len({digest for digest, _ in found}) == 1
    # Each alone would read 2,000; together they read each chunk once, or a few of them twice.
    assert sum(count for _, count in found) < 4000
    assert len(os.listdir(directory)) == 1


def test_an_index_that_is_deleted_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    index._write(tmp_path / "part", {"a": np.arange(5)})
    loads = json.loads

    def deleted_meanwhile(text):
        (tmp_path / "part").unlink()
        return loads(text)

    monkeypatch.setattr(index.json, "loads", deleted_meanwhile)
    assert index._read(tmp_path / "part").arrays["a"].tolist() == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    assert index._read(tmp_path / "part") is None


def test_packed_rows_of_files_and_records(tmp_path):
    for name, text in {"a": b"first", "b": b"second one", "c": b"third", "d": b"4"}.items():
        (tmp_path / name).write_bytes(text)
    corpus = read_corpus(str(tmp_path))
    train, held = ByteDocuments(corpus, "train", 2), ByteDocuments(corpus, "eval", 2)
    assert [train[i]["tokens"].tobytes() for i in range(len(train))] == [b"first", b"third"]
    assert [held[i]["tokens"].tobytes() for i in range(len(held))] == [b"second one", b"4"]
    assert held.lengths([0, 1]).tolist() == [10, 1]
    assert packed(train, 10)[0]["tokens"].tobytes() == b"firstthird"
    with pytest.raises(ConfigError, match="eval_every=2: one file"):
        ByteDocuments(read_corpus(str(tmp_path / "a")), "train", 2)

    file = str(tmp_path / "x.array_record")
    write_token_records(file, [np.arange(n) for n in (3, 1, 4)], any_length=True)
    rows = packed(TokenDocuments(file), 8)
    assert rows[0]["tokens"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert rows[0]["tokens"].dtype == np.uint16
    with pytest.raises(ValueError, match="row 1 is shaped"):
        write_token_records(file, [np.arange(n) for n in (3, 1, 4)])


def test_data_that_shrank_since_the_plan_is_named(directory):
    source = Lengths([4, 5])
    rows = packed(source, 16)
    source.sizes = np.array([4, 3])
    with pytest.raises(ConfigError, match="document 1 has 3 tokens, and had at least 5"):
        rows[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: packed(Documents(0, [1, 1]), 8, overlap=1), "none of its 2 documents has more"),
        (lambda: packed(Documents(0, []), 8), "holds no examples"),
        (lambda: filtered(Documents(0, [1]), lambda e: False), "keeps none of 1 examples"),
        (lambda: filtered(training_order(Documents(0, [1]), 0), is_kept), "repeated dataset"),
        (lambda: packed(training_order(Documents(0, [1]), 0), 8), "repeated dataset"),
        (lambda: packed(iter([]), 8), "needs a source with a length"),
        (lambda: packed([{"x": 3}], 8), "must be a dict of arrays of one length"),
        (
            lambda: filtered(fixed_order(Documents(0, [1])).filter(is_kept), is_kept),
            r"uses filter\(\)",
        ),
    ],
)
def test_what_cannot_be_packed_or_filtered_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
