"""The corpus: nouns, sources, fetching, storage, shards and versions. Never imports bpy, torch or ray."""

SCHEMA = 1
"""Version of everything written to storage: samples, receipts, plans, manifests, versions."""
