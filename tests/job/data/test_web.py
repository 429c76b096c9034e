"""Sources that fsspec reads, by real servers and clients: buckets, the web, the hub and SSH give what was put there.

A web server that answers badly, over real HTTP on loopback, is a table of answers × places.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import asyncssh
import numpy as np
import pytest
from fsspec.config import conf, set_conf_env

from job.data.checks import verify_dataset
from job.data.shards import load_index
from job.data.source import members, open_source
from job.exits import BadDataError, BadRequestError, BucketAwayError, Exit, MissingInputError, StoppedError
from job.stop import Stop
from job.store import Retry, open_store, open_to_read
from job.store.sources import About, SourceStore
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import flip_a_bit
from tests.job.data.file_server import Files
from tests.job.packing import entries_of, images_of, names_of
from tests.job.some_images import files_in, folder_of, idx, jpeg, mnist, png, tar_of, zip_of
from tests.job.store.test_store import put_by_others

IMAGES = {f"{kind}/{number}.png": png(10 * len(kind) + number) for kind in ("cat", "horse") for number in range(3)}
CATS = {name: data for name, data in IMAGES.items() if name.startswith("cat/")}
BELOW = {name.removeprefix("cat/"): data for name, data in CATS.items()}
ONES = {name: IMAGES[name] for name in ("cat/1.png", "horse/1.png")}
WORD = "a-word-that-no-log-shows"


def read(source: str) -> dict[str, bytes]:
    return dict(images_of(source))


@pytest.fixture(scope="module")
def zipped() -> bytes:
    """A zip of the images."""
    return zip_of(file := BytesIO(), IMAGES.items()) and file.getvalue()


def test_bucket_sources_equal_local_ones(bucket_uri: str, zipped: bytes, tmp_path, digits, monkeypatch) -> None:
    folder_of(local := tmp_path / "local", [(f"images/{name}", data) for name, data in IMAGES.items()])
    for make, name in ((zip_of, "all.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz")):
        make(local / name, IMAGES.items())
    mnist(local / "mnist", "train", *digits, gz=True)
    store, archive = open_store(bucket_uri), f"{bucket_uri}/theirs/all.zip"
    for name, data in files_in(local).items():
        store.put(f"theirs/{name}", data)
    more = ("a.tar", "a.tgz", "images/", "mnist", "mnist/train-images-idx3-ubyte.gz")
    for name in ("all.zip", "images", *(more if bucket_uri.startswith("gs://") else ())):
        here, there = open_source(str(local / name)), open_source(f"{bucket_uri}/theirs/{name}")
        assert (there.name, [*names_of(there)]) == (here.name, [*names_of(here)])
        assert [*entries_of(there)] == [*entries_of(here)]
    chains = {f"zip://::{archive}": IMAGES, f"zip://cat::{archive}": BELOW, f"zip://*/1.png::{archive}": ONES}
    if "://" in bucket_uri:
        chains[f"{bucket_uri}/theirs/images/c*/*.png"] = CATS
    for name in ("what?.zip", "a::b.zip", "a b#c%20d.zip"):
        put_by_others(bucket_uri, f"odd/{name}", zipped)
        chains[f"{bucket_uri}/odd/{name}"] = IMAGES
    for source, images in chains.items():
        assert read(source) == images, source
    for name, data, said in (
        ("damaged.zip", zipped[:60] + bytes([zipped[60] ^ 1]) + zipped[61:], "is truncated or damaged"),
        ("unsafe.zip", zipped.replace(b"horse/0.png", b"../evil.png"), "leads out of it"),
        ("none.zip", b"no archive", "is damaged, or not a .zip"),
    ):
        store.put(name, data)
        with pytest.raises(BadDataError, match=said):
            read(f"zip://::{bucket_uri}/{name}")
    for missing in (f"{bucket_uri}/theirs/else", f"{bucket_uri}/theirs/b.zip"):
        with pytest.raises(MissingInputError, match="there is nothing at"):
            open_source(missing)
    monkeypatch.setattr(members, "ENTRY_BYTES", 0)
    with pytest.raises(BadDataError, match=r"'cat/0.png' has [\d,]+ bytes, more than the 0"):
        read(f"{bucket_uri}/theirs/images")


def test_archives_on_the_web_and_the_hub(server, zipped: bytes, tmp_path: Path, monkeypatch) -> None:
    """A signature is in no record, and no fetched archive stays."""
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    handler.content = {f"/images/{name}": data for name, data in IMAGES.items()} | {"/all.zip": zipped}
    handler.content |= {"/all.tar": tar_of(tmp_path / "a.tar", sorted(IMAGES.items())).read_bytes()}
    signed, hub = f"{url}/all.zip?se=2026-01-01T00:00:00Z&sig={WORD}", "hf://datasets/org/name"
    for source in (f"zip://::{signed}", f"tar://::{url}/all.tar", f"{url}/all.tar"):
        assert read(source) == IMAGES
    assert read(f"tar://cat/*.png::{url}/all.tar") == BELOW
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "own"))
    both, at = "classes  cat, horse", ("--size", 16, "--bucket", tmp_path / "bucket")
    for name, source, code, said in (
        ("a", signed, Exit.FINISHED, both),
        ("b", f"zip://cat/*::{signed}", Exit.FINISHED, "images   3 colour"),
        ("c", f"zip://::zip://cat::{signed}", Exit.FINISHED, "images   3 colour"),
        ("d", f"zip://dog::{signed}", Exit.BAD_DATA, "no file is in 'dog'"),
        ("folder", f"{hub}/images", Exit.FINISHED, both),
        ("archive", f"{hub}/all.zip", Exit.FINISHED, "made     from all.zip"),
        ("none", f"{hub}/none", Exit.MISSING_INPUT, f"there is nothing at {hub}/none"),
    ):
        done = ddpm_here("data", "pack", source, name, *at)
        assert said in (refused(done, code) if code else succeeded(done))
        assert WORD not in done.stdout + done.stderr
    assert WORD not in refused(ddpm_here("import", signed, "--run", "r", *at[2:]), Exit.BAD_DATA)
    assert not [name for name, data in files_in(tmp_path / "bucket").items() if WORD.encode() in data]
    assert [*(tmp_path / "own/sources").iterdir()] == []


def page(*links: str) -> bytes:
    return "".join(f'<a href="{link}">there</a>' for link in links).encode()


def test_web_folder_is_its_page(server) -> None:
    handler, url = server
    handler.content = {f"/ds/{name}": data for name, data in IMAGES.items()}
    handler.content |= {f"/ds/{kind}": page("../", "/", *(f"{n}.png" for n in range(3))) for kind in ("cat", "horse")}
    links = ("?C=N", "https://elsewhere.example/x.png", "/ds/", "/dsx/0.png", "./cat/", "/ds/horse/")
    handler.content["/ds"] = page(*links)
    assert (read(f"{url}/ds/"), read(f"{url}/ds/*/1.png")) == (IMAGES, ONES)
    for source in (f"{url}/ds/?signature={WORD}", f"{url}/ds/*/1.png?signature={WORD}"):
        with pytest.raises(MissingInputError, match="a folder with a query cannot be listed") as error:
            read(source)
        assert WORD not in str(error.value)
    handler.content |= {"/loop" + "/loop" * deep: page("loop/") for deep in range(100)}
    with pytest.raises(BadDataError, match="more than 64 levels"):
        read(f"{url}/loop/")


SESSIONS: list[asyncssh.SSHServerConnection] = []
"""All that the server of files has had."""


class OnePassword(asyncssh.SSHServer):
    def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
        SESSIONS.append(connection)

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == ("somebody", WORD)


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that a real SSH server shows, and its URL; the password is in fsspec's configuration."""
    (folder := tmp_path / "shown").mkdir()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def listen() -> asyncssh.SSHAcceptor:
        how = {"server_factory": OnePassword, "server_host_keys": [asyncssh.generate_private_key("ssh-ed25519")]}
        how["sftp_factory"] = lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder).encode())
        return await asyncssh.listen("127.0.0.1", 0, **how)

    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    monkeypatch.setenv("FSSPEC_SFTP", f'{{"username": "somebody", "password": "{WORD}", "allow_agent": false}}')
    monkeypatch.setitem(conf, "sftp", {})
    set_conf_env(conf)
    yield folder, f"sftp://127.0.0.1:{listening.get_port()}"
    loop.call_soon_threadsafe(listening.close)


