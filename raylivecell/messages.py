"""Progress messages from training workers to the driver, through one actor: sent without waiting, read in batches."""

from typing import Any

import ray
from ray.actor import ActorHandle

Message = dict[str, Any]


class Mailbox:
    """Messages in the order of their arrival, until they are read once."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []

    def send(self, message: Message) -> None:
        """Add a message."""
        self.waiting.append(message)

    def read(self) -> list[Message]:
        """The messages since the last call."""
        messages, self.waiting = self.waiting, []
        return messages


def open_mailbox() -> ActorHandle:
    """A Mailbox as an actor that reserves no CPU; it ends with the driver."""
    actor: Any = ray.remote(num_cpus=0)(Mailbox)
    handle: ActorHandle = actor.remote()
    return handle
