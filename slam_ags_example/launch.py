"""Processes that torchrun started: rank 0 runs the command, the others help it to pretrain."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from joblib import cpu_count

from slam_ags_example.config import InputError

__all__ = ["Launch"]

_dist: Any = dist  # which does not export all that it documents
_CALL, _FAILED, _SAID = "call", "failed", "said"
_LONG = timedelta(days=30)  # rank 0 may have to decode every image before it calls
_SHORT = timedelta(seconds=10)


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started.

    Attributes:
        rank: its number, from 0.
        local_rank: its number on this machine, from 0.
        local_size: how many there are on this machine.
        size: how many there are.
        store: where they leave messages for each other.
    """

    rank: int
    local_rank: int
    local_size: int
    size: int
    store: Any

    @classmethod
    def of_environment(cls) -> "Launch | None":
        """From the variables that torchrun sets; None in a process that is alone.

        Raises:
            InputError: a variable is missing or wrong, or rank 0 cannot be reached.
        """
        try:
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                return None
            store, rank, size = next(_dist.rendezvous("env://"))
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"several processes are started by torchrun: {reason}") from error
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cpu_count() // local_size))
        return cls(rank, local_rank, local_size, size, store)

    def take_device(self, name: str) -> None:
        """Make ``cuda`` stand for the device of the local rank.

        Raises:
            InputError: ``name`` is one device for all, there are too few, or none that processes
                can talk about.
        """
        kind, colon, _ = name.partition(":")
        if kind not in ("auto", "cpu", "cuda"):
            raise InputError(f"several processes run on --device cpu or cuda, got {name}")
        if colon:
            raise InputError(
                f"--device {name} cannot be shared by {self.size} processes: pass --device "
                f"{kind}, and each takes the one of its local rank"
            )
        if kind == "cpu" or not torch.cuda.is_available():
            return
        n_devices = torch.cuda.device_count()
        if self.local_size > n_devices:
            raise InputError(
                f"{self.local_size} processes need {self.local_size} CUDA devices, there are "
                f"{n_devices}: start fewer, or pass --device cpu"
            )
        torch.cuda.set_device(self.local_rank)

    def call(self, job: Mapping[str, Any]) -> None:
        """On rank 0: let the others do a job too."""
        self.store.set(_CALL, json.dumps(job))

    def dismiss(self) -> None:
        """On rank 0, in the end: let the others go, unless they were called."""
        if not self.store.check([_CALL]):
            self.store.set(_CALL, json.dumps(None))

    def wait_for_call(self) -> dict[str, Any] | None:
        """On the others: the job of :meth:`call`; None after :meth:`dismiss`."""
        self.store.wait([_CALL], _LONG)
        job: dict[str, Any] | None = json.loads(self.store.get(_CALL))
        return job

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """The process group of all, for its duration: gloo, and for CUDA tensors nccl."""
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
        )
        # After an error the group stays until the process ends, which is soon: the others may be
        # inside a collective.
        try:
            yield
        except KeyboardInterrupt:  # on which all agree
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    def say_once(self, message: str) -> None:
        """Write on standard error why this process fails, unless another one failed before.

        torchrun ends all processes as soon as one has ended, so the others wait for the message.
        """
        if self.store.add(_FAILED, 1) == 1:
            print(message, file=sys.stderr, flush=True)
            self.store.set(_SAID, "")
            return
        with suppress(RuntimeError):
            self.store.wait([_SAID], _SHORT)
