from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.datasets.patches import Patches, PatchIndex
from influence_jobs.errors import DataError, SpecError


@given(
    sizes=st.lists(st.tuples(st.integers(5, 30), st.integers(5, 30)), min_size=1, max_size=5),
    patch_size=st.integers(1, 5),
    stride=st.integers(1, 9),
    data=st.data(),
)
def test_locate_is_brute_force_enumeration(
    sizes: list[tuple[int, int]], patch_size: int, stride: int, data: st.DataObject
) -> None:
    expected = [
        (image, row, column)
        for image, (height, width) in enumerate(sizes)
        for row in range(0, height - patch_size + 1, stride)
        for column in range(0, width - patch_size + 1, stride)
    ]
    index = PatchIndex(sizes, patch_size, stride, [""] * len(sizes))
    assert len(index) == len(expected)
    every = zip(*(a.tolist() for a in index.locate(range(len(index)))), strict=True)
    assert list(every) == expected
    some = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=9))
    located = zip(*(a.tolist() for a in index.locate(some)), strict=True)
    assert list(located) == [expected[i] for i in some]


def test_the_research_reports_number_of_patches() -> None:
    index = PatchIndex([(321, 481), (481, 321)] * 250, 50, 17, [""] * 500)
    assert len(index) == 208_000
    image, row, column = index.locate([0, 25, 26, 415, 416, 416 + 16, 207_999])
    assert image.tolist() == [0, 0, 0, 0, 1, 1, 499]
    assert row.tolist() == [0, 0, 17, 255, 0, 17, 425]
    assert column.tolist() == [0, 425, 0, 425, 0, 0, 255]


def test_an_image_of_exactly_the_patch_size_is_one_patch() -> None:
    assert len(PatchIndex([(8, 8)], 8, 3, ["a"])) == 1


@pytest.mark.parametrize("size", [(7, 99), (99, 7)])
def test_an_image_smaller_than_the_patch_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"tiny\.png .* smaller than the patch size 8"):
        PatchIndex([(8, 8), size], 8, 3, ["fine.png", "tiny.png"])


@pytest.mark.parametrize(("patch_size", "stride"), [(0, 1), (1, 0), (-3, 1)])
def test_patch_size_and_stride_below_one(patch_size: int, stride: int) -> None:
    with pytest.raises(SpecError, match="at least 1"):
        PatchIndex([(8, 8)], patch_size, stride, ["a"])


@pytest.mark.parametrize("patch_id", [-1, 9])
def test_ids_out_of_range(patch_id: int) -> None:
    with pytest.raises(IndexError):
        PatchIndex([(10, 10)], 8, 1, ["a"]).locate([0, patch_id])


class CountingFolder(ImageFolder):
    loads = 0

    def load(self, index: int) -> torch.Tensor:
        self.loads += 1
        return super().load(index)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("color", [True, False])
def test_a_patch_is_a_slice_of_its_image(root: Path, color: bool) -> None:
    folder = ImageFolder(root, color=color)
    patches = Patches(folder, 7, 3)
    ids = torch.randint(len(patches), (50,), generator=torch.Generator().manual_seed(0))
    cut = patches.get(ids)
    assert cut.shape == (50, folder.channels, 7, 7)
    assert cut.dtype == torch.uint8
    for k, (image, row, column) in enumerate(zip(*patches.index.locate(ids), strict=True)):
        whole = folder.load(int(image))
        assert torch.equal(cut[k], whole[:, row : row + 7, column : column + 7])


def test_no_ids(root: Path) -> None:
    ids = torch.tensor([], dtype=torch.int64)
    assert Patches(ImageFolder(root), 7, 3).get(ids).shape == (0, 3, 7, 7)


def test_ascending_ids_decode_each_image_once_even_with_room_for_one(root: Path) -> None:
    folder = CountingFolder(root)
    patches = Patches(folder, 7, 3, cache_bytes=1)
    for ids in torch.arange(len(patches)).split(11):
        patches.get(ids)
    assert folder.loads == 4


def test_random_order_decodes_each_image_once_when_all_fit(root: Path) -> None:
    folder = CountingFolder(root)
    patches = Patches(folder, 7, 3)
    for ids in torch.randperm(len(patches)).split(8):
        patches.get(ids)
    assert folder.loads == 4


def test_one_batch_decodes_each_image_once_in_any_order(root: Path) -> None:
    folder = CountingFolder(root)
    patches = Patches(folder, 7, 3, cache_bytes=1)
    patches.get(torch.randperm(len(patches)))
    assert folder.loads == 4


def test_the_least_recently_used_image_goes_first(root: Path) -> None:
    folder = CountingFolder(root)
    firsts = torch.tensor([0, *(len(PatchIndex(folder.sizes[: n + 1], 7, 3, "0123"[: n + 1]))
                                for n in range(3))])  # fmt: skip
    patches = Patches(folder, 7, 3, cache_bytes=2 * 23 * 30 * 3)  # room for two
    for number in (0, 1, 0, 2):  # 2 pushes out 1
        patches.get(firsts[[number]])
    assert folder.loads == 3
    patches.get(firsts[[0]])
    assert folder.loads == 3
    patches.get(firsts[[1]])
    assert folder.loads == 4
