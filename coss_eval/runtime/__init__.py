"""The machine beneath: devices, threads, disk, memory, and what a run was made with."""
