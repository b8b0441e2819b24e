"""A folder of images, read one at a time."""

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from influence_jobs.errors import DataError

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")  # decoders that are tried, whatever a file's suffix
MOST_PIXELS = 89_478_485  # of an image; Pillow warns of larger ones, and we refuse them
_NAMED = 5  # how many files an error message lists

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Photographs that ship with scikit-image and scikit-learn: (package, path within it).
SAMPLES = {
    "samples": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
    "samples-test": (
        ("skimage", "data/chelsea.png"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
}


class _TooLarge(DataError):
    def __init__(self, path: Path) -> None:
        many = f"{MOST_PIXELS / 1e6:.0f} million pixels"
        super().__init__(f"image {path} has more than {many}: scale it down, or cut it")


class ImageFolder:
    """The jpg, png, bmp and tif images of a folder and its subfolders, linked ones too, by name.

    An image's number is its position in `names`. Colour images are loaded as **BGR**, the channel
    order of OpenCV, because the published colour FFDNet was trained on it. Alpha is dropped,
    palettes and CMYK are converted, 16-bit grey keeps its high byte, and only the first page of a
    multi-page file is read. An EXIF orientation is ignored.

    Args:
        root: A folder, or one of the strings `samples` and `samples-test`: two disjoint sets of
            photographs that ship with scikit-image and scikit-learn, for training and for testing.
            (For a folder of that name give `./samples`.)
        color: Load (3, H, W) BGR if true, (1, H, W) luma if false.
        skip: Names to leave out, such as those that `check` returned. The caller should record
            them.

    Attributes:
        names: Path of each image relative to the root, with forward slashes.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: The folder is missing, or no image is left.
    """

    def __init__(
        self, root: Path | str, *, color: bool = True, skip: frozenset[str] = frozenset()
    ) -> None:
        found = _samples(root) if isinstance(root, str) and root in SAMPLES else _images(Path(root))
        self.names = tuple(sorted(found.keys() - skip))
        self.channels = 3 if color else 1
        self._paths = [found[name] for name in self.names]
        if not self.names:
            raise DataError(
                f"no images left in {root}: all {len(found)} are skipped; name another folder"
                if found
                else f"no images in {root}: name a folder with jpg, png, bmp or tif files"
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each image, read from the headers only.

        Raises:
            DataError: A header cannot be read.
        """
        sizes, bad = [], []
        for name, path in zip(self.names, self._paths, strict=True):
            try:
                with _opened(path) as image:
                    sizes.append((image.height, image.width))
            except _TooLarge:
                raise
            except Exception:  # noqa: BLE001  (a decoder may raise anything on bad bytes)
                bad.append(name)
        if bad:
            raise _unreadable(bad)
        return tuple(sizes)

    def load(self, index: int) -> torch.Tensor:
        """Decode one image.

        Returns:
            (C, H, W) uint8, BGR or grey.

        Raises:
            DataError: The image cannot be decoded.
        """
        try:
            return _decode(self._paths[index], color=self.channels == 3)
        except _TooLarge:
            raise
        except Exception as error:  # a decoder may raise anything on bad bytes
            raise _unreadable([self.names[index]]) from error

    def check(self, *, skip_unreadable: bool) -> list[str]:
        """Decode every image once, to find unreadable ones before the work begins.

        Args:
            skip_unreadable: Return the names of unreadable images, for `skip`, instead of raising.

        Returns:
            Names of the images that cannot be decoded.

        Raises:
            DataError: An image cannot be decoded, and `skip_unreadable` is false.
        """

        def fault(index: int) -> DataError | None:
            try:
                self.load(index)
            except DataError as error:
                return error
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(pool.map(fault, range(len(self.names))))
        bad = [name for name, found in zip(self.names, faults, strict=True) if found]
        if bad and not skip_unreadable:
            large = (found for found in faults if isinstance(found, _TooLarge))
            raise next(large, _unreadable(bad))
        return bad

    def digest(self) -> str:
        """SHA-256 over the names and contents of all files, in hexadecimal.

        Raises:
            DataError: A file cannot be read.
        """
        total = hashlib.sha256()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, content in zip(self.names, pool.map(_sha256, self._paths), strict=True):
                # Names and hexadecimal digests have no NUL, so different folders never hash alike.
                total.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
        return total.hexdigest()


def _images(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; name a folder with images")
    found = {}
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        # A link to a folder that it lies in would never end.
        below[:] = [name for name in below if not real.is_relative_to((here / name).resolve())]
        for path in (here / name for name in files):
            # A link to nowhere is kept: it cannot be read, which is told.
            if path.suffix.lower() in _SUFFIXES and (path.is_file() or path.is_symlink()):
                found[path.relative_to(root).as_posix()] = path
    return found


def _samples(subset: str) -> dict[str, Path]:
    found = {}
    for package, relative in SAMPLES[subset]:
        # The module spec of a top-level package gives its folder without importing the package.
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        path = Path(folders[0]) / relative if folders else None
        if path is None or not path.is_file():
            raise DataError(
                f"sample photograph {relative} of {package} is not installed; "
                "run `pip install scikit-image scikit-learn`, or name a folder with images"
            )
        found[path.name] = path
    return found


def _decode(path: Path, *, color: bool) -> torch.Tensor:
    with _opened(path) as opened:
        image: Image.Image = opened
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed scale")
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion saturates at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:  # Pillow warns unless it becomes plain alpha first
            image = image.convert("RGBA")
        pixels = np.asarray(image.convert("RGB" if color else "L"))
    if color:
        return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1].transpose(2, 0, 1)))
    return torch.from_numpy(pixels.copy()).unsqueeze(0)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header was read. A small file may claim to be of any size.

    Raises:
        _TooLarge: It has more than `MOST_PIXELS`.
    """
    try:
        opened = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise _TooLarge(path) from None
    with opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise _TooLarge(path)
        yield opened


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"cannot read image {path}: {error.strerror}; repair or remove it"
        ) from error


def _unreadable(names: Sequence[str]) -> DataError:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return DataError(
        f"cannot decode {', '.join(names[:_NAMED])}{more}; repair, remove or skip unreadable images"
    )
