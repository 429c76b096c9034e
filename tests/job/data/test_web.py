"""Sources on the web, by the real clients: a file server that knows ranges, and what the hub's client asks of it."""

from __future__ import annotations

import threading
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf
from PIL import Image

from job.data.source import open_source
from job.exits import BadDataError, BadRequestError, Exit, StoppedError
from job.stop import Stop
from job.store import Retry
from job.store.sources import About, SourceStore
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.packing import entries_of, images_of, names_of
from tests.job.some_images import idx, png, tar_of, zip_of


def archive(images: int) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for number in range(images):
            zipped.writestr(f"{'cats' if number % 2 else 'dogs'}/{number:03d}.png", png(number))
        zipped.writestr("notes.txt", np.random.default_rng(0).bytes(6_000_000))
    return file.getvalue()


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_broken_fetch_begins_again(server):
    handler, url = server
    handler.content = {"/all.zip": archive(40)}
    handler.cuts_once = True
    lines: list[str] = []
    assert len(list(names_of(open_source(f"{url}/all.zip", retry=Retry(note=lines.append))))) == 40
    assert [asked for command, asked in handler.asked if command == "GET"] == ["", ""]
    assert f"{url}/all.zip does not answer" in lines[0] and "trying again" in lines[0]


def test_killed_fetch_leaves_nothing(server, tmp_path, monkeypatch):
    handler, url = server
    handler.content = {"/all.zip": archive(40)}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("job.data.source.Progress.update", killed)
        open_source(f"{url}/all.zip")
    assert left_in(tmp_path / "cache") == []
    assert len(list(names_of(open_source(f"{url}/all.zip")))) == 40
    handler.asked.clear()
    # What was fetched stays, until it is packed.
    assert len(list(names_of(open_source(f"{url}/all.zip")))) == 40
    assert {command for command, _ in handler.asked} == {"HEAD"}


def test_fetch_is_of_one_file(server, monkeypatch):
    handler, url = server
    one, two = archive(40), archive(41)
    handler.content = {"/all.zip": one}
    check = SourceStore._check_same

    def replaced(*about):
        handler.content, handler.etag = {"/all.zip": two[: len(one)]}, "two"
        return check(*about)

    monkeypatch.setattr(SourceStore, "_check_same", replaced)
    with pytest.raises(BadDataError, match="has changed during the read: begin again"):
        open_source(f"{url}/all.zip")
    monkeypatch.undo()
    handler.content = {"/all.zip": two}
    assert len(list(names_of(open_source(f"{url}/all.zip")))) == 41


def test_lying_server_gets_no_disk(server, tmp_path, monkeypatch):
    handler, url = server
    handler.content = {"/all.zip": b"x" * 50_000_000}
    monkeypatch.setattr(SourceStore, "_about", lambda *_: About(1000, ('"one"',)))
    written: list[int] = []
    monkeypatch.setattr("job.data.source.Progress.update", lambda _, mib: written.append(mib))
    with pytest.raises(BadDataError, match=r"sends [\d,]+ of 1,000 bytes: download it"):
        open_source(f"{url}/all.zip")
    assert max(written) <= 2 and left_in(tmp_path / "cache") == []


def test_stalled_server_does_not_delay_stop(server, monkeypatch):
    handler, url = server
    handler.content = {"/all.zip": archive(40)}
    monkeypatch.setattr(handler, "stalls", True)
    stop = Stop()
    threading.Timer(1.0, stop.request, ["a test"]).start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        open_source(f"{url}/all.zip", retry=Retry(60.0, stop))
    assert time.monotonic() - began < 2


def test_hub_datasets_are_packed(server, tmp_path, monkeypatch):
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    handler.content = {f"/images/{kind}/{number}.png": png(number) for kind in ("cats", "dogs") for number in range(3)}
    handler.content["/all.zip"] = archive(4)
    at = ("--size", 8, "--bucket", tmp_path / "b")
    said = succeeded(ddpm_here("data", "pack", "hf://datasets/org/name/images", "folder", *at))
    assert "images   6 colour" in said and "classes  cats, dogs" in said
    said = succeeded(ddpm_here("data", "pack", "hf://datasets/org/name/all.zip", "archive", *at))
    assert "images   4 colour" in said and "made     from all.zip" in said
    line = refused(ddpm_here("data", "pack", "hf://datasets/org/name/none", "none", *at), Exit.MISSING_INPUT)
    assert "there is nothing at hf://datasets/org/name/none" in line


