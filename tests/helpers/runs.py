"""Training runs as processes: started anew, killed, several together."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
import time

from accelerate.state import AcceleratorState, GradientState, PartialState
from tqdm import tqdm

# Made by fork, so that a child needs no new imports: tests kill many of them.
FORK = multiprocessing.get_context("fork")


def reset_accelerator():
    """Accelerate keeps its state in the process: this makes the next run start as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def in_child(function, *arguments, environment=()):
    def target():
        os.environ.update(environment)
        # By default a lock that forked processes share: whoever is killed while drawing a bar would keep it for ever,
        # and all others, the test's own process too, would wait for it.
        tqdm.set_lock(threading.RLock())
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
        function(*arguments)

    child = FORK.Process(target=target)
    child.start()
    return child


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(function, *arguments, world=2):
    """Call a function in several processes of one run; their exit codes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    children = [
        in_child(
            function,
            *arguments,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(world)
    ]
    for child in children:
        child.join(timeout=240)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def killed_until_done(function, *arguments, duration):
    """Call a function in processes that are killed at random moments until one ends; how many were killed.

    Args:
        duration: seconds that it takes from beginning to end. The first ones are killed early, then later ones, and at
            last none: every run ends.
    """
    killed = 0
    for attempt in range(30):
        child = in_child(function, *arguments)
        child.join(timeout=random.uniform(0.3, 0.5 + 0.15 * attempt) * duration)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
        if child.exitcode == 0:
            break
    assert child.exitcode == 0, child.exitcode
    return killed


def timed(function, *arguments):
    """The seconds that a call takes."""
    started = time.monotonic()
    function(*arguments)
    return time.monotonic() - started


def sharded_accelerator(block):
    """An Accelerator as `accelerate launch --use_fsdp` sets it up, modules of class `block` wrapped each by itself; on
    a CPU alone it refuses to."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    reset_accelerator()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator
