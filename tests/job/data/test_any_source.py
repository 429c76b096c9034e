"""Sources that fsspec reads: every kind of URL gives the images that were put there, by real servers."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest

from job.data.checks import verify_dataset
from job.data.shards import load_index
from job.data.source import members, open_source
from job.exits import BadDataError, BadRequestError, BucketAwayError, Exit, MissingInputError
from job.store import Retry, open_store, open_to_read
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import flip_a_bit
from tests.job.packing import entries_of, images_of, names_of
from tests.job.some_images import files_in, folder_of, mnist, png, tar_of, zip_of
from tests.job.store.test_store import put_by_others

IMAGES = {f"{kind}/{number}.png": png(10 * len(kind) + number) for kind in ("cat", "horse") for number in range(3)}
WORD = "a-word-that-no-log-shows"
SESSIONS: list[asyncssh.SSHServerConnection] = []
"""All that the server of files has had."""


def read(source: str) -> dict[str, bytes]:
    return dict(images_of(source))


@pytest.fixture(scope="module")
def zipped(tmp_path_factory) -> bytes:
    """A zip of the images."""
    return zip_of(tmp_path_factory.mktemp("zipped") / "all.zip", IMAGES.items()).read_bytes()


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that a real SSH server shows, and its URL; the password is in fsspec's configuration."""
    folder = tmp_path / "shown"
    folder.mkdir()

    class OnePassword(asyncssh.SSHServer):
        def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
            SESSIONS.append(connection)

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("somebody", WORD)

    def below_folder(channel: asyncssh.SSHServerChannel[bytes]) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(channel, chroot=str(folder).encode())

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def listen() -> asyncssh.SSHAcceptor:
        key = asyncssh.generate_private_key("ssh-ed25519")
        return await asyncssh.listen(
            "127.0.0.1", 0, server_factory=OnePassword, server_host_keys=[key], sftp_factory=below_folder
        )

    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    monkeypatch.setenv("FSSPEC_SFTP", f'{{"username": "somebody", "password": "{WORD}", "allow_agent": false}}')
    from fsspec.config import conf, set_conf_env

    monkeypatch.setitem(conf, "sftp", {})
    set_conf_env(conf)
    yield folder, f"sftp://127.0.0.1:{listening.get_port()}"
    loop.call_soon_threadsafe(listening.close)


def test_bucket_sources_equal_local_ones(bucket_uri: str, zipped: bytes, tmp_path, digits, monkeypatch) -> None:
    folder_of(local := tmp_path / "local", [(f"images/{name}", data) for name, data in IMAGES.items()])
    for make, name in ((zip_of, "all.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz")):
        make(local / name, IMAGES.items())
    mnist(local / "mnist", "train", *digits, gz=True)
    store = open_store(bucket_uri)
    for name, data in files_in(local).items():
        store.put(f"theirs/{name}", data)
    more = ("a.tar", "a.tgz", "images/", "mnist", "mnist/train-images-idx3-ubyte.gz")
    for name in ("all.zip", "images", *(more if bucket_uri.startswith("gs://") else ())):
        here, there = open_source(str(local / name)), open_source(f"{bucket_uri}/theirs/{name}")
        assert there.name == here.name
        assert [*names_of(there)] == [*names_of(here)]
        assert [*entries_of(there)] == [*entries_of(here)]
    cats = {name: data for name, data in IMAGES.items() if name.startswith("cat/")}
    archive = f"{bucket_uri}/theirs/all.zip"
    for source, images in {
        f"zip://::{archive}": IMAGES,
        f"zip://cat::{archive}": {name.removeprefix("cat/"): data for name, data in cats.items()},
        f"zip://*/1.png::{archive}": {name: IMAGES[name] for name in ("cat/1.png", "horse/1.png")},
    }.items():
        assert read(source) == images, source
    if "://" in bucket_uri:
        assert read(f"{bucket_uri}/theirs/images/c*/*.png") == cats
    for missing in (f"{bucket_uri}/theirs/else", f"{bucket_uri}/theirs/b.zip"):
        with pytest.raises(MissingInputError, match="there is nothing at"):
            open_source(missing)
    monkeypatch.setattr(members, "ENTRY_BYTES", 0)
    with pytest.raises(BadDataError, match=r"'cat/0.png' has [\d,]+ bytes, more than the 0"):
        read(f"{bucket_uri}/theirs/images")