def test_unreadable_web_sources_are_one_line(server, tmp_path, monkeypatch):
    _, url = server
    at = ("name", "--size", 8, "--bucket", tmp_path / "b")
    line = refused(ddpm_here("data", "pack", f"{url}/none.zip", *at), Exit.MISSING_INPUT)
    assert f"there is nothing at {url}/none.zip: " in line
    line = refused(ddpm_here("data", "pack", f"{url}/secret.zip?token=abc", *at), Exit.NO_PERMISSION)
    assert "download it where you are signed in" in line and "abc" not in line
    for source, said in (
        ("http://example.com/a.zip", "could be changed in transit: use https://"),
        ("https://user:word@example.com/a.zip", "must not hold a user and password"),
        ("sftp://user:word@example.com/a.zip", "must not hold a user and password"),
        ("zip://a::http://example.com/a.zip", "could be changed in transit: use https://"),
        ("reference://::https://example.com/a.json", "may read any other location"),
        ("simplecache::https://example.com/a.zip", "may read any other location"),
        ("https://[::1/a.zip", "may read any other location"),
        ("https://[1/a.zip", "is not a valid URL"),
        ("sftp://user:wo#rd@example.com/a.zip", "is not a valid URL, or holds a user and password"),
        ("sfpt://example.com/a.zip", "sfpt:// needs more than is installed (Protocol not known: sfpt)"),
        ("smb://example.com/a.zip", "smb:// needs more than is installed (SMB requires"),
        ("adl://x/y", "adl:// needs more than is installed"),
        ("hdfs://host/x", "hdfs:// needs more than is installed"),
        ("hf://datasets/x", "Repository id must be 'namespace/name'"),
        ("hf://datasets/", "Repository id must be 'namespace/name'"),
        ("github://x", "missing 2 required positional arguments: 'org' and 'repo'"),
        ("zip://cat", "a chain is zip://FOLDER::ARCHIVE"),
        ("zip://a:b::all.zip", "a chain is zip://FOLDER::ARCHIVE"),
        ("local://photos", "local:// may read any other location"),
        ("dir:///photos", "dir:// may read any other location"),
        ("http://[2001:db8::1]/images", "changed in transit"),
    ):
        line = refused(ddpm_here("data", "pack", source, *at), Exit.BAD_REQUEST)
        assert said in line and "word" not in line.replace("password", "")
    with monkeypatch.context() as patch:
        patch.setitem(conf, "http", {"headers": "text"})
        line = refused(ddpm_here("data", "pack", f"{url}/none.zip", *at), Exit.BAD_CONFIG)
        assert "fsspec's configuration" in line and "is not valid" in line
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").rglob("*.tar"))


def cifar(path: Path, folder: str = "cifar-10-batches-bin", suffix: str = ".bin") -> Path:
    """An archive as it is downloaded, with twelve images a batch."""
    noise = np.random.default_rng(0)
    files = [
        (f"{folder}/{name}{suffix}", b"".join(bytes([number % 10]) + noise.bytes(3072) for number in range(12)))
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    ]
    names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    return tar_of(path, [*files, (f"{folder}/batches.meta.txt", names)])


def test_cifar_10_is_packed(tmp_path, caplog):
    path = cifar(tmp_path / "cifar-10-binary.tar.gz")
    at = ("--bucket", tmp_path / "b")
    said = succeeded(ddpm_here("data", "pack", path, "cifar10", *at))
    assert "images   24 colour, 32×32" in said and "classes  airplane, automobile, bird, cat" in said
    assert "packing its split train; --split test would pack another" in caplog.text
    said = succeeded(ddpm_here("data", "pack", path, "test", "--split", "test", "--size", 32, *at))
    assert "images   12 colour" in said
    # Channel by channel, as their page has it.
    entries = dict(entries_of(open_source(str(path))))
    first = np.asarray(Image.open(BytesIO(entries["train/data_batch_1-00000.ppm"])))
    assert first.shape == (32, 32, 3)
    assert first[..., 0].tobytes() == np.random.default_rng(0).bytes(3072)[:1024]


def test_cifar_10_can_be_a_chain(tmp_path):
    path = cifar(tmp_path / "cifar-10-binary.tar.gz")
    alone = open_source(str(path))
    whole = dict(entries_of(replace(alone, split="")))
    assert dict(entries_of(open_source(f"tar://::{path}"))) == dict(entries_of(alone))
    for split in ("train", "test"):
        part = {name.removeprefix(f"{split}/"): data for name, data in whole.items() if name.startswith(f"{split}/")}
        assert dict(entries_of(open_source(f"tar://{split}::{path}"))) == part
        assert dict(entries_of(replace(open_source(f"tar://::{path}"), split=split))).keys() == {
            f"{split}/{name}" for name in part
        }


def test_pickles_of_cifar_10_are_refused(tmp_path):
    at = ("cifar10", "--bucket", tmp_path / "b")
    path = cifar(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", "")
    line = refused(ddpm_here("data", "pack", path, *at), Exit.BAD_DATA)
    assert "holds pickles, which are programs: get cifar-10-binary.tar.gz, of the same images" in line


def test_zip_of_idx_files_is_packed(tmp_path, digits):
    images, labels = digits
    files = [("fashion-mnist_train.csv", b"label,pixel1\n")]
    for split in ("t10k", "train"):
        files += [(f"{split}-images-idx3-ubyte", idx(images)), (f"{split}-labels-idx1-ubyte", idx(labels))]
    path = zip_of(tmp_path / "archive.zip", files)
    said = succeeded(ddpm_here("data", "pack", path, "fashion-mnist", "--bucket", tmp_path / "b"))
    assert "images   12 grey, 28×28" in said and "classes  0, 1, 2" in said


def test_missing_web_library_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("no aiohttp")

    monkeypatch.setattr("job.store.sources.get_filesystem_class", missing)
    with pytest.raises(BadRequestError, match=r"https:// needs more than is installed \(no aiohttp\): .*\[web\]"):
        open_source("https://example.com/a.zip")


def test_nested_bombs_do_not_go_off(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("train-images-idx3-ubyte", idx(np.zeros((30_000, 28, 28))))
    words = ("data", "pack", tmp_path / "bomb.zip", "a", "--size", 8, "--no-classes", "--bucket", tmp_path / "b")
    line = refused(ddpm_here(*words), Exit.BAD_DATA)
    assert "unpacks to more than 200 times its size: do not trust this archive" in line


def test_content_decides_what_an_archive_is(tmp_path):
    image = ("cats/0.png", png(0))
    tar = tar_of(tmp_path / "cifar-10-pngs.tar", [image])
    mixed = zip_of(tmp_path / "mixed.zip", [image, ("train-images-idx3-ubyte", b"")])
    assert images_of(tar) == images_of(mixed) == [image]
