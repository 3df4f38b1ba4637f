"""Which texts are near-copies of each other, so that none is both trained on and tested.

After Broder, "On the resemblance and containment of documents", 1997: a text is the set of its runs
of eight words, and close to another when the other has many of them.
"""

import re
from collections import Counter
from collections.abc import Iterable
from zlib import crc32

import numpy as np

RUN_WORDS = 8
COPIED = 0.4  # of a text's runs stand in longer texts: then it joins the groups of those
FROM_ONE = 0.2  # of its runs stand in texts of a group that it joins, beside the one with most


def group_near_copies(texts: Iterable[str]) -> list[int]:
    """For each text a number that it shares with its near-copies, equal texts among them."""
    runs = [hash_runs(text) for text in texts]
    ends = np.cumsum([len(hashes) for hashes in runs])
    ids = np.split(np.unique(np.concatenate(runs), return_inverse=True)[1], ends[:-1])
    owners = np.full(ends[-1], -1)  # of each run, the first text that had it
    groups = list(range(len(ids)))  # for each text one of the same group, or itself

    def group_of(i: int) -> int:
        while groups[i] != i:
            i = groups[i]
        return i

    for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):  # the longest first
        found = owners[ids[i]]
        copied = found[found >= 0]
        if len(copied) >= COPIED * len(found):
            counts = Counter(map(group_of, copied.tolist())).most_common()
            for n_joined, (group, n_runs) in enumerate(counts):
                if n_joined == 0 or n_runs >= FROM_ONE * len(found):
                    groups[group] = group_of(i)
        owners[ids[i][found < 0]] = i
    return [group_of(i) for i in range(len(ids))]


def hash_runs(text: str) -> np.ndarray:
    """Hashes (n,) uint64 of the different runs of words in a text, at least one."""
    words = re.findall(r"\w+", text.lower())
    hashes = np.array([crc32(word.encode()) for word in words] or [0], np.uint64)
    n_runs = max(1, len(hashes) - RUN_WORDS + 1)
    runs = np.zeros(n_runs, np.uint64)
    for i in range(min(RUN_WORDS, len(hashes))):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + n_runs]
    return np.unique(runs)
