"""Files of `torch.save`, read so that they can neither run code nor fill the memory."""

import pickletools
import zipfile
from typing import Any, BinaryIO

import torch

_UNPACKED_MOST = 10  # times the size of the file; torch.save itself does not compress
_UNPACKED_FREE = 1 << 26
_FOLDER = 0x10  # the bit of MS-DOS's attributes


class UnsafeFileError(ValueError):
    """A file that would take far more memory than its size, or that is no archive of torch."""


def load_torch(stream: BinaryIO) -> Any:
    """What a file of `torch.save` holds, on the CPU: tensors, numbers and plain containers.

    The checksums of an archive are checked, which torch itself does not do.

    Raises:
        UnsafeFileError: It would unpack to much more than its size, or a checksum is wrong.
        Exception: It is damaged, or holds other objects; torch raises almost any error then.
    """
    if zipfile.is_zipfile(stream):
        _check_archive(stream)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def _check_archive(stream: BinaryIO) -> None:
    size = stream.seek(0, 2)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(_UNPACKED_MOST * size, _UNPACKED_FREE):
            raise UnsafeFileError(f"its {size:,} bytes unpack to {unpacked:,}")
        if archive.testzip():
            raise UnsafeFileError("a checksum is wrong")
        for entry in entries:
            # torch does not read such an entry, and takes what was in the memory for its numbers.
            if entry.external_attr & _FOLDER and entry.file_size:
                raise UnsafeFileError(f"{entry.filename} is marked as a folder")
            # bytearray(n) takes n bytes, and torch's own reader allows it.
            if entry.filename.endswith(".pkl") and _names_bytearray(archive.read(entry)):
                raise UnsafeFileError("it holds a bytearray, not tensors alone")


def _names_bytearray(pickled: bytes) -> bool:
    names = (name for _, name, _ in pickletools.genops(pickled) if isinstance(name, str))
    return any("bytearray" in name.split() for name in names)
