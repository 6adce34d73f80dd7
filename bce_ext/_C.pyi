from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | int | None]: ...
def bce(
    function: str,
    formula: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | float | None,
    pos_weight: Tensor | float | None,
    normalizer: Tensor | float | None,
    options: tuple[float | None, ...],
    reduction: int,
) -> Any: ...
