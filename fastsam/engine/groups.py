"""A parameter group as a recipe reads it."""

from __future__ import annotations

from fastsam.engine.recipe import Group, Recipe
from fastsam.support.checks import flag


def named(group: Group, recipe: Recipe, defaults: Group, aliases: dict[str, str]) -> Group:
    """A copy of ``group`` with the recipe's own names of its hyper-parameters, checked.

    Groups may have been assigned, loaded or added anywhere: what ``group`` itself lacks of the method's
    hyper-parameters it is given from ``defaults``. ``aliases`` are the names in it of those that the base optimizer has
    another meaning for. Where an objective is maximised, the worst point of the ball lies the other way, and so ``rho``
    is negative; a momentum is that of the objective turned round already.

    Raises ``ValueError`` for a hyper-parameter out of its range.
    """
    for name, value in defaults.items():
        group.setdefault(name, value)
    found = {**group, **{name: group[alias] for name, alias in aliases.items()}}
    flag("perturb", found["perturb"])
    recipe.check(found)
    found.update(recipe.numbers(found))
    if found.get("maximize") and not recipe.along_momentum:
        found["rho"] = -found["rho"]
    return found
