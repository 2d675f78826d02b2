"""Where to compute, and whether it had the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from bids_gacelle.engine.errors import EngineError

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)


def resolve_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu", "cuda" or "cuda:<n>".

    "auto" is the first GPU that can run this build of torch, else the CPU.

    Raises
    ------
    EngineError
        The name is unknown, or the GPU asked for is not there or cannot be used.
    """
    if name == "auto":
        problem = _cuda_problem(torch.device("cuda", 0))
        if problem and torch.cuda.is_available():
            logger.warning("The GPU cannot be used (%s): computing on the CPU.", problem)
        return torch.device("cpu") if problem else torch.device("cuda", 0)
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise EngineError(f"Device {name!r} is unknown; give auto, cpu, cuda or cuda:<number>.")
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(index or 0))
    problem = _cuda_problem(device)
    if problem:
        raise EngineError(f"Device {name!r} was asked for but {problem}; use 'auto' or 'cpu'.")
    return device


def resolve_devices(names: str | Sequence[str]) -> list[torch.device]:
    """Return the devices of a name, of several names, or of "cuda:all", which is every GPU.

    Raises
    ------
    EngineError
        As `resolve_device`; there is no GPU or no name.
    """
    if names == "cuda:all":
        names = [f"cuda:{i}" for i in range(max(torch.cuda.device_count(), 1))]
    elif isinstance(names, str | torch.device):
        names = [str(names)]
    elif not isinstance(names, Iterable):
        raise EngineError(f"device is {names!r}; give a name or several.")
    names = list(names)
    if not names:
        raise EngineError("The list of devices is empty.")
    return [resolve_device(str(name)) for name in names]


def _cuda_problem(device: torch.device) -> str:
    """Say why a GPU cannot be used, or "" when a small computation on it succeeds."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there are only {torch.cuda.device_count()} GPUs"
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        return f"it does not work with this torch: {str(error).splitlines()[0]}"
    return ""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device or the host had too little memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
