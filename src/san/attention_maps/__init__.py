"""What a pixel attends to: weights, places and values of any attention layer, how far layers look, roll-out, Grad-CAM.

`observe` runs a network once and keeps each attention layer's query, key and value; everything else follows from these.
Weights α are recomputed through the reference formulas, band by band, so no fast path has to keep them and it does not
matter which backend ran. `explain` does all of it for one image; `san.attention_maps.figures` draws it (matplotlib).
A pixel is always (x, y) of the network's input, as it is preprocessed: x to the right, y down, from 0.
"""

from __future__ import annotations

from san.attention_maps.evidence import grad_cam
from san.attention_maps.explanation import Explanation, explain, prepare_image, shown_image
from san.attention_maps.extent import EffectiveFootprint, effective_footprint
from san.attention_maps.observation import ObservedLayer, attention_layers, observe
from san.attention_maps.propagation import middle_rollout, rollout
from san.attention_maps.weights import PixelAttention, attention_weights, pixel_attention

__all__ = [
    "EffectiveFootprint",
    "Explanation",
    "ObservedLayer",
    "PixelAttention",
    "attention_layers",
    "attention_weights",
    "effective_footprint",
    "explain",
    "grad_cam",
    "middle_rollout",
    "observe",
    "pixel_attention",
    "prepare_image",
    "rollout",
    "shown_image",
]
