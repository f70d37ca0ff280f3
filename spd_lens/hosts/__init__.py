"""Hosts: the only part of spd_lens that knows how TransformerLens models are built.

`open_host(model)` finds the right one by what the model offers, never by importing a class that one of the two
supported TransformerLens majors does not have."""

from spd_lens.hosts.bridge import BridgeHost
from spd_lens.hosts.declared import DeclaredHost, DeclaredSite
from spd_lens.hosts.hooked import HookedHost
from spd_lens.hosts.host import Host
from spd_lens.hosts.model_description import ModelDescription
from spd_lens.hosts.opening import open_host
from spd_lens.hosts.provenance import Provenance
from spd_lens.hosts.revisions import note_revision
from spd_lens.hosts.site import POINT_SUFFIXES, ModuleInput, PointOutput, Site, StoredMatrix, match_sites

__all__ = [
    "POINT_SUFFIXES",
    "BridgeHost",
    "DeclaredHost",
    "DeclaredSite",
    "HookedHost",
    "Host",
    "ModelDescription",
    "ModuleInput",
    "PointOutput",
    "Provenance",
    "Site",
    "StoredMatrix",
    "match_sites",
    "note_revision",
    "open_host",
]
