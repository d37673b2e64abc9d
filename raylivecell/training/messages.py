"""Progress messages from training workers to the driver through an actor: sent without waiting, read in batches."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Message = dict[str, Any]


class Mailbox:
    """A queue of messages in order of arrival."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []

    def send(self, message: Message) -> None:
        """Add a message."""
        self.waiting.append(message)

    def read(self) -> list[Message]:
        """Remove and return all messages."""
        messages, self.waiting = self.waiting, []
        return messages


def open_mailbox() -> ActorHandle:
    """Start a Mailbox actor that reserves no CPU and ends with the driver.

    It runs on the driver's node, so that draining or losing another node does not end it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its annotations lack this strategy
    handle: ActorHandle = remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    return handle
