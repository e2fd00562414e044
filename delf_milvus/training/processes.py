"""One run over several processes, one a GPU, as `torchrun` starts them; without it, one process.

Every process holds the whole network and takes its share of each batch; gradients are averaged
(`DistributedDataParallel`), so that a step is that of one process with the whole batch, BatchNorm in training mode
apart. The first process alone writes. Without GPUs the processes compute on the CPU and talk by gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
from torch import distributed, nn

from delf_milvus.errors import UsageError

PATIENCE = timedelta(hours=6)
"""How long a process waits for another one, which may be computing the figures of validation meanwhile."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. rank: its number, from 0. count: of all. device: where it computes."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """Photos of a batch that fall to one process; raises UsageError where they cannot be shared evenly."""
        if batch % self.count or batch // self.count < 2:
            raise UsageError(
                f"A batch of {batch} cannot be shared by {self.count} processes; "
                f"give --batch a multiple of {self.count}, {2 * self.count} at least."
            )
        return batch // self.count

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            distributed.barrier()

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over all processes, (N,)."""
        if self.count == 1:
            return list(values)
        # fp32 on a GPU would lose counts above 16 million; fp64 is there too.
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return cast("list[float]", sums.tolist())

    def trained(self, network: nn.Module) -> nn.Module:
        """What to call in place of the network while training: its gradients are the mean over all processes."""
        if self.count == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def synchronised(self, module: nn.Module) -> nn.Module:
        """The module with BatchNorm over the batches of all processes, which torch has for GPUs only."""
        if self.count == 1 or self.device.type != "cuda":
            return module
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes of this run, connected for the time of the block.

    Raises UsageError where `torchrun` started more on this machine than torch sees GPUs.
    """
    cuda = torch.cuda.is_available()
    count = started()
    if count == 1:
        yield Processes(torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cpu")
    if cuda:
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UsageError(f"torchrun started more processes than there are GPUs; give --nproc-per-node {there}.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Processes(device, distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


def started() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
