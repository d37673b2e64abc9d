"""Evaluate Kubernetes NetworkPolicies: the connections that a network enforcing them allows."""

import ipaddress
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kuberay import Doc


class Peer(NamedTuple):
    """A Pod (namespace and labels) or a host outside the cluster (address)."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012
    address: str = ""


def admits(docs: list[Doc], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies in `docs` let `source` open a connection to `target`."""
    return _side(docs, "Egress", source, target, port, protocol) and _side(
        docs, "Ingress", target, source, port, protocol
    )


def _side(docs: list[Doc], direction: str, own: Peer, other: Peer, port: int, protocol: str) -> bool:
    policies = [policy for policy in _policies(docs, own) if direction in policy["policyTypes"]]
    field, ends = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    rules = [rule for policy in policies for rule in policy.get(field, [])]
    return not policies or any(
        _port_matches(rule.get("ports"), port, protocol)
        and (not rule.get(ends) or any(_peer_matches(end, own, other) for end in rule[ends]))
        for rule in rules
    )


def _policies(docs: list[Doc], own: Peer) -> Iterator[Doc]:
    for doc in docs:
        in_namespace = doc["kind"] == "NetworkPolicy" and doc["metadata"]["namespace"] == own.namespace
        if in_namespace and _selects(doc["spec"]["podSelector"], own.labels):
            yield doc["spec"]


def _port_matches(ports: Iterable[Doc] | None, port: int, protocol: str) -> bool:
    return not ports or any(entry["port"] == port and entry.get("protocol", "TCP") == protocol for entry in ports)


def _peer_matches(end: Doc, own: Peer, other: Peer) -> bool:
    if "ipBlock" in end:
        network = ipaddress.ip_network(end["ipBlock"]["cidr"])
        return bool(other.address) and ipaddress.ip_address(other.address) in network
    if not other.namespace:
        return False
    if "namespaceSelector" in end:
        in_namespace = _selects(end["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        in_namespace = own.namespace == other.namespace
    return in_namespace and _selects(end.get("podSelector", {}), other.labels)


def _selects(selector: Doc, labels: dict[str, str]) -> bool:
    labels_match = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions), "other operators are not implemented"
    return labels_match and all(labels.get(expression["key"]) in expression["values"] for expression in expressions)
