import struct
import subprocess
import sys
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from PIL import Image

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
BGR = torch.from_numpy(RGB[:, :, ::-1].copy()).permute(2, 0, 1)


def save(path: Path, pixels: np.ndarray = RGB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def load_one(root: Path, *, color: bool = True) -> torch.Tensor:
    folder = ImageFolder(root, color=color)
    assert len(folder.names) == 1
    return folder.load(0)


def test_names_are_sorted_relative_and_recursive_and_sizes_come_from_headers(
    tmp_path: Path,
) -> None:
    for name in ("b.PNG", "a/z.tif", "a/b/c.bmp", "Z.jpeg", "k.jpg", "t.tiff"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    folder = ImageFolder(tmp_path)
    assert folder.names == ("Z.jpeg", "a/b/c.bmp", "a/z.tif", "b.PNG", "k.jpg", "t.tiff")
    assert folder.sizes == ((6, 9),) * 6
    save(tmp_path / "k.jpg", RGB[:4])
    (tmp_path / "k.jpg").write_bytes((tmp_path / "k.jpg").read_bytes()[:-20])
    assert ImageFolder(tmp_path).sizes[4] == (4, 9)  # truncated, but the header is whole


def test_linked_folders_and_images_are_followed_and_links_to_nowhere_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save(root / "a.png")
    save(tmp_path / "elsewhere" / "deep" / "b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "c.png").symlink_to(tmp_path / "elsewhere" / "deep" / "b.png")
    (root / "linked" / "deep" / "back").symlink_to(tmp_path / "elsewhere")  # a loop
    folder = ImageFolder(root)
    assert folder.names == ("a.png", "c.png", "linked/deep/b.png")
    assert folder.check(skip_unreadable=False) == []
    (tmp_path / "link").symlink_to(root)
    assert ImageFolder(tmp_path / "link").names == folder.names
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        ImageFolder(root).check(skip_unreadable=False)
    assert ImageFolder(root).check(skip_unreadable=True) == ["gone.png"]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_colour_is_bgr_and_grey_is_luma(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}")
    assert torch.equal(load_one(tmp_path), BGR)
    grey = load_one(tmp_path, color=False)
    assert grey.shape == (1, 6, 9)
    luma = RGB @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(grey[0].numpy() - luma).max() <= 1


@pytest.mark.filterwarnings("error")
class TestModes:
    def test_alpha_is_dropped(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", np.dstack((RGB, RGB[:, :, :1])))
        assert torch.equal(load_one(tmp_path), BGR)

    def test_palette_with_transparency(self, tmp_path: Path) -> None:
        palette = Image.fromarray(RGB).quantize(16)
        palette.save(tmp_path / "a.png", transparency=bytes(range(16)))
        expected = np.asarray(palette.convert("RGB"))[:, :, ::-1].transpose(2, 0, 1)
        assert np.array_equal(load_one(tmp_path).numpy(), expected)

    def test_grey_file_as_colour(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", RGB[:, :, 0])
        assert torch.equal(load_one(tmp_path), BGR[2:].expand(3, -1, -1))

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    @pytest.mark.parametrize("color", [True, False])
    def test_16_bit_grey_keeps_the_high_byte(
        self, tmp_path: Path, suffix: str, color: bool
    ) -> None:
        deep = RGB[:, :, 0].astype(np.uint16) * 256 + RGB[:, :, 1]
        save(tmp_path / f"a.{suffix}", deep)
        expected = BGR[2:].expand(3 if color else 1, -1, -1)
        assert torch.equal(load_one(tmp_path, color=color), expected)

    def test_cmyk_and_one_bit(self, tmp_path: Path) -> None:
        Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.tif")
        assert torch.equal(load_one(tmp_path), BGR)
        (tmp_path / "a.tif").unlink()
        save(tmp_path / "a.png", RGB[:, :, 0] > 127)
        assert torch.equal(load_one(tmp_path, color=False), (BGR[2:] > 127).byte() * 255)

    def test_exif_orientation_is_ignored(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
        assert ImageFolder(tmp_path).sizes == ((6, 9),)
        assert torch.equal(load_one(tmp_path), BGR)

    def test_float_pixels_are_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "a.tif", RGB[:, :, 0].astype(np.float32))
        with pytest.raises(DataError, match=r"cannot decode a\.tif"):
            load_one(tmp_path)


def test_missing_empty_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(DataError, match="no images in"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder(save(tmp_path / "a.png"))
    with pytest.raises(DataError, match="all 1 are skipped"):
        ImageFolder(tmp_path, skip=frozenset({"a.png"}))


def test_unreadable_files_are_named_and_skipped_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "fine.png")
    truncated = save(tmp_path / "sub" / "cut.png")
    truncated.write_bytes(truncated.read_bytes()[:-60])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "void.png").touch()
    folder = ImageFolder(tmp_path)
    with pytest.raises(DataError, match=r"^cannot decode text\.jpg, void\.png;"):
        _ = folder.sizes
    with pytest.raises(DataError, match=r"^cannot decode sub/cut\.png, text\.jpg, void\.png;"):
        folder.check(skip_unreadable=False)
    with pytest.raises(DataError, match=r"^cannot decode sub/cut\.png;"):
        folder.load(folder.names.index("sub/cut.png"))
    bad = folder.check(skip_unreadable=True)
    assert bad == ["sub/cut.png", "text.jpg", "void.png"]
    rest = ImageFolder(tmp_path, skip=frozenset(bad))
    assert rest.names == ("fine.png",)
    assert rest.sizes == ((6, 9),)
    assert rest.check(skip_unreadable=False) == []
    assert torch.equal(rest.load(0), BGR)


def png_that_says(width: int, height: int) -> bytes:
    """A few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_small_file_that_claims_to_be_huge_is_not_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(png_that_says(*size))
    folder = ImageFolder(tmp_path)
    for act in (
        lambda: folder.sizes,
        lambda: folder.load(0),
        lambda: folder.check(skip_unreadable=False),
    ):
        with pytest.raises(DataError, match=r"bomb\.png has more than 89 million pixels: scale it"):
            act()
    assert folder.check(skip_unreadable=True) == ["bomb.png"]


def test_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(DataError, match=r"0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 3 more;"):
        ImageFolder(tmp_path).check(skip_unreadable=False)


def test_a_format_that_was_not_asked_for_is_not_decoded(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", format="PPM")
    with pytest.raises(DataError, match=r"cannot decode a\.png"):
        load_one(tmp_path)


def test_digest_follows_names_and_contents(tmp_path: Path) -> None:
    for place in ("one", "two"):
        save(tmp_path / place / "a.png")
        save(tmp_path / place / "b.png", RGB[:3])
    one, two = tmp_path / "one", tmp_path / "two"
    digest = ImageFolder(one).digest()
    assert digest == ImageFolder(two).digest()
    assert digest != ImageFolder(two, skip=frozenset({"b.png"})).digest()
    (two / "b.png").rename(two / "c.png")
    assert digest != ImageFolder(two).digest()
    (two / "c.png").rename(two / "b.png")
    assert digest == ImageFolder(two).digest()
    save(two / "b.png", RGB[:4])
    assert digest != ImageFolder(two).digest()


def test_digest_of_a_file_that_has_gone(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png: No such file"):
        folder.digest()


def test_samples_are_colour_photographs_and_disjoint() -> None:
    train, test = ImageFolder("samples"), ImageFolder("samples-test")
    assert len(train.names) == 5
    assert len(test.names) == 2
    assert not set(train.names) & set(test.names)
    for folder in (train, test):
        folder.check(skip_unreadable=False)
        for number, (height, width) in enumerate(folder.sizes):
            image = folder.load(number).int()
            assert image.shape == (3, height, width)
            assert min(height, width) >= 300
            assert (image[0] - image[2]).abs().float().mean() > 3  # not grey


def test_samples_are_found_without_importing_their_packages() -> None:
    code = (
        "import sys; from influence_jobs.datasets.images import ImageFolder;"
        "ImageFolder('samples').sizes;"
        "print([m for m in sys.modules if m.split('.')[0] in ('skimage', 'sklearn', 'scipy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_samples_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-image"):
        ImageFolder("samples")


def test_a_folder_called_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "samples" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert ImageFolder("./samples").names == ("a.png",)
