"""Scores of other libraries for the protocol of lds.py, as files that `infl submit lds` judges.

dattri: conjugate gradients with the Hessian of all samples in its published setting (lambda .005,
10 iterations), TracIn over the models, and TRAK. kronfluence: EK-FAC, damped by its default.
traker: TRAK. All of them get the same weights. lds.py calls this script in an environment that has
the libraries.

    python benchmarks/lds_peers.py --data mnist.npz --weights seed-0.pt --out peers
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DIMENSIONS = 512  # of projected gradients, as in dattri's benchmark


class Perceptron(nn.Module):
    """784-128-64-10, without dropout, as all scores are of evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 784)."""
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(images)))))
        return logits


class Peers:
    """The libraries, each with its scores (Q, N), positive = helpful."""

    def __init__(self, train: TensorDataset, test: TensorDataset, weights: list[dict[str, Tensor]]):
        self.train, self.test, self.weights = train, test, weights
        self.model = Perceptron().eval()

    def _dattri(self, weights: list[dict[str, Tensor]], margin: bool = False) -> Any:
        from dattri.task import AttributionTask

        model = self.model

        def loss(params: Any, data: Any) -> Tensor:
            images, labels = data
            logits = functional_call(model, params, images.reshape(-1, 784))
            return F.cross_entropy(logits, labels.reshape(-1))

        def log_odds(params: Any, data: Any) -> Tensor:
            p = torch.exp(-loss(params, data))
            return torch.log(p / (1 - p))

        target = log_odds if margin else loss
        return AttributionTask(
            loss_func=target, target_func=target, model=model, checkpoints=weights
        )

    def _batches(self, size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        return DataLoader(self.train, size), DataLoader(self.test, size)

    def dattri_cg(self) -> Tensor:
        from dattri.algorithm.influence_function import IFAttributorCG

        attributor = IFAttributorCG(
            task=self._dattri(self.weights[:1]), max_iter=10, regularization=0.005
        )
        train, test = self._batches(len(self.train))
        attributor.cache(train)
        with torch.no_grad():
            found: Tensor = attributor.attribute(train, test)
        return found.T

    def dattri_tracin(self) -> Tensor:
        from dattri.algorithm.tracin import TracInAttributor

        attributor = TracInAttributor(
            task=self._dattri(self.weights),
            weight_list=torch.ones(len(self.weights)),
            normalized_grad=False,
        )
        with torch.no_grad():
            found: Tensor = attributor.attribute(*self._batches(500))
        return found.T

    def dattri_trak(self) -> Tensor:
        from dattri.algorithm.trak import TRAKAttributor

        model = self.model

        def probability(params: Any, data: Any) -> Tensor:
            image, label = data
            logits = functional_call(model, params, image.reshape(-1, 784))
            return torch.exp(-F.cross_entropy(logits, label.reshape(-1)))

        attributor = TRAKAttributor(
            task=self._dattri(self.weights, margin=True),
            correct_probability_func=probability,
            projector_kwargs={
                "device": "cpu",
                "proj_dim": DIMENSIONS,
                "proj_max_batch_size": 32,
            },
        )
        train, test = self._batches(100)
        with torch.no_grad():
            attributor.cache(train)
            found: Tensor = attributor.attribute(test)
        return found.T

    def kronfluence_ek_fac(self) -> Tensor:
        """Mean over the models."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task as KronfluenceTask

        class Classify(KronfluenceTask):
            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                logits, labels = model(batch[0]), batch[1]
                if sample:
                    with torch.no_grad():
                        labels = torch.multinomial(F.softmax(logits, dim=1), 1).flatten()
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        total = torch.zeros(len(self.test), len(self.train))
        for one in self.weights:
            model = Perceptron()
            model.load_state_dict(one)
            model = prepare_model(model.eval(), Classify())
            with tempfile.TemporaryDirectory() as folder:
                analyzer = Analyzer(
                    "lds", model, Classify(), cpu=True, output_dir=folder, disable_tqdm=True
                )
                analyzer.logger.setLevel(logging.ERROR)
                analyzer.fit_all_factors("ekfac", self.train, per_device_batch_size=500)
                analyzer.compute_pairwise_scores(
                    "scores",
                    "ekfac",
                    self.test,
                    self.train,
                    per_device_query_batch_size=100,
                    per_device_train_batch_size=500,
                )
                found = analyzer.load_pairwise_scores("scores")["all_modules"]
            total += found / len(self.weights)
        return total

    def traker(self) -> Tensor:
        from trak import TRAKer
        from trak.projectors import BasicProjector, ProjectionType

        model = Perceptron().eval()
        projector = BasicProjector(
            grad_dim=sum(p.numel() for p in model.parameters()),
            proj_dim=DIMENSIONS,
            seed=0,
            proj_type=ProjectionType.rademacher,
            device="cpu",
            block_size=64,
        )
        with tempfile.TemporaryDirectory() as folder:
            tracker = TRAKer(
                model=model,
                task="image_classification",
                train_set_size=len(self.train),
                save_dir=folder,
                device="cpu",
                projector=projector,
                proj_dim=DIMENSIONS,
                use_half_precision=False,
                logging_level=logging.ERROR,
            )
            train, test = self._batches(100)
            for i, one in enumerate(self.weights):
                tracker.load_checkpoint(one, model_id=i)
                for batch in train:
                    tracker.featurize(batch=list(batch), num_samples=len(batch[0]))
            tracker.finalize_features()
            for i, one in enumerate(self.weights):
                tracker.start_scoring_checkpoint("lds", one, i, num_targets=len(self.test))
                for batch in test:
                    tracker.score(batch=list(batch), num_samples=len(batch[0]))
            return torch.from_numpy(np.array(tracker.finalize_scores("lds"))).T


def main(
    data: Annotated[Path, typer.Option(help="x_train, y_train, x_test, y_test as .npz.")],
    weights: Annotated[list[Path], typer.Option(help="State dicts of the trained models.")],
    out: Annotated[Path, typer.Option(help="Folder of the files of scores.")],
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
) -> None:
    """Write one file of scores (Q, N) for each method, of all models if it can average them."""
    found = np.load(data)
    x_train, y_train, x_test, y_test = (
        torch.from_numpy(found[name]) for name in ("x_train", "y_train", "x_test", "y_test")
    )
    states = [torch.load(path, weights_only=True) for path in weights]
    peers = Peers(TensorDataset(x_train, y_train), TensorDataset(x_test, y_test), states)
    methods: dict[str, Callable[[], Tensor]] = {
        "kronfluence-ek-fac": peers.kronfluence_ek_fac,
        "dattri-tracin": peers.dattri_tracin,
        "traker": peers.traker,
        "dattri-trak": peers.dattri_trak,
        "dattri-cg": peers.dattri_cg,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, scores in methods.items():
        path = out / f"{name}.npy"
        if path.exists() or (only and name not in only):
            continue
        np.save(path, scores().detach().float().numpy())
        print(path, flush=True)


if __name__ == "__main__":
    typer.run(main)
