"""The samples that explain a point or region of a test image, computed from stored norms."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from influence_jobs.errors import SpecError
from influence_jobs.experiments.stability import head
from influence_jobs.methods.attribution import attribution_scores, clamped_outputs, pool
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import norms_name
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import converted, out_of_half
from influence_jobs.tasks.registry import make_task
from influence_jobs.terms import Region
from influence_jobs.views.norms import StoredNorms

MAP_BYTES = 256 * 2**20  # limit of kept activations; the last image is always kept
NORMS_BYTES = 512 * 2**20  # limit of kept norms
BLOCK = 16  # chunks of norms in one read


class Explainer:
    """Explains points by activations times norms. Threads may share an explainer.

    Args:
        norms: Stored norms of a finished run.
    """

    def __init__(self, norms: StoredNorms):
        self.norms = norms
        self.task: Task = make_task(norms.task)
        self._lock = threading.Lock()  # one forward pass with hooks at a time
        self._kept: dict[int, dict[str, Tensor]] = {}  # by image and layer, the latest image last
        self._norms: dict[tuple[str, int], npt.NDArray[Any]] = {}  # by layer and first sample
        self._room = NORMS_BYTES
        self._model: nn.Module | None = None

    def top(
        self,
        test: int,
        point: tuple[int, int],
        k: int,
        *,
        extent: tuple[int, int] = (1, 1),
        layers: Sequence[str],
        normalize: bool = False,
        exclude_norm_above: float | None = None,
    ) -> list[tuple[int, float]]:
        """The k samples that explain a point, and their scores, largest first.

        Args:
            test: Id of a test image.
            point: y and x in pixels.
            k: Number of samples.
            extent: Height and width of the region that begins at the point.
            layers: Some of `norms.layers`; their scores are summed.
            normalize: Divide a sample's norms by their sum.
            exclude_norm_above: Leave out samples whose norms sum to more.

        Raises:
            SpecError: There is no such layer, image or region.
            ModelError: A layer has no positions.
        """
        scores_N = self._scores(test, (*point, *extent), layers, normalize, exclude_norm_above)
        ids = head(scores_N, k, largest=True)
        return [(int(i), float(scores_N[i])) for i in ids]

    def prepare(self, test: int, layers: Sequence[str]) -> None:
        """Compute an image's activations and read norms ahead, for a quick first answer."""
        with self._lock:
            self._maps(test, layers)
        for _ in self._rows(layers):
            pass

    def _scores(
        self,
        test: int,
        region: Region,
        layers: Sequence[str],
        normalize: bool,
        exclude_norm_above: float | None,
    ) -> npt.NDArray[np.float32]:
        for layer in layers:
            if layer not in self.norms.layers:
                raise SpecError(f"there are no norms of layer {layer}")
        if not 0 <= test < len(self.task.test_data()):
            raise SpecError(f"there is no test image {test}")
        size = self.task.test_size(test)
        y, x, height, width = region
        if (
            size is None
            or min(y, x) < 0
            or min(height, width) < 1
            or y + height > size[0]
            or x + width > size[1]
        ):
            raise SpecError(f"region {y},{x},{height},{width} is outside of test image {test}")
        with self._lock:
            maps = self._maps(test, layers)
        activations = {
            layer: pool(layer, map_Chw, region, size)[None].numpy()
            for layer, map_Chw in maps.items()
        }
        pieces = []
        for rows in self._rows(layers):
            found = attribution_scores(
                activations, rows, exclude_norm_above=exclude_norm_above, normalize=normalize
            )
            pieces.append(np.sum([of_layer[0] for of_layer in found.values()], axis=0))
        return np.concatenate(pieces)

    def _rows(self, layers: Sequence[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """The norms of some layers, a block of samples at a time; kept while there is room."""
        # All arrays have the same number of samples in a chunk.
        run, first = self.norms.run, norms_name(layers[0])
        axis = run.row_axis(first)
        count, step = run.array(first).shape[axis], BLOCK * run.array(first).chunks[axis]
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield {layer: self._block(layer, start, stop, axis) for layer in layers}

    def _block(self, layer: str, start: int, stop: int, axis: int) -> npt.NDArray[Any]:
        kept = self._norms.get((layer, start))
        if kept is not None:
            return kept
        values = self.norms.run.read_rows(norms_name(layer), start, stop)
        if axis:  # a leading checkpoint axis
            values = values.sum(axis=0)
        with self._lock:
            if (layer, start) not in self._norms and self._room >= values.nbytes:
                self._room -= values.nbytes
                self._norms[layer, start] = values
        return values

    def _maps(self, test: int, layers: Sequence[str]) -> dict[str, Tensor]:
        """A test image's activations, cached while there is room. The caller holds the lock."""
        maps = self._kept.get(test, {})
        if missing := [layer for layer in dict.fromkeys(layers) if layer not in maps]:
            maps = {**maps, **self._activations(test, missing)}
        self._kept.pop(test, None)
        self._kept[test] = maps
        while len(self._kept) > 1 and self._kept_bytes() > MAP_BYTES:
            del self._kept[next(iter(self._kept))]
        return {layer: maps[layer] for layer in layers}

    def _kept_bytes(self) -> int:
        return sum(map_Chw.nbytes for maps in self._kept.values() for map_Chw in maps.values())

    @torch.no_grad()
    def _activations(self, test: int, layers: Sequence[str]) -> dict[str, Tensor]:
        """A test image's activations (C, h, w) by layer, the mean over draws of its noise."""
        if self._model is None:
            model, _ = converted(self.task, torch.device("cpu"))
            load_checkpoint(model, self.norms.run.root, self.norms.checkpoint)
            self._model = model  # set last: a model without its weights must not be used
        totals: dict[str, Tensor] = {}
        for draw in range(self.norms.noise_draws):
            batch = self.task.test_batch(torch.tensor([test]), Draw(self.norms.seed, draw))
            batch = out_of_half(batch, self._model)
            found = clamped_outputs(self.task, self._model, layers, batch)
            for layer, output in found.items():
                totals[layer] = totals[layer] + output[0] if layer in totals else output[0]
        return {layer: total / self.norms.noise_draws for layer, total in totals.items()}
