"""Sources that fsspec reads: every kind of URL gives the images that were put there, by real servers."""

from __future__ import annotations

import asyncio
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import numpy as np
import pytest

from job.data.shards import load_index
from job.data.sources import open_source
from job.data.verify import verify_dataset
from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.job.data.test_web import png, server  # noqa: F401

IMAGES = {f"{kind}/{number}.png": png(10 * len(kind) + number) for kind in ("cat", "horse") for number in range(3)}
WORD = "a-word-that-no-log-shows"


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
    return file.getvalue()


def tar_bytes(names: list[str], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES[name])
            archive.addfile(info, io.BytesIO(IMAGES[name]))
    return file.getvalue()


def read(source: str) -> dict[str, bytes]:
    opened = open_source(source)
    assert list(opened.names()) == [name for name, _ in opened.entries()]
    return dict(opened.entries())


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that a real SSH server shows, and its URL; the password is in fsspec's configuration."""
    folder = tmp_path / "shown"
    folder.mkdir()

    class OnePassword(asyncssh.SSHServer):
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("somebody", WORD)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def listen() -> asyncssh.SSHAcceptor:
        key = asyncssh.generate_private_key("ssh-ed25519")
        files = lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder).encode())  # noqa: E731
        return await asyncssh.listen(
            "127.0.0.1", 0, server_factory=OnePassword, server_host_keys=[key], sftp_factory=files
        )

    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    monkeypatch.setenv("FSSPEC_SFTP", f'{{"username": "somebody", "password": "{WORD}", "allow_agent": false}}')
    from fsspec.config import conf, set_conf_env

    monkeypatch.setitem(conf, "sftp", {})
    set_conf_env(conf)
    yield folder, f"sftp://127.0.0.1:{listening.get_port()}"
    loop.call_soon_threadsafe(listening.close)


def test_folders_archives_and_chains_in_a_bucket(bucket_uri: str) -> None:
    store = open_store(bucket_uri)
    for name, data in IMAGES.items():
        store.put(f"theirs/{name}", data)
    store.put("archives/all.zip", zip_bytes())
    cats = {name: data for name, data in IMAGES.items() if name.startswith("cat/")}
    for source, images in {
        f"{bucket_uri}/theirs": IMAGES,
        f"{bucket_uri}/archives/all.zip": IMAGES,
        f"zip://::{bucket_uri}/archives/all.zip": IMAGES,
        f"zip://cat::{bucket_uri}/archives/all.zip": {name.removeprefix("cat/"): data for name, data in cats.items()},
        f"zip://*/1.png::{bucket_uri}/archives/all.zip": {name: IMAGES[name] for name in ("cat/1.png", "horse/1.png")},
    }.items():
        if "s3://" not in source or "::" not in source:
            assert read(source) == images, source
    if "://" in bucket_uri:
        assert read(f"{bucket_uri}/theirs/c*/*.png") == cats


def test_chains_over_the_web(server) -> None:  # noqa: F811
    handler, url = server
    handler.content = {"/all.zip": zip_bytes(), "/all.tar": tar_bytes(sorted(IMAGES))}
    assert read(f"zip://::{url}/all.zip?signature={WORD}") == IMAGES
    assert read(f"tar://::{url}/all.tar") == IMAGES
    assert read(f"{url}/all.tar") == IMAGES


def test_a_server_of_files_by_ssh(sftp: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = sftp
    for name, data in IMAGES.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(data)
    (folder / "all.zip").write_bytes(zip_bytes())
    assert read(f"{url}/photos") == read(f"{url}/all.zip") == read(f"zip://::{url}/all.zip") == IMAGES
    ours = tmp_path / "bucket"
    said = succeeded(ddpm("data", "pack", f"{url}/photos", "photos", "--size", 16, "--bucket", ours))
    assert "images   6 colour" in said and "classes  cat, horse" in said
    line = refused(ddpm("data", "pack", f"{url}/none", "none", "--size", 16, "--bucket", ours), Exit.MISSING_INPUT)
    assert f"there is nothing at {url}/none" in line
    assert WORD not in "".join(path.read_text(errors="replace") for path in ours.rglob("*") if path.is_file())


def test_tars_are_indexed_wherever_they_lie(sftp: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = sftp
    names = sorted(IMAGES)
    (folder / "tars").mkdir()
    for number in range(2):
        (folder / "tars" / f"{number:05d}.tar").write_bytes(tar_bytes(names[3 * number : 3 * number + 3]))
    ours = tmp_path / "bucket"
    said = succeeded(ddpm_here("data", "index", f"{url}/tars", "tars", "--size", 16, "--bucket", ours))
    assert "6 colour, 16×16 pixels, in 2 shards" in said
    bucket = open_store(str(ours))
    index = load_index(bucket, "datasets/tars-16")
    assert [shard.uri for shard in index.shards] == [f"{url}/tars/0000{number}.tar" for number in range(2)]
    assert verify_dataset(bucket, "datasets/tars-16") == []
    # What is in the middle of a tar was changed.
    damaged = bytearray((folder / "tars" / "00001.tar").read_bytes())
    damaged[600] ^= 1
    (folder / "tars" / "00001.tar").write_bytes(damaged)
    assert np.size(verify_dataset(bucket, "datasets/tars-16")) == 1
