"""From the raw output of the head to detections or proposals."""

from .proposals import ProposalSelector

__all__ = ["ProposalSelector"]
