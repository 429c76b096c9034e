"""The section `model` of each kind of network, from the catalogue."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ddpm import catalogue
from job.config.fields import Settings


class UNetSection(Settings, catalogue.UNetConfig):
    """The section `model` of a U-Net."""


class EDM2Section(Settings, catalogue.EDM2Config):
    """The section `model` of EDM2."""


class DiTSection(Settings, catalogue.DiTConfig):
    """The section `model` of a transformer."""


class DomeUNetSection(Settings, catalogue.DomeUNetConfig):
    """The section `model` of dome's U-Net."""


NETWORKS = {"unet": UNetSection, "edm2": EDM2Section, "dit": DiTSection, "dome": DomeUNetSection}
Network = Annotated[UNetSection | EDM2Section | DiTSection | DomeUNetSection, Field(discriminator="kind")]
