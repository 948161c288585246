"""See `alignlab.atomic_files`."""

from alignlab.atomic_files import READ_BYTES, publish, sha256_of, sync_file, write_atomically

__all__ = ["READ_BYTES", "publish", "sha256_of", "sync_file", "write_atomically"]
