"""The section `model` of each kind of network, from the catalogue."""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ddpm import catalogue
from job.config.fields import Settings

NETWORKS: dict[str, Any] = {
    kind: type(options.__name__, (Settings, options), {"__doc__": options.__doc__, "__module__": __name__})
    for kind, options in catalogue.NETWORKS.items()
}
# A pickled configuration names the class of its section.
globals().update({section.__name__: section for section in NETWORKS.values()})
if TYPE_CHECKING:
    Network = catalogue.Network
else:
    Network = Annotated[reduce(operator.or_, NETWORKS.values()), Field(discriminator="kind")]
