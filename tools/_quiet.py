"""Silence of warnings that a user of the tools cannot act on; imported first, by workers too."""

import warnings

_MODULES = r"(atss|detectron2|fvcore|torch)\."  # atss: for arguments that torch 2.0 needs
warnings.filterwarnings("ignore", category=FutureWarning, module=_MODULES)
warnings.filterwarnings("ignore", "Creating a tensor from a list of numpy", UserWarning)
