"""Sites of a `TransformerBridge` (TransformerLens 3.9 and 4.x). In work."""

from __future__ import annotations

from spd_lens.hosts.site import Host, Provenance, Site


class BridgeHost(Host):
    """A TransformerBridge."""

    def site_names(self) -> list[str]:
        raise ValueError("TransformerBridge is not supported yet")

    def site(self, name: str) -> Site:
        raise ValueError("TransformerBridge is not supported yet")

    def provenance(self) -> Provenance:
        raise ValueError("TransformerBridge is not supported yet")
