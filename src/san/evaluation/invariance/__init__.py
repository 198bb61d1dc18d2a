"""What attention is invariant to, and what it can represent: the paper's theory, to be run and measured.

`measure` does it all for trained networks, side by side: `measure_operators` looks at each attention layer and
convolution alone, where some equalities are exact by construction (`PROPERTIES` says which), and `measure_network` at
what a whole network makes of altered images (`VIEWS`). `patchwise_from_convolution` is the construction by which
patchwise attention computes a given convolution, `relabel_groups` the one by which weight groups change their numbers.
Claims of the paper's sections 3.1 and 3.2; the statements are in docs/theory.md.
"""

from __future__ import annotations

from san.evaluation.invariance.convolution import patchwise_from_convolution
from san.evaluation.invariance.groups import permute_groups, relabel_groups
from san.evaluation.invariance.measuring import measure
from san.evaluation.invariance.networks import measure_network
from san.evaluation.invariance.operators import PROPERTIES, Property, measure_operators
from san.evaluation.invariance.views import VIEWS, View

__all__ = [
    "PROPERTIES",
    "VIEWS",
    "Property",
    "View",
    "measure",
    "measure_network",
    "measure_operators",
    "patchwise_from_convolution",
    "permute_groups",
    "relabel_groups",
]
