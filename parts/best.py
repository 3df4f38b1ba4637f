"""The best validation of a run so far, and how long ago that was.

The validation before the first update is of the base model: a later one is better only if it is
lower than that too.
"""

import math
from typing import NamedTuple

import numpy as np


class Best(NamedTuple):
    """Where a run's validation loss was lowest, after the validation at iteration `last`."""

    base: float = math.nan  # validation loss before the first update, nats a token
    loss: float = math.inf  # the lowest, that of the base model included
    iteration: int = 0  # at which it was that; 0: none is better than the base model
    last: int = 0
    n_worse: int = 0  # validations since, without a better one
    matrices: dict | None = None  # of that iteration, as a tree; None where they are saved
    digest: str = ""  # SHA-256 of the file that holds them, or of what the run began with

    def compare(self, iteration: int, loss: float, matrices: dict) -> "Best":
        """Return the best after a validation of these matrices; 0 is the one before any update.

        One that was compared already, before the run was interrupted, changes nothing.
        """
        if iteration == 0:
            lowest = loss if math.isfinite(loss) else math.inf
            return Best(base=loss, loss=lowest, digest=self.digest)
        if iteration <= self.last:
            return self
        if loss < self.loss:
            return Best(self.base, loss, iteration, iteration, 0, matrices)
        return self._replace(last=iteration, n_worse=self.n_worse + 1)

    def forget(self) -> "Best":
        """Return what is left to compare with where the file of the best matrices is lost."""
        loss = self.base if math.isfinite(self.base) else math.inf
        return self._replace(loss=loss, iteration=0, matrices=None, digest="")

    def to_array(self) -> np.ndarray:
        """Return the figures, for the state file."""
        return np.array(self[:5], float)

    @classmethod
    def from_array(cls, figures: np.ndarray, digest: str) -> "Best":
        """Return what `to_array` has put into the state file. Raises ValueError."""
        base, loss, *counts = figures.tolist()
        return cls(base, loss, *map(int, counts), None, digest)
