"""Which tars the words of a person mean."""

from pathlib import Path

import pytest

from job.data.indexing import index_tars
from job.data.tar_uris import expand_braces, find_tars
from job.exits import JobError
from job.store import open_store
from tests.job.some_images import folder_of, jpeg, tar_of


@pytest.mark.parametrize(
    ("word", "code", "part"),
    [
        ("nowhere.tar", 66, "nothing at"),
        ("nowhere", 66, "nothing at"),
        ("empty", 66, "nothing at"),
        ("texts", 65, "holds no .tar"),
        ("a.tar.gz", 64, "is compressed"),
        ("a.zip.tar", 64, "is compressed"),
        ("{1..", 64, "{00000..00099}"),
        ("{5..1}.tar", 64, "runs backwards"),
        ("{0..999999}.tar", 64, "more than 100,000"),
        ("{x}.tar", 64, "neither a range"),
        ("{1..99999}{1..99999}.tar", 64, "more than 100,000"),
        ("{a,a}.tar", 64, "named twice"),
        ("ftp://host/a.tar", 64, "nobody here speaks"),
    ],
)
def test_words_that_mean_no_tars(tmp_path, word, code, part):
    bucket = open_store(str(tmp_path / "bucket"))
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "texts", [("read.me", b"hello")])
    tar_of(tmp_path / "a.tar.gz", [("1.jpg", jpeg(1))])
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    (tmp_path / "a.zip.tar").write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(JobError, match=part) as error:
        index_tars(bucket, [word if "://" in word else f"{tmp_path}/{word}"], "laion", size=16)
    assert error.value.exit_code == code
    assert not Path(bucket.uri).exists()


def test_braces_expand_as_in_a_shell():
    assert list(expand_braces("a/{008..011}.tar")) == [f"a/{n}.tar" for n in ("008", "009", "010", "011")]
    assert list(expand_braces("{x,y}/{0..1}")) == ["x/0", "x/1", "y/0", "y/1"]
    assert list(expand_braces("gs://b/plain.tar")) == ["gs://b/plain.tar"]


def test_a_pattern_costs_a_bucket_one_listing(tmp_path, gcs_bucket):
    for number in range(4):
        open_store(gcs_bucket).create(f"a/{number:05d}.tar", bytes(number + 1))
    opened: list[str] = []

    def open_and_note(uri: str):
        opened.append(uri)
        return open_store(uri)

    tars = find_tars([f"{gcs_bucket}/a/{{00001..00003}}.tar", f"{gcs_bucket}/a/00000.tar"], open_and_note)
    assert [(tar.uri, tar.bytes) for tar in tars] == [(f"{gcs_bucket}/a/0000{n}.tar", n + 1) for n in (1, 2, 3, 0)]
    assert opened == [f"{gcs_bucket}/a"]
    assert [tar.uri for tar in find_tars([gcs_bucket])] == [f"{gcs_bucket}/a/0000{n}.tar" for n in range(4)]


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    monkeypatch.chdir(tmp_path)
    for word in ("a.tar", ".", "./a.tar", f"file://{tmp_path}", f"{tmp_path}/"):
        assert [tar.uri for tar in find_tars([word])] == [f"{tmp_path}/a.tar"]
