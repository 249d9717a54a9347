"""moestro: understand, steer, shrink and save mixture-of-experts models."""

import moestro.models.lm  # noqa: F401  registers the native language model with transformers' AutoModel classes
from moestro.fitting.pipeline import fit
from moestro.view.edit import Edit, ForceOn, Gain, LogitBias, Replace, Reselect, SwitchOff
from moestro.view.open import ExpertView, open

__all__ = ["Edit", "ExpertView", "ForceOn", "Gain", "LogitBias", "Replace", "Reselect", "SwitchOff", "fit", "open"]
__version__ = "0.1.0"
