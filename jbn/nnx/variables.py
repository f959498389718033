"""How the value of an NNX variable is read and written; Flax moved these spellings between 0.12.0 and 0.12.8."""

from typing import Any

from flax import nnx


def read(variable: nnx.Variable[Any]) -> Any:
    """Return the value of a variable, an array or a tree."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def write(variable: nnx.Variable[Any], value: Any) -> None:
    """Set the value of a variable."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def become(module: Any, kind: type) -> None:
    """Let a module be of another class from now on.

    A new module in its place would not be seen by those who hold the old one: optimizers, other modules, users.
    """
    object.__setattr__(module, "__class__", kind)
