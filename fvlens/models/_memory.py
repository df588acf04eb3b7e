"""Whether a model fits into the memory, before anything of it is loaded."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch

from fvlens.models._checkpoints import Checkpoint


def count_parameters(config: Any) -> int:
    """Parameters of a model of this configuration, counted without making them; tied ones count once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    return sum(parameter.numel() for parameter in made.parameters())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        free = _available()
    except (OSError, ValueError, IndexError):
        return None
    room = cgroup_room()
    return free if room is None else min(free, room)


def _available() -> int:
    """Bytes of memory that the system can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left under the limits of the control groups that hold this process (a container); None without a limit.

    Cached files that the kernel would give back count as free.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    rooms: list[int] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":  # version 2
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, usage, cached = names
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit here
                left = int((place / limit).read_text()) - int((place / usage).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                rooms.append(max(0, left + int(stat.get(cached, 0))))
            if place == base:
                break
    return min(rooms, default=None)


def check_memory(
    checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype, devices: list[torch.device], copies: int
) -> None:
    """Estimate, before anything is loaded, whether the weights fit.

    Args:
        checkpoint, config: the model.
        dtype: precision of the parameters.
        devices: where the model goes, in equal shares.
        copies: how often the weights are held while the model is made on the CPU.

    Raises:
        ValueError: they do not.
    """
    n_parameters = count_parameters(config)
    weights = n_parameters * dtype.itemsize
    cpu = torch.device("cpu")
    needs = [(devices, weights if devices != [cpu] else copies * weights)]
    if devices != [cpu] and copies > 0:
        needs.append(([cpu], copies * weights))
    for places, needed in needs:
        free = [free_memory(place) for place in places]
        total = sum(amount for amount in free if amount is not None)
        if None in free or needed <= total:
            continue
        where = ", ".join(str(place) for place in places)
        raise ValueError(
            f"load_model: {checkpoint.name} has {n_parameters:,} parameters and needs {_gib(needed)} in "
            f"{str(dtype).removeprefix('torch.')} while it loads on {where}, where {_gib(total)} are free; take a "
            "smaller dtype (torch.bfloat16), another device, or split it over CUDA devices with n_devices."
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 1024**3:.3g} GiB"
