"""Reading ahead and writing behind: order, bytes, failures in each thread, and no thread left."""

import errno
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

from parts.float16 import round_to_float16, to_float16
from parts.lazy_tensors import LazyTensor, Weight, read_parameters
from parts.model_folder import write_npz
from parts.pipeline import BLOCKS, read_ahead, write_behind
from parts.torch_files import open_torch


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# -------------------------------------------------------------------------------------------------
# Reading ahead


def test_items_come_in_order_and_few_wait():
    made = []

    def make():
        for i in range(50):
            made.append(i)
            yield i

    for i, item in enumerate(read_ahead(make())):
        assert item == i
        assert len(made) <= i + 2 + BLOCKS
        time.sleep(0.001)
    assert made == list(range(50))


def test_a_failure_of_the_reader_is_raised_after_what_was_read():
    def make():
        yield "whole"
        raise ValueError("damaged")

    items = read_ahead(make())
    assert next(items) == "whole"
    with pytest.raises(ValueError, match="damaged"):
        next(items)


def test_a_reader_ends_with_whoever_reads():
    """As at Ctrl-C: whether nothing was read yet, or a little."""
    endless = iter(int, 1)
    read_ahead(endless).close()
    items = read_ahead(endless)
    next(items)
    items.close()


# -------------------------------------------------------------------------------------------------
# Writing behind


def test_a_file_holds_what_was_written_where_it_was_written(tmp_path):
    blocks = [bytes([i]) * (i * 1000) for i in range(1, 20)]
    with write_behind(tmp_path / "file") as file:
        for block in blocks:
            assert file.write(block) == len(block)
        end = file.tell()
        file.seek(3)
        file.write(b"head")
        file.seek(end)
        file.write(np.arange(6, dtype=np.float16).reshape(2, 3).data)
    whole = b"".join(blocks) + np.arange(6, dtype=np.float16).tobytes()
    assert (tmp_path / "file").read_bytes() == whole[:3] + b"head" + whole[7:]


@pytest.mark.parametrize("n_blocks", [1, 3 * BLOCKS])
def test_a_full_disk_is_raised_at_the_latest_at_the_end(n_blocks):
    with pytest.raises(OSError, match="No space") as raised, write_behind("/dev/full") as file:
        for _ in range(n_blocks):
            file.write(b"x" * 4096)
    assert raised.value.errno == errno.ENOSPC


def test_a_failure_elsewhere_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_behind("/dev/full") as file:
        file.write(b"x")
        raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------------
# Both: weights.npz


def weight_of(name: str, array: np.ndarray, n_blocks: int = 1) -> Weight:
    blocks = np.array_split(array, n_blocks)
    return Weight(name, array.shape, array.dtype.name, lambda: iter(blocks))


def test_weights_npz_is_what_zipfile_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.standard_normal((37, 5)).astype(np.float16),
        "b": rng.integers(0, 2**32, (12, 3, 2), np.uint32),
        "c": rng.standard_normal(7).astype(np.float16),
    }
    weights = [weight_of(name, array, len(array)) for name, array in arrays.items()]
    sizes = list(write_npz(tmp_path / "ours.npz", weights))
    assert sum(sizes) == sum(array.nbytes for array in arrays.values())
    with zipfile.ZipFile(tmp_path / "plain.npz", "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0))
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


def test_a_weight_that_cannot_be_read_is_named(tmp_path):
    def blocks():
        yield np.zeros(3, np.float32)
        raise ValueError("it ends early")

    tensors = {"norm": [LazyTensor((6,), "float32", blocks)]}
    with pytest.raises(ValueError, match=r"norm cannot be read \(it ends early\)"):
        list(write_npz(tmp_path / "cut.npz", read_parameters(tensors, {"norm": (6,)})))


# -------------------------------------------------------------------------------------------------
# Values


EVERY = np.arange(2**16, dtype=np.uint16)  # bfloat16's bits


def torch_float16(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).half().numpy()


@pytest.mark.parametrize("first", [0, 3])
def test_every_bfloat16_is_rounded_as_torch_does(first):
    finite = EVERY[np.isfinite(torch_float16(EVERY))]
    for bits in (finite, np.random.default_rng(0).permutation(np.repeat(finite, 5))):
        bits = bits[first:]
        expected = torch_float16(bits)
        half = to_float16(bits.copy(), "bfloat16")
        assert half.tobytes() == expected.tobytes()
        rounded = round_to_float16(bits.copy()).astype(np.uint32) << 16
        assert rounded.tobytes() == expected.astype(np.float32).tobytes()


def test_no_value_that_float16_lacks_gets_through():
    lacking = EVERY[~np.isfinite(torch_float16(EVERY))]
    assert len(lacking) > 10_000
    for bits in lacking[:: len(lacking) // 50]:
        values = np.full(35, 0x3F80, np.uint16)  # ones
        for place in (0, 20, 34):
            values[place] = bits
            with pytest.raises(OverflowError, match="not finite in float16"):
                to_float16(values.copy(), "bfloat16")
            with pytest.raises(OverflowError, match="not finite in float16"):
                round_to_float16(values.copy())
            values[place] = 0x3F80
    with pytest.raises(OverflowError):
        to_float16(np.array([1, 7e4], np.float32), "float32")
    with pytest.raises(OverflowError):
        to_float16(np.array([np.nan], np.float16), "float16")


# -------------------------------------------------------------------------------------------------
# torch's files


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_are_those_that_torch_reads(tmp_path, archive):
    base = torch.arange(60.0).reshape(6, 10)
    tensors = {
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(base + 1),
        "row": base[3],
        "whole": torch.arange(7, dtype=torch.bfloat16),
        "one": torch.ones(1, 1, 4, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.float16),
        "integers": torch.arange(5),
        "embedding": torch.arange(2**20 + 3.0).reshape(-1, 1),
    }
    path = tmp_path / "file.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=archive)
    opened = open_torch(path)
    assert opened.keys() == tensors.keys()
    for name, expected in torch.load(path, weights_only=True).items():
        stored = opened[name]
        assert (stored.shape, stored.dtype) == (tuple(expected.shape), str(expected.dtype)[6:])
        bits = expected.detach().view(torch.int16) if name == "whole" else expected.detach()
        np.testing.assert_array_equal(stored.read(), bits.numpy())
    assert len(list(opened["embedding"].blocks())) == 2
