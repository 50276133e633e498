"""Silence of warnings that a user of the tools cannot act on; imported first, by workers too."""

import warnings

warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|detectron2|fvcore)\.")
warnings.filterwarnings("ignore", "Creating a tensor from a list of numpy", UserWarning)
