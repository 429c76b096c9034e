"""The keys that all targets have in common, and what a target declares about its machines."""

from __future__ import annotations

import os
import re
from typing import Annotated, ClassVar, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from job.exits import BadRequestError
from job.jobs.prices import Hourly
from job.jobs.spec import JobSpec
from job.stop import SPOT_GRACE_SECONDS
from job.store import KINDS, check_uri

_SECRET = re.compile(
    r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!IZ)|PWD|KEYS?(_|$)|SAS_|CONNECTION_STRING|FSSPEC_[A-Z0-9]+$|FSSPEC_\w*(KWARGS|HEADERS|PASS)"
)
_NO_SECRET = re.compile("|".join([r"\w+_(FILE|PATH|DIR)|(OLD)?PWD", *(name for kind in KINDS for name in kind.files)]))
"""The names that look like those of secrets, and hold a path."""


def _not_secret(variable: str) -> str:
    if _SECRET.search(variable) and not _NO_SECRET.fullmatch(variable):
        raise ValueError(f"{variable} looks like a secret, which lists would show: use the job's service account")
    return variable


def _uri(text: str) -> str:
    try:
        check_uri(text)
    except BadRequestError as error:
        raise ValueError(str(error)) from None
    return text


Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Image = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,400})?$")]
Word = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@,=-]{0,400})?$")]
"""Part of a command or of a path: neither an option nor the path of another place."""
_Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$"), AfterValidator(_not_secret)]


class Terms(NamedTuple):
    """The facts about a job on a target that a person reads before it is sent.

    Attributes:
        machine: the type of its machines.
        place: where they are.
        limit: what `max_hours` count for, and who ends the job then.
        attempts: how often these hours may pass; None without bound.
        margin: what a job costs beside them.
        kind: whether its machines may be taken away, if `spot` does not tell.
    """

    machine: str
    place: tuple[str, ...]
    limit: str
    attempts: int | None = 1
    margin: str = "; machines that start or go cost some minutes more"
    kind: str = ""


class Target(BaseModel):
    """A place for jobs, as `targets.yaml` describes it. Each backend has a subclass with keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    is_remote: ClassVar[bool] = True
    """Whether its jobs run on other machines."""
    is_in_place: ClassVar[bool] = False
    """Whether its jobs have the files, libraries and variables of this program."""
    has_groups: ClassVar[bool] = False
    """Whether several of its machines can train together."""
    limits_attempts: ClassVar[bool] = False
    """Whether `max_hours` end one attempt, after which the engine itself begins the next."""
    is_expected: ClassVar[bool] = True
    """Whether a list of all jobs reports that its engine does not answer."""

    name: str = Field("", pattern=r"^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Its key in the file."""
    backend: str
    image: Image = ""
    """By tag, `REGISTRY/NAME:TAG`, or by digest, `REGISTRY/NAME@sha256:…`."""
    bucket: Annotated[str, AfterValidator(_uri)] = ""
    """Where datasets and runs lie, unless `--bucket` or `DDPM_BUCKET` says otherwise."""
    gpus: int = Field(1, ge=0, le=64)
    """Per node, unless `--gpus` says otherwise."""
    gpu_type: LabelValue = ""
    spot: bool = True
    max_hours: float = Field(24.0, ge=0.017, le=720)
    price_per_hour: float | None = Field(None, ge=0)
    """In dollars, of one machine with all its GPUs, as the user pays it."""
    preempted_every_hours: float | None = Field(None, gt=0, le=1e6)
    """The mean time between two interruptions of one of its machines, as the user knows it."""
    env: dict[_Variable, str] = Field(default_factory=dict)
    """Variables of the job, without secrets, because lists and logs show them."""

    @property
    def software(self) -> str:
        """Returns where its machines find the program: the image, or what stands for one."""
        return self.image

    @property
    def has_files(self) -> bool:
        """Returns whether its machines have the files of this one, at the same paths."""
        return not self.is_remote

    @property
    def usual_bucket(self) -> str:
        """Returns the bucket of a command without `--bucket`: `DDPM_BUCKET`, else the target's, else ./bucket."""
        return os.environ.get("DDPM_BUCKET", "") or self.bucket or "./bucket"

    @property
    def notice_seconds(self) -> float:
        """Returns the time between the notice that a machine is taken away and its end."""
        return SPOT_GRACE_SECONDS

    @property
    def selects_machines(self) -> bool:
        """Returns whether the GPU type and `spot` decide about the machine."""
        return True

    def terms(self, spec: JobSpec) -> Terms:
        """Returns the facts about a job on a remote target."""
        raise NotImplementedError

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine by the table that comes with the program; None if it is unknown."""
        return None

    def hourly(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine: the target's own wins."""
        return (
            self.list_price(spec) if self.price_per_hour is None else Hourly(self.price_per_hour, "as the target says")
        )

    def dollars_per_hour(self, spec: JobSpec) -> float | None:
        """Returns the highest price of all machines of a job together; None if it is unknown."""
        hourly = self.hourly(spec)
        return spec.machines * hourly.dollars if hourly and not hourly.unknown else None
