"""`ejk repro`: a call that `ejk check` found or `ejk.testing.dump` wrote, run again."""

import os
from typing import Annotated, Any

import typer

from ejk._version import __version__
from ejk.cli._fuzzed import BackendNames, Interpret, backends, check_names, engine


def repro(
    recipe: Annotated[str, typer.Argument(help="What was printed, or a file of ejk.testing.dump.")],
    backend: BackendNames = None,
    interpret: Interpret = False,
) -> None:
    """Run a call again and compare it with the oracle: what `check` printed, or a dumped one.

    The exit code is 0 where it agrees now, 1 where it fails, 2 where the text is no recipe.

    Example: ejk repro '{"operation":"copy_kv_pages","backend":"xla","call":{"shape":
    {"num_kv_heads":1,"head_dim":4,"value_head_dim":4,"page_size":2,"num_pages":3},
    "sources":[0],"targets":[2]}}'
    """
    recipes = engine("recipes")
    try:
        if recipe.endswith(".npz") or os.path.isfile(recipe):
            failed = _dumped(recipe, backend, interpret)
        else:
            failed = _recipe(recipes.parse(recipe), backend, interpret)
    except recipes.RecipeError as error:
        raise typer.BadParameter(str(error), param_hint="'RECIPE'") from None
    raise typer.Exit(1 if failed else 0)


def _recipe(recipe: Any, named: list[str] | None, interpret: bool) -> bool:
    """Run a recipe on its own backend, or on others; say whether any fails."""
    verdicts = engine("verdicts")
    if recipe.version != __version__:
        print(f"of ejk {recipe.version}; this is {__version__} and may build another call")
    print(f"{recipe.operation}, {recipe.composition}: {recipe.call}")
    if named is None:
        found = {recipe.backend: verdicts.backend_of(recipe)}
    else:
        check_names(named, [recipe.operation])
        found = backends(recipe.operation, named, interpret)
    told = {name: verdicts.judge(recipe, backend) for name, backend in found.items()}
    return _tell(told)


def _dumped(path: str, named: list[str] | None, interpret: bool) -> bool:
    """Run a dumped call on each backend; say whether any fails."""
    dumps, verdicts = engine("dumps"), engine("verdicts")
    operation, given = dumps.load(path)
    check_names(named, [operation])
    print(f"{operation}: {dumps.described(given)}")
    told: dict[str, Any] = {}
    for name, backend in backends(operation, named, interpret).items():
        call, compositions = dumps.call_of(operation, given, backend)
        for composition in compositions:
            told[f"{name}, {composition}"] = verdicts.judge_call(call, composition)
    return _tell(told)


def _tell(told: dict[str, Any]) -> bool:
    for name, verdict in told.items():
        said = {"agrees": "agrees with the oracle"}.get(verdict.outcome, verdict.outcome)
        print(f"{name}: {said}{': ' * bool(verdict.said)}{verdict.said}")
    if all(verdict.outcome == "refused" for verdict in told.values()):
        raise typer.BadParameter("no backend runs it here", param_hint="'--backend'")
    return any(verdict.outcome == "fails" for verdict in told.values())
