"""The size of images: people say width × height, tensors have the height first."""

from __future__ import annotations

import re
from dataclasses import dataclass

TEXT = r"(\d{1,18})(?:x(\d{1,18}))?"
"""The pattern of a size: a side, or width and height."""


@dataclass(frozen=True, order=True)
class ImageSize:
    """Height and width in pixels, or of latents. Its text is `64` for a square, else width × height: `96x64`."""

    height: int
    width: int

    @classmethod
    def of(cls, stated: object) -> ImageSize:
        """Returns the size that a text such as `64` or `96x64` states, or one number for both sides.

        Raises:
            ValueError: it states none.
        """
        if isinstance(stated, ImageSize):
            return stated
        match = re.fullmatch(TEXT, str(stated), re.ASCII)
        if match is None:
            raise ValueError("write 64 for a square, or width x height such as 96x64")
        return cls(int(match[2] or match[1]), int(match[1]))

    def __str__(self) -> str:
        return str(self.stated)

    @property
    def stated(self) -> int | str:
        """The value that stands for it in files: a number for a square, else its text."""
        return self.width if self.is_square else f"{self.width}x{self.height}"

    @property
    def words(self) -> str:
        """Both sides, for people: `96×64`."""
        return f"{self.width}×{self.height}"

    @property
    def is_square(self) -> bool:
        """Whether both sides are equal."""
        return self.width == self.height

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, as in the shape of a tensor."""
        return self.height, self.width
