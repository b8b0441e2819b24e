"""The view of an index."""

import numpy as np

from influence_jobs.kinds.gradient_index.spec import TOP, GradientIndexSpec
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.views.base import View


class GradientIndexView(View[GradientIndexSpec]):
    """Says how much an index finds."""

    @property
    def title(self) -> str:
        return f"Index of projected gradients ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        shares = self.run.read_table("recall").column("recall").to_numpy()
        top = min(TOP, GradientStore(self.run.root, self.spec.gradients).num_rows)
        said = (
            f"The index finds {100 * np.mean(shares):.1f} % of the {top} samples of largest score, "
            f"measured with {len(shares)} stored samples as queries."
        )
        return [said]

    def next_step(self) -> str:
        spec = self.spec
        words = f"infl submit gradient-scores --gradients {spec.gradients.run_id}"
        return f"{words} --method {spec.method} --approximate 100 --test 0{self.more}"
