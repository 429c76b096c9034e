"""The formats that keep many images in a file: the reader of each, and the next step with those that have none.

A format is a module here with a reader, and its line in `FORMATS`. A reader takes the files of a place, and the label
to take where the format has several: empty for the usual one, None for no labels. It returns a `Source` whose members
have their labels, or None if it sees no files of its format by their names. It imports the library of its format late,
and reads nothing that could execute code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FORMATS = {
    "published:idx_source": "",
    "published:cifar_source": r"\.bin",
    "published:lsun_source": r"[._]lmdb",
    "tfrecords:tfrecord_source": r"\.tfrec(?:ords?)?|\.tfrecords?-.*|-\d{5}-of-\d{5}",
    "tables:table_source": r"\.parquet|\.arrow",
    # Other formats may have statistics in an .npz beside them.
    "arrays:array_source": r"\.np[yz]",
}
"""The reader of each format, in this order, and how the names of files of many images end (a regular expression)."""
_CONVERT = "write its images into a folder or an .npz, and pack that"
_UNREAD = {
    ".zip .tar .tgz": "it holds archives: unpack it once, and pack the folder of archives",
    # Their readers need a folder or a file of their own.
    ".npy .npz .tfrecord .tfrecords .lmdb .mdb .bin": "it holds files of many images: unpack it, and pack the folder",
    ".pkl .pickle .pt .pth \x80\2 \x80\4 \x80\5": f"pickles are programs, and are not read: {_CONVERT}",
    ".h5 .hdf5 .he5 .mat \x89HDF MATL": f"HDF5 is not read, nor are MATLAB's files: {_CONVERT}",
    ".rec .beton .msgpack .dcm .nii": f"records of MXNet and FFCV, and medical volumes are not read: {_CONVERT}",
    ".7z .rar 7z\xbc\xaf Rar!": "it is packed by 7-Zip or RAR: unpack it, and pack the folder",
    ".mp4 .avi .mov .mkv .webm": "videos are not read: write their frames into a folder, with ffmpeg",
    ".gz .xz .bz2 .zst \xfd7zX (\xb5/\xfd BZh": "single compressed files are not read: unpack it, and pack that",
    ".cr2 .nef .arw .dng": "raw photographs are not read: develop them into JPEG or PNG",
    ".csv .json .jsonl .txt": "tables and texts hold names, not images: name the folder or archive of the images",
}
"""The next step with files that are recognised and not read, by their suffixes, and first bytes as Latin-1."""
_IMAGE_STARTS = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"


def next_step(suffix: str = "", start: bytes = b"") -> str:
    """Returns what to do with a file of this suffix, or that begins with these bytes; an empty string for others."""
    for words, said in _UNREAD.items():
        if any(word == suffix or start.startswith(word.encode("latin-1")) for word in words.split(" ")):
            return said
    return ""


def is_image_file(content: bytes) -> bool:
    """Returns whether the first bytes are those of an image file."""
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return is_webp or content[4:8] == b"ftyp" or content.startswith(_IMAGE_STARTS)


def netpbm(pixels: np.ndarray) -> bytes:
    """Returns uint8 [height, width, 1 or 3] as a PGM or PPM file; the suffix .ppm stands for both."""
    height, width, channels = pixels.shape
    return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + pixels.tobytes()
