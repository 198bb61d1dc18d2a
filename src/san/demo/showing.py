"""From the values of the page's controls to what it shows: the page without gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from san.demo.answers import Changed, Taken, attend, change, in_turn, prepare, take
from san.demo.networks import Network
from san.demo.panel import draw_panel
from san.demo.samples import Sample, samples_for
from san.demo.uploads import read_upload

__all__ = ["MEAN", "Controls", "Look", "Picture", "Showing", "group_name"]

MEAN = "mean of all"
"""The choice among weight groups that is none of them."""


@dataclass(frozen=True)
class Picture:
    """What a visitor looks at: its name, and it as each network takes it, normalised, by the network's name."""

    name: str
    prepared: dict[str, Tensor]


@dataclass(frozen=True)
class Controls:
    """What is chosen for one network.

    Args:
        network: Its name.
        degrees: Turn the picture clockwise by so much.
        strength: Of the attack, for pixels from 0 to 255.
        point: Of the pixel to look at, from the left and the top, as parts of the picture.
        layer: In which attention layer; of one that the network lacks, its `first_layer` instead.
        group: `MEAN`, or what `group_name` gives.
    """

    network: str
    degrees: float = 0.0
    strength: float = 0.0
    point: tuple[float, float] = (0.5, 0.5)
    layer: str | None = None
    group: str = MEAN


@dataclass(frozen=True)
class Look:
    """What is known of a picture for one network, by its name, kept so that a click computes only what it changes."""

    network: str
    taken: Taken
    changed: Changed


class Showing:
    """The networks and samples of a page, and what it shows of them; any number of threads may ask."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self.networks = {network.name: network for network in networks}
        self.samples: list[Sample] = samples_for(networks[0].words)

    def sample(self, number: int) -> Picture:
        """A sample for all networks."""
        sample = self.samples[number]
        return self._picture(sample.name, sample.image)

    def upload(self, path: str | Path) -> Picture:
        """An uploaded file for all networks; `UserError` as `read_upload`."""
        return self._picture(Path(path).name, in_turn(read_upload, path))

    def _picture(self, name: str, image: Image.Image) -> Picture:
        return Picture(name, {key: in_turn(prepare, each, image) for key, each in self.networks.items()})

    def take(self, picture: Picture, controls: Controls) -> Look:
        """Look at another picture, or with another network."""
        taken = in_turn(take, self.networks[controls.network], picture.prepared[controls.network])
        return self._look(controls.network, taken, controls)

    def change(self, look: Look, controls: Controls) -> Look:
        """Turn and attack the same picture otherwise."""
        return self._look(look.network, look.taken, controls)

    def _look(self, name: str, taken: Taken, controls: Controls) -> Look:
        changed = in_turn(change, self.networks[name], taken, controls.degrees, controls.strength)
        return Look(name, taken, changed)

    def draw(self, look: Look, controls: Controls) -> str:
        """All that is shown of it, as HTML.

        The look says by which network: the one in `controls` may be chosen already and still wait for its turn. Layer
        and group may be another network's then.
        """
        network = self.networks[look.network]
        layer = controls.layer if controls.layer in network.groups else network.first_layer
        attention = None if layer is None else in_turn(attend, network, look.changed, controls.point, layer)
        numbers = {group_name(number): number for number in range(network.groups.get(layer or "", 0))}
        return draw_panel(network, look.taken, look.changed, controls.point, attention, numbers.get(controls.group))

    def layers(self, name: str) -> list[str]:
        """The attention layers of a network, in order."""
        return list(self.networks[name].groups)

    def groups(self, name: str, layer: str | None) -> list[str]:
        """What can be chosen among a layer's weight groups."""
        return [MEAN, *map(group_name, range(self.networks[name].groups.get(layer or "", 0)))]


def group_name(number: int) -> str:
    """What a weight group is called among the choices."""
    return f"group {number}"
