"""Checks of constructor arguments, with messages that name the config key.

Each returns the value it was given, so that a check fits where the value is stored::

    self.topk = check_integer("ATSSAssigner", "topk", topk, 1, "model.assigner.topk")

and raises a `ValueError` for any other. `owner` is the class or function that takes the argument,
`name` is that of the argument, and `key` is the config key to change, "" where there is none.
"""

import math
from numbers import Integral, Real
from typing import Any, Iterable, Optional


def check_integer(
    owner: str, name: str, value: Any, low: int, key: str = "", high: Optional[int] = None
) -> int:
    """An integer from `low` to `high`, both inclusive; `True` and `False` are none.

    Example:
        >>> check_integer("ATSSAssigner", "topk", 9, 1, "model.assigner.topk")
        9
        >>> check_integer("ATSSAssigner", "topk", 0, 1, "model.assigner.topk")
        Traceback (most recent call last):
        ValueError: ATSSAssigner needs an integer topk >= 1, got 0. Change model.assigner.topk.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"from {low} to {high}"
        raise _error(f"{owner} needs an integer {name} {bounds}, got {value!r}.", key)
    return int(value)


def check_range(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    key: str = "",
    ends: str = "[]",
) -> float:
    """A finite number in an interval; `True` and `False` are none.

    Args:
        owner, name, value, key: see above.
        low, high: bounds of the interval; either may be infinite.
        ends: "[" or "(" and "]" or ")", as in mathematics: a square bracket includes its bound.

    Example:
        >>> check_range("ATSSHead", "prior_prob", 0.01, 0, 1, "model.head.prior_prob", ends="()")
        0.01
        >>> check_range("ATSSHead", "prior_prob", 1.0, 0, 1, "model.head.prior_prob", ends="()")
        Traceback (most recent call last):
        ValueError: ATSSHead needs prior_prob in (0, 1), got 1.0. Change model.head.prior_prob.
        >>> check_range("DenseLoss", "smooth_l1_beta", -2, 0, key="model.loss.smooth_l1_beta")
        Traceback (most recent call last):
        ValueError: DenseLoss needs a finite smooth_l1_beta >= 0, got -2. Change
            model.loss.smooth_l1_beta.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    is_above = is_number and (low < value or (ends[0] == "[" and value == low))
    if not (is_above and (value < high or (ends[1] == "]" and value == high))):
        needed = f"{name} in {ends[0]}{low}, {high}{ends[1]}"
        if high == math.inf:
            needed = f"a finite {name}"
            if low > -math.inf:
                needed += f" {'>=' if ends[0] == '[' else '>'} {low}"
        raise _error(f"{owner} needs {needed}, got {value!r}.", key)
    return value


def check_choice(owner: str, name: str, value: Any, choices: Iterable, key: str = "") -> Any:
    """One of several values.

    Example:
        >>> known = ("giou", "smooth_l1")
        >>> check_choice("DenseLoss", "box_loss", "giou", known, "model.loss.box_loss")
        'giou'
        >>> check_choice("DenseLoss", "box_loss", "l1", known, "model.loss.box_loss")
        Traceback (most recent call last):
        ValueError: DenseLoss needs box_loss to be one of ['giou', 'smooth_l1'], got 'l1'. Change
            model.loss.box_loss.
    """
    choices = list(choices)
    if value not in choices:
        raise _error(f"{owner} needs {name} to be one of {choices}, got {value!r}.", key)
    return value


def _error(problem: str, key: str) -> ValueError:
    return ValueError(f"{problem} Change {key}." if key else problem)
