"""From the raw output of the head to detections or proposals."""

from .detections import DetectionSelector
from .proposals import ProposalSelector
from .selection import Detections, SelectionInputs

__all__ = ["DetectionSelector", "Detections", "ProposalSelector", "SelectionInputs"]
