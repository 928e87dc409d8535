"""Folds of models that keep models alike together, for errors on a model that has no relative in the training data.

A random fold leaves most relatives of a model in the training; whole families are new only when all alike are held out
at once. Names tell nothing here: models are alike when their operators are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasgpu_predictor.device_times import SUMMARY_SCALE
from hasgpu_predictor.operators import Workload

GROUPS_PER_FOLD = 2
"""More groups: smaller families, of which more relatives stay."""


def folds_of_like(workloads: Sequence[Workload], folds_count: int) -> NDArray[np.int64]:
    """Returns the fold of each model, shape (n,); equal arguments give equal folds.

    Average linkage of the summaries of operators into groups, the largest dealt first to the fold with fewest models.
    Fewer models than folds leave folds empty.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]  # has no types

    count = len(workloads)
    folds = np.zeros(count, np.int64)
    if count < 2:
        return folds
    places = np.array([workload.summary for workload in workloads]) * SUMMARY_SCALE
    groups = fcluster(linkage(places, "average"), GROUPS_PER_FOLD * folds_count, "maxclust")
    names, sizes = np.unique(groups, return_counts=True)
    held = np.zeros(folds_count, np.int64)
    for group in names[np.argsort(-sizes, kind="stable")]:
        fold = int(np.argmin(held))
        folds[groups == group] = fold
        held[fold] += int((groups == group).sum())
    return folds
