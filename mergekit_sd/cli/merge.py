"""merge: one operation without writing a recipe first."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import mergekit_sd as mk
from mergekit_sd.cli.one_shot import carry_out, one_shot_options
from mergekit_sd.errors import UsageError
from mergekit_sd.text import count

F = TypeVar("F", bound=Callable[..., Any])


# cast's: the file's --dtype says it.
NO_OPTION = ("dtype",)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _methods() -> list[Any]:
    """The operations that merge: those on one model's parts have commands of their own."""
    return [each for each in mk.OPERATIONS.values() if not each.planned or each.name == "formula"]


def parameter_options(function: F) -> F:
    """One option for each parameter that some operation has."""
    users: dict[str, list[str]] = {}
    kinds: dict[str, Any] = {}
    for operation in _methods():
        for parameter in operation.parameters:
            users.setdefault(parameter.name, []).append(operation.name)
            kinds[parameter.name] = parameter
    for name in sorted(set(users) - set(NO_OPTION), reverse=True):
        whose = f" ({', '.join(users[name])})" if len(users[name]) < 4 else ""
        text = f"{mk.parameter_forms(kinds[name])}{whose}."
        function = click.option(f"--{name}", metavar="VALUE", help=text)(function)
    return function


@click.command("merge")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B [C]…")
@click.option("--method", default="weighted_sum", show_default=True, metavar="OP", help="The operation; see `ops`.")
@parameter_options
@click.option("--seed", type=click.IntRange(0), metavar="N", help="For random numbers.  [default: 0]")
@click.option("--extrapolate", is_flag=True, help="Allow weights outside 0 to 1.")
@click.option("--vae", type=click.Path(path_type=Path), metavar="FILE", help="Bake this VAE: a VAE file or a model.")
@one_shot_options(dtype="fp16")
@click.pass_obj
def merge_command(
    token: mk.CancelToken,
    /,
    models: tuple[Path, ...],
    method: str,
    vae: Path | None,
    **options: Any,
) -> int:
    """Merge models: A B [C]… in the order of the operation's operands; in a formula they are a, b, c, …"""
    operation = mk.find_operation(method)
    _check_number(models, operation)
    weights = _weights(options, [parameter.name for parameter in operation.parameters])
    opened = {path: mk.open(path) for path in [*models, *([vae] if vae else [])]}
    node = _node(operation.name, [opened[model] for model in models], weights)
    return carry_out(token, node, vae=opened[vae] if vae else None, **options)


def _node(name: str, models: list[Any], parameters: dict[str, Any]) -> Any:
    """The step that the options say."""
    if name == "formula":
        return mk.ops.formula(parameters.get("expr", ""), **dict(zip(LETTERS, models, strict=False)))
    return getattr(mk.ops, name)(*models, **parameters)


def _check_number(models: tuple[Path, ...], operation: Any) -> None:
    """As many models as the operation takes; else name the operations that take so many."""
    if operation.name == "formula" and len(models) <= len(LETTERS):
        return
    if not operation.takes(len(models)):
        others = [each for each in _methods() if each.takes(len(models))]
        others.sort(key=lambda method: any(each.many or each.optional for each in method.operands))
        names = ", ".join(f"{operand.name}…" if operand.many else operand.name for operand in operation.operands)
        raise UsageError(
            f"{operation.name} takes {count(len(operation.operands), 'model')} ({names}), not {len(models)}.",
            key="--method",
            hint=f"for {len(models)}: --method {', '.join(each.name for each in others[:6])}",
        )


def _weights(options: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Take the parameters' options out of `options`, read as a recipe would read them."""
    every = {p.name for operation in _methods() for p in operation.parameters} - set(NO_OPTION)
    given = {name: options.pop(name) for name in every}
    extrapolate = options.pop("extrapolate")
    for name, text in given.items():
        if text is not None and name not in known:
            takes = ", ".join(f"--{each}" for each in known) or "none"
            raise UsageError("This operation has no such parameter.", key=f"--{name}", hint=f"it takes: {takes}")
    weights = {n: text if n == "expr" else _read(n, text) for n, text in given.items() if text is not None}
    return weights | ({"extrapolate": True} if extrapolate else {})


def _read(name: str, text: str) -> Any:
    """A number, array or table as TOML reads it; anything else is a preset or a pasted list."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if text.lstrip()[:1] in ("{", "["):
            example = '{ default = 0.3, "OUT03-OUT05" = 0.8 }' if "{" in text else "[0.5, 0, 0.1, …]"
            raise UsageError(f"This is not TOML: {error}.", key=f"--{name}", hint=f"write {example}") from error
        return text
