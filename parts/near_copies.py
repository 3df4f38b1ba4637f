"""Which texts are near-copies of each other, so that none is both trained on and tested.

After Broder, "On the resemblance and containment of documents", 1997: a text is the set of its runs
of eight words, and close to another when the other has most of them.
"""

import re
from collections.abc import Iterable
from zlib import crc32

import numpy as np

RUN_WORDS = 8
SHARE = 0.6  # of a text's runs that stand in longer texts make it a near-copy; at least a half


def group_near_copies(texts: Iterable[str]) -> list[int]:
    """For each text a number that its near-copies share, equal texts among them.

    The longest come first. Each joins the group that has most of its runs, if those that have been
    seen before are SHARE of them, else it begins a group.
    """
    runs = [hash_runs(text) for text in texts]
    ends = np.cumsum([len(row) for row in runs])
    ids = np.split(np.unique(np.concatenate(runs), return_inverse=True)[1], ends[:-1])
    owners = np.full(max(ends[-1], 1), -1)
    groups = [0] * len(ids)
    for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
        found = owners[ids[i]]
        known = found[found >= 0]
        is_copy = len(known) >= SHARE * len(found)
        groups[i] = int(np.bincount(known).argmax()) if is_copy else i
        owners[ids[i][found < 0]] = groups[i]
    return groups


def hash_runs(text: str) -> np.ndarray:
    """Hashes (n,) uint64 of the different runs of words in a text, at least one."""
    words = re.findall(r"\w+", text.lower())
    hashes = np.array([crc32(word.encode()) for word in words] or [0], np.uint64)
    n_runs = max(1, len(hashes) - RUN_WORDS + 1)
    runs = np.zeros(n_runs, np.uint64)
    for i in range(min(RUN_WORDS, len(hashes))):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + n_runs]
    return np.unique(runs)
