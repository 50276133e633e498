"""Maps between two sets of parameter names, declared once and read both ways."""

import re
from functools import cache
from typing import Collection, Dict, NamedTuple, Optional, Sequence, Tuple

_FIELD = re.compile(r"\{(?:(\d+)\*)?([a-z]+)(?:\+(\d+))?\}")


class Rule(NamedTuple):
    """One line of a map: two templates of the same parameter.

    `{i}` stands for a number, and may be `{i+1}` or `{3*i+1}`; fields of more than one letter,
    such as `{param}`, stand for a word.

    Attributes:
        theirs: name in the other code base.
        ours: name here.
        given: template, in our names, of a parameter that must exist for the rule to be used from
            ours to theirs; for one of our names that has several of theirs.
        reshape: shapes (theirs, ours), where they differ.
    """

    theirs: str
    ours: str
    given: str = ""
    reshape: Optional[Tuple[Tuple[int, ...], Tuple[int, ...]]] = None


class Source(NamedTuple):
    """A code base whose weights can be read.

    Attributes:
        name: as `convert_checkpoint` takes it.
        title: its name in messages.
        marks: regular expressions of names; all must occur for weights to be recognised.
        rules: the map; the first rule that fits a name counts.
        dropped: (regular expression of names, reason) of what has no place here.
    """

    name: str
    title: str
    marks: Sequence[str]
    rules: Sequence[Rule]
    dropped: Sequence[Tuple[str, str]]


def translate(
    name: str, rules: Sequence[Rule], to_ours: bool, present: Collection[str] = ()
) -> Optional[Tuple[str, Rule]]:
    """Name of a parameter on the other side of a map.

    Args:
        name: on this side.
        rules: the map.
        to_ours: from theirs to ours, or back.
        present: all of our names, for rules with `given`; used on the way back.

    Returns:
        The other name with the rule that gave it, or None if no rule fits.

    Example:
        >>> rule = Rule("layer{s}.bn{i}.{param}", "res{s+1}.conv{i}.norm.{param}")
        >>> translate("layer1.bn2.weight", [rule], to_ours=True)[0]
        'res2.conv2.norm.weight'
        >>> translate("res2.conv2.norm.weight", [rule], to_ours=False)[0]
        'layer1.bn2.weight'
    """
    for rule in rules:
        pattern, target = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        fields = _match(pattern, name)
        if fields is None:
            continue
        if not to_ours and rule.given and _fill(rule.given, fields) not in present:
            continue
        return _fill(target, fields), rule
    return None


@cache
def _compile(template: str):
    """Regular expression of a template, and (factor, field, summand) of each of its groups."""
    regex, fields, end = "", [], 0
    for found in _FIELD.finditer(template):
        factor, field, summand = found.groups()
        regex += re.escape(template[end : found.start()])
        regex += r"(\d+)" if len(field) == 1 else "([a-z_]+)"
        fields.append((int(factor or 1), field, int(summand or 0)))
        end = found.end()
    return re.compile(regex + re.escape(template[end:])), fields


def _match(template: str, name: str) -> Optional[Dict[str, str]]:
    """Values of the fields for which a template reads as a name, if there are any."""
    regex, fields = _compile(template)
    found = regex.fullmatch(name)
    if found is None:
        return None
    values: Dict[str, str] = {}
    for text, (factor, field, summand) in zip(found.groups(), fields):
        if len(field) == 1:
            value, rest = divmod(int(text) - summand, factor)
            if rest or value < 0:
                return None
            text = str(value)
        if values.setdefault(field, text) != text:
            return None
    return values


def _fill(template: str, values: Dict[str, str]) -> str:
    def value(found) -> str:
        factor, field, summand = found.groups()
        if len(field) > 1:
            return values[field]
        return str(int(factor or 1) * int(values[field]) + int(summand or 0))

    return _FIELD.sub(value, template)
