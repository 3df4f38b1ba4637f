"""Read ahead and write behind, so that reading, computing and writing run side by side.

What waits is bounded: a few blocks. What fails in a thread is raised where the next block is asked
for or written, and no thread outlives its `with` or its generator.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

BLOCKS = 4  # that wait between two stages


def read_ahead(items: Iterable, n_blocks: int = BLOCKS) -> Iterator:
    """Yield the items, none of them None, made in a thread while those before them are in use."""
    items, pool = iter(items), ThreadPoolExecutor(1)
    thread = pool.submit(threading.get_native_id)
    coming = deque(pool.submit(next, items, None) for _ in range(n_blocks))
    try:
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        wait_for_end(thread.result())


def wait_for_end(thread: int) -> None:
    """Wait until Linux has ended a thread, by its native id. Up to Python 3.12, a thread is joined
    a little before; one that has used MLX aborts a process that ends meanwhile.
    """
    task = Path(f"/proc/self/task/{thread}")
    while task.exists():
        time.sleep(0.001)


class WriteBehind:
    """A file whose `write` returns before the bytes are in it: a thread writes them, in order.

    What is written must not be changed afterwards. A failure is raised by a later call, by `flush`
    at the latest.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.pool = ThreadPoolExecutor(1)
        self.position = 0
        self.waiting = deque()

    def write(self, content: bytes | memoryview) -> int:
        """Write the content at the position, and return its size in bytes."""
        content = memoryview(content).cast("B")
        if len(self.waiting) == BLOCKS:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(write_at, self.descriptor, content, self.position))
        self.position += len(content)
        return len(content)

    def tell(self) -> int:
        """Return the position, in bytes, that is written next."""
        return self.position

    def seek(self, position: int) -> None:
        """Write at this position next."""
        self.position = position

    def flush(self) -> None:
        """Wait until all is written. Raises OSError where that failed."""
        while self.waiting:
            self.waiting.popleft().result()

    def sync(self) -> None:
        """Wait until all is on the disk. Raises OSError where that failed."""
        self.flush()
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Leave unwritten what still waits, and end the thread."""
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def write_behind(path: str | Path) -> Iterator[WriteBehind]:
    """Open a file to write behind. All is written at the end, or OSError is raised."""
    with open(path, "wb", buffering=0) as file, closing(WriteBehind(file.fileno())) as behind:
        yield behind
        behind.flush()


def write_at(descriptor: int, content: memoryview, position: int) -> None:
    """Write all of the content at a position of the file. Raises OSError."""
    while content:
        n_written = os.pwrite(descriptor, content, position)
        content, position = content[n_written:], position + n_written
