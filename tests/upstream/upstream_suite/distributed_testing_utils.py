"""Why: the mixins for FSDP and tensor parallelism start their processes with it. Here: gloo on the CPU."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int, backend: str | None = None) -> None:
    """The CPU needs no choice."""


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    torch.multiprocessing.spawn(function, args=args, nprocs=nprocs)


def _run_rank(rank: int, function, world_size: int, port: int, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size: int):
    """Run a function of `(rank, *args)` in that many processes."""

    def with_processes(function):
        def start(*args):
            with socket.create_server(("localhost", 0)) as probe:
                port = probe.getsockname()[1]
            _start_rank_processes(_run_rank, args=(function, world_size, port, args), nprocs=world_size)

        return start

    return with_processes
