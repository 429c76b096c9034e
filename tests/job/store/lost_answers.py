"""What every bucket keeps to when its answer is lost: what was written counts, and is not taken for somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from job.store import ConflictError, ObjectExistsError, Store
from tests.job.store.proxy import Proxy, lose_the_answer_to


class LostAnswers:
    """Tests over a `proxy` and the `store` behind it."""

    request: ClassVar[bytes]
    """What is in each request that writes."""

    def test_create_survives_a_lost_answer(self, proxy: Proxy, store: Store) -> None:
        lost = lose_the_answer_to(proxy, self.request)
        version = store.create("manifest", b"mine")
        assert lost.is_set()
        assert store.read("manifest").version == version
        with pytest.raises(ObjectExistsError):
            store.create("manifest", b"theirs")

    def test_replace_survives_a_lost_answer(self, proxy: Proxy, store: Store) -> None:
        first = store.create("lease", b"1")
        lost = lose_the_answer_to(proxy, self.request)
        second = store.replace("lease", b"2", first)
        assert lost.is_set()
        assert store.read("lease").version == second != first
        with pytest.raises(ConflictError):
            store.replace("lease", b"3", first)

    def test_upload_survives_a_lost_answer(self, proxy: Proxy, store: Store, file: Path) -> None:
        lost = lose_the_answer_to(proxy, self.request)
        store.upload(file, "part")
        assert lost.is_set()
        assert store.read("part").data == file.read_bytes()
