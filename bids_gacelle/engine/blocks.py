"""How any number of voxels goes through any memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

_CPU_BUDGET = 512 * 2**20
_FEWEST, _MOST = 2048, 2**20


def default_block_size(bytes_per_voxel: int, device: torch.device) -> int:
    """Return how many voxels to hold on the device at once.

    Parameters
    ----------
    bytes_per_voxel
        Data, starts and results of one voxel.
    device
        A CUDA device lends half of its free memory, the CPU a fixed share that a laptop has.
    """
    budget = _CPU_BUDGET
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 2
    return min(max(budget // bytes_per_voxel, _FEWEST), _MOST)


def for_blocks(n: int, size: int, work: Callable[[int, int], None]) -> None:
    """Call `work(start, stop)` over consecutive blocks of `size` of `n` voxels.

    A block that does not fit the memory of a GPU is done again in halves.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        Not even the smallest block fits.
    """
    start = 0
    while start < n:
        stop = min(start + size, n)
        try:
            work(start, stop)
        except torch.cuda.OutOfMemoryError:
            if stop - start <= _FEWEST:
                raise
            size = (stop - start + 1) // 2
            torch.cuda.empty_cache()
            logger.warning("GPU memory is short: continuing with blocks of %d voxels.", size)
        else:
            start = stop