def test_ssh_server_is_a_source(sftp: tuple[Path, str], zipped: bytes, tmp_path: Path) -> None:
    (folder, url), ours = sftp, tmp_path / "bucket"
    at = ("--size", 16, "--bucket", ours)
    folder_of(folder / "photos", IMAGES.items())
    (folder / "all.zip").write_bytes(zipped)
    assert read(f"{url}/photos") == read(f"{url}/all.zip") == read(f"zip://::{url}/all.zip") == IMAGES
    said = succeeded(ddpm_here("data", "pack", f"{url}/photos", "photos", *at))
    assert "images   6 colour" in said and "classes  cat, horse" in said
    line = refused(ddpm_here("data", "pack", f"{url}/none", "none", *at), Exit.MISSING_INPUT)
    assert f"there is nothing at {url}/none" in line
    assert WORD.encode() not in b"".join(files_in(ours).values())

    # Tars are indexed in place; what is in the middle of one was changed.
    (folder / "tars").mkdir()
    for number in range(2):
        tar_of(folder / "tars" / f"{number:05d}.tar", [*IMAGES.items()][3 * number : 3 * number + 3])
    said = succeeded(ddpm_here("data", "index", f"{url}/tars", "tars", *at))
    assert "6 colour, 16×16 pixels, in 2 shards" in said
    bucket = open_store(str(ours))
    index = load_index(bucket, "datasets/tars-16")
    assert [shard.uri for shard in index.shards] == [f"{url}/tars/0000{number}.tar" for number in range(2)]
    assert verify_dataset(bucket, "datasets/tars-16") == []
    flip_a_bit(folder / "tars" / "00001.tar", 600)
    assert len(verify_dataset(bucket, "datasets/tars-16")) == 1


