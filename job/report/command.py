"""`ddpm report`: writes a page, prints its URI, and opens it."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from job.exits import BadRequestError
from job.plan import open_run
from job.progress import note
from job.report.bucket_page import bucket_page
from job.report.facts import facts_of
from job.report.page import PAGE_KEY, run_page
from job.report.picture_cache import PictureCache
from job.store import Store, is_remote, open_store
from job.store.files import write_file


def write_report(bucket_uri: str, name: str, open_it: bool, output: Path | None) -> None:
    """Writes the page of a run, or of all runs without a `name`, into its folder or to `output`.

    Raises:
        MissingInputError: the run or the bucket is missing.
        BadDataError: its configuration or its dataset's index is damaged.
        BadRequestError: `output` is not a writable HTML file.
    """
    if output is not None and (output.suffix.lower() != ".html" or output.is_dir() or not output.parent.is_dir()):
        raise BadRequestError(f"--output {output}: name a file that ends in .html, in a folder that exists")
    bucket = open_store(bucket_uri)
    if name:
        handle = open_run(bucket_uri, name, with_dataset=False)
        folder, page = handle.run, run_page(facts_of(handle, name), PictureCache(note))
    else:
        folder, page = bucket, bucket_page(bucket)
    if output is not None:
        write_file(output, page)
    else:
        folder.put(PAGE_KEY, page)
    where = str(output) if output else folder.uri_of(PAGE_KEY)
    print(f"{where}  ({len(page):,} bytes)")
    if open_it:
        open_page(folder, page, output)


def open_page(folder: Store, page: bytes = b"", output: Path | None = None, key: str = PAGE_KEY) -> None:
    """Opens a page in the browser of this machine: `output`, else the one in a folder, which is read without `page`.

    Without a page or a browser this is a note.
    """
    page = page or (folder.read(key).data if folder.exists(key) else b"")
    if not page or not webbrowser.open(_local(folder, page, output, key).absolute().as_uri()):
        note(f"no browser has opened {output or folder.uri_of(key)}")


def _local(folder: Store, page: bytes, output: Path | None, key: str) -> Path:
    """Returns a lasting local file with the page, for the browser."""
    if output is not None:
        return output
    if not is_remote(folder.uri):
        return Path(folder.uri, key)
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="ddpm-"), key)
    path.write_bytes(page)
    return path
