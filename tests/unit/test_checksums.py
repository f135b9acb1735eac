from __future__ import annotations

import pytest

from trainer import checksums


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 1000)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "large").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


def test_an_untouched_tree_passes(tree):
    names = checksums.files_below(tree)
    assert names == ["deep/large", "empty"]
    checksums.write_manifest(tree / "manifest", checksums.digest_files(tree, names))
    checksums.verify(tree, checksums.read_manifest(tree / "manifest"))


def test_every_chunk_is_some_process_s_share(tree):
    files = checksums.digest_files(tree, checksums.files_below(tree))
    large = tree / "deep" / "large"
    original = large.read_bytes()
    for start in range(0, len(original), 1000):
        large.write_bytes(original[:start] + b"\xff" + original[start + 1 :])
        changed = original[start] != 0xFF
        seen = []
        for part in range(3):
            try:
                checksums.verify(tree, files, part, 3)
            except checksums.DamagedError as error:
                seen.append(str(error))
        assert len(seen) == changed
        assert all(f"deep/large: bytes {start} to" in text for text in seen)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "deep/large: No such file"),
        (lambda path: path.write_bytes(b"x"), "deep/large has 1 bytes instead of 10240"),
    ],
)
def test_a_missing_or_shorter_file_is_named(tree, harm, message):
    files = checksums.digest_files(tree, checksums.files_below(tree))
    harm(tree / "deep" / "large")
    with pytest.raises(checksums.DamagedError, match=message):
        checksums.verify(tree, files)


def test_a_changed_manifest_is_noticed(tree):
    path = tree / "manifest"
    checksums.write_manifest(path, checksums.digest_files(tree, ["empty"]))
    path.write_text(path.read_text().replace('"bytes": 0', '"bytes": 1'))
    with pytest.raises(checksums.DamagedError, match="own checksum"):
        checksums.read_manifest(path)
