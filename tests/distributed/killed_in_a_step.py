"""Runs a script in which one rank is killed (SIGKILL) between the passes of a step, the first time it is launched.

torchrun ... killed_in_a_step.py RANK STEP script.py [arguments]
"""

import os
import runpy
import signal
import sys

import fastsam

rank, step, sys.argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
taken = []


def killed_between_the_passes(optimizer, *args, **kwargs):
    taken.append(optimizer)
    first_launch = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_launch and int(os.environ["RANK"]) == rank and len(taken) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return second_step(optimizer, *args, **kwargs)


second_step = fastsam.FriendlySAM.second_step
fastsam.FriendlySAM.second_step = killed_between_the_passes
runpy.run_path(sys.argv[0], run_name="__main__")
