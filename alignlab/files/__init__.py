"""Files that are whole or absent, their digests and locks, and named errors for what disks do."""
