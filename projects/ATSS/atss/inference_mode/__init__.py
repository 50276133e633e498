"""Preparation of a trained model for fast inference."""

from .prepare import inference_dtype, prepare_as_configured, prepare_for_inference

__all__ = ["inference_dtype", "prepare_as_configured", "prepare_for_inference"]
