"""Examples hold the bytes and tokens they should, and what cannot be read is named."""

import math
import os

import numpy as np
import pytest

from launch.spec import ConfigError
from trainer.data.pipeline import BatchIterator
from trainer.data.records import TokenRecords, write_token_records
from trainer.data.sources import ByteWindows, Corpus, read_corpus, training_order


def corpus_of(num_bytes):
    """Bytes that tell their own place, up to 2 MB."""
    places = np.arange((num_bytes + 2) // 3, dtype=">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    return Corpus(places.reshape(-1)[:num_bytes].copy(), 1, 0)


def tree(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(directory)


def test_a_directory_is_read_in_path_order_by_pattern(tmp_path):
    path = tree(
        tmp_path,
        {
            "b.py": b"3",
            "a/z.py": b"1",
            "a-b/y.py": b"2",  # '-' sorts before '/', but 'a' before 'a-b'.
            "a/notes.txt": b"no",
            "vendored/a.py": b"no",
            ".git/a.py": b"no",
            ".hidden.py": b"no",
        },
    )
    corpus = read_corpus(path, "*.py", exclude=["vendored"])
    assert (corpus.data.tobytes(), corpus.num_files, corpus.num_skipped) == (b"123", 3, 0)
    assert read_corpus([path + "/b.py", path + "/a"], "*.py").data.tobytes() == b"31"


def test_a_file_is_mapped_and_equals_the_same_bytes_from_a_directory(tmp_path):
    path = tree(tmp_path, {"a": b"some ", "b": b"text", "one/all": b"some text"})
    single = read_corpus(path + "/one/all")
    assert isinstance(single.data, np.memmap)
    assert (single.data == read_corpus([path + "/a", path + "/b"]).data).all()
    assert len(single.data) > len(read_corpus(path + "/a").data)


def test_unreadable_files_are_skipped_and_counted(tmp_path):
    path = tree(tmp_path, {"a": b"1", "b": b"2"})
    os.symlink("nowhere", tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")  # Would block for ever.
    corpus = read_corpus(path)
    assert (corpus.data.tobytes(), corpus.num_files, corpus.num_skipped) == (b"12", 2, 2)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, {"path": "{}/none"}, r"config.data.path='.*/none': no such file"),
        ({"a.txt": b"x"}, {"pattern": "*.py"}, r"config.data.pattern='\*.py': matches no file"),
        ({"a": b"", "b": b""}, {}, r"config.data.path=.*: its 2 files are empty"),
        ({"a": b""}, {}, r"config.data.path=.*: its 1 files are empty"),
    ],
)
def test_a_corpus_that_is_not_there_names_its_field(tmp_path, files, arguments, message):
    tree(tmp_path, files)
    arguments = {"path": "{}", **arguments}
    arguments["path"] = arguments["path"].format(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_corpus(**arguments)


def test_unigram_entropy_is_that_of_the_byte_counts():
    assert Corpus(np.frombuffer(b"aabb", np.uint8), 1, 0).unigram_entropy == pytest.approx(
        math.log(2)
    )
    uniform = np.tile(np.arange(256, dtype=np.uint8), 40_000)  # More than one piece.
    assert Corpus(uniform, 1, 0).unigram_entropy == pytest.approx(math.log(256))
    assert Corpus(np.zeros(9, np.uint8), 1, 0).unigram_entropy == 0


@pytest.mark.parametrize("num_bytes", [34, 35, 50, 170, 849, 850, 5_000, 100_000, 4_000_000])
def test_train_and_eval_share_no_byte_and_leave_little_out(num_bytes):
    corpus = Corpus(np.zeros(num_bytes, np.uint8), 1, 0)
    seen = {}
    for split in ("train", "eval"):
        windows = ByteWindows(corpus, 16, split)
        # Where each window lies, from its address: the bytes themselves repeat.
        base = corpus.data.__array_interface__["data"][0]
        mask = np.zeros(num_bytes, bool)
        for example in windows._getitems(range(len(windows))):
            start = example["tokens"].__array_interface__["data"][0] - base
            assert example["tokens"].shape == (17,)
            assert 0 <= start <= num_bytes - 17
            mask[start : start + 17] = True
        assert len(windows) >= 1
        seen[split] = mask
    assert not (seen["train"] & seen["eval"]).any()
    if num_bytes >= 100_000:
        assert 0.01 < seen["eval"].mean() < 0.03
        assert (seen["train"] | seen["eval"]).mean() > 0.98


def test_each_byte_is_predicted_once_an_epoch():
    windows = ByteWindows(corpus_of(1000), 10, "train", eval_every=0)
    targets = np.concatenate([windows[i]["tokens"][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, corpus_of(1000).data[1:991])
    assert len(ByteWindows(corpus_of(1000), 10, "eval", eval_every=0)) == 0


def test_windows_read_singly_or_together_are_the_bytes_of_the_corpus():
    corpus = corpus_of(2_000_000)
    windows = ByteWindows(corpus, 512, "train")
    order = np.random.default_rng(0).permutation(len(windows))[:500].tolist()
    text = corpus.data.tobytes()
    for index, example in zip(order, windows._getitems(order), strict=True):
        np.testing.assert_array_equal(windows[index]["tokens"], example["tokens"])
        assert example["tokens"].tobytes() in text
    starts = {example["tokens"][:6].tobytes() for example in windows._getitems(range(len(windows)))}
    assert len(starts) == len(windows)


def test_an_example_cannot_change_the_corpus(tmp_path):
    corpus = read_corpus(tree(tmp_path, {"a": b"some text", "b": b"more"}))
    example = ByteWindows(corpus, 4, "train")[0]
    with pytest.raises(ValueError, match="read-only"):
        example["tokens"][0] = 0


@pytest.mark.parametrize(
    ("num_bytes", "arguments", "message"),
    [
        (33, {}, r"config.data.seq_len=16: needs .* at least 34 bytes .* has 33"),
        (100, {"seq_len": 0}, r"config.data.seq_len=0: must be at least 1"),
        (100, {"eval_every": 1}, r"config.data.eval_every=1: must be 0"),
    ],
)
def test_a_corpus_too_small_or_a_bad_size_is_refused(num_bytes, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ByteWindows(corpus_of(num_bytes), **{"seq_len": 16, "split": "train", **arguments})


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_token_records_come_back_as_written_over_several_files(tmp_path, dtype):
    rows = np.random.default_rng(0).integers(0, 200, (7, 9))
    assert write_token_records(str(tmp_path / "b.array_record"), rows[4:], dtype) == 3
    write_token_records(str(tmp_path / "a.array_record"), rows[:4], dtype)
    for files in (str(tmp_path), str(tmp_path / "*.array_record")):
        records = TokenRecords(files, seq_len=8, dtype=dtype)
        assert len(records) == 7
        for i in range(7):
            assert records[i]["tokens"].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(records[i]["tokens"], rows[i])
    together = [example["tokens"] for example in records._getitems([6, 0, 3])]
    np.testing.assert_array_equal(together, rows[[6, 0, 3]])


def test_token_records_feed_the_pipeline(tmp_path):
    rows = np.arange(12)[:, None] * 100 + np.arange(5)
    write_token_records(str(tmp_path / "t.array_record"), rows)
    dataset = training_order(TokenRecords(str(tmp_path), 4), seed=3)
    batches = BatchIterator(dataset, 4, range(4))
    epoch = np.concatenate([next(batches)["tokens"] for _ in range(3)])
    np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 9}, r"config.data.path: record 0 has 18 bytes, .* 10 uint16 tokens = 20"),
        ({"dtype": "int32"}, r"record 0 has 18 bytes, .* 9 int32 tokens = 36 bytes"),
        ({"dtype": "float32"}, r"config.data.dtype='float32': must be one of uint8"),
        ({"files": "{}/none*"}, r"config.data.path='.*none\*': no such file"),
        ({"files": "{}/text"}, r"config.data.path='.*text': cannot be read as ArrayRecord"),
        ({"files": "{}/empty"}, r"config.data.path='.*empty': its 1 files hold no record"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, arguments, message):
    write_token_records(str(tmp_path / "rows"), np.zeros((3, 9), int))
    write_token_records(str(tmp_path / "empty"), [])
    (tmp_path / "text").write_text("not an ArrayRecord file")
    arguments = {"files": "{}/rows", "seq_len": 8, **arguments}
    arguments["files"] = arguments["files"].format(tmp_path)
    with pytest.raises(ConfigError, match=message):
        TokenRecords(**arguments)


def test_a_later_record_of_another_length_is_named_when_it_is_read(tmp_path):
    write_token_records(str(tmp_path / "a"), np.zeros((2, 9), int))
    write_token_records(str(tmp_path / "b"), np.zeros((1, 5), int))
    records = TokenRecords([str(tmp_path / "a"), str(tmp_path / "b")], seq_len=8)
    with pytest.raises(ConfigError, match="record 2 has 10 bytes"):
        records[2]


@pytest.mark.parametrize("row", [np.full(4, 70_000), np.full(4, -1), np.zeros(3, int)])
def test_writing_refuses_tokens_and_rows_that_do_not_fit(tmp_path, row):
    with pytest.raises(ValueError, match="row 1"):
        write_token_records(str(tmp_path / "x"), [np.zeros(4, int), row])
