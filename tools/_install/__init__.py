"""Helpers of install_detectron2.py."""
