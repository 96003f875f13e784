"""What the ranks do with checkpoints: save on some, go on with others."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_training import set_eigenvector, spread
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fastsam.integrations.rank_state import RankMomentum, average_momentum


def write(training, optimizer, path, **more):
    model, state = get_state_dict(training.model, optimizer)
    dcp.save({"model": model, "optimizer": state, **more}, checkpoint_id=path)


def read(training, optimizer, path):
    model, state = get_state_dict(training.model, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=path)
    set_state_dict(training.model, optimizer, model_state_dict=model, optim_state_dict=state)


def name(folder, case):
    return str(folder / "-".join(case))


def save(folder, how, cases, steps):
    for case in cases:
        training = spread(how)
        optimizer = training.optimizer(*case)
        if case[0] == "Eigen-SAM":
            set_eigenvector(optimizer)
        training.run(optimizer, steps)
        write(training, optimizer, name(folder, case))


def resume(folder, how, cases, done, steps):
    """The weights after ``steps`` more, of a model and an optimizer that begin with other values."""
    found = {}
    for case in cases:
        training = spread(how)
        optimizer = training.optimizer(*case)
        with torch.no_grad():
            for p in training.model.parameters():
                p.mul_(0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e3
        read(training, optimizer, name(folder, case))
        training.step = done
        found[case] = training.run(optimizer, steps)
    return found


def save_before_the_first_estimate(folder, steps):
    training = spread("FSDP2")
    optimizer = training.optimizer("Eigen-SAM", "SGD")
    training.run(optimizer, steps)
    write(training, optimizer, str(folder))


def resume_without_an_eigenvector(folder, done, steps):
    training = spread("FSDP2")
    optimizer = training.optimizer("Eigen-SAM", "SGD")
    read(training, optimizer, str(folder))
    training.step = done
    return training.run(optimizer, steps)


def look_and_train(how, steps):
    """A checkpoint is looked for, and there is none: the optimizer's state was asked for, and nothing loaded."""
    training = spread(how)
    optimizer = training.optimizer("F-SAM", "AdamW")
    get_state_dict(training.model, optimizer)
    return training.run(optimizer, steps)


# ---- m-sharpness: each rank its own m ----------------------------------------------------------------------


def m_sharp():
    training = spread("DDP")
    return training, training.optimizer("F-SAM", "SGD", m_sharpness=True)


def averages(training, optimizer):
    return torch.cat([optimizer.state[p]["momentum"].reshape(-1) for p in training.model.parameters()])


def save_per_rank(folder, steps, more):
    """This rank's m after ``steps``, when everything is saved, and the weights after ``more``."""
    training, optimizer = m_sharp()
    training.run(optimizer, steps, model=training.model)
    write(training, optimizer, str(folder), momentum=RankMomentum(optimizer))
    m = averages(training, optimizer).clone()
    return m, training.run(optimizer, more, model=training.model)


def resume_per_rank(folder, done, more):
    training, optimizer = m_sharp()
    read(training, optimizer, str(folder))
    dcp.load({"momentum": RankMomentum(optimizer)}, checkpoint_id=str(folder))
    m = averages(training, optimizer).clone()
    training.step = done
    return m, training.run(optimizer, more, model=training.model)


def load_in_the_wrong_order(folder):
    training, optimizer = m_sharp()
    model, state = get_state_dict(training.model, optimizer)
    dcp.load({"model": model, "optimizer": state, "momentum": RankMomentum(optimizer)}, checkpoint_id=str(folder))


def load_raises(folder):
    """What ``resume_per_rank`` raises, as text: DCP's exception is no ``Exception``."""
    try:
        resume_per_rank(folder, 0, 0)
    except dcp.api.CheckpointException as error:
        return str(error)
    return None


def save_averaged(folder, steps):
    """The m of this rank before and after it was averaged; the second is saved."""
    training, optimizer = m_sharp()
    training.run(optimizer, steps, model=training.model)
    before = averages(training, optimizer).clone()
    average_momentum(optimizer)
    write(training, optimizer, str(folder))
    return before, averages(training, optimizer)


def resume_averaged(folder):
    training, optimizer = m_sharp()
    read(training, optimizer, str(folder))
    return averages(training, optimizer)


def average_where_one_rank_has_none():
    training, optimizer = m_sharp()
    training.run(optimizer, 1, model=training.model)
    p = next(training.model.parameters())
    m = optimizer.state[p]["momentum"].clone()
    if dist.get_rank() == 0:
        del optimizer.state[p]["momentum"]
    average_momentum(optimizer)
    return m, optimizer.state[p]["momentum"]


def refused(kind):
    training = spread("FSDP2" if kind == "sharded" else "DDP")
    RankMomentum(training.optimizer("SAM" if kind == "without m" else "F-SAM", "SGD"))


def step_counts(steps):
    """AdamW's count of each parameter, and whether this rank has elements of it."""
    training = spread("FSDP2")
    optimizer = training.optimizer("SAM", "AdamW")
    training.run(optimizer, steps)
    return [(float(optimizer.state[p]["step"]), p.to_local().numel()) for p in training.model.parameters()]
