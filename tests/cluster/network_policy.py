"""Kubernetes' NetworkPolicies as a network that enforces them reads them: may this one speak to that one?"""

import ipaddress
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kuberay import Doc


class Peer(NamedTuple):
    """A Pod by its namespace and labels, or what lies outside the cluster by its address."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012
    address: str = ""


def admits(docs: list[Doc], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies in `docs` let `source` open a connection to `target`."""
    return _side(docs, "Egress", source, target, port, protocol) and _side(
        docs, "Ingress", target, source, port, protocol
    )


def _side(docs: list[Doc], way: str, own: Peer, other: Peer, port: int, protocol: str) -> bool:
    policies = [one for one in _policies(docs, own) if way in one["policyTypes"]]
    field, ends = ("egress", "to") if way == "Egress" else ("ingress", "from")
    rules = [rule for policy in policies for rule in policy.get(field, [])]
    return not policies or any(
        _fits_port(rule.get("ports"), port, protocol)
        and (not rule.get(ends) or any(_fits_peer(end, own, other) for end in rule[ends]))
        for rule in rules
    )


def _policies(docs: list[Doc], own: Peer) -> Iterator[Doc]:
    for doc in docs:
        here = doc["kind"] == "NetworkPolicy" and doc["metadata"]["namespace"] == own.namespace
        if here and _selects(doc["spec"]["podSelector"], own.labels):
            yield doc["spec"]


def _fits_port(ports: Iterable[Doc] | None, port: int, protocol: str) -> bool:
    return not ports or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports)


def _fits_peer(end: Doc, own: Peer, other: Peer) -> bool:
    if "ipBlock" in end:
        network = ipaddress.ip_network(end["ipBlock"]["cidr"])
        return bool(other.address) and ipaddress.ip_address(other.address) in network
    if not other.namespace:
        return False
    if "namespaceSelector" in end:
        at_home = _selects(end["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        at_home = own.namespace == other.namespace
    return at_home and _selects(end.get("podSelector", {}), other.labels)


def _selects(selector: Doc, labels: dict[str, str]) -> bool:
    same = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    rest = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in rest), "no other operator is used"
    return same and all(labels.get(one["key"]) in one["values"] for one in rest)
