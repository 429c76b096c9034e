"""The words of a verb, taken apart by its own parser, and written down again."""

from __future__ import annotations

import pytest

from job.cli.words import parsed
from job.data.pack import PackRequest
from job.requests import SampleRequest, TrainRequest


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", ["--dataset", "a"]),
        ("train", ["--dataset", "a", "--set", "x=1", "--set", "y=[1, 2]", "--wait", "30", "--epochs", "3"]),
        ("train", ["--dataset", "a", "--config", "some where.yaml", "--hang-after", "0.5", "--stop-after", "1h"]),
        ("sample", ["--run", "r", "--gif", "--raw", "--no-nearest", "--steps", "4"]),
        ("sample", ["--run", "r", "--nearest", "--checkpoints", "30,80", "--seeds", "0-3"]),
        ("sample", ["--run", "r", "--count", "10", "--slice", "0/2", "--first-seed=-1"]),
        ("pack", ["a folder", "name", "--size", "8", "--no-classes", "--licence", "it's mine"]),
        ("pack", ["a", "b", "--classes", "--channels", "1", "--max-bad", "0", "--licence=--size=3"]),
        ("pack", ["--size", "8", "--", "-a", "b"]),
    ],
)
def test_what_is_written_down_is_read_again(verb, words):
    first = parsed(verb, words)
    prefix = 2 if verb == "pack" else 1
    argv = first.argv()
    assert argv[:prefix] == (("data", "pack") if verb == "pack" else (verb,))
    again = parsed(verb, argv[prefix:])
    assert again == first
    assert again.request() == first.request()
    assert again.argv() == argv


def test_each_verb_has_its_request():
    kinds = [type(parsed(verb, words).request()) for verb, words in WORDS.items()]
    assert kinds == [TrainRequest, SampleRequest, PackRequest]


WORDS = {"train": ["--dataset", "a"], "sample": ["--run", "r"], "pack": ["a", "b"]}


def test_only_what_was_typed_is_written_down(monkeypatch):
    monkeypatch.setenv("DDPM_BUCKET", "gs://of-the-environment")
    words = parsed("train", ["--dataset", "a"])
    assert words.argv() == ("train", "--dataset", "a")
    assert words.request().bucket == "gs://of-the-environment"
    assert words.saying(bucket="gs://b").argv() == ("train", "--dataset", "a", "--bucket", "gs://b")
    assert words.saying(config="f").without("config") == words.without("config")


def test_the_source_comes_before_the_options():
    argv = parsed("pack", ["--bucket", "/b", "/images", "name"]).argv()
    assert argv == ("data", "pack", "/images", "name", "--bucket", "/b")


def test_equal_command_lines_give_equal_words():
    one = parsed("train", ["--dataset=a", "--epochs=3", "--run", "r"])
    other = parsed("train", ["--run=r", "--epochs", "3", "--dataset", "a"])
    assert one.argv() == other.argv()
