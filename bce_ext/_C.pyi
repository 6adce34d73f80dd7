from typing import Any

def build_info() -> dict[str, str | int | None]: ...
def bce(
    function: str,
    formula: int,
    operands: tuple[Any, ...],
    options: tuple[float | None, ...],
    option_names: tuple[str, ...],
    reduction: int,
) -> Any: ...
def linear_bce(operands: tuple[Any, ...], options: tuple[float | None, ...], reduction: int) -> Any: ...
