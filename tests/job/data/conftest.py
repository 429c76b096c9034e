"""Small sources that several files pack."""

from tests.job.data.file_server import server_fixture  # noqa: F401
from tests.job.packing import source_fixture, undisturbed_fixture  # noqa: F401
from tests.job.some_images import digits_fixture  # noqa: F401
