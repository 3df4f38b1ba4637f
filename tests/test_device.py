"""What each kind of device wants. A Mac's GPU is stood for by a CPU that takes its path, with the
lever of parts/device.py: the scripts themselves, in processes of their own.
"""

import io

import numpy as np
import pytest

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

import lora
from models import Model, ModelArgs

SMALL = ModelArgs(32, 2, 16, 48, 2, 1, 1e-5, 50)


# -------------------------------------------------------------------------------------------------
# Ranks


class Twins(lora.Ranks):
    """Two ranks with the same rows; keeps what was still to be computed when they summed."""

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.size, self.sum_on_gpu, self.pending = 2, on_gpu, []

    def sum(self, x: mx.array) -> mx.array:
        graph = io.StringIO()
        mx.export_to_dot(graph, x)
        self.pending.append(graph.getvalue().count("shape=rectangle"))
        return x + x


@pytest.mark.parametrize("on_gpu", [False, True], ids=["ring", "NCCL"])
def test_the_sum_of_ranks_is_waited_for_outside_of_the_step_but_for_that_of_nccl(on_gpu):
    ranks = Twins(on_gpu)
    model = Model(SMALL)
    lora.add_lora(model, [1])
    optimizer = lora.optim.Adam(1e-3)
    step = lora.make_step(model, optimizer, lora.loss, lora.open_streams(1), ranks)
    tokens, lengths = np.arange(48).reshape(4, 12), mx.array([11] * 4)
    for _ in range(2):
        result = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), lengths)
    mx.eval(result)
    assert [n > 0 for n in ranks.pending] == [on_gpu, on_gpu]