def test_names_links_and_broken_connections_by_ssh(sftp: tuple[Path, str]) -> None:
    folder, url = sftp
    found = {"a.png": IMAGES["cat/0.png"], "a.png?b.png": IMAGES["cat/1.png"], "c.png": IMAGES["cat/0.png"]}
    folder_of(folder / "odd", [*found.items()][:2])
    (folder / "odd" / "c.png").symlink_to("a.png")
    assert read(f"{url}/odd") == found
    assert read(f"{url}/odd/a.png?*.png") == {"a.png?b.png": IMAGES["cat/1.png"]}
    assert read(url) == {f"odd/{name}": data for name, data in found.items()}
    (folder / "linked").symlink_to("odd")
    with pytest.raises(BadDataError, match=r"/linked is a link to a folder: put a copy"):
        read(url)
    with pytest.raises(BadRequestError, match=r"a folder with a \? in its name"):
        open_source(f"{url}/a?b/")
    store = open_to_read(f"{url}/odd/", Retry(20))
    assert store.read("a.png").data == found["a.png"]
    for connection in [*SESSIONS]:
        connection.abort()
    assert store.sub("sub").exists("none") is False
    assert store.read("a.png").data == found["a.png"]


def test_date_replaces_a_missing_etag(server) -> None:
    handler, url = server
    handler.content, handler.etag, handler.date = {"/a": b"1" * 9_000_000}, "", "Sun, 01 Nov 2026 00:00:00 GMT"
    with open_to_read(url, Retry(1)).open("a") as file:
        assert file.read(10) == b"1" * 10
        handler.content, handler.date = {"/a": b"2" * 9_000_000}, "Mon, 02 Nov 2026 00:00:00 GMT"
        with pytest.raises(BadDataError, match="has changed during the read"):
            file.read()


PATIENCE_SECONDS = 1.2
SILENCE_SECONDS = 3.0
"""Longer than the patience, so that a busy machine does not look like a silent server."""
MOST_REQUESTS = 100
"""Of a command: a try has two (HEAD, GET), and ten for each that is redirected for ever."""


def silent(handler: Files) -> None:
    handler.send_part(1000)
    time.sleep(SILENCE_SECONDS + 1)


