"""The learner's own word, which came another way, on what each version is."""

from __future__ import annotations

from orz_async.errors import WireError

_KEPT = 16


class Digests:
    """Digests of the newest versions, from the broker. Whoever hands out weights is held to them."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Something is known: from now on whoever is not the learner itself needs a digest to be believed."""
        return bool(self._known)

    def learn(self, version: int, digest: str) -> None:
        """ "" teaches nothing."""
        if digest:
            self._known[version] = digest
            while len(self._known) > _KEPT:
                del self._known[min(self._known)]

    def get(self, version: int) -> str | None:
        return self._known.get(version)

    def require(self, version: int, digest: str, peer: str) -> None:
        """Raise WireError if this is not the version the learner published. Unknown versions pass."""
        expected = self._known.get(version, digest)
        if digest != expected:
            raise WireError(
                f"{peer} offers version {version} with digest {digest[:16]!r}, the learner published {expected!r}"
            )