def test_chains_over_the_web(server, zipped: bytes, tmp_path: Path) -> None:
    handler, url = server
    tar = tar_of(tmp_path / "all.tar", sorted(IMAGES.items())).read_bytes()
    handler.content = {"/all.zip": zipped, "/all.tar": tar}
    assert read(f"zip://::{url}/all.zip?signature={WORD}") == IMAGES
    assert read(f"tar://::{url}/all.tar") == read(f"{url}/all.tar") == IMAGES
    assert read(f"tar://cat/*.png::{url}/all.tar") == {
        name.removeprefix("cat/"): data for name, data in IMAGES.items() if name.startswith("cat/")
    }


def test_signatures_are_in_no_record(server, zipped: bytes, tmp_path: Path) -> None:
    handler, url = server
    handler.content = {"/all.zip": zipped}
    query = f"?se=2026-01-01T00:00:00Z&sig={WORD}"
    bucket = tmp_path / "bucket"
    for name, source in {
        "a": f"{url}/all.zip{query}",
        "b": f"zip://cat/*::{url}/all.zip{query}",
        "c": f"zip://::zip://cat::{url}/all.zip{query}",
    }.items():
        done = ddpm_here("data", "pack", source, name, "--size", 16, "--bucket", bucket)
        assert WORD not in succeeded(done) + done.stderr
    done = ddpm_here("import", f"{url}/all.zip{query}", "--run", "r", "--bucket", bucket)
    assert WORD not in refused(done, Exit.BAD_DATA)
    assert not [path for path in bucket.rglob("*") if path.is_file() and WORD.encode() in path.read_bytes()]


def test_archives_in_chains_are_checked(bucket_uri: str, zipped: bytes) -> None:
    store, damaged, unsafe = open_store(bucket_uri), bytearray(zipped), io.BytesIO()
    damaged[60] ^= 1
    with zipfile.ZipFile(unsafe, "w") as archive:
        archive.writestr("../../evil.png", IMAGES["cat/0.png"])
    for name, data, said in (
        ("damaged.zip", bytes(damaged), "is truncated or damaged"),
        ("unsafe.zip", unsafe.getvalue(), "leads out of it"),
        ("none.zip", b"no archive", "is damaged, or not a .zip"),
    ):
        store.put(name, data)
        with pytest.raises(BadDataError, match=said):
            read(f"zip://::{bucket_uri}/{name}")


def test_odd_names_are_names(bucket_uri: str, zipped: bytes) -> None:
    for name in ("what?.zip", "a::b.zip", "a b#c%20d.zip"):
        put_by_others(bucket_uri, f"odd/{name}", zipped)
        assert read(f"{bucket_uri}/odd/{name}") == IMAGES


def test_ssh_server_is_a_source(sftp: tuple[Path, str], zipped: bytes, tmp_path: Path) -> None:
    folder, url = sftp
    folder_of(folder / "photos", IMAGES.items())
    (folder / "all.zip").write_bytes(zipped)
    assert read(f"{url}/photos") == read(f"{url}/all.zip") == read(f"zip://::{url}/all.zip") == IMAGES
    ours = tmp_path / "bucket"
    said = succeeded(ddpm_here("data", "pack", f"{url}/photos", "photos", "--size", 16, "--bucket", ours))
    assert "images   6 colour" in said and "classes  cat, horse" in said
    line = refused(ddpm_here("data", "pack", f"{url}/none", "none", "--size", 16, "--bucket", ours), Exit.MISSING_INPUT)
    assert f"there is nothing at {url}/none" in line
    assert WORD not in "".join(path.read_text(errors="replace") for path in ours.rglob("*") if path.is_file())


def test_names_and_links_by_ssh(sftp: tuple[Path, str]) -> None:
    folder, url = sftp
    (folder / "odd").mkdir()
    (folder / "odd" / "a.png").write_bytes(IMAGES["cat/0.png"])
    (folder / "odd" / "a.png?b.png").write_bytes(IMAGES["cat/1.png"])
    (folder / "odd" / "c.png").symlink_to("a.png")
    found = {"a.png": IMAGES["cat/0.png"], "a.png?b.png": IMAGES["cat/1.png"], "c.png": IMAGES["cat/0.png"]}
    assert read(f"{url}/odd") == found
    assert read(f"{url}/odd/a.png?*.png") == {"a.png?b.png": IMAGES["cat/1.png"]}
    assert read(url) == {f"odd/{name}": data for name, data in found.items()}
    (folder / "linked").symlink_to("odd")
    with pytest.raises(BadDataError, match=r"/linked is a link to a folder: put a copy"):
        read(url)
    with pytest.raises(BadRequestError, match=r"a folder with a \? in its name"):
        open_source(f"{url}/a?b/")


