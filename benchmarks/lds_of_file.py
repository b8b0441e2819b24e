"""The LDS of a file of scores by the published losses; needs NumPy, SciPy and pyarrow alone.

python benchmarks/lds_of_file.py benchmarks/lds scores.npy
"""

import sys

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

folder, scores_QN = sys.argv[1], np.load(sys.argv[2])  # tests from 0 on, positive = helpful
members_NM = np.column_stack([c.to_numpy() for c in pq.read_table(f"{folder}/subsets.parquet")])
losses_RQ = np.array(pq.read_table(f"{folder}/losses.parquet").column("losses").to_pylist())
subsets = members_NM.shape[1]
losses_MQ = losses_RQ.reshape(subsets, -1, losses_RQ.shape[1]).mean(axis=1)  # over seeds
predicted_QM = -scores_QN.astype(float) @ members_NM
pairs = zip(predicted_QM, losses_MQ[:, : len(scores_QN)].T, strict=True)
print(np.mean([spearmanr(p, loss).statistic for p, loss in pairs]))
