"""A pool of processes, kept for all tests, that run one function on every rank of a fresh gloo process group."""

import contextlib
import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from free_port import free_port

TIMEOUT = datetime.timedelta(seconds=300)
#: Processes begin as copies of one that has imported torch: a rank that was killed is replaced at once.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
)


class RankPool:
    """``pool(4, function, *args)`` gives what ``function(*args)`` returned on each rank, in their order.

    ``function`` is a module's, with a process group of that many ranks up. An exception on any rank is returned in
    its place by ``pool.outcomes``, and raised by a call. A rank that returns ``Last(result)`` ends its process; one
    that was killed returns None.
    """

    def __init__(self):
        self._workers = []

    def __call__(self, ranks, function, *args):
        results = self.outcomes(ranks, function, *args)
        for result in results:
            if isinstance(result, Failure):
                raise AssertionError(f"on a rank: {result.text}")
        return results

    def outcomes(self, ranks, function, *args):
        while len(self._workers) < ranks:
            self._workers.append(Worker())
        address = f"tcp://127.0.0.1:{free_port()}"
        for rank, worker in enumerate(self._workers[:ranks]):
            worker.connection.send((address, rank, ranks, function, args))
        return [self._result(i) for i in range(ranks)]

    def _result(self, i):
        result = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            result = self._workers[i].connection.recv()
        if result is None or isinstance(result, Last):
            self._workers[i] = Worker()
            return getattr(result, "result", None)
        return result[0]

    def close(self):
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()


class Failure:
    """An exception on a rank: its type's name, its message with its notes, and where it came from."""

    def __init__(self, error):
        self.kind = type(error).__name__
        self.message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        self.text = "".join(traceback.format_exception(error))


class Last:
    """The result of a rank whose process ends with it."""

    def __init__(self, result):
        self.result = result


class Worker:
    def __init__(self):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, sys.path[:]), daemon=True)
        self.process.start()
        theirs.close()


def _serve(connection, path):
    sys.path[:] = path
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            address, rank, ranks, function, args = connection.recv()
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=TIMEOUT)
            try:
                result = function(*args)
            except Exception as error:
                result = Failure(error)
            if isinstance(result, Last):
                connection.send(result)
                os._exit(1)
            dist.destroy_process_group()
            connection.send((result,))
