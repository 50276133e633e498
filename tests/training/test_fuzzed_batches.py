"""Training steps on made-up batches: degenerate, huge, empty and crowded."""

import pytest
import torch
from conftest import tiny_detector

fuzzing = pytest.importorskip("stress.fuzz", reason="needs hypothesis")


def test_losses_and_gradients_of_made_up_batches_are_finite():
    counts = fuzzing.fuzz(tiny_detector().train(), 100)
    assert counts["trained"] > 20


def test_positives_are_at_most_the_anchors_also_with_5000_objects_in_an_image(monkeypatch):
    from atss.assigners import atss

    model = tiny_detector().train()
    torch.manual_seed(1)
    corners = (torch.rand(5000, 4) * 60 + 1).tolist()
    objects = [[(x, y, w, h, i % 3) for i, (x, y, w, h) in enumerate(corners)]]
    found = []
    assign = atss.ATSSAssigner.__call__ if "__call__" in vars(atss.ATSSAssigner) else None
    name = "__call__" if assign else "forward"
    assign = assign or atss.ATSSAssigner.forward

    def recording(*args, **kwargs):
        found.append(assign(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(atss.ATSSAssigner, name, recording)
    assert fuzzing.check_step(model, objects) == "trained"
    num_anchors = 64 + 16 + 4 + 1 + 1
    assert 0 < int(found[0].is_positive.sum()) <= num_anchors
