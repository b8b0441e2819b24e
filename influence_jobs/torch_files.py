"""Files of `torch.save`, read so that they can neither run code nor fill the memory."""

import re
import zipfile
from typing import Any, BinaryIO

import torch

_UNPACKED_MOST = 10  # times the size of the file; torch.save itself does not compress
_UNPACKED_FREE = 1 << 26
_BLOCK = 1 << 24
# How a pickle calls bytearray(n), which takes n bytes and which torch's own reader allows. It reads
# no other opcode for it.
_CALLED = re.compile(rb"c(?:builtins|__builtin__)\nbytearray\n")
_LONGEST, _BYTEARRAY = 32, "it holds a bytearray, not tensors alone"
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
    else:
        _check_bytes(stream)
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
            # torch finds its pickle whatever the case of its name.
            if entry.filename.lower().endswith(".pkl") and _CALLED.search(archive.read(entry)):
                raise UnsafeFileError(_BYTEARRAY)


def _check_bytes(stream: BinaryIO) -> None:
    stream.seek(0)
    end = b""
    while block := stream.read(_BLOCK):
        if _CALLED.search(end + block):
            raise UnsafeFileError(_BYTEARRAY)
        end = block[-_LONGEST:]
