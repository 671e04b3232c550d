"""Programs that use shmcbw, to read and to copy."""
