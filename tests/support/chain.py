"""What must hold of a registry's history, whoever wrote it and however they fared."""

from collections.abc import Sequence

from torchrec_cce.maps.journal import RegistryState


def broken_links(history: Sequence[RegistryState]) -> list[str]:
    """Where a step does not follow from the record before it; empty for a good history, oldest record first."""
    broken = []
    for before, after in zip((RegistryState(), *history), history, strict=False):
        published = after.action == "publish"
        newest = after.versions[-1] if after.versions else None
        links = {
            "sequence": after.sequence == before.sequence + 1,
            "next_version": after.next_version == before.next_version + published,
            "current": after.current in {one.version for one in after.versions},
            "numbers": all(one.version < after.next_version for one in after.versions),
        }
        if published:
            links |= {
                "number": after.subject == after.current == before.next_version,
                "entry": newest is not None and newest.version == after.subject,
                "parent": newest is not None and newest.parent == before.current,
                "versions": after.versions[:-1] == before.versions,
            }
        elif after.action == "collect":
            links["versions"] = set(after.versions) <= set(before.versions) and after.current == before.current
        elif after.action == "rollback":
            links["versions"] = after.versions == before.versions and after.current == after.subject
        else:
            links["versions"] = len(after.versions) == len(before.versions) and after.current == before.current
        broken += [f"record {after.sequence} ({after.action}): {name}" for name, good in links.items() if not good]
    return broken