def page(*links: str) -> bytes:
    return "".join(f'<a href="{link}">there</a>' for link in links).encode()


def test_web_folder_is_its_page(server) -> None:
    handler, url = server
    handler.content = {f"/ds/{name}": data for name, data in IMAGES.items()}
    handler.content |= {f"/ds/{kind}": page("../", "/", *(f"{n}.png" for n in range(3))) for kind in ("cat", "horse")}
    handler.content["/ds"] = page(
        "?C=N", "https://elsewhere.example/x.png", "/ds/", "/dsx/0.png", "./cat/", "/ds/horse/"
    )
    assert read(f"{url}/ds/") == IMAGES
    assert read(f"{url}/ds/*/1.png") == {name: IMAGES[name] for name in ("cat/1.png", "horse/1.png")}
    for source in (f"{url}/ds/?signature={WORD}", f"{url}/ds/*/1.png?signature={WORD}"):
        with pytest.raises(MissingInputError, match="a folder with a query cannot be listed") as error:
            read(source)
        assert WORD not in str(error.value)
    handler.content |= {"/loop" + "/loop" * deep: page("loop/") for deep in range(100)}
    with pytest.raises(BadDataError, match="more than 64 levels"):
        read(f"{url}/loop/")


def test_fetched_archives_do_not_stay(server, zipped: bytes, tmp_path: Path) -> None:
    handler, url = server
    handler.content = {"/all.zip": zipped}
    at = ("--size", 16, "--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("data", "pack", f"zip://::zip://cat::{url}/all.zip", "cats", *at))
    refused(ddpm_here("data", "pack", f"zip://dog::{url}/all.zip", "dogs", *at), Exit.BAD_DATA)
    assert [*(tmp_path / "cache/sources").iterdir()] == []


def test_ipv6_addresses_are_hosts() -> None:
    assert open_to_read("https://[2001:db8::1]/images").uri == "https://[2001:db8::1]/images"


def test_broken_connection_is_renewed(sftp: tuple[Path, str]) -> None:
    folder, url = sftp
    (folder / "0.png").write_bytes(IMAGES["cat/0.png"])
    store = open_to_read(f"{url}/", Retry(20))
    assert store.read("0.png").data == IMAGES["cat/0.png"]
    for connection in [*SESSIONS]:
        connection.abort()
    assert store.sub("sub").exists("none") is False
    assert store.read("0.png").data == IMAGES["cat/0.png"]


def test_date_replaces_a_missing_etag(server) -> None:
    handler, url = server
    one, two = (b"1" * 9_000_000, b"2" * 9_000_000)
    handler.content, handler.etag, handler.date = {"/a": one}, "", "Sun, 01 Nov 2026 00:00:00 GMT"
    store = open_to_read(url, Retry(1))
    with store.open("a") as file:
        assert file.read(10) == b"1" * 10
        handler.content, handler.date = {"/a": two}, "Mon, 02 Nov 2026 00:00:00 GMT"
        with pytest.raises(BadDataError, match="has changed during the read"):
            file.read()


def test_short_body_is_an_outage(server) -> None:
    handler, url = server
    handler.content, handler.without_length = {"/a": b"0123456789" * 100}, True
    with pytest.raises(BucketAwayError, match="sends 500 of 1,000 bytes"):
        open_to_read(url, Retry(0.5)).read("a")


def test_tars_by_ssh_are_indexed(sftp: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = sftp
    (folder / "tars").mkdir()
    for number in range(2):
        tar_of(folder / "tars" / f"{number:05d}.tar", [*IMAGES.items()][3 * number : 3 * number + 3])
    ours = tmp_path / "bucket"
    said = succeeded(ddpm_here("data", "index", f"{url}/tars", "tars", "--size", 16, "--bucket", ours))
    assert "6 colour, 16×16 pixels, in 2 shards" in said
    bucket = open_store(str(ours))
    index = load_index(bucket, "datasets/tars-16")
    assert [shard.uri for shard in index.shards] == [f"{url}/tars/0000{number}.tar" for number in range(2)]
    assert verify_dataset(bucket, "datasets/tars-16") == []
    # What is in the middle of a tar was changed.
    flip_a_bit(folder / "tars" / "00001.tar", 600)
    assert len(verify_dataset(bucket, "datasets/tars-16")) == 1
