"""A memory as a dict that is searched by brute force in float64, and the ways in which one can search."""

import numpy as np

from utils.memory.vector_index import IndexConfig

WAYS = {
    "flat": IndexConfig("faiss"),
    "lists": IndexConfig("faiss", exact_up_to=40, target_recall=1.0),
    "torch": IndexConfig("torch"),
}


def points(count, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


class Reference:
    """id -> (vector, domain, metadata)."""

    def __init__(self, metric):
        self.metric, self.held = metric, {}

    def scores(self, query, domain=None, where=None):
        """Scores by id of what fits, the best first."""
        fitting = {
            key: np.asarray(vector, dtype=np.float64)
            for key, (vector, home, about) in self.held.items()
            if (domain is None or home == domain)
            and (where is None or all(about.get(n) == v for n, v in where.items()))
        }
        query = np.asarray(query, dtype=np.float64)
        if self.metric == "l2":
            found = {key: float(((vector - query) ** 2).sum()) for key, vector in fitting.items()}
        else:
            found = {
                key: float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
                for key, vector in fitting.items()
            }
        return dict(sorted(found.items(), key=lambda item: item[1] if self.metric == "l2" else -item[1]))


def agrees(result, row, scores, k, tolerance=2e-5):
    """The best k, ties and rounding aside: each id has the score that is due to it, and no better one is left out."""
    ids, found = result.ids[row].tolist(), result.scores[row]
    assert len(ids) == min(k, len(scores)) == len(set(ids)) and set(ids) <= set(scores)
    true = np.array(list(scores.values())[: len(ids)])
    own = np.array([scores[key] for key in ids])
    scale = 1 + np.abs(true)
    assert (np.abs(found - own) <= tolerance * scale).all()
    assert (np.abs(own - true) <= 2 * tolerance * scale).all()
    return True
