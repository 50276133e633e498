"""From the raw output of the head to detections or proposals."""

from .detections import DetectionSelector
from .eager import Detections
from .proposals import ProposalSelector

__all__ = ["DetectionSelector", "Detections", "ProposalSelector"]
