"""Content-addressed results of stages: a result is computed once and then read.

The key of a stage is the sha256 of canonical JSON over its kind, version, settings, seed and the keys or fingerprints
of its inputs; it excludes paths, labels and devices. A result is written to a temporary sibling folder, synced, and
renamed into place together with a manifest that lists every file's size and sha256. A rename never replaces an
existing result, so publishing is idempotent: correctness rests on that alone, and locks only save work. Every read
verifies; a damaged entry is set aside, not deleted.

On disk: ``<root>/<kind>/<first 16 digits of the key>/{manifest.json, files}``, and beside the kinds ``scratch/``
(checkpoints of unfinished stages), ``damaged/``, ``locks/`` (also records of use) and ``fingerprints.json`` (hashes of
unchanged files). A manifest's modification time is the time of its entry's last use.
"""

from deftx.cache.entry import Entry, Event, Workspace
from deftx.cache.files import file_sha256, fingerprint_files
from deftx.cache.keys import Stage, canonical_json
from deftx.cache.store import FINGERPRINTS, StageCache

__all__ = [
    "FINGERPRINTS",
    "Entry",
    "Event",
    "Stage",
    "StageCache",
    "Workspace",
    "canonical_json",
    "file_sha256",
    "fingerprint_files",
]
