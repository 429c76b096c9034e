"""Formats that are recognised and not read, and what a person does instead."""

from __future__ import annotations

_CONVERT = "write its images into a folder or an .npz, and pack that"
_UNREAD = {
    (".zip", ".tar", ".tgz"): "it holds archives: unpack it once, and pack the folder of archives",
    # Their readers need a folder or a file of their own.
    (".npy", ".npz", ".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".bin"): (
        "it holds files of many images: unpack it, and pack the folder"
    ),
    (".pkl", ".pickle", ".pt", ".pth"): f"pickles are programs, and are not read: {_CONVERT}",
    (".h5", ".hdf5", ".he5"): f"HDF5 is not read: {_CONVERT} (h5py opens it)",
    (".mat",): f"MATLAB's files are not read: {_CONVERT} (scipy.io.loadmat opens them)",
    (".rec", ".beton", ".msgpack"): f"records of MXNet, FFCV and the like are not read: {_CONVERT}",
    (".7z", ".rar"): "it is packed by 7-Zip or RAR: unpack it, and pack the folder",
    (".mp4", ".avi", ".mov", ".mkv", ".webm"): "videos are not read: write their frames into a folder, with ffmpeg",
    (".npy.gz", ".gz"): "gzipped files are not read: gunzip them",
    (".xz", ".bz2", ".zst"): "xz, bzip2 and zstd are not read: unpack it, and pack the folder or the .tar",
    (".cr2", ".nef", ".arw", ".dng"): "raw photographs are not read: develop them into JPEG or PNG",
    (".dcm", ".nii"): f"medical volumes are not read: {_CONVERT}",
    (
        ".csv",
        ".json",
        ".jsonl",
        ".txt",
    ): "tables and texts hold names, not images: name the folder or archive of the images",
}
_MAGIC = {
    b"\x89HDF": ".h5",
    b"7z\xbc\xaf": ".7z",
    b"Rar!": ".rar",
    b"\x80\x02": ".pkl",
    b"\x80\x04": ".pkl",
    b"\x80\x05": ".pkl",
    b"MATL": ".mat",
    b"\xfd7zX": ".xz",
    b"\x28\xb5\x2f\xfd": ".xz",
    b"BZh": ".xz",
}


def next_step(suffix: str) -> str:
    """Returns what a file with this suffix is and what to do with it; an empty string for an unknown one."""
    return next((said for suffixes, said in _UNREAD.items() if suffix in suffixes), "")


def next_step_by(start: bytes) -> str:
    """Returns the same for a file that begins with these bytes."""
    return next_step(next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), ""))
