"""Options of a command as the fields of a struct: each is written, typed and documented once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import msgspec

Result = TypeVar("Result")


def from_fields(command: Callable[..., Result]) -> Callable[..., Result]:
    """A command for typer: a parameter that is a struct becomes a parameter a field.

    The fields are annotated as parameters of a command are: ``Annotated[int, typer.Option(help=...)]``.
    """
    parameters: list[inspect.Parameter] = []
    structs: dict[str, type[msgspec.Struct]] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            parameters.append(parameter.replace(annotation=kind))
            continue
        structs[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            default = inspect.Parameter.empty if field.required else field.default
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=types[field.name],
                )
            )

    @functools.wraps(command)
    def called(**given: Any) -> Result:
        made = {
            name: kind(**{field: given.pop(field) for field in kind.__struct_fields__})
            for name, kind in structs.items()
        }
        return command(**given, **made)

    keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    called.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in keyword}
    return called
