"""Losses of the first steps with every assigner, compared with those recorded before."""

import json

import pytest
from stress import curves

RECORDED = json.loads(curves.FILE.read_text())


def test_every_assigner_of_the_package_has_a_curve():
    from atss import assigners

    names = {name for name in dir(assigners) if name.endswith("Assigner")}
    assert names - {"Assigner", "PredictionAssigner"} == {*RECORDED["curves"]}


@pytest.mark.parametrize("name", sorted(curves.ASSIGNERS))
def test_losses_are_those_recorded(name):
    expected = RECORDED["curves"][name]
    if curves.machine() == RECORDED["machine"]:
        assert curves.losses_of(name) == expected
    else:
        assert curves.losses_of(name, 5) == pytest.approx(expected[:5], rel=1e-4)


def test_a_second_run_in_the_same_process_is_the_same():
    assert curves.losses_of("ATSSAssigner", 8) == curves.losses_of("ATSSAssigner", 8)
