"""Settings of the service, as arguments of `application.build` in a Serve config file."""

import hashlib
import os

from pydantic import Field, model_validator

from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel

TOKEN_VARIABLE = "RAYLIVECELL_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 32
"""Characters: shorter ones can be guessed, and found from their hash."""


class ServeSettings(StrictModel):
    """What a service segments with, its size and its limits."""

    checkpoint: str
    """A run, a checkpoint or an .onnx file; a path or URI that every machine of the cluster can read."""
    min_replicas: int = Field(1, ge=1)
    """Processes with the network that always run."""
    max_replicas: int = Field(1, ge=1)
    """Processes with the network under load; as many segment, encode and decode."""
    network_cpus: float = Field(1.0, gt=0)
    """CPUs reserved for a process with the network; its threads too."""
    network_gpus: float = Field(0.0, ge=0)
    """GPUs reserved for a process with the network."""
    batch_size: int = Field(8, ge=1)
    """Images of equal size that pass the network together, at most."""
    require_token: bool = True
    """Refuse requests without the token; False is for 127.0.0.1 alone."""
    token_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the token; default: that of the environment variable RAYLIVECELL_SERVE_TOKEN on the machine."""
    max_request_mib: float = Field(512, gt=0)
    """Larger requests are refused (413)."""
    max_files: int = Field(256, ge=1)
    """Requests with more files are refused (413)."""
    max_queue: int = Field(256, ge=1)
    """Files in work or waiting; further requests are refused (429)."""
    max_queue_mib: float = Field(2048, gt=0)
    """Bytes of the files in work or waiting; further requests are refused (429)."""
    timeout_s: float = Field(600, gt=0)
    """A request that takes longer is given up (503)."""
    cache_mib: float = Field(256, ge=0)
    """Memory of a segmenting process for the maps of recent images: other thresholds need no network."""

    @model_validator(mode="after")
    def _check(self) -> "ServeSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if self.max_queue < self.max_files:
            raise ValueError(f"max_queue {self.max_queue} is below max_files {self.max_files}: such requests never fit")
        return self


def token_hash(token: str) -> str:
    """SHA-256 of a token, in hexadecimal; UserError if it is short or contains spaces."""
    if (
        len(token) < MIN_TOKEN_LENGTH
        or not token.isascii()
        or any(not 32 < ord(character) < 127 for character in token)
    ):
        raise UserError(
            f"{TOKEN_VARIABLE} is not a token: {MIN_TOKEN_LENGTH} or more letters and digits, such as the output of "
            "`openssl rand -hex 32`"
        )
    return hashlib.sha256(token.encode()).hexdigest()


def required_hash(settings: ServeSettings) -> str | None:
    """SHA-256 of the token that requests must have; None: none. UserError if one is required and there is none."""
    if not settings.require_token:
        return None
    if settings.token_sha256:
        return settings.token_sha256
    if token := os.environ.get(TOKEN_VARIABLE):
        return token_hash(token)
    raise UserError(
        f"this service needs a token: set {TOKEN_VARIABLE}, such as to the output of `openssl rand -hex 32`"
    )