def slow(handler: Files) -> None:
    handler.send_part(0)
    step = len(handler.whole) // 6 + 1
    for start in range(0, len(handler.whole), step):
        handler.wfile.write(handler.whole[start : start + step])
        time.sleep(PATIENCE_SECONDS / 2)


def cut_once(handler: Files) -> None:
    gets = sum(command == "GET" for command, _ in handler.asked)
    handler.send_part(len(handler.whole) * (2 if gets == 1 else 3) // 3)


def redirect(target: str) -> Callable[[Files], object]:
    return lambda handler: handler.send(b"", {"Location": target, "Content-Length": "0"}, 302)


def archive(images: int) -> bytes:
    files = [(f"{'cats' if number % 2 else 'dogs'}/{number:03d}.png", png(number)) for number in range(images)]
    files += [("notes.txt", np.random.default_rng(0).bytes(6_000_000))]
    return zip_of(file := BytesIO(), files) and file.getvalue()


def test_fetch_is_whole_or_begins_again(server, tmp_path, monkeypatch):
    (handler, url), lines = server, list[str]()
    one, two = archive(40), archive(41)
    handler.content, handler.place, handler.bad = {"/all.zip": one}, "GET", cut_once

    def images(**options) -> int:
        return len(list(names_of(open_source(f"{url}/all.zip", **options))))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def replaced(*about):
        handler.content, handler.etag = {"/all.zip": two[: len(one)]}, "two"
        return check(*about)

    assert images(retry=Retry(note=lines.append)) == 40
    assert [asked for command, asked in handler.asked if command == "GET"] == ["", ""]
    assert f"{url}/all.zip does not answer" in lines[0] and "trying again" in lines[0]
    handler.place = ""
    handler.asked.clear()
    # What was fetched stays, until it is packed.
    assert images() == 40
    assert {command for command, _ in handler.asked} == {"HEAD"}

    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("job.data.source.Progress.update", killed)
        images()
    assert not files_in(tmp_path / "other")
    check = SourceStore._check_same
    with monkeypatch.context() as patch, pytest.raises(BadDataError, match="has changed during the read: begin again"):
        patch.setattr(SourceStore, "_check_same", replaced)
        images()
    handler.content = {"/all.zip": two}
    assert images() == 41


def test_lying_server_gets_no_disk(server, tmp_path, monkeypatch):
    handler, url = server
    handler.content = {"/all.zip": b"x" * 50_000_000}
    monkeypatch.setattr(SourceStore, "_about", lambda *_: About(1000, ('"one"',)))
    written: list[int] = []
    monkeypatch.setattr("job.data.source.Progress.update", lambda _, mib: written.append(mib))
    with pytest.raises(BadDataError, match=r"sends [\d,]+ of 1,000 bytes: download it"):
        open_source(f"{url}/all.zip")
    assert max(written) <= 2 and not files_in(tmp_path / "cache")


def test_short_and_stalled_bodies(server):
    handler, url = server
    handler.content, handler.place = {"/a.zip": b"0123456789" * 100}, "GET"
    # Nothing says that half of a body is half.
    handler.bad = lambda answer: answer.send(answer.whole[:500], {})
    with pytest.raises(BucketAwayError, match="sends 500 of 1,000 bytes"):
        open_to_read(url, Retry(0.5)).read("a.zip")
    handler.bad = lambda answer: (answer.send_part(0), time.sleep(5))
    stop, began = Stop(), time.monotonic()
    threading.Timer(1.0, stop.request, ["a test"]).start()
    with pytest.raises(StoppedError):
        open_source(f"{url}/a.zip", retry=Retry(60.0, stop))
    assert time.monotonic() - began < 4


def test_unreadable_web_sources_are_one_line(server, tmp_path, monkeypatch):
    (_, url), at = server, ("name", "--size", 8, "--bucket", tmp_path / "b")
    for source, said, *codes in (
        (f"{url}/none.zip", f"there is nothing at {url}/none.zip: ", Exit.MISSING_INPUT),
        (f"{url}/secret.zip?token=word", "download it where you are signed in", Exit.NO_PERMISSION),
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
        line = refused(ddpm_here("data", "pack", source, *at), *(codes or [Exit.BAD_REQUEST]))
        assert said in line and "word" not in line.replace("password", "")
    with monkeypatch.context() as patch:
        patch.setitem(conf, "http", {"headers": "text"})
        line = refused(ddpm_here("data", "pack", f"{url}/none.zip", *at), Exit.BAD_CONFIG)
        assert "fsspec's configuration" in line and "is not valid" in line
    assert not list(tmp_path.rglob("*.tar"))
    assert open_to_read("https://[2001:db8::1]/images").uri == "https://[2001:db8::1]/images"

    def missing(*_, **__):
        raise ImportError("no aiohttp")

    monkeypatch.setattr("job.store.sources.get_filesystem_class", missing)
    with pytest.raises(BadRequestError, match=r"https:// needs more than is installed \(no aiohttp\): .*\[web\]"):
        open_source("https://example.com/a.zip")


def test_splits_of_archives_can_be_chosen_by_a_chain(tmp_path, digits):
    """CIFAR-10 with twelve images a batch, and MNIST in a zip."""
    noise = np.random.default_rng(0)
    files = [
        (f"cifar-10-batches-bin/{name}.bin", b"".join(bytes([n % 10]) + noise.bytes(3072) for n in range(12)))
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    ]
    path = tar_of(tmp_path / "cifar-10-binary.tar.gz", files)
    alone, chain = open_source(str(path)), open_source(f"tar://::{path}")
    whole = dict(entries_of(replace(alone, split="")))
    assert dict(entries_of(chain)) == dict(entries_of(alone))
    for split, count in (("train", 24), ("test", 12)):
        part = {name.removeprefix(f"{split}/"): data for name, data in whole.items() if name.startswith(f"{split}/")}
        assert len(part) == count and read(f"tar://{split}::{path}") == part
        assert {*names_of(replace(chain, split=split))} == {f"{split}/{name}" for name in part}
    images, labels = map(idx, digits)
    files = [("fashion-mnist_train.csv", b"label,pixel1\n")]
    for split in ("t10k", "train"):
        files += [(f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)]
    words = ("fashion-mnist", "--bucket", tmp_path / "b")
    said = succeeded(ddpm_here("data", "pack", zip_of(tmp_path / "archive.zip", files), *words))
    assert "images   12 grey, 28×28" in said and "classes  0, 1, 2" in said
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("train-images-idx3-ubyte", idx(np.zeros((30_000, 28, 28))))
    line = refused(ddpm_here("data", "pack", tmp_path / "bomb.zip", "a", "--size", 8, "--no-classes", *words[1:]), 65)
    assert "unpacks to more than 200 times its size: do not trust this archive" in line


def error(code: int) -> Callable[[Files], object]:
    return lambda handler: handler.send_error(code)


AWAY, BAD, FINE, REQUEST, MISSING = (Exit(code) for code in (69, 65, 0, 64, 66))
DENIED = Exit.NO_PERMISSION
ANSWERS: dict[str, tuple[Callable[[Files], object], Exit | None, Exit | None, Exit | None]] = {
    # An answer, and the exit code if HEAD, GET or every request gets it. Without one to HEAD the GET tells the size.
    "whole, too short": (lambda handler: handler.send_whole(handler.whole[:-1]), BAD, BAD, None),
    "whole, too long": (lambda handler: handler.send_whole(handler.whole + b"x"), BAD, BAD, None),
    "whole, empty": (lambda handler: handler.send_whole(b""), BAD, AWAY, BAD),
    "another file": (lambda handler: handler.send_whole(b"x" * len(handler.whole)), None, BAD, BAD),
    "cut at two thirds": (lambda handler: handler.send_part(len(handler.whole) * 2 // 3), None, AWAY, None),
    "cut at two thirds, once": (cut_once, None, FINE, None),
    "1,000 bytes, then silence": (silent, None, AWAY, None),
    "whole, slower than the patience": (slow, None, FINE, None),
    "junk": (lambda handler: handler.wfile.write(b"\x00junk\r\n\r\n" * 50), FINE, AWAY, AWAY),
    "nothing": (lambda handler: None, FINE, AWAY, AWAY),
    "redirect to a file": (redirect("file:///etc/hostname"), FINE, REQUEST, REQUEST),
    "redirect to http": (redirect("http://example.invalid/all.zip"), None, REQUEST, REQUEST),
    "redirect to itself": (redirect("/all.zip"), None, REQUEST, REQUEST),
    "redirect to no URL": (redirect("http://[bad"), None, REQUEST, REQUEST),
    "redirect to no port": (redirect("https://host:99999999/all.zip"), None, REQUEST, REQUEST),
    **{str(code): (error(code), None, DENIED, DENIED) for code in (401, 403)},
    **{str(code): (error(code), FINE if code == 404 else None, MISSING, MISSING) for code in (404, 410)},
    **{str(code): (error(code), FINE if code == 500 else None, AWAY, AWAY) for code in (429, 500, 503)},
    "416": (error(416), None, BAD, None),
}


@pytest.mark.parametrize("place", ["HEAD", pytest.param("GET", marks=pytest.mark.slow), "every request"])
def test_every_answer_has_its_exit_code(server, tmp_path, monkeypatch, place):
    monkeypatch.setattr("job.store.Retry.silence_seconds", SILENCE_SECONDS)
    handler, url = server
    # The client drops up to 128 KiB before a cut.
    files = [("notes.txt", np.random.default_rng(0).bytes(3_000_000)), *((f"{n}.jpg", jpeg(n)) for n in range(12))]
    handler.place, handler.etag = place, ""
    handler.content = {"/all.zip": zip_of(tmp_path / "all.zip", files).read_bytes()}
    for number, (answer, (bad, *codes)) in enumerate(ANSWERS.items()):
        if (code := codes[("HEAD", "GET", "every request").index(place)]) is None:
            continue
        handler.bad = bad
        handler.asked.clear()
        cache, bucket, began = tmp_path / f"cache{number}", tmp_path / f"bucket{number}", time.monotonic()
        words = ("data", "pack", f"{url}/all.zip", "all", "--size", 8, "--bucket", bucket)
        # Patience only helps where a later answer is good.
        patience_seconds = PATIENCE_SECONDS / 4 if code == AWAY else PATIENCE_SECONDS
        done = ddpm_here(*words, DDPM_CACHE=str(cache), DDPM_AWAY_SECONDS=str(patience_seconds))
        assert done.returncode == code, answer
        assert time.monotonic() - began < 50 * PATIENCE_SECONDS, answer
        assert len(handler.asked) <= MOST_REQUESTS, (answer, len(handler.asked))
        errors = [line for line in done.stderr.splitlines() if line.startswith("ddpm: ")]
        assert len(errors) == bool(code) and "Traceback" not in done.stderr, (answer, done.stderr)
        assert not files_in(cache) and not (code and files_in(bucket)), answer


NO_HOST = dict.fromkeys(("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"), "http://no-such.invalid")
NO_HOST |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "a")


def test_unknown_host_is_given_up_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.5)
    # The clients' own errors have to lead to that of the resolver.
    cases = [("landscape-sample", f"{kind}://bucket/folder", socket.EAI_NONAME) for kind in ("s3", "gs")]
    for source in ("https://no-such.invalid/all.zip", "hf://datasets/some/one", "sftp://no-such/all"):
        cases += [(source, "", code) for code in (socket.EAI_NONAME, socket.EAI_AGAIN)]
    for source, bucket, code in cases:

        def unknown(*_: object, code: int = code, **__: object) -> None:
            raise socket.gaierror(code, "Name or service not known")

        monkeypatch.setattr("socket.getaddrinfo", unknown)
        words, began = ("data", "pack", source, "all", "--size", 8), time.monotonic()
        variables = {"DDPM_AWAY_SECONDS": "100", **(NO_HOST if bucket else {})}
        done = ddpm_here(*words, "--bucket", bucket or tmp_path / "b", **variables)
        line = refused(done, Exit.BUCKET_AWAY)
        said = "Name or service not known" if bucket else f"ddpm: {source}: the name of its host is not known ("
        assert said in line and "trying again for up to 0.5 s" in done.stderr
        assert time.monotonic() - began < 30
