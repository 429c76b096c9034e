"""The networks: the section `model` for each kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from job.config.fields import LARGEST, Counts, Mults, Section


class NetworkConfig(Section):
    """What all networks have."""

    kind: str
    num_classes: int | None = Field(None, ge=0, le=LARGEST, description="follows the dataset; 0: unconditional")
    label_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the images that are learnt without their class, for guidance"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep less in memory and compute more, for larger batches or images; the same to the bit"
    )

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""


_CHANNELS = "width of the first level, before its multiplier"
_MULTS = "one multiplier for each level; every level halves the size"
_ATTENTION = "pixels; levels of these sizes have attention"
_LAYERS = "residual blocks of a level on the way down"
_DROPOUT = "probability, within the residual blocks"


class UNetConfig(NetworkConfig):
    """The U-Net of Ho et al. (2020), appendix B; with its switches that of Dhariwal & Nichol (2021)."""

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=4, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 2, 2), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16,), description=_ATTENTION)
    layers_per_level: int = Field(2, ge=1, le=64, description=_LAYERS)
    norm_groups: int = Field(32, ge=1, le=LARGEST, description="of the group normalisations")
    heads: int = Field(1, ge=1, le=LARGEST, description="of the attention")
    head_channels: int | None = Field(None, ge=1, le=LARGEST, description="width of a head, in the place of heads")
    scale_shift: bool = Field(False, description="the timestep scales as well as shifts")
    resample_in_blocks: bool = Field(False, description="residual blocks change the size, and not convolutions")
    conventions: Literal["ho", "diffusers"] = Field(
        "ho", description="diffusers: its defaults for the timestep's sinusoids, the norms and the padding"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        _check_halvings(size, len(self.channel_mults) - 1)
        if self.channels % self.norm_groups:
            raise ValueError(
                f"model.channels={self.channels} cannot be split into model.norm_groups={self.norm_groups} groups"
            )
        if self.channels % 2:
            raise ValueError(f"model.channels={self.channels} must be even, for sines and cosines of the timestep")
        key = "head_channels" if self.head_channels else "heads"
        _check_heads(self, size, self.head_channels or self.heads, f"model.{key}={self.head_channels or self.heads}")


class EDM2Config(NetworkConfig):
    """The magnitude-preserving U-Net of Karras et al. (2024), configuration G; by default EDM2-S."""

    kind: Literal["edm2"] = "edm2"
    channels: int = Field(192, ge=1, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 3, 4), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16, 8), description=_ATTENTION)
    layers_per_level: int = Field(3, ge=1, le=64, description=_LAYERS)
    head_channels: int = Field(64, ge=1, le=LARGEST, description="width of a head of the attention")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    uncertainty: bool = Field(False, description="learn which error to expect at each noise level, and weigh by it")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        _check_halvings(size, len(self.channel_mults) - 1)
        _check_heads(self, size, self.head_channels, f"model.head_channels={self.head_channels}")


class DiTConfig(NetworkConfig):
    """The transformer of Peebles & Xie (2023); by default DiT-S/2."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, ge=1, le=LARGEST, description="pixels")
    width: int = Field(384, ge=4, le=65536, description="channels of a patch")
    depth: int = Field(12, ge=1, le=1024, description="blocks")
    heads: int = Field(6, ge=1, le=LARGEST, description="of the attention")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    qk_norm: bool = Field(False, description="RMSNorm, with a learnt scale, of queries and keys")
    rms_norm: bool = Field(False, description="RMSNorm in the place of layer normalisation")
    rope: bool = Field(False, description="rotary embedding of rows and columns in the attention")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        if (size or 0) % self.patch_size:
            raise ValueError(f"data.size={size} is not a multiple of model.patch_size={self.patch_size}: change one")
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} cannot be split into model.heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be a multiple of 4, for sines and cosines of two axes")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"model.rope: model.width={self.width} / model.heads={self.heads} must be a multiple of 4")


class DomeConfig(NetworkConfig):
    """The U-Net of dome272's and ErenGurs' ddpm."""

    kind: Literal["dome"] = "dome"
    dropout: ClassVar[float] = 0.0

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        if (size or 0) % 8:
            raise ValueError(f"data.size={size} cannot be halved 3 times, as model.kind=dome does: use a multiple of 8")


Network = Annotated[UNetConfig | EDM2Config | DiTConfig | DomeConfig, Field(discriminator="kind")]
NETWORKS: dict[str, type[NetworkConfig]] = {
    "unet": UNetConfig,
    "edm2": EDM2Config,
    "dit": DiTConfig,
    "dome": DomeConfig,
}


def _check_halvings(size: int | None, halvings: int) -> None:
    # Without a size yet, any will do.
    if (size or 0) % 2**halvings:
        raise ValueError(
            f"data.size={size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.channel_mults need: pack at a multiple of {2**halvings}, or use fewer levels"
        )


def _check_heads(model: UNetConfig | EDM2Config, size: int | None, divisor: int, said: str) -> None:
    widths = [model.channels * mult for mult in model.channel_mults]
    has_attention = [(size or 0) / 2**level in model.attention_sizes for level in range(len(widths))]
    for width in [*(width for width, has in zip(widths, has_attention, strict=True) if has), widths[-1]]:
        if width % divisor:
            raise ValueError(f"{width} channels, as the attention has, cannot be split into heads by {said}")
