"""The section `model` of each kind of network."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from job.config.fields import LARGEST, Counts, Mults, Section


class NetworkConfig(Section):
    """The settings that all networks share."""

    kind: str
    num_classes: int | None = Field(None, ge=0, le=LARGEST, description="null: as in the dataset; 0: unconditional")
    label_dropout: float = Field(0.0, ge=0, lt=1, description="share of images trained without class, for guidance")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower, same result")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot be built for images of this size; None stands for any size."""


_CHANNELS = "channels of the first level, before its multiplier"
_MULTS = "channel multiplier of each level; each level halves the size of the one before"
_ATTENTION = "sizes of the levels that have attention, in pixels"
_LAYERS = "residual blocks per level of the encoder"
_HEAD_CHANNELS = "channels of each attention head"
_DROPOUT = "dropout probability in each block"


class UNetConfig(NetworkConfig):
    """The U-Net of Ho et al. (2020), appendix B; with its switches that of Dhariwal & Nichol (2021)."""

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=4, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 2, 2), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16,), description=_ATTENTION)
    layers_per_level: int = Field(2, ge=1, le=64, description=_LAYERS)
    norm_groups: int = Field(32, ge=1, le=LARGEST, description="groups of each group normalisation")
    heads: int = Field(1, ge=1, le=LARGEST, description="attention heads")
    head_channels: int | None = Field(None, ge=1, le=LARGEST, description=f"{_HEAD_CHANNELS}; replaces heads")
    scale_shift: bool = Field(False, description="the timestep scales the features as well as shifting them")
    resample_in_blocks: bool = Field(False, description="residual blocks change the size, instead of convolutions")
    conventions: Literal["ho", "diffusers"] = Field("ho", description="timestep embedding, norms and padding")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot be built for images of this size; None stands for any size."""
        _check_halvings(size, len(self.channel_mults) - 1)
        if self.channels % self.norm_groups:
            raise ValueError(
                f"model.channels={self.channels} cannot be split into model.norm_groups={self.norm_groups} groups"
            )
        if self.channels % 2:
            raise ValueError(f"model.channels={self.channels} must be even, for sines and cosines of the timestep")
        _check_heads(self, size, "head_channels" if self.head_channels else "heads")


class EDM2Config(NetworkConfig):
    """The magnitude-preserving U-Net of Karras et al. (2024), configuration G; by default EDM2-S."""

    kind: Literal["edm2"] = "edm2"
    channels: int = Field(192, ge=1, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 3, 4), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16, 8), description=_ATTENTION)
    layers_per_level: int = Field(3, ge=1, le=64, description=_LAYERS)
    head_channels: int = Field(64, ge=1, le=LARGEST, description=_HEAD_CHANNELS)
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    uncertainty: bool = Field(False, description="learn the expected error at each noise level; it weights the loss")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot be built for images of this size; None stands for any size."""
        _check_halvings(size, len(self.channel_mults) - 1)
        _check_heads(self, size, "head_channels")


class DiTConfig(NetworkConfig):
    """The transformer of Peebles & Xie (2023); by default DiT-S/2."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, ge=1, le=LARGEST, description="height and width of a patch, in pixels")
    width: int = Field(384, ge=4, le=65536, description="channels of the embedding of a patch")
    depth: int = Field(12, ge=1, le=1024, description="number of transformer blocks")
    heads: int = Field(6, ge=1, le=LARGEST, description="attention heads")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, with a learnt scale")
    rms_norm: bool = Field(False, description="RMSNorm instead of layer normalisation")
    rope: bool = Field(False, description="rotary embedding of rows and columns in the attention")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot be built for images of this size; None stands for any size."""
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
        """Raises ValueError if the network cannot be built for images of this size; None stands for any size."""
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
    if (size or 0) % 2**halvings:
        raise ValueError(
            f"data.size={size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.channel_mults need: pack at a multiple of {2**halvings}, or use fewer levels"
        )


def _check_heads(model: UNetConfig | EDM2Config, size: int | None, key: str) -> None:
    """Raises ValueError if the attention's channels cannot be split as `key` says; the last level has attention."""
    divisor, last = getattr(model, key), len(model.channel_mults) - 1
    for level, mult in enumerate(model.channel_mults):
        width, has_attention = model.channels * mult, level == last or (size or 0) / 2**level in model.attention_sizes
        if has_attention and width % divisor:
            raise ValueError(f"attention with {width} channels cannot be split into heads by model.{key}={divisor}")
